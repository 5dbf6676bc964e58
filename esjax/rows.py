"""The token row: one shape for training, scoring and sampling.

A row is a *trunk* (a dialogue, or a prompt) followed by *branches* that leave the trunk at some position, so that what
several continuations share is computed once. Several examples, called segments, may be packed into one row::

    tokens    S   q1  r1  q2  r2 | h   a   b | h   d   e     trunk S q1 r1 q2 r2; branches 1 and 2 both answer q2
    position  0   1   2   3   4  | 4   5   6 | 4   5   6
    branch    0   0   0   0   0  | 1   1   1 | 2   2   2
    until     11  11  11  11  5  | 8   8   8 | 11  11  11    r2 is hidden from the branches, branch 1 from branch 2

Who sees whom is one integer a key: token i sees token j iff ``j <= i < until[j]`` (``sees``). It can be one, because the
branches of a segment lie in descending order of the position at which they leave: those that see a trunk token then follow
it without a gap, and it is seen until the end of the last of them. Padding sees itself alone.

A branch begins with the last token ``h`` of its prompt, so that the token before every target lies in the target's own
branch: the target of token i is always token i + 1.

Letters for dimensions, the same everywhere: B batch, T tokens (queries), S keys or cache slots, D model, N query heads,
K key/value heads, H head size, F feed-forward, V vocabulary, L layers, R LoRA rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

Layout = Literal["causal", "packed", "branched"]  # one trunk a row; trunks; trunks with branches
Array = Any  # a numpy or a JAX array: this module only uses what both have


class Rows(NamedTuple):
    """Arrays of shape [T] (one row) or [B, T] (a batch of rows)."""

    tokens: Array  # int32
    position: Array  # int32, rotary position; a branch continues from where it leaves the trunk
    segment: Array  # int32, which packed example; 0 is padding
    branch: Array  # int32, 0 is the trunk, 1.. are the branches of that segment
    until: Array  # int32, the first token of the row from which on this one is no longer seen
    weight: Array  # float32, loss weight of predicting the next token; 0 is not a target


def trunk(tokens: Sequence[int] | np.ndarray, weight: Sequence[float] | np.ndarray | None = None) -> Rows:
    """A row of one segment without branches. ``weight[i]`` is for predicting ``tokens[i + 1]``; none means no targets."""
    n = len(tokens)
    return Rows(
        tokens=np.asarray(tokens, np.int32),
        position=np.arange(n, dtype=np.int32),
        segment=np.ones(n, np.int32),
        branch=np.zeros(n, np.int32),
        until=np.full(n, n, np.int32),
        weight=np.zeros(n, np.float32) if weight is None else np.asarray(weight, np.float32),
    )


def prompt_with_replies(prompt: Sequence[int], replies: Sequence[Sequence[int]]) -> Rows:
    """A prompt as the trunk, and each reply as a branch whose every token is a target of weight 1.

    A lone reply needs no branch: it stays on the trunk, which costs one token less.
    """
    if len(replies) != 1:
        return trunk_with_replies(prompt, [(len(prompt), reply) for reply in replies])
    (reply,) = replies
    if len(prompt) < 2 or not reply:
        raise ValueError("a prompt of at least two tokens and non-empty replies are needed")
    return trunk([*prompt, *reply], [0.0] * (len(prompt) - 1) + [1.0] * len(reply) + [0.0])


def trunk_with_replies(stem: Sequence[int], replies: Sequence[tuple[int, Sequence[int]]]) -> Rows:
    """A trunk that several replies leave: reply ``(n, tokens)`` is branch i = 1, 2, ... and answers ``stem[:n]``.

    The last token of its prompt opens each branch, so the trunk holds what the longest prompt has before that. The branch
    with the longest prompt comes first.
    """
    if not replies or any(not tokens or not 2 <= n <= len(stem) for n, tokens in replies):
        raise ValueError("a prompt of at least two tokens and non-empty replies are needed")
    parts = [trunk(stem[: max(n for n, _ in replies) - 1])]
    end = len(parts[0].tokens)
    for i, (n, tokens) in sorted(enumerate(replies, start=1), key=lambda reply: -reply[1][0]):
        length = len(tokens) + 1
        end += length
        parts[0].until[: n - 1] = end
        parts.append(
            Rows(
                tokens=np.asarray([stem[n - 1], *tokens], np.int32),
                position=np.arange(n - 1, n - 1 + length, dtype=np.int32),
                segment=np.ones(length, np.int32),
                branch=np.full(length, i, np.int32),
                until=np.full(length, end, np.int32),
                weight=np.asarray([1.0] * len(tokens) + [0.0], np.float32),
            )
        )
    return concatenate(parts)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with together."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices of lists is far quicker than a loop over tokens
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Join rows of shape [T_i] end to end, fields as they are."""
    return Rows(*(np.concatenate(fields) for fields in zip(*parts, strict=True)))


