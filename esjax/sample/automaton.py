"""A pattern's automaton over bytes, deterministic. Long repetitions are counted, where that is unambiguous, not unrolled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from esjax.errors import InputError
from esjax.sample.pattern import Chars, Choice, Join, Node, Ranges, Repeat, shown

UNROLLED = 256  # a repetition that would take more nodes is counted
MOST_NODES, MOST_STATES, MOST_WORK = 200_000, 20_000, 6_000_000
UNLIMITED = 1 << 30


class Loop(NamedTuple):
    """A counted repetition: how often its body may come."""

    least: int
    most: int


class Dfa(NamedTuple):
    """S states, 0 the first and the last one dead, over C classes of bytes. Every state can reach an accepting one."""

    classes: np.ndarray  # int64 [256], the class of a byte
    next: np.ndarray  # int32 [S, C]
    left: np.ndarray  # bool [S, C], whether the transition leaves the loop of its state
    counts: np.ndarray  # bool [S, C], whether it begins a body of the loop that it leads into
    loop: np.ndarray  # int32 [S], the loop that a state lies in, -1 in none
    accepts: np.ndarray  # bool [S]
    loops: list[Loop]


class _TooLarge(Exception):
    pass


class _Ambiguous(Exception):
    """These loops cannot be counted: what is read next may belong to the loop or to what follows it."""


def build(node: Node, pattern: str, counting: bool) -> Dfa:
    """The automaton of a pattern's tree. Raises InputError when it is too large, or nothing matches."""
    unrolled: set[Repeat] = set()
    while True:
        nfa = _Nfa(unrolled, counting)
        try:
            nfa.add(node, 0, 1, 0)
            return _pruned(_determinise(nfa), pattern)
        except _Ambiguous as e:
            unrolled |= {nfa.repeats[loop - 1] for loop in e.args[0]}
        except (_TooLarge, RecursionError):
            raise InputError(f"the pattern {shown(pattern)} needs too many states; {advice(node)}") from None


def advice(node: Node) -> str:
    """What to change in a pattern that is too large."""
    bounds = [max(r.least, r.most or 0) for r in _repeats(node)]
    if max(bounds, default=0) < 2:
        return "simplify it"
    found = max(_repeats(node), key=lambda r: max(r.least, r.most or 0))
    most = "" if found.most is None else found.most
    text = f"{{{most}}}" if found.least == found.most else f"{{{found.least},{most}}}"
    return f"lower the bounds of its repetition {text}, or write + or * there (the reply has a limit of tokens anyway)"


def _repeats(node: Node) -> Iterator[Repeat]:
    if isinstance(node, Repeat):
        yield node
        yield from _repeats(node.body)
    elif not isinstance(node, Chars):
        for part in node[0]:
            yield from _repeats(part)


@lru_cache(maxsize=4096)
def utf8(ranges: Ranges) -> list[list[tuple[int, int]]]:
    """Sequences of byte ranges that are the characters' UTF-8."""

    def split(low: int, high: int) -> Iterator[list[tuple[int, int]]]:
        for limit in (0x7F, 0x7FF, 0xFFFF):
            if low <= limit < high:
                yield from split(low, limit)
                yield from split(limit + 1, high)
                return
        if high > 0x7F:
            for i in (1, 2, 3):
                mask = (1 << 6 * i) - 1
                if (low & ~mask) != (high & ~mask):
                    if low & mask:
                        yield from split(low, low | mask)
                        yield from split((low | mask) + 1, high)
                        return
                    if high & mask != mask:
                        yield from split(low, (high & ~mask) - 1)
                        yield from split(high & ~mask, high)
                        return
        yield list(zip(chr(low).encode(), chr(high).encode(), strict=True))

    return [sequence for low, high in ranges for sequence in split(low, high)]


ENTERS, LEAVES = 1, 2  # marks of an empty edge: a loop's body begins, a loop is left


