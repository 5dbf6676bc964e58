"""Constrained decoding: literal text and free fields become one token-level automaton in dense tables.

A field's regular expression becomes an automaton over bytes, and that one over the tokenizer's vocabulary; literals are
chains of their own tokens. The tables lie on the device, so masking happens inside the decoding loop and reads one row of one
table for each reply. Every field has a budget of tokens, and a token that would leave too little budget to close the field is
not allowed: whatever is drawn, the text parses. Long repetitions ("at most 500 characters") are counted in the loop.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from esjax.errors import InputError
from esjax.sample.automaton import UNLIMITED, advice, build
from esjax.sample.pattern import parse, shown
from esjax.sample.vocabulary import FAR, follow_all, leading_to, strides_of, trie
from esjax.tokens.tokenizer import ChatTokenizer

BUCKET = 32  # the number of states is a multiple of this, so that similar constraints share a program
NEVER = np.iinfo(np.int16).max  # the cost of a token that is not allowed; every budget is below it
LEAVES = -1  # the cost of a token that leaves its part
LONGEST = 32000  # most tokens of any part
TABLE_BYTES = 1 << 29  # most that the tables of a constraint may take


@dataclass(frozen=True)
class Field:
    """Free text that matches ``pattern``, of so many tokens; 0 as the fewest allows the empty text, if the pattern does."""

    pattern: str
    max_tokens: int
    min_tokens: int = 1


class Automaton(NamedTuple):
    """S states over V tokens. State 0 allows everything for ever; a constrained reply begins in START."""

    next: np.ndarray  # int16 [S, V], next state; -1 where the token is not allowed
    cost: (
        np.ndarray
    )  # int16 [S, V], tokens of the part that the token and the shortest way to close it take; LEAVES, NEVER
    part: np.ndarray  # int32 [S], which part (literal or field) of the template the state belongs to
    most: np.ndarray  # int32 [S], most tokens of this state's part
    least: np.ndarray  # int32 [S], fewest tokens of this state's part


class Counted(NamedTuple):
    """An automaton some of whose states lie in counted repetitions: the first five are ``Automaton``'s."""

    next: np.ndarray
    cost: np.ndarray
    part: np.ndarray
    most: np.ndarray
    least: np.ndarray
    units: np.ndarray  # int16 [S, V], repetitions that the token begins; ~n where it leaves the repetition after n more
    fewest: np.ndarray  # int32 [S], fewest repetitions of the one that this state lies in
    limit: np.ndarray  # int32 [S], most repetitions
    stride: np.ndarray  # int32 [S], some token begins k repetitions, for each k up to this; 0 in states outside


Constraint = Automaton | Counted
START = 1


class Template(NamedTuple):
    """A compiled constraint. What every text begins with is given, not drawn: it belongs behind the prompt."""

    automaton: Constraint
    opening: list[int]  # tokens
    max_tokens: int  # most tokens drawn, the end-of-turn token included


def free(vocab: int) -> Automaton:
    """The automaton of no constraint."""
    zeros = np.zeros((BUCKET, vocab), np.int16)
    owner = np.zeros(BUCKET, np.int32)
    return Automaton(zeros, zeros, owner, np.full(BUCKET, np.iinfo(np.int32).max, np.int32), owner)


def narrowed(automaton: Constraint, drawable: np.ndarray | None) -> Constraint:
    """The same with a state 0 that allows these tokens [V] alone, if given. It costs the loop nothing."""
    if drawable is None:
        return automaton
    cost, most = automaton.cost.copy(), automaton.most.copy()
    cost[0] = np.where(drawable, LEAVES, NEVER)  # what leaves is allowed for ever, and nothing costs NEVER
    most[0] = 0
    return automaton._replace(cost=cost, most=most)


def padded(automaton: Constraint) -> Constraint:
    """The same with states that nothing reaches, up to a power of two, so that constraints that come and go share programs."""
    more = (1 << (len(automaton.part) - 1).bit_length()) - len(automaton.part)
    return type(automaton)(*(np.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]) for x in automaton))


def drawable(tokenizer: ChatTokenizer, vocab: int) -> np.ndarray:
    """Which of the embedding's tokens [V] may be drawn: text and the end of the turn, no other control token, no padding."""
    out = np.zeros(vocab, bool)
    known = np.asarray(list(tokenizer.hf.get_vocab().values()))
    out[known[known < vocab]] = True
    out[[i for i in tokenizer.special if i < vocab]] = False
    out[[i for i in tokenizer.stops if i < vocab]] = True
    return out


def compile_template(parts: list[str | Field], tokenizer: ChatTokenizer, vocab: int) -> Template:
    """The constraint of a text that consists of these parts and then ends its turn.

    Raises InputError when a field's pattern matches no tokens or its budget is too small or too large.
    """
    opening = tokenizer.encode(parts[0]) if isinstance(parts[0], str) else []
    graph = _Graph(tokenizer, vocab)
    for number, part in enumerate(parts[1:] if opening else parts, start=2):
        if isinstance(part, str):
            graph.literal(tokenizer.continuation(part), number)
        else:
            graph.field(part, number)
    graph.leave(tokenizer.end_of_turn, len(parts) + 2)
    return Template(graph.tables(), opening, graph.longest)


