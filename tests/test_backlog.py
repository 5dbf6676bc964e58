"""Groups wait in order and are found by how their prompts begin; prompts that are computed together wait for each other."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esjax.model.cache import Chunk
from esjax.rows import common_prefix
from esjax.sample.backlog import Backlog
from esjax.sample.prefills import FILLED, Prefills
from esjax.sample.rowbook import BLOCK, Group, Piece, Request, RowBook, beginnings
from esjax.sample.shapes import Shapes

NEVER, ALWAYS = (lambda: False), (lambda: True)


def group(key: Any, prompt: list[int]) -> Group:
    return Group.of([Request(key, prompt, 0, None, 1)])


def row(*prompts: list[int]) -> RowBook:
    """A row in which these lie."""
    book, start = RowBook(1 << 20), 0
    for prompt in prompts:
        book.pieces.append(Piece(start, prompt))
        start += len(prompt)
    return book


def key_of(taken: Group) -> Any:
    return taken.pending[0].key


# --- the backlog -----------------------------------------------------------------------------------------------------


def test_groups_are_taken_in_order() -> None:
    backlog = Backlog(group(i, [i]) for i in range(3))
    backlog.put_first([group("a", [1]), group("b", [2])])
    backlog.append([group("z", [3])])
    backlog.put_first([group("first", [4])])
    order = ["first", "a", "b", 0, 1, 2, "z"]
    assert [key_of(g) for g in backlog] == order
    assert [key_of(backlog.take(row(), 100)) for _ in range(len(backlog))] == order
    assert not backlog


def test_a_forgotten_request_is_not_taken() -> None:
    backlog = Backlog([group(0, [1] * 40), group(1, [2] * 40), group(2, [2] * 40)])
    backlog.forget(1)
    assert len(backlog) == 2
    assert key_of(backlog.take(row([2] * 40), 100)) == 2
    assert key_of(backlog.take(row([2] * 40), 100)) == 0


def expected(waiting: list[tuple[int, list[int]]], pieces: list[list[int]], near: int) -> int:
    """By the definition: the first of whose half, in whole blocks, all lies in the row; the first of all where none is near."""
    first = waiting[0][0]
    for place, prompt in waiting:
        half = len(prompt) // 2 // BLOCK * BLOCK
        if place < first + near and half and any(common_prefix(p, prompt) >= half for p in pieces):
            return place
    return first


STEMS = st.sampled_from([0, 1, 2, 3])
LENGTHS = st.integers(1, 6 * BLOCK)
PROMPT = st.builds(lambda stem, n, m: [stem] * n + [9] * m, STEMS, LENGTHS, LENGTHS)


@settings(deadline=None, max_examples=300)
@given(st.lists(PROMPT, min_size=1, max_size=12), st.lists(PROMPT, max_size=3), st.integers(1, 12))
def test_what_lies_in_the_row_is_found(prompts: list[list[int]], pieces: list[list[int]], near: int) -> None:
    backlog, waiting = Backlog(), list(enumerate(prompts))
    backlog.append(group(i, p) for i, p in waiting)
    while waiting:
        taken = key_of(backlog.take(row(*pieces), near))
        assert taken == expected(waiting, pieces, near)
        waiting = [w for w in waiting if w[0] != taken]


def test_a_piece_behind_a_trunk_is_no_beginning() -> None:
    book = row([1] * 40)
    book.pieces[0].position = 5
    backlog = Backlog([group(0, [2] * 40), group(1, [1] * 40)])
    assert key_of(backlog.take(book, 100)) == 0
    book.pieces[0].position = 0  # control
    assert key_of(Backlog([group(0, [2] * 40), group(1, [1] * 40)]).take(book, 100)) == 1


def test_beginnings_are_those_of_the_tokens() -> None:
    a = list(range(100))
    assert len(beginnings(a)) == 100 // BLOCK
    assert beginnings(a)[:2] == beginnings([*a[: 2 * BLOCK], 7])  # what comes later does not count
    assert beginnings([5, *a[1:]])[-1] != beginnings(a)[-1]  # what came before does


def calls(work: Callable[[], Any]) -> int:
    """How many functions it calls."""
    numbers = count()
    sys.setprofile(lambda frame, event, arg: next(numbers) if event in ("call", "c_call") else None)
    try:
        work()
    finally:
        sys.setprofile(None)
    return next(numbers)


def test_a_group_costs_the_same_however_many_wait() -> None:
    def each(n: int) -> float:
        rng = np.random.default_rng(0)
        prompts = rng.integers(0, 1000, (n, 200)).tolist()
        backlog = Backlog(group(i, p) for i, p in enumerate(prompts))
        rows = [row(prompts[i]) for i in rng.permutation(n)]
        [*(b.pieces[0].beginnings for b in rows)]  # computed once, when something comes to lie there
        return calls(lambda: [backlog.take(b, n) for b in rows]) / n

    def scanned(n: int) -> float:  # control: looking through what waits
        waiting = deque(range(n))
        return calls(lambda: [[waiting.index(i), waiting.remove(i), [abs(x) for x in waiting]] for i in range(n)]) / n

    assert each(800) < 1.5 * each(100)
    assert scanned(800) > 4 * scanned(100)


# --- what is computed together ---------------------------------------------------------------------------------------

SHAPES = Shapes(rows=8, lanes=2, slots=64, new=8, windows=4, few=1, width=8)


def chunk(number: int) -> Chunk:
    one, slots = np.zeros(SHAPES.width, np.int32), np.zeros(SHAPES.slots, np.int32)
    return Chunk(np.int32(number), np.int32(0), one, one, one < 1, slots, slots, slots)


def rows_of(part: Chunk | None) -> list[int]:
    """Which windows a call computes; those that fill it up are left out."""
    assert part is not None
    return [int(n) for n, valid in zip(part.row, part.valid, strict=True) if valid.any()]


def test_devices_wait_until_the_others_have_something() -> None:
    queued = Prefills(2, SHAPES)
    assert not queued
    assert queued.next(ALWAYS) is None
    assert queued.add(0, [chunk(i) for i in range(5)]) == 5
    assert queued.next(NEVER) is None  # half of a call for two devices is not enough
    assert queued.add(1, [chunk(10), chunk(11)]) == 2
    assert FILLED * 2 * SHAPES.windows <= 6
    assert rows_of(queued.next(NEVER)) == [0, 1, 2, 3, 10, 11]
    assert queued.done == [4, 2]
    assert queued.next(NEVER) is None
    assert queued
    assert queued.add(1, [chunk(12)]) == 3
    part = queued.next(NEVER)
    assert part is not None
    assert len(part.row) == 2
    assert rows_of(part) == [4, 12]
    assert not queued
    assert queued.done == [5, 3]


def test_what_is_urgent_does_not_wait() -> None:
    queued = Prefills(4, SHAPES)
    queued.add(2, [chunk(1)])
    asked = []
    assert queued.next(lambda: bool(asked.append(1))) is None
    assert asked == [1]
    assert rows_of(queued.next(ALWAYS)) == [1]
    assert queued.done == [0, 0, 1, 0]


@pytest.mark.parametrize("devices", [1, 3])
def test_each_devices_windows_keep_their_order(devices: int) -> None:
    rng, queued = np.random.default_rng(1), Prefills(devices, SHAPES)
    given: list[list[int]] = [[] for _ in range(devices)]
    made: list[list[int]] = [[] for _ in range(devices)]
    numbers = count(1)
    for step in range(60):
        d = int(rng.integers(devices))
        more = [next(numbers) for _ in range(rng.integers(0, 6))]
        given[d] += more
        assert queued.add(d, [chunk(n) for n in more]) == len(given[d])
        while (part := queued.next(ALWAYS if step % 7 == 0 or step == 59 else NEVER)) is not None:
            valid = part.valid.reshape(devices, -1, SHAPES.width).any(axis=2)
            for device, (rows, there) in enumerate(zip(part.row.reshape(devices, -1), valid, strict=True)):
                made[device] += rows[there].tolist()
            assert queued.done == [len(m) for m in made]
    assert made == given