class _Nfa:
    """Nodes with empty edges and edges of byte ranges. Node 0 is the first, node 1 the last."""

    def __init__(self, unrolled: set[Repeat], counting: bool) -> None:
        self.empty: list[list[tuple[int, int]]] = [[], []]  # (target, mark)
        self.edges: list[list[tuple[int, int, int]]] = [[], []]  # (first byte, last byte, target)
        self.owner = [0, 0]  # the loop that a node lies in, from 1
        self.repeats: list[Repeat] = []  # of the loops
        self.unrolled, self.counting = unrolled, counting

    def node(self, owner: int) -> int:
        if len(self.empty) >= MOST_NODES:
            raise _TooLarge
        self.empty.append([])
        self.edges.append([])
        self.owner.append(owner)
        return len(self.empty) - 1

    def add(self, node: Node, start: int, end: int, owner: int) -> None:
        """Ways from ``start`` to ``end``; none that comes back to ``start``."""
        if isinstance(node, Chars):
            known: dict[tuple[tuple[int, int], ...], int] = {(): end}
            for sequence in utf8(node.ranges):
                for i in reversed(range(1, len(sequence))):
                    rest = tuple(sequence[i:])
                    if rest not in known:
                        known[rest] = self.node(owner)
                        self.edges[known[rest]].append((*sequence[i], known[rest[1:]]))
                self.edges[start].append((*sequence[0], known[tuple(sequence[1:])]))
        elif isinstance(node, Choice):
            for option in node.options:
                self.add(option, start, end, owner)
        elif isinstance(node, Join):
            for i, part in enumerate(node.parts):
                following = end if i == len(node.parts) - 1 else self.node(owner)
                self.add(part, start, following, owner)
                start = following
            if not node.parts:
                self.empty[start].append((end, 0))
        elif self._is_counted(node, owner):
            self._count(node, start, end, owner)
        else:
            self._unroll(node, start, end, owner)

    def _is_counted(self, node: Repeat, owner: int) -> bool:
        most = node.least if node.most is None else node.most
        if not self.counting or owner or node in self.unrolled or most < 2:
            return False
        if any(most < max(r.least, r.most or 0) for r in _repeats(node.body)):
            return False  # the longer one inside is
        return most * size(node.body) > UNROLLED and not nullable(node.body)

    def _count(self, node: Repeat, start: int, end: int, owner: int) -> None:
        self.repeats.append(node)
        mine = len(self.repeats)
        first, last = self.node(mine), self.node(mine)
        self.add(node.body, first, last, mine)
        self.empty[start].append((first, ENTERS))
        self.empty[last] += [(first, ENTERS), (end, LEAVES)]
        if not node.least:
            self.empty[start].append((end, 0))

    def _unroll(self, node: Repeat, start: int, end: int, owner: int) -> None:
        for _ in range(node.least):
            following = self.node(owner)
            self.add(node.body, start, following, owner)
            start = following
        self.empty[start].append((end, 0))
        if node.most is None:
            around, back = self.node(owner), self.node(owner)
            self.empty[start].append((around, 0))
            self.add(node.body, around, back, owner)
            self.empty[back] += [(around, 0), (end, 0)]
        else:
            for _ in range(node.most - node.least):
                following = self.node(owner)
                self.add(node.body, start, following, owner)
                self.empty[following].append((end, 0))
                start = following


@lru_cache(maxsize=1 << 16)
def size(node: Node) -> int:
    """Nodes that a tree takes, about; repetitions unrolled."""
    if isinstance(node, Chars):
        return 1 + len({tuple(s[1:]) for s in utf8(node.ranges)})
    if isinstance(node, Repeat):
        return 2 + size(node.body) * max(1, node.least, node.most or 0)
    return 1 + sum(map(size, node[0]))


@lru_cache(maxsize=1 << 16)
def nullable(node: Node) -> bool:
    """Whether the empty text matches."""
    if isinstance(node, Chars):
        return False
    if isinstance(node, Repeat):
        return not node.least or nullable(node.body)
    return (all if isinstance(node, Join) else any)(map(nullable, node[0]))


