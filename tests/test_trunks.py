"""Which pairs share a trunk: token prefixes, nothing else; and what that makes of pairs from a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, pair_ids
from hypothesis import given
from hypothesis import strategies as st

from esjax import rows
from esjax.evolve.pairs import trunks
from esjax.settings.schema import DpoSettings
from esjax.tokens.batches import share_trunks
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=8), min_size=1, max_size=12)


@given(PROMPTS, st.integers(8, 40), st.data())
def test_a_group_is_a_trunk_and_what_leaves_it(prompts: list[list[int]], room: int, data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(2, 6), min_size=len(prompts), max_size=len(prompts)))
    groups = share_trunks(prompts, sizes, room)
    assert sorted(i for g in groups for i in g) == list(range(len(prompts)))
    assert groups == sorted(groups)
    for group in groups:
        stem = max((prompts[i] for i in group), key=len)
        assert all(stem[: len(prompts[i])] == prompts[i] for i in group)
        assert len(group) == 1 or len(stem) - 1 + sum(sizes[i] for i in group) <= room
        assert group == sorted(group)


@given(PROMPTS)
def test_with_room_enough_no_two_trunks_begin_one_another(prompts: list[list[int]]) -> None:
    groups = share_trunks(prompts, [2] * len(prompts), 1000)
    stems = [max((prompts[i] for i in g), key=len) for g in groups]
    for i, a in enumerate(stems):
        assert not any(b[: len(a)] == a for j, b in enumerate(stems) if j != i)


def chat(n: int, name: str = "a") -> list[dict[str, str]]:
    """A conversation that awaits its n-th answer."""
    turns = []
    for i in range(n):
        turns.append({"role": "user", "content": f"{name} question {i}"})
        turns.append({"role": "assistant", "content": f"{name} answer {i}"})
    return turns[:-1]


def pair(prompt: list[dict[str, str]], number: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": f"Better {number}."}],
        "rejected": [{"role": "assistant", "content": f"Worse and longer {number}."}],
    }


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    """Two conversations, their turns in a mixed order."""
    prompts = [chat(3), chat(2, "b"), chat(1), chat(2), chat(1, "b")]
    return [pair(p, i) for i, p in enumerate(prompts)]


@pytest.fixture
def encoder(tiny_folder: Any) -> Encoder:
    return Encoder(ChatTokenizer(tiny_folder), 4096, "")


def test_the_turns_of_a_conversation_share_its_trunk(pairs: list[dict[str, Any]], encoder: Encoder) -> None:
    made = trunks(pairs, encoder, DpoSettings(row_length=1024))
    assert [t.members for t in made] == [[0, 2, 3], [1, 4]]
    assert encoder.counts["unshared"] == 0
    for trunk in made:
        rows.check(rows.stack([trunk.rows]))
        row = trunk.rows
        longest = max((encoder.tokenizer.prompt(pairs[i]["prompt"]) for i in trunk.members), key=len)
        assert row.tokens[row.branch == 0].tolist() == longest[:-1]
        for p, i in enumerate(trunk.members):
            ids, replies = pair_ids(
                encoder, pairs[i]["prompt"], *(pairs[i][s][0]["content"] for s in ("chosen", "rejected"))
            )
            for side, reply in enumerate(replies):
                branch = row.branch == 2 * p + side + 1
                assert row.tokens[branch].tolist() == [ids[-1], *reply]
                assert row.position[branch].tolist() == list(range(len(ids) - 1, len(ids) + len(reply)))
    alone = trunks(pairs, encoder, DpoSettings(trunk="prompt"))
    assert [t.members for t in alone] == [[0], [1], [2], [3], [4]]
    assert sum(len(t.rows.tokens) for t in alone) > sum(len(t.rows.tokens) for t in made)


def test_a_trunk_that_would_be_too_long_is_divided(pairs: list[dict[str, Any]], encoder: Encoder) -> None:
    whole = len(trunks(pairs, encoder, DpoSettings(row_length=1024))[0].rows.tokens)
    made = trunks(pairs, encoder, DpoSettings(row_length=whole - 1))
    assert [t.members for t in made] != [[0, 2, 3], [1, 4]]
    assert all(len(t.rows.tokens) < whole for t in made)
    assert sorted(i for t in made for i in t.members) == list(range(5))


def test_what_a_template_breaks_is_counted(pairs: list[dict[str, Any]], encoder: Encoder) -> None:
    """This one writes how many questions there are, so no prompt begins another."""
    count = "{{ messages | selectattr('role', 'equalto', 'user') | list | length }} asked<|im_end|>\n"
    encoder.tokenizer.hf.chat_template = count + CHAT_TEMPLATE
    made = trunks(pairs, encoder, DpoSettings(row_length=1024))
    assert [t.members for t in made] == [[0], [1], [2], [3], [4]]
    assert encoder.counts["unshared"] == 3  # chats 1 and 2 of "a", and chat 1 of "b"
    assert all(
        np.array_equal(a.rows.tokens, b.rows.tokens)
        for a, b in zip(made, trunks(pairs, encoder, DpoSettings(trunk="prompt")), strict=True)
    )


def test_a_pair_is_tokenised_once(
    pairs: list[dict[str, Any]], encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters, scoring and training each ask for it."""
    asked: list[Any] = []
    records = ChatTokenizer.records
    monkeypatch.setattr(ChatTokenizer, "records", lambda self, texts: asked.extend(texts) or records(self, texts))
    first = trunks(pairs, encoder, DpoSettings(row_length=1024))
    assert len(asked) == 2 * len(pairs)
    again = trunks(pairs, encoder, DpoSettings(row_length=1024))
    assert len(asked) == 2 * len(pairs)
    assert all(np.array_equal(a.rows.tokens, b.rows.tokens) for a, b in zip(first, again, strict=True))
    trunks([pair(chat(1), 9)], encoder, DpoSettings())  # control: another text is another pair
    assert len(asked) == 2 * len(pairs) + 2
