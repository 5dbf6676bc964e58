"""Prompts that begin alike are computed once: the layout, and that the text does not depend on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_adapter, real_dialogues

from esjax import rows
from esjax.config import LoraSettings, SamplingSettings
from esjax.model.lora import lora_from
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.sample import generate
from esjax.sample.generate import Generator
from esjax.tokens.batches import LEAVES, Planted, plant
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

PROMPTS = st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=8)


@settings(deadline=None)
@given(PROMPTS, st.sampled_from([8, 9, 12]), st.sampled_from([1, 4]))
def test_every_leaf_sees_its_prompt_and_nothing_else(prompts: list[list[int]], batch: int, bucket: int) -> None:
    planted = plant(prompts, batch, bucket)
    b, m = planted.leaves.shape
    assert b * m == batch
    assert planted.rows.tokens.shape[0] == b
    assert planted.rows.tokens.shape[1] % bucket == 0
    assert len(set(planted.place)) == len(prompts)
    seen = rows.visible(planted.rows)
    for prompt, place in zip(prompts, planted.place, strict=True):
        r, leaf = place // m, planted.leaves.reshape(-1)[place]
        keys = np.flatnonzero(seen[r, leaf])
        assert planted.rows.tokens[r, keys].tolist() == prompt  # a trunk comes before its branches
        assert planted.rows.position[r, keys].tolist() == list(range(len(prompt)))
        assert planted.rows.segment[r, leaf] > 0
    assert planted.rows.tokens.size <= batch * -(-max(map(len, prompts)) // bucket) * bucket


def test_contexts_of_a_dialogue_share_a_row() -> None:
    dialogue = list(range(100, 180))
    prompts = [dialogue[:n] for n in (20, 40, 60, 80)] + [[7] * 70]
    planted = plant(prompts, 8, 1)
    assert planted.leaves.shape == (2, LEAVES)
    assert sorted(int((planted.rows.segment[r] > 0).sum()) for r in range(2)) == [
        70,
        83,
    ]  # a token more for each branch
    assert plant(prompts[:1], 8, 1).leaves.shape == (8, 1)
    assert plant(prompts, 7, 1).leaves.shape == (7, 1)  # no multiple of LEAVES


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, lora_from(LoraSettings(rank=4)), compute_dtype("float32"))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_text_does_not_depend_on_what_is_shared(
    tiny: Backbone, esconv: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real dialogues, all turns, of a tiny model with a random adapter: alone, and in batches of 3 and 16."""
    tokenizer = ChatTokenizer(tiny.folder)
    encoder = Encoder(tokenizer, 2048, "")
    adapter = random_adapter(tiny, 2, size=0.05)
    dialogues = real_dialogues(esconv)[:2]
    prompts = [tokenizer.prompt(encoder.context(d, t)) for d in dialogues for t in d.supporter_turns()][:16]
    seeds = [1000 + i for i in range(len(prompts))]
    how = SamplingSettings(temperature=temperature, max_tokens=16)

    def texts(batch: int) -> tuple[list[list[int]], list[float]]:
        generator = Generator(tiny, batch, tokenizer.end_of_turn)
        made = []
        for i in range(0, len(prompts), batch):
            made += generator.generate(adapter, prompts[i : i + batch], seeds[i : i + batch], how, 16)
        return [m.token_ids for m in made], [x for m in made for x in m.logprobs]

    laid_out: list[Planted] = []

    def watch(*arguments: Any) -> Planted:
        laid_out.append(plant(*arguments))
        return laid_out[-1]

    monkeypatch.setattr(generate, "plant", watch)
    ids, logprobs = texts(1)
    assert len({tuple(x) for x in ids}) >= 4  # a random model repeats itself when it is greedy
    for batch in (3, 16):
        same_ids, same_logprobs = texts(batch)
        assert same_ids == ids
        assert np.abs(np.subtract(same_logprobs, logprobs)).max() <= 1e-4
    assert any(p.leaves.shape[1] == LEAVES for p in laid_out)

    def early(*arguments: Any) -> Planted:
        planted = plant(*arguments)
        return planted._replace(leaves=np.maximum(planted.leaves - 1, 0))

    monkeypatch.setattr(generate, "plant", early)
    assert texts(16)[0] != ids


def test_nothing_is_lost_without_an_adapter(tiny_folder: Path) -> None:
    bare = load_backbone(tiny_folder, None, compute_dtype("float32"))
    generator = Generator(bare, 4, 1)
    stem = list(range(5, 60))
    prompts = [stem[:n] for n in (20, 30, 40, 55)]
    how = SamplingSettings(temperature=0, max_tokens=8)
    alone = [generator.generate(nnx.State({}), [p], [0], how, 8)[0].token_ids for p in prompts]
    assert [m.token_ids for m in generator.generate(nnx.State({}), prompts, [0] * 4, how, 8)] == alone
