"""Constrained decoding: literal text and free fields become one token-level automaton in dense tables.

outlines-core turns a field's regular expression into transitions over the tokenizer's vocabulary; literals are chains of
their own tokens. The tables lie on the device, so masking happens inside the decoding loop and reads one row of one table
for each reply. Every field has a budget of tokens, and a token that would leave too little budget to close the field is not
allowed: whatever is drawn, the text parses.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from outlines_core import Index, Vocabulary
from outlines_core.json_schema import build_regex_from_schema

from esjax.errors import InputError
from esjax.tokens.tokenizer import ChatTokenizer

BUCKET = 32  # the number of states is a multiple of this, so that similar constraints share a program
NEVER = np.iinfo(np.int16).max  # the cost of a token that is not allowed; every budget is below it
LEAVES = -1  # the cost of a token that leaves its part
LONGEST = 32000  # most tokens of any part
MARK = "\U0010ffff"  # ends a field's pattern, see _Graph.field; no text contains it


@dataclass(frozen=True)
class Field:
    """Free text that matches ``pattern`` (no bounded repetitions: they blow up the automaton), of so many tokens."""

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


START = 1


class Template(NamedTuple):
    """A compiled constraint. What every text begins with is given, not drawn: it belongs behind the prompt."""

    automaton: Automaton
    opening: list[int]  # tokens
    max_tokens: int  # most tokens drawn, the end-of-turn token included


def free(vocab: int) -> Automaton:
    """The automaton of no constraint."""
    zeros = np.zeros((BUCKET, vocab), np.int16)
    owner = np.zeros(BUCKET, np.int32)
    return Automaton(zeros, zeros, owner, np.full(BUCKET, np.iinfo(np.int32).max, np.int32), owner)


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


def schema_pattern(schema: str, where: str) -> str:
    """The regular expression of the JSON texts that a JSON schema allows. Raises InputError where it has none."""
    try:
        json.loads(schema)
        return str(build_regex_from_schema(schema))
    except Exception as e:  # outlines-core raises its own kinds
        raise InputError(f"{where}: not a JSON schema that can be followed ({' '.join(str(e).split())})") from e


class _Graph:
    """States and transitions while they are put together."""

    def __init__(self, tokenizer: ChatTokenizer, vocab: int) -> None:
        self.vocab, self.end = vocab, tokenizer.end_of_turn
        by_bytes: dict[bytes, list[int]] = {}
        for token, text in tokenizer.token_bytes().items():
            by_bytes.setdefault(text, []).append(token)
        self.mark = max(vocab, max(i for ids in by_bytes.values() for i in ids) + 1)  # an id that no token has
        self.words = Vocabulary(self.end, {k: v for k, v in by_bytes.items() if k} | {MARK.encode(): [self.mark]})
        self.edges: list[dict[int, int]] = [{}, {}]  # state -> token -> state
        self.owner = [0, 1]
        self.open = [START]  # the states that the next part's first token leaves
        self.longest = 1
        self.limits: dict[int, tuple[int, int]] = {}  # of the fields: fewest and most tokens
        self.entries: list[tuple[int, int]] = []  # fields and the states before them

    def _add(self, part: int) -> int:
        self.edges.append({})
        self.owner.append(part)
        return len(self.edges) - 1

    def leave(self, token: int, part: int) -> int:
        """A new state, reached by ``token`` from every open one."""
        state = self._add(part)
        for s in self.open:
            if token in self.edges[s]:
                raise InputError(
                    f"the text after a field begins with a token ({token}) that the field itself may contain"
                )
            self.edges[s][token] = state
        return state

    def literal(self, tokens: list[int], number: int) -> None:
        """Text as it is."""
        for token in tokens:
            self.open = [self.leave(token, number)]
            self.longest += 1

    def field(self, field: Field, number: int) -> None:
        """Text that matches the field's pattern."""
        if not 1 <= field.min_tokens <= field.max_tokens <= LONGEST:
            raise InputError(
                f"a field of {field.min_tokens} to {field.max_tokens} tokens: give 1 <= fewest <= most <= {LONGEST}"
            )
        # An Index leaves out ways on from a state in which the text could end already. So no text may end but by a mark,
        # which is an extra token: the states that it leaves are where the field's texts end.
        try:
            index = Index(f"(?:{field.pattern}){MARK}", self.words)
        except ValueError as e:
            raise InputError(f"the field {field.pattern!r} cannot be filled with this vocabulary ({e})") from e
        self.longest += field.max_tokens
        self.limits[number] = field.min_tokens, field.max_tokens
        transitions: dict[int, dict[int, int]] = index.get_transitions()
        ended = set(index.get_final_states())
        final = [s for s, out in transitions.items() if out.get(self.mark) in ended]
        if index.get_initial_state() in final:
            raise InputError(f"the field {field.pattern!r} matches the empty text; it must take a token at least")
        useful = _leading_to(set(final), transitions)  # the mark's bytes one by one lead nowhere
        states = {s: self._add(number) for s in transitions if s in useful}
        ends = (self.end, self.mark)
        for s, state in states.items():
            self.edges[state] |= {t: states[n] for t, n in transitions[s].items() if n in states and t not in ends}
        (start,) = self.open
        if index.get_initial_state() in states:
            self.edges[start] |= self.edges[states[index.get_initial_state()]]
        self.open = [states[s] for s in final]
        self.entries.append((number, start))

    def tables(self) -> Automaton:
        """The dense tables."""
        count = -(-len(self.edges) // BUCKET) * BUCKET
        if count > NEVER:
            raise InputError(f"the constraint needs {count} states, more than {NEVER}; simplify its patterns")
        close = self._distance_out()
        least, most = (np.asarray([self.limits.get(p, (0, LONGEST))[i] for p in self.owner], np.int32) for i in (0, 1))
        for number, start in self.entries:
            need = 1 + min((int(close[s]) for s in self.edges[start].values()), default=LONGEST)
            if need > self.limits[number][1]:
                raise InputError(
                    f"a field of {self.limits[number][1]} tokens is too small: its shortest text takes {need}"
                )
            self._check_least(number, start, close)
        following = np.full((count, self.vocab), -1, np.int16)
        cost = np.full((count, self.vocab), NEVER, np.int16)
        following[0] = cost[0] = 0
        most[0] = np.iinfo(np.int32).max
        owner = np.asarray(self.owner, np.int32)
        for state, out in enumerate(self.edges):
            tokens, states = np.asarray(list(out), np.int64), np.asarray(list(out.values()), np.int64)
            following[state, tokens] = states
            price = 1 + close[states]
            fits = price <= most[states]  # of the part that is entered
            leaves = np.where(fits, LEAVES, NEVER)
            cost[state, tokens] = np.where(owner[states] == owner[state], np.minimum(price, NEVER), leaves)
        rest = count - len(self.edges)
        return Automaton(following, cost, *(np.pad(x, (0, rest)) for x in (owner, most, least)))

    def _check_least(self, number: int, start: int, close: np.ndarray) -> None:
        """Raise InputError where a text may be neither left, for it is too short, nor continued, for that takes too long."""
        least, most = self.limits[number]
        reached = {n for n in self.edges[start].values() if 1 + close[n] <= most}
        for used in range(1, least):
            following = {}
            for s in reached:
                on = {n for n in self.edges[s].values() if self.owner[n] == number and used + 1 + close[n] <= most}
                following[s] = on
            if not all(following.values()):
                raise InputError(
                    f"a field of {least} to {most} tokens: some texts of its pattern end before and cannot go on; "
                    "ask for fewer or allow more"
                )
            reached = set().union(*following.values())

    def _distance_out(self) -> np.ndarray:
        """Tokens on the shortest way from each state until its part is left, not counting the leaving token itself."""
        leaving = [
            s
            for s, out in enumerate(self.edges)
            if not out or any(self.owner[n] != self.owner[s] for n in out.values())
        ]
        back: dict[int, set[int]] = {}
        for s, out in enumerate(self.edges):
            for n in set(out.values()):
                if self.owner[n] == self.owner[s]:
                    back.setdefault(n, set()).add(s)
        distance = np.full(len(self.edges), 1 << 20, np.int64)
        distance[leaving] = 0
        queue = deque(leaving)
        while queue:
            n = queue.popleft()
            for s in back.get(n, ()):
                if distance[s] > distance[n] + 1:
                    distance[s] = distance[n] + 1
                    queue.append(s)
        return distance


def _leading_to(goal: set[int], transitions: dict[int, dict[int, int]]) -> set[int]:
    """The states from which some way leads to one of the goal's."""
    back: dict[int, set[int]] = {}
    for s, out in transitions.items():
        for n in set(out.values()):
            back.setdefault(n, set()).add(s)
    reached, queue = set(goal), deque(goal)
    while queue:
        for s in back.get(queue.popleft(), set()) - reached:
            reached.add(s)
            queue.append(s)
    return reached
