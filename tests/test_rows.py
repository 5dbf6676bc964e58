"""The token row: who sees whom, how rows are built, packed and stacked, and what ``check`` refuses."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax import rows
from esjax.rows import Rows

S, Q1, R1, Q2, R2, H, A, B, D, E = range(10, 20)


def hand_made(columns: Sequence[tuple[int, int, int, int, int, float]]) -> Rows:
    """A row [T] from (token, position, segment, branch, limit, weight) columns."""
    fields = list(zip(*columns, strict=True))
    kinds = [np.int32] * 5 + [np.float32]
    return Rows(*(np.asarray(f, kind) for f, kind in zip(fields, kinds, strict=True)))


def batched(row: Rows) -> Rows:
    return Rows(*(np.asarray(field)[None] for field in row))


def oracle(batch: Rows) -> list[list[list[bool]]]:
    """The definition of ``visible``, word for word, in plain Python."""
    out = []
    for b in range(batch.tokens.shape[0]):
        seg, bra, pos, lim = (
            [int(x) for x in f[b]] for f in (batch.segment, batch.branch, batch.position, batch.limit)
        )
        n = len(seg)
        square = [[False] * n for _ in range(n)]
        for i in range(n):
            for j in range(n):
                if seg[i] != seg[j]:
                    continue
                own = bra[i] == bra[j] and j <= i
                stem = bra[j] == 0 and pos[j] < lim[i]
                square[i][j] = own or stem
        out.append(square)
    return out


# The example of esjax.rows' docstring: a trunk S q1 r1 q2 r2 and two branches that both answer q2.
EXAMPLE = hand_made(
    [(t, i, 1, 0, 0, 0.0) for i, t in enumerate((S, Q1, R1, Q2, R2))]
    + [(t, 4 + i, 1, 1, 4, w) for i, (t, w) in enumerate(((H, 1.0), (A, 1.0), (B, 0.0)))]
    + [(t, 4 + i, 1, 2, 4, w) for i, (t, w) in enumerate(((H, 1.0), (D, 1.0), (E, 0.0)))]
)


@st.composite
def random_rows(draw: st.DrawFn) -> Rows:
    """Batches of packed rows: segments with trunks, branches that leave them anywhere, and padding on either side."""
    length = draw(st.integers(1, 24))
    return rows.stack([_random_row(draw, length) for _ in range(draw(st.integers(1, 3)))])


def _random_row(draw: st.DrawFn, length: int) -> Rows:
    columns: list[tuple[int, int, int, int, int, float]] = []
    left = draw(st.integers(0, min(2, length)))
    columns += [(0, 0, 0, 0, 0, 0.0)] * left
    segment = 0
    while len(columns) < length and draw(st.integers(0, 9)) > 0:
        segment += 1
        room = length - len(columns)
        trunk = draw(st.integers(1, room))
        columns += [(draw(st.integers(0, 9)), p, segment, 0, 0, 0.0) for p in range(trunk)]
        for branch in range(1, draw(st.integers(0, 3)) + 1):
            size = draw(st.integers(0, max(0, min(4, length - len(columns)))))
            leaves = draw(st.integers(0, trunk))
            columns += [(draw(st.integers(0, 9)), leaves + p, segment, branch, leaves, 0.0) for p in range(size)]
    columns += [(0, i, 0, 0, 0, 0.0) for i in range(length - len(columns))]
    return hand_made(columns)


@settings(max_examples=150, deadline=None)
@given(random_rows())
def test_visible_is_its_definition(batch: Rows) -> None:
    seen = rows.visible(batch)
    assert seen.dtype == bool
    assert seen.tolist() == oracle(batch)


@settings(max_examples=150, deadline=None)
@given(random_rows())
def test_no_token_sees_a_later_one_and_every_token_sees_itself(batch: Rows) -> None:
    seen = rows.visible(batch)
    later = np.triu(np.ones(seen.shape[1:], bool), 1)
    assert not (seen & later).any()
    assert np.diagonal(seen, axis1=1, axis2=2).all()


def test_visible_of_the_worked_example() -> None:
    seen = rows.visible(batched(EXAMPLE))[0]
    shown = ["".join("x" if s else "." for s in line) for line in seen]
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


@pytest.mark.parametrize(
    "change",
    [
        {"limit": np.where(EXAMPLE.branch > 0, 5, 0)},  # r2 no longer hidden
        {"branch": np.minimum(EXAMPLE.branch, 1)},  # branch 2 sees branch 1
        {"segment": np.where(EXAMPLE.branch == 2, 2, 1)},  # branch 2 loses its trunk
        {"position": EXAMPLE.position + 1},  # q2 no longer seen
    ],
    ids=["limit", "branch", "segment", "position"],
)
def test_every_field_matters_for_visible(change: dict[str, np.ndarray]) -> None:
    other = batched(EXAMPLE._replace(**change))
    assert rows.visible(other).tolist() == oracle(other)
    assert rows.visible(other).tolist() != oracle(batched(EXAMPLE))


def test_visible_of_jax_arrays_is_the_same() -> None:
    batch = batched(EXAMPLE)
    on_device = Rows(*(jnp.asarray(f) for f in batch))
    assert np.asarray(rows.visible(on_device)).tolist() == oracle(batch)
    assert np.asarray(rows.visible(on_device._replace(limit=on_device.limit * 0))).tolist() != oracle(batch)


def test_prompt_with_two_replies_is_laid_out_as_documented() -> None:
    got = rows.prompt_with_replies([S, Q1, R1, Q2, H], [[A, B], [D, E]])
    columns = [(int(t), int(p), int(s), int(b), int(k), float(w)) for t, p, s, b, k, w in zip(*got, strict=True)]
    assert columns == [
        (S, 0, 1, 0, 0, 0.0),
        (Q1, 1, 1, 0, 0, 0.0),
        (R1, 2, 1, 0, 0, 0.0),
        (Q2, 3, 1, 0, 0, 0.0),
        (H, 4, 1, 1, 4, 1.0),
        (A, 5, 1, 1, 4, 1.0),
        (B, 6, 1, 1, 4, 0.0),
        (H, 4, 1, 2, 4, 1.0),
        (D, 5, 1, 2, 4, 1.0),
        (E, 6, 1, 2, 4, 0.0),
    ]
    assert [f.dtype for f in got] == [np.int32] * 5 + [np.float32]
    rows.check(batched(got))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 99), min_size=2, max_size=6),
    st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_every_reply_sees_its_prompt_and_itself_as_if_alone(prompt: list[int], replies: list[list[int]]) -> None:
    """What each target's query token attends to, in order of position, is exactly prompt + reply up to it."""
    row = rows.prompt_with_replies(prompt, replies)
    seen = rows.visible(batched(row))[0]
    targets = [i for i in range(len(row.tokens)) if row.weight[i]]
    contexts = []
    for i in targets:
        keys = sorted(np.flatnonzero(seen[i]), key=lambda j: int(row.position[j]))
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
    assert not got.limit.any()
    two = rows.prompt_with_replies([S, Q1, H], [[A, B], [A, B]])
    assert two.branch.any()
    assert len(two.tokens) == 2 + 2 * 3


