"""``esjax score`` on real ESConv chats with SmolLM2, against log_softmax of transformers' logits in float32.

The oracle tokenises by itself (the tokenizer's own chat template) and computes each chat alone, unpadded; the command
packs chats of mixed lengths into rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import BARE, real_dialogues, torch_logits, torch_logprobs, torch_model, worst
from transformers import AutoTokenizer

from esjax.cli import main
from esjax.corpus.dialogue import Message
from esjax.model.weights import load_backbone
from esjax.run.files import write_jsonl
from esjax.run.jsonl import read_jsonl
from esjax.sample.score import MOST_TOPS, tops

CHATS = 8
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def chats(esconv: Path) -> list[list[Message]]:
    """Eight dialogues, each up to its supporter's first, second, ... or fifth answer, so that lengths differ."""
    dialogues = real_dialogues(esconv)[16 : 16 + CHATS]
    return [d.messages(d.supporter_turns()[n % 5] + 1) for n, d in enumerate(dialogues)]


@pytest.fixture(scope="module")
def scored(
    chats: list[list[Message]], smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("score")
    write_jsonl(folder / "chats.jsonl", [{"id": f"chat-{i}", "messages": m} for i, m in enumerate(chats)])
    files = ["--data", str(folder / "chats.jsonl"), "--out", str(folder / "scores.jsonl")]
    main(["score", "--model", str(smollm_folder), *files])
    return read_jsonl(folder / "scores.jsonl")


@pytest.fixture(scope="module")
def expected(chats: list[list[Message]], smollm_folder: Path) -> list[tuple[list[int], np.ndarray, list[int]]]:
    """For each chat: the prompt's tokens, the log-probs of the reply's tokens, the reply's tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm_folder)
    model = torch_model(smollm_folder)
    out = []
    for messages in chats:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
        reply = whole[len(prompt) :]
        reply = reply[: reply.index(tokenizer.eos_token_id) + 1]
        assert tokenizer.decode(reply, skip_special_tokens=True).strip() == messages[-1]["content"]
        out.append((prompt, torch_logprobs(model, prompt, reply), reply))
    return out


def test_score_is_transformers_log_softmax(
    scored: list[dict[str, Any]], expected: list[tuple[list[int], np.ndarray, list[int]]]
) -> None:
    assert [row["id"] for row in scored] == [f"chat-{i}" for i in range(CHATS)]
    assert len({len(prompt) + len(reply) for prompt, _, reply in expected}) == CHATS  # mixed lengths
    assert sum(len(prompt) + len(reply) for prompt, _, reply in expected) < CHATS * 512 / 2  # so several share a row
    differences, shifted = [], []
    for row, (_, theirs, reply) in zip(scored, expected, strict=True):
        assert row["num_tokens"] == len(row["token_logprobs"]) == len(reply)
        assert row["logprob"] == pytest.approx(sum(row["token_logprobs"]), abs=1e-6)
        assert row["logprob"] == pytest.approx(float(theirs.sum()), abs=TOLERANCE * len(reply))
        differences.append(worst(row["token_logprobs"], theirs))
        shifted.append(worst(row["token_logprobs"][1:], theirs[:-1]))
    print(f"worst differences: {[f'{d:.1e}' for d in differences]}")
    assert max(differences) <= TOLERANCE
    assert min(shifted) > TOLERANCE  # one token off would not do, in any chat


@pytest.mark.parametrize(
    "lengths", [(40, 1, 300, 5), (700, 900, 40, 1000), (2100, 3)], ids=["a row", "rows", "a long one"]
)
def test_texts_that_share_rows_each_hear_what_is_likely(tiny_folder: Path, lengths: tuple[int, ...]) -> None:
    draw = np.random.default_rng(3)
    backbone, oracle = load_backbone(tiny_folder, None, np.dtype("float32")), torch_model(tiny_folder)
    texts = [draw.integers(2, backbone.arch.vocab, n).tolist() for n in lengths]
    wrong = []
    for text, made in zip(texts, tops(backbone, BARE, texts), strict=True):
        theirs = torch.log_softmax(torch.tensor(torch_logits(oracle, text)[:-1]), -1)
        assert made.ids.shape == made.top.shape == (len(text) - 1, MOST_TOPS)
        if len(text) == 1:
            continue
        assert worst(made.logprobs, theirs.gather(1, torch.tensor(text[1:])[:, None])[:, 0].numpy()) <= 1e-4
        assert worst(made.top, theirs.topk(MOST_TOPS).values.numpy()) <= 1e-4
        assert worst(made.top, theirs.gather(1, torch.tensor(made.ids, dtype=torch.long)).numpy()) <= 1e-4
        wrong += [worst(made.top[1:], made.top[:-1])] if len(text) > 2 else []
    assert min(wrong) > 1e-4  # control: the place beside it expects something else
