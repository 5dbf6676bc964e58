"""The token row: who sees whom, how rows are built, packed and stacked, and what ``check`` refuses."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from definition import remasked, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax import rows
from esjax.rows import Rows

S, Q1, R1, Q2, R2, H, A, B, D, E = range(10, 20)
# The example of esjax.rows' docstring: a trunk S q1 r1 q2 r2 and two branches that both answer q2 (whose last token is h).
EXAMPLE = rows.concatenate(
    [
        rows.trunk([S, Q1, R1, Q2, R2])._replace(until=np.asarray([11, 11, 11, 11, 5], np.int32)),
        *(
            Rows(*map(np.asarray, ([H, *t], [4, 5, 6], [1] * 3, [b] * 3, [end] * 3, np.asarray([1, 1, 0], np.float32))))
            for b, t, end in ((1, [A, B], 8), (2, [D, E], 11))
        ),
    ]
)


def batched(*parts: Rows) -> Rows:
    return rows.stack(list(parts))


@st.composite
def examples(draw: st.DrawFn) -> Rows:
    """A trunk, or one with replies that leave it anywhere, in any order."""
    stem = draw(st.lists(st.integers(0, 9), min_size=2, max_size=12))
    replies = draw(
        st.lists(st.tuples(st.integers(2, len(stem)), st.lists(st.integers(0, 9), min_size=1, max_size=4)), max_size=4)
    )
    return rows.trunk_with_replies(stem, replies) if replies else rows.trunk(stem)


@st.composite
def packed_rows(draw: st.DrawFn) -> Rows:
    """A batch of packed rows with padding at their ends."""
    packed = draw(st.lists(st.lists(examples(), max_size=4), min_size=1, max_size=3))
    length = max(sum(len(e.tokens) for e in row) for row in packed) + draw(st.integers(0, 3))
    return rows.stack([rows.pack(row, max(1, length)) for row in packed])


def seen(batch: Rows) -> np.ndarray:
    index = np.arange(batch.tokens.shape[1])
    return np.asarray(rows.sees(batch.until, index, index))


@settings(max_examples=200, deadline=None)
@given(packed_rows())
def test_one_integer_a_key_says_what_the_definition_says(batch: Rows) -> None:
    assert (seen(batch) == visible(batch)).all()
    assert (remasked(batch).until == batch.until).all()
    targets = batch.weight.any(axis=1)
    if targets.all():
        rows.check(batch)
    for by in (-1, 1):  # a mask off by one is noticed
        other = remasked(batch, by)
        if (other.until != batch.until).any():
            assert (seen(other) != visible(batch)).any()
            with pytest.raises(ValueError):
                rows.check(other)


def test_who_sees_whom_in_the_worked_example() -> None:
    on_device = rows.sees(jnp.asarray(batched(EXAMPLE).until), jnp.arange(11), jnp.arange(11))
    assert (np.asarray(on_device) == seen(batched(EXAMPLE))).all()
    shown = ["".join("x" if s else "." for s in line) for line in seen(batched(EXAMPLE))[0]]
    assert shown == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "xxxxx......",
        "xxxx.x.....",  # h of branch 1: S q1 r1 q2, not r2
        "xxxx.xx....",
        "xxxx.xxx...",
        "xxxx....x..",  # h of branch 2: nothing of branch 1
        "xxxx....xx.",
        "xxxx....xxx",
    ]
    rows.check(batched(EXAMPLE))


def test_replies_are_laid_out_as_documented() -> None:
    """The longest prompt first, whatever the order; the branch's number says whose it is."""
    got = rows.trunk_with_replies([S, Q1, R1, Q2, H], [(2, [A, B]), (5, [D])])
    assert [tuple(map(float, column)) for column in zip(*got, strict=True)] == [
        (S, 0, 1, 0, 9, 0.0),
        (Q1, 1, 1, 0, 6, 0.0),
        (R1, 2, 1, 0, 6, 0.0),
        (Q2, 3, 1, 0, 6, 0.0),
        (H, 4, 1, 2, 6, 1.0),
        (D, 5, 1, 2, 6, 0.0),
        (Q1, 1, 1, 1, 9, 1.0),
        (A, 2, 1, 1, 9, 1.0),
        (B, 3, 1, 1, 9, 0.0),
    ]
    assert [f.dtype for f in got] == [np.int32] * 5 + [np.float32]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=6),
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_every_reply_sees_its_prompt_and_itself_as_if_alone(prompt: list[int], replies: list[list[int]]) -> None:
    """What each target's query token attends to, in order of position, is exactly prompt + reply up to it."""
    row = rows.prompt_with_replies(prompt, replies)
    mask = seen(batched(row))[0]
    contexts = []
    for i in np.flatnonzero(row.weight):
        keys = sorted(np.flatnonzero(mask[i]), key=lambda j: int(row.position[j]))
        assert [int(row.position[j]) for j in keys] == list(range(int(row.position[i]) + 1))
        contexts.append(([int(row.tokens[j]) for j in keys], int(row.tokens[i + 1])))
    expected = [([*prompt, *reply[:n]], reply[n]) for reply in replies for n in range(len(reply))]
    assert contexts == expected
    assert contexts[:-1] != expected  # control: a lost target is noticed