@pytest.mark.parametrize(
    ("prompt", "replies"), [([S], [[A]]), ([], [[A]]), ([S, H], []), ([S, H], [[A], []]), ([S, H], [[]])]
)
def test_prompts_and_replies_must_not_be_empty(prompt: list[int], replies: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least two tokens and non-empty replies"):
        rows.prompt_with_replies(prompt, replies)


def test_trunk() -> None:
    got = rows.trunk([S, Q1, R1])
    assert [f.tolist() for f in got] == [[S, Q1, R1], [0, 1, 2], [1, 1, 1], [0, 0, 0], [0, 0, 0], [0.0, 0.0, 0.0]]
    weighted = rows.trunk([S, Q1, R1], [0.0, 1.0, 0.0])
    assert weighted.weight.tolist() == [0.0, 1.0, 0.0]
    assert weighted.weight.dtype == np.float32


def test_concatenate_keeps_fields_as_they_are() -> None:
    a, b = rows.trunk([S, Q1], [1.0, 0.0]), EXAMPLE
    got = rows.concatenate([a, b])
    for name in Rows._fields:
        assert getattr(got, name).tolist() == [*getattr(a, name).tolist(), *getattr(b, name).tolist()]
    assert rows.concatenate([b, a]).tokens.tolist() != got.tokens.tolist()


def test_pack_numbers_the_segments_and_pads_with_zero() -> None:
    a, b, c = rows.trunk([S, Q1]), rows.prompt_with_replies([Q2, H], [[A], [B]]), rows.trunk([E])
    got = rows.pack([a, b, c], 11)
    assert got.tokens.tolist() == [S, Q1, Q2, H, A, H, B, E, 0, 0, 0]
    assert got.segment.tolist() == [1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 0]
    assert got.branch.tolist() == [0, 0, 0, 1, 1, 2, 2, 0, 0, 0, 0]
    assert got.position.tolist()[:8] == [0, 1, 0, 1, 2, 1, 2, 0]
    assert got.weight.tolist() == [0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    assert [f.dtype for f in got] == [np.int32] * 5 + [np.float32]
    assert a.segment.tolist() == [1, 1]  # the example itself is untouched
    assert rows.pack([b, a, c], 11).segment.tolist() != got.segment.tolist()


def test_pack_fills_a_row_to_the_last_token_and_not_beyond() -> None:
    assert rows.pack([EXAMPLE], len(EXAMPLE.tokens)).segment.tolist() == [1] * len(EXAMPLE.tokens)
    with pytest.raises(ValueError, match="11 tokens do not fit a row of 10"):
        rows.pack([EXAMPLE], 10)


def test_pack_of_nothing_is_padding() -> None:
    got = rows.pack([], 4)
    assert got.segment.tolist() == [0] * 4
    assert not got.weight.any()


def test_packed_segments_do_not_see_each_other() -> None:
    packed = rows.pack([EXAMPLE, EXAMPLE], 25)
    seen = rows.visible(batched(packed))[0]
    n = len(EXAMPLE.tokens)
    alone = rows.visible(batched(EXAMPLE))[0]
    assert (seen[:n, :n] == alone).all()
    assert (seen[n : 2 * n, n : 2 * n] == alone).all()
    assert not seen[:n, n:].any()
    assert not seen[n : 2 * n, :n].any()
    assert not seen[n : 2 * n, 2 * n :].any()
    assert seen[2 * n :, 2 * n :].any()  # padding sees padding
    assert not seen[2 * n :, : 2 * n].any()


def test_stack() -> None:
    a, b = rows.pack([EXAMPLE], 12), rows.pack([rows.trunk([S, Q1])], 12)
    got = rows.stack([a, b])
    for name in Rows._fields:
        assert getattr(got, name).tolist() == [getattr(a, name).tolist(), getattr(b, name).tolist()]
    assert rows.stack([b, a]).tokens.tolist() != got.tokens.tolist()
    with pytest.raises(ValueError):
        rows.stack([a, rows.trunk([S])])


def good() -> Rows:
    """A batch of two packed rows that obeys every rule."""
    pair = rows.prompt_with_replies([S, Q1, H], [[A, B], [D, E]])
    lone = rows.prompt_with_replies([S, H], [[A, B]])
    return rows.stack([rows.pack([pair, lone], 16), rows.pack([lone, pair], 16)])


def test_check_passes_a_good_batch() -> None:
    rows.check(good())


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
    batch = good()
    segment, branch = batch.segment[0], batch.branch[0]
    if column < 15:  # the example is what its comment says
        same = segment[column] == segment[column + 1] > 0 and branch[column] == branch[column + 1]
        assert not same
    assert batch.weight[0, column] == 0
    with pytest.raises(ValueError, match=what):
        rows.check(at(batch, "weight", (0, column), 1.0))


def test_check_refuses_a_weight_on_the_last_token_of_a_full_row() -> None:
    full = rows.stack([rows.pack([rows.trunk([S, H, A], [0.0, 1.0, 0.0])], 3)])
    rows.check(full)
    with pytest.raises(ValueError, match="weight"):
        rows.check(at(full, "weight", (0, 2), 1.0))


def test_check_refuses_a_row_without_a_target_and_names_it() -> None:
    batch = good()
    with pytest.raises(ValueError, match="row 1 has no target"):
        rows.check(batch._replace(weight=batch.weight * np.asarray([[1.0], [0.0]], np.float32)))
    with pytest.raises(ValueError, match="row 0 has no target"):
        rows.check(rows.stack([rows.pack([], 4)]))


def test_check_refuses_a_limit_on_the_trunk() -> None:
    with pytest.raises(ValueError, match="trunk token has a limit"):
        rows.check(at(good(), "limit", (0, 1), 1))


def test_check_refuses_a_branch_before_its_trunk() -> None:
    """Attention on a CPU computes keys up to the query only, so a token that sees a later one must not pass."""
    turned = Rows(*(np.concatenate([f[5:], f[:5]]) for f in EXAMPLE))
    assert np.triu(np.asarray(oracle(batched(turned))[0]), 1).any()
    rows.check(batched(EXAMPLE))
    with pytest.raises(ValueError):
        rows.check(batched(turned))