def pack(examples: Sequence[Rows], length: int) -> Rows:
    """Pack single-segment rows into one row of ``length`` tokens as segments 1, 2, ..., padded with segment 0."""
    used, parts = 0, []
    for i, e in enumerate(examples, start=1):
        parts.append(e._replace(segment=np.full_like(e.segment, i), until=e.until + np.int32(used)))
        used += len(e.tokens)
    if used > length:
        raise ValueError(f"{used} tokens do not fit a row of {length}")
    padding = trunk([0] * (length - used))
    itself = np.arange(used + 1, length + 1, dtype=np.int32)
    return concatenate([*parts, padding._replace(segment=np.zeros_like(padding.segment), until=itself)])


def stack(rows: Sequence[Rows]) -> Rows:
    """Rows of shape [T] to one batch [B, T]."""
    return Rows(*(np.stack(fields) for fields in zip(*rows, strict=True)))


def sees(until: Array, query: Array, key: Array) -> Array:
    """Who sees whom: bool [..., Q, S], true where the query at ``query`` [..., Q] attends to the key at ``key`` [..., S].

    The one rule of every way to compute attention: a key is seen from where it stands until ``until`` [..., S].
    """
    at = query[..., :, None]
    return (key[..., None, :] <= at) & (at < until[..., None, :])


def near(window: int, query: Array, key: Array) -> Array:
    """Who is near enough: bool [..., Q, S], true where a position [..., Q] lies fewer than ``window`` behind a key's [..., S].

    In layers with a sliding window a query attends to what it sees and what is near.
    """
    return query[..., :, None] - key[..., None, :] < window


def layout(examples: Sequence[Rows], packed: bool) -> Layout:
    """What rows of these examples hold at most; ``packed`` says that a row may hold several.

    Padding at the end of a causal row changes nothing: no other token sees it.
    """
    if any((e.branch != 0).any() for e in examples):
        return "branched"
    return "packed" if packed else "causal"


def check(rows: Rows) -> None:
    """Raise ValueError unless the batch [B, T] obeys the rules above and every row has a target."""
    tokens, position, segment, branch, until, weight = (np.asarray(x) for x in rows)
    if not (weight != 0).any(axis=1).all():
        raise ValueError(f"row {int(np.argmin((weight != 0).any(axis=1)))} has no target token")
    follows = (segment[:, :-1] == segment[:, 1:]) & (
        branch[:, :-1] == branch[:, 1:]
    )  # the next token is of this branch
    if (weight[:, :-1][~follows | (segment[:, 1:] == 0)] != 0).any() or (weight[:, -1] != 0).any():
        raise ValueError("a weight stands where the next token is of another branch, another segment or padding")
    for row in range(len(tokens)):
        cuts = [0, *(np.flatnonzero(~follows[row]) + 1), tokens.shape[1]]
        wanted = np.arange(1, tokens.shape[1] + 1)
        pieces: set[tuple[int, int]] = set()
        home, stem, room = (
            0,
            slice(0, 0),
            0,
        )  # the newest trunk: its segment, where it lies, how much of it is seen last
        for start, stop in pairwise(cuts):
            s, b, first = int(segment[row, start]), int(branch[row, start]), int(position[row, start])
            if s == 0:
                continue
            if (s, b) in pieces:
                raise ValueError(f"row {row}: branch {b} of segment {s} does not lie in one piece")
            pieces.add((s, b))
            if b == 0:
                home, stem, room = s, slice(start, stop), stop - start
            elif s != home:
                raise ValueError(f"row {row}: a trunk must come before its branches, and segment {s} begins with one")
            elif first > room:
                raise ValueError(
                    f"row {row}: branch {b} of segment {s} leaves its trunk behind its end, or behind the one before"
                )
            if (position[row, start:stop] != np.arange(stop - start) + (first if b else 0)).any():
                raise ValueError(f"row {row}: the positions of branch {b} of segment {s} do not count up")
            wanted[start:stop] = stop
            if b:
                room = first
                wanted[stem.start : stem.start + first] = stop
        if (until[row] != wanted).any():
            raise ValueError(f"row {row}: token {int(np.argmax(until[row] != wanted))} is seen by the wrong ones")