def test_a_lone_reply_stays_on_the_trunk() -> None:
    got = rows.prompt_with_replies([S, Q1, H], [[A, B]])
    assert got.tokens.tolist() == [S, Q1, H, A, B]
    assert got.weight.tolist() == [0.0, 0.0, 1.0, 1.0, 0.0]
    assert not got.branch.any()
    two = rows.prompt_with_replies([S, Q1, H], [[A, B], [A, B]])
    assert two.branch.any()
    assert len(two.tokens) == 2 + 2 * 3


@pytest.mark.parametrize(
    ("prompt", "replies"), [([S], [[A]]), ([], [[A]]), ([S, H], []), ([S, H], [[A], []]), ([S, H], [[]])]
)
def test_prompts_and_replies_must_not_be_empty(prompt: list[int], replies: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least two tokens and non-empty replies"):
        rows.prompt_with_replies(prompt, replies)


def test_pack_numbers_the_segments_and_pads_with_zero() -> None:
    a, b, c = rows.trunk([S, Q1]), rows.prompt_with_replies([Q2, H], [[A], [B]]), rows.trunk([E])
    got = rows.pack([a, b, c], 11)
    assert got.tokens.tolist() == [S, Q1, Q2, H, A, H, B, E, 0, 0, 0]
    assert got.segment.tolist() == [1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 0]
    assert got.branch.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0]
    assert got.position.tolist()[:8] == [0, 1, 0, 1, 2, 1, 2, 0]
    assert got.until.tolist() == [2, 2, 7, 5, 5, 7, 7, 8, 9, 10, 11]
    assert got.weight.tolist() == [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert [f.dtype for f in got] == [np.int32] * 5 + [np.float32]
    assert (a.segment.tolist(), b.until.tolist()) == ([1, 1], [5, 3, 3, 5, 5])  # the examples are untouched
    assert rows.pack([b, a, c], 11).segment.tolist() != got.segment.tolist()


def test_pack_fills_a_row_to_the_last_token_and_not_beyond() -> None:
    assert rows.pack([EXAMPLE], len(EXAMPLE.tokens)).segment.tolist() == [1] * len(EXAMPLE.tokens)
    assert rows.pack([], 4).segment.tolist() == [0] * 4
    with pytest.raises(ValueError, match="11 tokens do not fit a row of 10"):
        rows.pack([EXAMPLE], 10)
    with pytest.raises(ValueError):
        rows.stack([rows.pack([EXAMPLE], 12), rows.trunk([S])])


def good() -> Rows:
    """A batch of two packed rows that obeys every rule."""
    pair = rows.prompt_with_replies([S, Q1, H], [[A, B], [D, E]])
    lone = rows.prompt_with_replies([S, H], [[A, B]])
    return rows.stack([rows.pack([pair, lone], 16), rows.pack([lone, pair], 16)])


def at(batch: Rows, name: str, index: tuple[int, int], value: float) -> Rows:
    field = getattr(batch, name).copy()
    field[index] = value
    return batch._replace(**{name: field})


@pytest.mark.parametrize(
    ("column", "what"),
    [
        (4, "another branch"),  # the last token of branch 1
        (7, "another segment"),  # the last token of branch 2
        (11, "padding"),  # the last token of the lone reply
        (12, "padding"),  # padding itself
        (15, "padding"),  # the row's last token
    ],
)
def test_check_refuses_a_weight_without_a_next_token(column: int, what: str) -> None:
    rows.check(good())
    with pytest.raises(ValueError, match=what):
        rows.check(at(good(), "weight", (0, column), 1.0))
    full = rows.stack([rows.pack([rows.trunk([S, H, A], [0.0, 1.0, 0.0])], 3)])
    rows.check(full)
    with pytest.raises(ValueError, match="weight"):
        rows.check(at(full, "weight", (0, 2), 1.0))


def test_check_refuses_a_row_without_a_target_and_names_it() -> None:
    batch = good()
    with pytest.raises(ValueError, match="row 1 has no target"):
        rows.check(batch._replace(weight=batch.weight * np.asarray([[1.0], [0.0]], np.float32)))


def turned(order: Any) -> Rows:
    return batched(Rows(*(f[order] for f in EXAMPLE)))


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (turned([*range(5, 11), *range(5)]), "before its branches"),  # attention computes keys up to the query only
        (turned([*range(6), 8, 6, 7, 9, 10])._replace(weight=np.eye(1, 11, 9)), "in one piece"),
        (at(batched(EXAMPLE), "position", (0, 8), 5), "leaves its trunk behind"),
        (at(batched(EXAMPLE), "position", (0, 9), 6), "do not count up"),
        (at(batched(EXAMPLE), "until", (0, 4), 8), "token 4 is seen by the wrong ones"),
    ],
    ids=["turned", "torn", "ascending", "position", "until"],
)
def test_check_refuses_what_one_integer_cannot_say(batch: Rows, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        rows.check(batch)