class _State(NamedTuple):
    """Of the repetition that a state lies in: fewest and most repetitions, and its own number; see Counted."""

    fewest: int = 0
    limit: int = UNLIMITED
    loop: int = -1


class _Graph:
    """States and transitions while they are put together."""

    def __init__(self, tokenizer: ChatTokenizer, vocab: int) -> None:
        self.vocab, self.end = vocab, tokenizer.end_of_turn
        texts = tokenizer.token_bytes()
        self.levels = trie({i: text for i, text in texts.items() if i < vocab and i != self.end})
        self.most_states = min(NEVER, TABLE_BYTES // (4 * vocab))
        self.rows: list[np.ndarray] = []  # int16 [V] a state: the next state, -1 for none
        self.units: dict[int, np.ndarray] = {}  # int16 [V] of states whose tokens count
        self.loops: dict[int, _State] = {}  # of states in counted repetitions
        self.stride: list[int] = []  # of the repetitions
        self.owner: list[int] = []
        for part in (0, 1):
            self._add(part, self._row())
        self.open = [START]  # the states that the next part's first token leaves
        self.longest = 1
        self.limits: dict[int, tuple[int, int]] = {}  # of the fields: fewest and most tokens
        self.entries: list[tuple[int, int]] = []  # fields and the states before them

    def _row(self) -> np.ndarray:
        return np.full(self.vocab, -1, np.int16)

    def _add(self, part: int, row: np.ndarray) -> int:
        self.rows.append(row)
        self.owner.append(part)
        return len(self.rows) - 1

    def _make_room(self, count: int, remedy: str) -> None:
        if len(self.rows) + count > self.most_states:
            raise InputError(
                f"the constraint needs {len(self.rows) + count} states or more, of {self.most_states} at most; {remedy}"
            )

    def leave(self, token: int, part: int) -> int:
        """A new state, reached by ``token`` from every open one."""
        state = self._add(part, self._row())
        for s in self.open:
            if self.rows[s][token] >= 0:
                raise InputError(
                    f"the text after a field begins with a token ({token}) that the field itself may contain"
                )
            self.rows[s][token] = state
            if s in self.loops:
                self.units[s][token] = ~0
        return state

    def literal(self, tokens: list[int], number: int) -> None:
        """Text as it is."""
        self._make_room(len(tokens), "shorten its texts")
        for token in tokens:
            self.open = [self.leave(token, number)]
            self.longest += 1

    def field(self, field: Field, number: int) -> None:
        """Text that matches the field's pattern."""
        if not 0 <= field.min_tokens <= field.max_tokens <= LONGEST or field.max_tokens < 1:
            raise InputError(
                f"a field of {field.min_tokens} to {field.max_tokens} tokens: give 0 <= fewest <= most <= {LONGEST}"
            )
        tree = parse(field.pattern)
        room = partial(self._make_room, remedy=advice(tree))
        dfa = build(tree, field.pattern, counting=field.min_tokens <= 1)
        found = follow_all(dfa, self.levels, self.vocab, room)
        strides = strides_of(dfa, *found)
        if 0 in strides:
            dfa = build(tree, field.pattern, counting=False)
            found, strides = follow_all(dfa, self.levels, self.vocab, room), []
        rows, units = found
        self.longest += field.max_tokens
        self.limits[number] = field.min_tokens, field.max_tokens
        useful = leading_to({s for s in rows if dfa.accepts[s]}, rows, len(dfa.accepts))
        if 0 not in useful or (len(useful) == 1 and not (rows[0] == 0).any()):
            raise InputError(f"the pattern {shown(field.pattern)} cannot be written with this tokenizer's tokens")
        (start,) = self.open
        again = any((rows[s] == 0).any() for s in useful)
        number_of = np.full(len(dfa.accepts), -1, np.int16)
        for s in sorted(useful):
            if s or again:
                number_of[s] = self._add(number, self._row())
        for s in useful:
            row, state = number_of[rows.pop(s)], int(number_of[s])
            for mine in ([start] if not s else []) + ([state] if state >= 0 else []):
                self.rows[mine] = row.copy()
                if dfa.loops:
                    self.units[mine] = units[s].copy()
            if dfa.loop[s] >= 0:
                loop = int(dfa.loop[s])
                self.loops[state] = _State(*dfa.loops[loop], len(self.stride) + loop)
        self.stride += strides
        self.open = [int(number_of[s]) for s in useful if dfa.accepts[s] and number_of[s] >= 0]
        if dfa.accepts[0] and not field.min_tokens:
            self.open.append(start)
        self.entries.append((number, start))

    def tables(self) -> Constraint:
        """The dense tables."""
        self._make_room(0, "simplify its patterns")
        states = len(self.rows)
        count = -(-states // BUCKET) * BUCKET
        close = self._distance_out()
        least, most = (np.asarray([self.limits.get(p, (0, LONGEST))[i] for p in self.owner], np.int32) for i in (0, 1))
        following = np.full((count, self.vocab), -1, np.int16)
        cost = np.full((count, self.vocab), NEVER, np.int16)
        following[0] = cost[0] = 0
        most[0] = np.iinfo(np.int32).max
        owner = np.asarray(self.owner, np.int32)
        for state, row in enumerate(self.rows[1:], start=1):
            following[state] = row
            tokens = np.flatnonzero(row >= 0)
            to = row[tokens]
            price = 1 + close[to] + self._reserve(state, tokens, to)
            leaves = np.where(price <= most[to], LEAVES, NEVER)  # of the part that is entered
            cost[state, tokens] = np.where(owner[to] == owner[state], np.minimum(price, NEVER), leaves)
        for number, start in self.entries:
            self._check_budget(number, start, close)
        rest = count - states
        made = Automaton(following, cost, *(np.pad(x, (0, rest)) for x in (owner, most, least)))
        if not self.loops:
            return made
        units = np.zeros((count, self.vocab), np.int16)
        for state, row in self.units.items():
            units[state] = row
        kinds = [self.loops.get(s, _State()) for s in range(count)]
        fewest, limit = (np.asarray([k[i] for k in kinds], np.int32) for i in (0, 1))
        stride = np.asarray([self.stride[k.loop] if k.loop >= 0 else 0 for k in kinds], np.int32)
        return Counted(*made, units, fewest, limit, stride)

    def _reserve(self, state: int, tokens: np.ndarray, to: np.ndarray) -> np.ndarray:
        """Tokens that the fewest repetitions still take, where a token enters a counted repetition."""
        out = np.zeros(len(tokens), np.int64)
        if state in self.loops or state not in self.units:
            return out
        for target in np.unique(to).tolist():
            if target in self.loops:
                kind, mine = self.loops[target], to == target
                left = np.maximum(0, kind.fewest - self.units[state][tokens[mine]].astype(np.int64))
                out[mine] = -(-left // self.stride[kind.loop])
        return out

    def _check_budget(self, number: int, start: int, close: np.ndarray) -> None:
        """Raise InputError where no text is short enough, or where one may be neither left, for it is too short, nor
        continued, for that takes too long."""
        least, most = self.limits[number]
        tokens = np.flatnonzero(self.rows[start] >= 0)
        tokens = tokens[np.asarray(self.owner)[self.rows[start][tokens]] == number]
        to = self.rows[start][tokens]
        need = 1 + int((close[to] + self._reserve(start, tokens, to)).min(initial=LONGEST))
        if need > most and start not in self.open:
            raise InputError(f"a field of {most} tokens is too small: its shortest text takes {need}")
        reached = {n for n in np.unique(to).tolist() if 1 + close[n] <= most}
        for used in range(1, least):
            following = {}
            for s in reached:
                row = np.unique(self.rows[s][self.rows[s] >= 0]).tolist()
                following[s] = {n for n in row if self.owner[n] == number and used + 1 + close[n] <= most}
            if not all(following.values()):
                raise InputError(
                    f"a field of {least} to {most} tokens: some texts of its pattern end before and cannot go on; "
                    "ask for fewer or allow more"
                )
            reached = set().union(*following.values())

    def _distance_out(self) -> np.ndarray:
        """Tokens on the shortest way from each state until its part is left, not counting the leaving token itself.

        In a counted repetition: on the way that begins no more of them, through a state that can take any number.
        """
        back: dict[int, dict[int, int]] = {}
        distance = np.full(len(self.rows), FAR, np.int64)
        owner = np.asarray(self.owner)
        for s, row in enumerate(self.rows):
            tokens = np.flatnonzero(row >= 0)
            if s in self.loops:  # a state from which no token stays is on the way, but none to leave from
                units = self.units[s][tokens]
                turns = (row[tokens] == s) & (units == 1)
                tokens = tokens[(units == 0) | ((units == ~0) & turns.any())]
            to = row[tokens]
            if (not len(to) and s not in self.loops) or (owner[to] != owner[s]).any():
                distance[s] = 0
            weight = 1 + self._reserve(s, tokens, to)
            for n, w in zip(*_cheapest(to[owner[to] == owner[s]], weight[owner[to] == owner[s]]), strict=True):
                back.setdefault(n, {})[s] = w
        heap = [(0, int(s)) for s in np.flatnonzero(distance == 0)]
        while heap:
            d, n = heapq.heappop(heap)
            if d > distance[n]:
                continue
            for s, w in back.get(n, {}).items():
                if distance[s] > d + w:
                    distance[s] = d + w
                    heapq.heappush(heap, (d + w, s))
        return distance


def _cheapest(to: np.ndarray, weight: np.ndarray) -> tuple[list[int], list[int]]:
    """Each target once, with its smallest weight."""
    best = np.full(int(to.max(initial=-1)) + 1, FAR, np.int64)
    np.minimum.at(best, to, weight)
    targets = np.flatnonzero(best < FAR)
    return targets.tolist(), best[targets].tolist()
