"""The sampler with real weights on real contexts: transformers' text and distribution, busy lanes, reflections that parse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import context
from oracles import BARE, real_dialogues, torch_logits, torch_model
from scipy.stats import chisquare

from esjax.evolve.reflect import Instructions, form, parse
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.sample.constrain import START
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request
from esjax.sample.schedule import Completion, Usage
from esjax.settings.files import load
from esjax.settings.schema import SamplingSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

LANES = 16


@pytest.fixture(scope="module")
def smollm(smollm_folder: Path) -> Backbone:
    return load_backbone(smollm_folder, None, compute_dtype("float32"))


@pytest.fixture(scope="module")
def encoder(smollm_folder: Path) -> Encoder:
    return Encoder(ChatTokenizer(smollm_folder), 2048, "")


@pytest.fixture(scope="module")
def generator(smollm: Backbone, encoder: Encoder) -> Generator:
    """One for all tests, with room for all of them, so that programs are compiled once."""
    made = Generator(smollm, LANES, encoder.tokenizer.end_of_turn, lanes=2, slots=1280, new=128)
    made.usage = Usage()
    return made


def real_prompts(encoder: Encoder, esconv: Path, dialogues: int) -> list[list[int]]:
    """The contexts of all supporter turns."""
    chosen = real_dialogues(esconv)[:dialogues]
    return [encoder.tokenizer.prompt(context(encoder, d, t)) for d in chosen for t in d.supporter_turns()]


def continued(model: Any, prompt: list[int], count: int, end: int) -> list[int]:
    """transformers' own greedy text."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=end,
        pad_token_id=0,
        use_cache=True,
    )
    return made[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.slow
def test_forty_greedy_texts_are_transformers_token_for_token(
    smollm_folder: Path, encoder: Encoder, esconv: Path, generator: Generator
) -> None:
    """Prompts of mixed length, which share trunks and lanes, with natural stops."""
    prompts = real_prompts(encoder, esconv, 13)[::3][:40]
    assert len(prompts) == 40
    assert max(map(len, prompts)) > 8 * min(map(len, prompts))
    model, end = torch_model(smollm_folder), encoder.tokenizer.end_of_turn
    theirs = [continued(model, p, 48, end) for p in prompts]
    ours = [m.token_ids for m in generator.generate(BARE, prompts, [0] * 40, SamplingSettings(temperature=0), 48)]
    assert [i for i in range(40) if ours[i] != theirs[i]] == []
    assert {len(t) == 48 for t in ours} == {True, False}  # some stop, some do not
    other = [m.token_ids for m in generator.generate(BARE, prompts, [0] * 40, SamplingSettings(temperature=0.7), 48)]
    assert sum(a != b for a, b in zip(other, theirs, strict=True)) > 30  # control


@pytest.mark.slow
def test_sampled_tokens_follow_transformers_distribution(
    smollm_folder: Path, encoder: Encoder, esconv: Path, generator: Generator
) -> None:
    """Chi-squared, temperature and top-p on, of the first token of 6000 replies to one real context."""
    prompt, n, temperature, top_p = real_prompts(encoder, esconv, 1)[4], 6000, 0.9, 0.8
    how = SamplingSettings(temperature=temperature, top_p=top_p)
    made = generator.generate(BARE, [prompt] * n, range(n), how, 1)
    logits = torch_logits(torch_model(smollm_folder), prompt)[-1].astype(np.float64)
    counts = np.bincount([m.token_ids[0] for m in made], minlength=len(logits))

    def p_value(temperature: float, top_p: float) -> float:
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
        q = np.zeros_like(p)
        q[kept] = p[kept] / p[kept].sum()
        if counts[q == 0].any():
            return 0.0
        often = q * n >= 5
        observed, expected = [*counts[often], counts[~often].sum()], [*(q[often] * n), q[~often].sum() * n]
        if expected[-1] == 0:
            observed, expected = observed[:-1], expected[:-1]
        return float(chisquare(observed, np.asarray(expected) * n / np.sum(expected)).pvalue)

    right = p_value(temperature, top_p)
    print(f"p = {right:.3f} over {(counts > 0).sum()} tokens")
    assert (counts > 0).sum() > 10
    assert right > 1e-3
    assert p_value(1.1, top_p) < 1e-6  # controls
    assert p_value(temperature, 0.7) < 1e-6


@pytest.mark.slow
def test_lanes_stay_busy_on_real_contexts(encoder: Encoder, esconv: Path, generator: Generator) -> None:
    """All turns of twenty dialogues, natural stops."""
    prompts = real_prompts(encoder, esconv, 20)
    generator.usage = usage = Usage()
    made = generator.generate(BARE, prompts, range(len(prompts)), SamplingSettings(max_tokens=128), 128)
    lengths = [len(m.token_ids) for m in made]
    print(f"{len(prompts)} contexts, {sum(lengths)} tokens, {usage}")
    assert max(lengths) > 8 * min(lengths)
    assert usage.occupancy >= 0.85
    assert usage.computed_tokens < 0.25 * usage.prompt_tokens
    in_batches = sum(max(lengths[i : i + LANES]) * LANES for i in range(0, len(lengths), LANES))
    assert sum(lengths) / in_batches < 0.7  # control: what batches that wait for their longest would give


@pytest.mark.slow
def test_five_hundred_reflections_parse(encoder: Encoder, esconv: Path, smollm: Backbone, generator: Generator) -> None:
    """SmolLM2 at temperature 1, nothing cut off."""
    instructions = Instructions.load(load(None, []))
    template = form(encoder.tokenizer, 20, smollm.arch.vocab)
    chats = [context(encoder, d, t) for d in real_dialogues(esconv) for t in d.supporter_turns()[:4]][:500]
    prompts = [encoder.tokenizer.prompt(instructions.reflection_prompt(c)) for c in chats]
    texts: list[str] = []
    how = SamplingSettings(temperature=1.0, top_p=1.0)

    def requests(state: int, opening: list[int]) -> list[list[Request]]:
        most = template.max_tokens
        return generator.grouped([Request(i, [*p, *opening], i, how, most, state) for i, p in enumerate(prompts)])

    def done(request: Request, made: Completion) -> tuple[()]:
        texts.append(encoder.tokenizer.decode([*template.opening, *made.token_ids]))
        return ()

    def parses(text: str) -> bool:
        try:
            return len(parse(text)) == 3
        except ValueError:
            return False

    for state in (START, 0):
        generator.usage = usage = Usage()
        texts.clear()
        generator.work(BARE, requests(state, template.opening), done, template.automaton)
        good = sum(map(parses, texts))
        step = usage.decode_seconds / usage.steps * 1e3
        print(f"state {state}: {good} of {len(texts)} parse; {step:.1f} ms a step, {usage}")
        assert good == (500 if state == START else 0)  # control: without the constraint none does