def _determinise(nfa: _Nfa) -> Dfa:
    cuts = sorted({0} | {x for out in nfa.edges for low, high, _ in out for x in (low, high + 1) if x < 256})
    classes = np.searchsorted(cuts, np.arange(256), side="right") - 1
    class_of = [*classes.tolist(), len(cuts)]
    numbers: dict[frozenset[int], int] = {frozenset([0]): 0}
    todo = [frozenset([0])]
    rows: list[dict[int, tuple[int, bool, bool]]] = []
    accepts = []
    work = 0
    for kernel in todo:  # grows
        reached = _closure(nfa, kernel)
        moves: dict[int, set[tuple[int, bool, bool]]] = {}
        for node, (left, enters) in reached.items():
            for low, high, target in nfa.edges[node]:
                work += class_of[high + 1] - class_of[low] if high < 255 else len(cuts) - class_of[low]
                for c in range(class_of[low], class_of[high] + 1):
                    moves.setdefault(c, set()).add((target, left, enters))
        work += len(reached)
        row = {}
        for c, found in moves.items():
            kinds = {(nfa.owner[target], left, enters) for target, left, enters in found}
            if len(kinds) > 1:
                involved = {k[0] for k in kinds} | {nfa.owner[n] for n in kernel}
                raise _Ambiguous(involved - {0})
            ((_, left, enters),) = kinds
            if left and enters:  # a token has one number for what it adds
                raise _Ambiguous({nfa.owner[n] for n in kernel})
            following = frozenset(target for target, _, _ in found)
            if following not in numbers:
                numbers[following] = len(numbers)
                todo.append(following)
            row[c] = numbers[following], left, enters
        rows.append(row)
        accepts.append(1 in reached)
        if work > MOST_WORK or len(numbers) > MOST_STATES:
            raise _TooLarge
    count = len(rows)
    dfa = Dfa(
        classes=classes,
        next=np.full((count + 1, len(cuts)), count, np.int32),
        left=np.zeros((count + 1, len(cuts)), bool),
        counts=np.zeros((count + 1, len(cuts)), bool),
        loop=np.asarray([nfa.owner[min(kernel)] - 1 for kernel in todo] + [-1], np.int32),
        accepts=np.asarray([*accepts, False]),
        loops=[Loop(r.least, UNLIMITED if r.most is None else r.most) for r in nfa.repeats],
    )
    for s, row in enumerate(rows):
        for c, move in row.items():
            dfa.next[s, c], dfa.left[s, c], dfa.counts[s, c] = move
    return dfa


def _closure(nfa: _Nfa, kernel: frozenset[int]) -> dict[int, tuple[bool, bool]]:
    """What empty edges lead to, with whether a loop is left and whether one is entered on the way."""
    reached = dict.fromkeys(kernel, (False, False))
    stack = list(kernel)
    while stack:
        node = stack.pop()
        left, enters = reached[node]
        for target, mark in nfa.empty[node]:
            now = left or mark == LEAVES, mark == ENTERS or (enters and mark != LEAVES)
            if target not in reached:
                reached[target] = now
                stack.append(target)
            elif reached[target] != now:
                raise _Ambiguous({nfa.owner[n] for n in (*kernel, node, target)} - {0})
    return reached


def _pruned(dfa: Dfa, pattern: str) -> Dfa:
    """Transitions from which no text can end lead to the dead state; states that are not reached go."""
    dead = len(dfa.accepts) - 1
    useful = dfa.accepts.copy()
    while True:
        more = useful | useful[dfa.next].any(axis=1)
        if (more == useful).all():
            break
        useful = more
    if not useful[0]:
        raise InputError(f"the pattern {shown(pattern)} matches no text at all; correct it")
    following = np.where(useful[dfa.next], dfa.next, dead)
    if (following[0] == dead).all():
        raise InputError(f"the pattern {shown(pattern)} matches the empty text only; there is nothing to sample")
    return dfa._replace(next=following)
