"""A byte automaton over a tokenizer's vocabulary: where each token leads, and which states that makes useful."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from esjax.sample.automaton import UNLIMITED, Dfa

TOGETHER = 64  # states whose tokens are followed at once
FAR = 1 << 20  # more than any token has


class Level(NamedTuple):
    """Prefixes of N tokens that have the same length in bytes."""

    parent: np.ndarray  # [N], of the level before
    byte: np.ndarray  # [N]
    ends: np.ndarray  # [E], prefixes that are tokens
    tokens: np.ndarray  # [E], which


def trie(texts: dict[int, bytes]) -> list[Level]:
    """The tokens' prefixes, so that what tokens have in common is followed once."""
    levels = []
    left = [(token, text, 0) for token, text in texts.items() if text]
    depth = 0
    while left:
        nodes: dict[tuple[int, int], int] = {}
        here = [nodes.setdefault((parent, text[depth]), len(nodes)) for _, text, parent in left]
        depth += 1
        ending = [(n, token) for n, (token, text, _) in zip(here, left, strict=True) if len(text) == depth]
        ends, tokens = np.asarray(ending, np.int64).reshape(-1, 2).T
        keys = np.asarray(list(nodes), np.int64)
        levels.append(Level(keys[:, 0], keys[:, 1], ends, tokens))
        left = [(token, text, n) for n, (token, text, _) in zip(here, left, strict=True) if len(text) > depth]
    return levels


def _follow(dfa: Dfa, levels: list[Level], states: np.ndarray, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each token leads from these states [N]: the next states [N, V], the dead one for none, and units [N, V].

    Units are the repetitions of a counted loop that a token begins, and ~n where it leaves the loop after n more.
    """
    dead = len(dfa.accepts) - 1
    ends = np.full((len(states), vocab), dead, np.int32)
    units = np.zeros((len(states), vocab if dfa.loops else 0), np.int16)
    least, most = (np.asarray([*(x[i] for x in dfa.loops), d], np.int32) for i, d in ((0, 0), (1, UNLIMITED)))
    inside = dfa.loop[states][:, None] >= 0
    now, place = states[:, None], np.zeros(1, np.int64)
    gone, spent = np.zeros(now.shape, bool), np.zeros(now.shape, np.int32)
    for level in levels:
        before = place[level.parent]
        kept = np.flatnonzero(before >= 0)
        before, c = before[kept], dfa.classes[level.byte[kept]]
        old = now[:, before]
        now = dfa.next[old, c]
        if dfa.loops:
            gone, spent = gone[:, before], spent[:, before]
            left, counts, loop = dfa.left[old, c], dfa.counts[old, c], dfa.loop[old]
            whole = left & ~inside  # a repetition that began in this token
            wrong = whole & ((spent < least[loop]) | (spent > most[loop]))
            wrong |= gone & counts
            gone, spent = gone | (left & inside), np.where(whole, 0, spent) + counts
            now = np.where(wrong | (~gone & (spent > most[dfa.loop[now]])), dead, now)
        alive = np.flatnonzero((now != dead).any(axis=0))
        now = now[:, alive]
        place = np.full(len(level.parent), -1)
        place[kept[alive]] = np.arange(len(alive))
        found = place[level.ends]
        found, tokens = found[found >= 0], level.tokens[found >= 0]
        ends[:, tokens] = now[:, found]
        if dfa.loops:
            gone, spent = gone[:, alive], spent[:, alive]
            units[:, tokens] = np.where(gone, ~spent, np.where(dfa.loop[now] >= 0, spent, 0))[:, found]
        if not len(alive):
            break
    return ends, units


def follow_all(
    dfa: Dfa, levels: list[Level], vocab: int, make_room: Callable[[int], None]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Next states and units, both [V], of all states that tokens lead to; ``make_room`` is told how many there are so far."""
    rows: dict[int, np.ndarray] = {}
    units: dict[int, np.ndarray] = {}
    seen = np.zeros(len(dfa.accepts), bool)
    seen[[0, -1]] = True
    todo = np.asarray([0])
    while len(todo):
        make_room(int(seen.sum()))
        block, todo = todo[:TOGETHER], todo[TOGETHER:]
        ends, spent = _follow(dfa, levels, block, vocab)
        for i, s in enumerate(block.tolist()):
            rows[s], units[s] = ends[i].astype(np.int16), spent[i]
        reached = np.zeros(len(seen), bool)
        reached[ends] = True
        todo = np.concatenate([todo, np.flatnonzero(reached & ~seen)])
        seen |= reached
    return rows, units


def strides_of(dfa: Dfa, rows: dict[int, np.ndarray], units: dict[int, np.ndarray]) -> list[int]:
    """For each counted repetition the largest K for which tokens that lead from a state to itself begin 1, ..., K of them.

    0 where no state has such a token.
    """
    out = [FAR] * len(dfa.loops)
    for s, row in rows.items():
        loop = dfa.loop[s]
        if loop >= 0:
            have = set(np.unique(units[s][row == s]).tolist())
            k = next(k for k in range(1, len(have) + 2) if k not in have) - 1
            out[loop] = min(out[loop], k) if k else out[loop]
    return [k if k < FAR else 0 for k in out]


def leading_to(goal: set[int], rows: dict[int, np.ndarray], count: int) -> set[int]:
    """The states from which some way leads to one of the goal's."""
    back: dict[int, list[int]] = {}
    for s, row in rows.items():
        for n in np.flatnonzero(np.bincount(row, minlength=count)).tolist():
            back.setdefault(n, []).append(s)
    reached, todo = set(goal), list(goal)
    while todo:
        for s in back.get(todo.pop(), ()):
            if s not in reached:
                reached.add(s)
                todo.append(s)
    return reached
