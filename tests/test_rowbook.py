"""Which prompts lie where in a row: a simulated row holds, for each slot, the whole prefix that its token was computed from.

So a slot that was given away too early, a window that writes too much, or a span that sees too much or too little is seen at
once in what the slot holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from esjax.model.cache import Chunk
from esjax.rows import common_prefix, sees
from esjax.sample.prefills import stack_windows
from esjax.sample.rowbook import Group, Piece, Placed, Request, RowBook, Run, beginnings, windows

Prefix = tuple[int, ...]


def begun(stem: list[int], rest: list[int]) -> list[int]:
    """A prompt; so few stems that some prompts begin alike, and some branches begin like a prompt."""
    return stem + rest


STEMS = st.sampled_from([[], [1] * 6, [2, 1, 1, 2, 2, 1], [2, 1, 1, 1]])
PROMPTS = st.builds(begun, STEMS, st.lists(st.integers(1, 2), min_size=1, max_size=8))
GROUPS = st.lists(PROMPTS, min_size=1, max_size=4)


def request(prompt: list[int]) -> Request:
    return Request(None, prompt, 0, None, 4)


def group(*prompts: list[int]) -> Group:
    return Group.of(map(request, prompts))


class SimulatedRow:
    """A RowBook, and what the windows that it asks for write into its slots."""

    def __init__(self, slots: int, width: int, book: type[RowBook] = RowBook) -> None:
        self.book, self.width = book(slots), width
        self.held: list[Prefix | None] = [None] * slots  # what each slot's keys and values were computed from
        self.uids: Iterator[int] = count()
        self.given = self.finished = 0

    def give(self, *prompts: list[int]) -> None:
        self.book.groups.append(group(*prompts))
        self.given += len(prompts)

    def place(self, most_waiting: int) -> int:
        """Place what fits and compute it, trunks before branches. Returns how many tokens were computed."""
        needed = {s for placed in self.placed() for s in slots_of(placed)}
        written: set[int] = set()
        before = len(self.book.waiting)
        for runs in self.book.place(most_waiting, self.uids):
            chunks = windows(0, runs, self.width, self.book.slots)
            slots = [slot for chunk in chunks for slot in self.load(chunk)]
            assert sorted(slots) == sorted(r.slot + i for r in runs for i in range(len(r.tokens)))
            assert not needed & set(slots), "a window writes what a placed request needs"
            assert not written & set(slots), "a slot is computed twice"
            written |= set(slots)
        assert len(self.book.waiting) <= max(before, most_waiting)
        return len(written)

    def load(self, chunk: Chunk) -> list[int]:
        """Write the chunk as the model would. Returns the slots that it wrote."""
        assert chunk.start >= 0
        assert chunk.start + len(chunk.tokens) <= self.book.slots
        slots = [int(chunk.start) + int(i) for i in np.flatnonzero(chunk.valid)]
        mask = sees(chunk.until, np.arange(len(chunk.tokens)), chunk.since)
        for slot in slots:
            i = slot - int(chunk.start)
            assert mask[i, slot]
            seen = sorted(set(np.flatnonzero(mask[i]).tolist()) - {slot}, key=lambda s: len(self.held[s]))
            self.held[slot] = (*self.read(seen), int(chunk.tokens[i]))
            assert chunk.position[i] == len(seen)
        return slots

    def read(self, slots: Sequence[int]) -> Prefix:
        """The tokens in these slots, which must have been computed from one another, in this order, and nothing else."""
        prefixes = [self.held[s] for s in slots]
        tokens: Prefix = tuple(p[-1] if p else 0 for p in prefixes)
        for i, prefix in enumerate(prefixes, start=1):
            assert prefix == tokens[:i], f"slot {slots[i - 1]} holds {prefix}, not {tokens[:i]}"
        return tokens

    def start(self, most: int) -> None:
        for _ in range(min(most, len(self.book.waiting))):
            placed = self.book.waiting.popleft()
            self.book.running[placed.uid] = placed

    def finish(self, which: int) -> None:
        uid = sorted(self.book.running)[which % len(self.book.running)]
        assert self.book.finish(uid).uid == uid
        self.finished += 1

    def placed(self) -> list[Placed]:
        return [*self.book.waiting, *self.book.running.values()]

    def check(self) -> None:
        """Every placed request sees its prompt but for the last token; pieces lie apart and know their users."""
        for placed in self.placed():
            assert self.read(slots_of(placed)) == tuple(placed.request.prompt[:-1])
        pieces = sorted(self.book.pieces, key=lambda p: p.start)
        ends = [0, *(p.stop for p in pieces)]
        assert all(end <= p.start for end, p in zip(ends, pieces, strict=False))
        assert ends[-1] <= self.book.slots
        users = [x for placed in self.placed() for x in (placed.trunk, placed.own)]
        users += [g.trunk for g in self.book.groups]
        for piece in pieces:
            assert piece.users == sum(u is piece for u in users)
        assert all(u is None or u in pieces for u in users)
        assert len(self.placed()) + self.finished + sum(len(g.pending) for g in self.book.groups) == self.given

    def empty(self) -> None:
        """Go on until nothing is left; a group for which the row is really too short is taken away."""
        while self.book.outstanding:
            self.place(3)
            self.check()
            if not self.placed():
                stuck = self.book.groups.popleft()
                assert too_long(stuck, self.book.slots)
                self.given -= len(stuck.pending)
                if stuck.trunk is not None:
                    stuck.trunk.users -= 1
            self.start(2)
            while self.book.running:
                self.finish(0)
                self.check()
        assert self.finished == self.given
        assert not any(p.users for p in self.book.pieces)


def slots_of(placed: Placed) -> list[int]:
    a, b, c, d = placed.spans
    return [*range(a, b), *range(c, d)]


def too_long(stuck: Group, slots: int) -> bool:
    """Whether a group's next prompt fits no row of so many slots, or not beside the group's trunk."""
    known = stuck.pending[0].prompt[:-1]
    if stuck.trunk is None:
        return len(known) > slots
    branch = len(known) - common_prefix(known, stuck.trunk.tokens)
    return branch > max(stuck.trunk.start, slots - stuck.trunk.stop)


class Life(RuleBasedStateMachine):
    """Groups come, are placed, start and finish in any order."""

    book: type[RowBook] = RowBook

    @initialize(slots=st.integers(4, 60), width=st.integers(1, 16))
    def begin(self, slots: int, width: int) -> None:
        self.row = SimulatedRow(slots, min(width, slots), self.book)

    @rule(prompts=GROUPS)
    def give(self, prompts: list[list[int]]) -> None:
        self.row.give(*prompts)

    @rule(most=st.integers(1, 6))
    def place(self, most: int) -> None:
        self.row.place(most)

    @rule(most=st.integers(1, 3))
    def start(self, most: int) -> None:
        self.row.start(most)

    @precondition(lambda self: self.row.book.running)
    @rule(which=st.integers(0, 5))
    def finish(self, which: int) -> None:
        self.row.finish(which)

    @invariant()
    def holds(self) -> None:
        self.row.check()

    def teardown(self) -> None:
        self.row.empty()


LONG = settings(max_examples=300, stateful_step_count=25, deadline=None)


def test_every_placed_request_sees_its_prompt_at_every_moment() -> None:
    run_state_machine_as_test(Life, settings=LONG)


HASTY = settings(LONG, phases=[Phase.generate], report_multiple_bugs=False, derandomize=True, database=None)


class Forgetful(RowBook):
    """Does not note who needs a piece."""

    def _use(self, piece: Piece) -> None:
        self._time += 1
        piece.last_use = self._time


class Generous(RowBook):
    """Lets a request see a token more of its trunk than the two share."""

    def place(self, most_waiting: int, uids: Iterator[int]) -> list[list[Run]]:  # type: ignore[override]
        before = len(self.waiting)
        out = super().place(most_waiting, uids)
        for placed in list(self.waiting)[before:]:
            placed.seen += placed.trunk is not None and placed.seen < len(placed.trunk.tokens)
        return out


@pytest.mark.parametrize("book", [Forgetful, Generous])
def test_a_wrong_book_is_found_out(book: type[RowBook]) -> None:
    """Control: the machine fails where pieces are given away too early, or spans are one too long."""
    machine = type("Wrong", (Life,), {"book": book})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=HASTY)


@given(PROMPTS, st.integers(0, 12), st.integers(1, 16), st.booleans())
def test_a_corrupted_slot_is_found_out(prompt: list[int], where: int, width: int, other_history: bool) -> None:
    """Control: the checker sees one wrong token, and the right token computed from another prefix."""
    row = SimulatedRow(40, width)
    row.give(prompt, [2, 2, 1])
    row.place(2)
    row.check()
    needed = sorted({s for placed in row.placed() for s in slots_of(placed)})
    assume(needed)
    slot = needed[where % len(needed)]
    held = row.held[slot]
    assert held is not None
    row.held[slot] = (9, *held) if other_history else (*held[:-1], 9)
    with pytest.raises(AssertionError, match=r"holds|=="):
        row.check()


def test_everything_finishes_in_a_row_of_three_prompts() -> None:
    """With room for a trunk and a branch on one of its sides, nothing has to be taken away."""

    @settings(deadline=None)
    @given(st.lists(GROUPS, min_size=1, max_size=12), st.integers(1, 16))
    def all_done(groups: list[list[list[int]]], width: int) -> None:
        row = SimulatedRow(3 * 13, width)
        for prompts in groups:
            row.give(*prompts)
        row.empty()
        assert row.finished == sum(map(len, groups))

    all_done()
    short = SimulatedRow(12, 4)  # control: a prompt of 14 tokens, 13 of them in the row
    short.give([1] * 14)
    short.empty()
    assert short.finished == short.given == 0


def test_a_second_group_with_the_same_trunk_computes_only_its_branches() -> None:
    stem = list(range(10, 30))
    row = SimulatedRow(64, 8)
    row.give([*stem, 1, 2, 3], [*stem, 4, 5])
    assert row.place(8) == 22 + 1
    row.start(2)
    row.finish(0)
    row.finish(0)
    assert beginnings(stem)[-1] in row.book.beginnings
    row.give([*stem, 6, 7, 8], [*stem[:15], 9, 9])
    assert row.place(8) == 2 + 1  # what is beyond the first group's trunk, which nobody used any more
    row.check()
    other = [x + 50 for x in stem]
    assert beginnings(other)[-1] not in row.book.beginnings
    row.give([*other, 6, 7, 8])
    assert row.place(8) == 22  # control: another trunk


def test_a_branch_is_not_taken_for_a_beginning() -> None:
    """Its tokens may be those that a prompt begins with; they were computed behind a trunk."""
    row = SimulatedRow(64, 8)
    row.give([5, 6, 7, 8, 9, 9, 9, 9, 5], [5, 6, 7, 1, 2, 3, 4, 5])
    assert row.place(2) == 8 + 4
    row.start(2)
    row.finish(0)
    row.finish(0)
    row.give([1, 2, 3, 4, 8, 8])
    assert row.place(2) == 5
    row.check()


def test_what_shares_nothing_is_computed_with_the_trunks() -> None:
    """The next group may begin like it, and lie in front of it."""
    row = SimulatedRow(20, 8)
    row.give([9] * 6)
    row.place(1)
    row.start(1)
    row.finish(0)
    row.give([3] * 8, [2] * 7)
    row.give([2] * 6 + [4] * 4)
    assert row.place(8) == 7 + 6 + 3
    assert row.placed()[-1].spans == (12, 18, 0, 3)
    row.check()


def test_a_trunk_that_lies_there_is_not_kept_where_there_is_no_room_beside_it() -> None:
    """A prompt that fits the row is placed in it, even if what it shares with an old one would have to be computed again."""
    row = SimulatedRow(12, 4)
    row.give([1] * 11)
    row.place(1)
    row.start(1)
    row.finish(0)
    row.give([1] * 5 + [2] * 6)
    assert row.place(1) > 0
    row.check()
    assert len(row.placed()) == 1


@given(st.integers(1, 3), st.integers(3, 5))
def test_chunks_that_fill_up_a_load_write_nothing(chunks: int, size: int) -> None:
    made = windows(2, [Run(3, list(range(1, 4 * chunks + 1)), 0, (3, 3))], 4, 32)
    assert len(made) == chunks
    load = stack_windows([made], size)
    assert load.valid.sum(axis=1).tolist() == [4] * chunks + [0] * (size - chunks)
    assert load.tokens[:chunks].ravel().tolist() == list(range(1, 4 * chunks + 1))
    assert set(load.row.tolist()) == {2}
    assert (load.start + 4 <= 32).all()


def test_a_conversation_computes_what_is_new_alone() -> None:
    """Two views of it in one row, each going on from where it was; what ended a prompt and did not last is written over."""
    row = SimulatedRow(64, 4)
    computed = []
    first, second = [1] * 8, [2] * 10
    for turn in range(4):
        for view in (first, second):
            view += [1, 2, 2][: 2 + turn % 2]  # what was said
            prompt = [*view, 1 + turn % 2, 1]  # and a question that the next prompt does not have
            row.book.groups.append(Group.of([request(prompt)._replace(room=32)]))
            row.given += 1
            computed.append(row.place(2))
            row.start(1)
            row.finish(0)
    assert computed[:2] == [8 + 2 + 1, 10 + 2 + 1]  # all but the last token, which decoding computes
    assert max(computed[2:]) <= 5, computed


def test_a_trunk_that_is_needed_does_not_grow() -> None:
    row = SimulatedRow(40, 4)
    row.give([1] * 8)
    row.place(2)
    row.start(1)
    row.give([1] * 7 + [2] * 4)
    row.place(2)  # the first is under way: its slots stay
    assert row.held[:7] == [tuple([1] * (n + 1)) for n in range(7)]
    assert len(row.book.pieces) == 2
