"""Constrained decoding: literal text and free fields become one token-level automaton in a dense table.

outlines-core turns a field's regular expression into transitions over the tokenizer's vocabulary; literals are chains of
their own tokens. The table lies on the device, so masking happens inside the decoding loop. Every field has a budget of
tokens, and a token that would leave too little budget to close the field is not allowed: whatever is drawn, the text parses.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from outlines_core import Index, Vocabulary

from esjax.config import InputError
from esjax.tokens.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class Field:
    """Free text that matches ``pattern`` (no bounded repetitions: they blow up the automaton), of at most ``max_tokens``."""

    pattern: str
    max_tokens: int


class Automaton(NamedTuple):
    """S states over V tokens. State 0 is the start; the state after the end-of-turn token is the end."""

    next: np.ndarray  # int16 [S, V], next state, or -1 where the token is not allowed
    part: np.ndarray  # int16 [S], which part (literal or field) of the template the state belongs to
    close: np.ndarray  # int32 [S], fewest tokens that leave the part from here
    budget: np.ndarray  # int32 [S], most tokens of this state's part


def compile_template(parts: list[str | Field], tokenizer: ChatTokenizer, vocab: int) -> tuple[Automaton, int]:
    """The automaton of a template that ends with the end-of-turn token, and the most tokens it can take.

    Raises InputError when a field's pattern matches no tokens or its budget is too small.
    """
    by_bytes: dict[bytes, list[int]] = {}
    for token, text in tokenizer.token_bytes().items():
        by_bytes.setdefault(text, []).append(token)
    words = Vocabulary(tokenizer.end_of_turn, {k: v for k, v in by_bytes.items() if k})
    edges: list[dict[int, int]] = [{}]  # state -> token -> state; the open states of a part are given its exit tokens
    owner = [0]
    open_states = [0]
    longest = 1
    entries: list[tuple[int, int]] = []  # fields and the states before them

    def add(part: int) -> int:
        edges.append({})
        owner.append(part)
        return len(edges) - 1

    def leave(token: int, part: int) -> int:
        state = add(part)
        for s in open_states:
            if token in edges[s]:
                raise InputError(
                    f"the text after a field begins with a token ({token}) that the field itself may contain"
                )
            edges[s][token] = state
        return state

    for number, part in enumerate(parts, start=1):
        if isinstance(part, str):
            for token in tokenizer.encode(part) if number == 1 else tokenizer.continuation(part):
                open_states = [leave(token, number)]
                longest += 1
            continue
        try:
            index = Index(part.pattern, words)
        except ValueError as e:
            raise InputError(f"the field {part.pattern!r} cannot be filled with this vocabulary ({e})") from e
        longest += part.max_tokens
        transitions = index.get_transitions()
        if index.get_initial_state() in index.get_final_states():
            raise InputError(f"the field {part.pattern!r} matches the empty text; it must take a token at least")
        states = {s: add(number) for s in {*transitions, *index.get_final_states()}}
        for s, out in transitions.items():
            edges[states[s]] |= {t: states[n] for t, n in out.items() if t != tokenizer.end_of_turn}
        (start,) = open_states
        edges[start] |= edges[states[index.get_initial_state()]]
        open_states = [states[s] for s in index.get_final_states()]
        entries.append((number, start))
    leave(tokenizer.end_of_turn, len(parts) + 1)
    if len(edges) > np.iinfo(np.int16).max:
        raise InputError(
            f"the constraint needs {len(edges)} states, more than {np.iinfo(np.int16).max}; simplify its patterns"
        )
    table = np.full((len(edges), vocab), -1, np.int16)
    for state, out in enumerate(edges):
        table[state, list(out)] = list(out.values())
    close = _distance_out(edges, owner)
    limits = {n: p.max_tokens if isinstance(p, Field) else 1 << 30 for n, p in enumerate(parts, start=1)}
    budget = np.asarray([limits.get(p, 1 << 30) for p in owner], np.int32)
    for number, start in entries:
        need = 1 + min(int(close[s]) for s in edges[start].values())
        if need > limits[number]:
            raise InputError(f"a field of {limits[number]} tokens is too small: its shortest text takes {need}")
    return Automaton(table, np.asarray(owner, np.int16), close, budget), longest


def _distance_out(edges: list[dict[int, int]], owner: list[int]) -> np.ndarray:
    """Tokens on the shortest way from each state until its part is left, not counting the leaving token itself."""
    leaving = [s for s, out in enumerate(edges) if not out or any(owner[n] != owner[s] for n in out.values())]
    back: dict[int, set[int]] = {}
    for s, out in enumerate(edges):
        for n in set(out.values()):
            if owner[n] == owner[s]:
                back.setdefault(n, set()).add(s)
    distance = np.full(len(edges), 1 << 20, np.int32)
    distance[leaving] = 0
    queue = deque(leaving)
    while queue:
        n = queue.popleft()
        for s in back.get(n, ()):
            if distance[s] > distance[n] + 1:
                distance[s] = distance[n] + 1
                queue.append(s)
    return distance
