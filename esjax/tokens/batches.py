"""Which examples go into which packed row, and which rows into which step: a function of lengths and seed alone."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import count, islice

import numpy as np

from esjax import rows
from esjax.errors import InputError
from esjax.rows import Rows

Packed = list[int]  # indices of the examples packed into one row
TAKEN, MOST_TAKEN, TRIES = (
    4,
    12,
    6,
)  # rows packed anew at a time, with so many examples at most; how often, for each row
ENOUGH = 1.01  # so many times the rows that would be full are few enough


def share_trunks(prompts: Sequence[Sequence[int]], sizes: Sequence[int], room: int) -> list[list[int]]:
    """Group examples whose prompts begin one another, so that the longest prompt of a group can be the trunk of all.

    Args:
        prompts: token ids.
        sizes: tokens of an example's branches.
        room: most tokens of a group, trunk and branches.

    Returns: indices, ascending within a group; groups in the order of their first members.
    """
    groups: list[list[int]] = []
    stem: Sequence[int] = ()
    used = room + 1
    # In descending order whatever begins with a prompt stands right before it, so only the newest group can take it.
    for i in sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i), reverse=True):
        if list(stem[: len(prompts[i])]) == list(prompts[i]) and used + sizes[i] <= room:
            groups[-1].append(i)
            used += sizes[i]
        else:
            groups.append([i])
            stem, used = prompts[i], len(prompts[i]) - 1 + sizes[i]
    return sorted(sorted(group) for group in groups)


def group_by_prefix(prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
    """Group prompts that begin alike, so that what they share need be computed once. Returns indices.

    Every member of a group shares at least half of its own tokens with the group's longest prompt, which comes first; no
    group has more than ``most`` members. Groups come in the order of their work, the largest first.
    """
    groups: list[list[int]] = []
    # In lexicographic order prompts that begin alike stand together; whatever does not fit a group's longest goes round again.
    left = sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i))
    while left:
        later: list[int] = []
        cluster: list[int] = []
        for i in [*left, None]:
            if i is not None and (not cluster or _shares_half(prompts[i], prompts[cluster[-1]])):
                cluster.append(i)
                continue
            longest = max(cluster, key=lambda j: len(prompts[j]))
            members = [j for j in cluster if _mostly_of(prompts[j], prompts[longest])]
            later += sorted(set(cluster) - set(members))
            members.sort(key=lambda j: (-len(prompts[j]), j))
            groups += [members[n : n + most] for n in range(0, len(members), most)]
            cluster = [] if i is None else [i]
        left = sorted(later, key=lambda i: (list(prompts[i]), i))
    return sorted(groups, key=lambda g: (-len(g), -len(prompts[g[0]]), g))


def _shares_half(a: Sequence[int], b: Sequence[int]) -> bool:
    return 2 * rows.common_prefix(a, b) >= min(len(a), len(b))


def _mostly_of(prompt: Sequence[int], trunk: Sequence[int]) -> bool:
    return 2 * rows.common_prefix(prompt, trunk) >= len(prompt)


def pack(lengths: Sequence[int], row_length: int, seed: tuple[int, ...] = (0,)) -> list[Packed]:
    """Pack examples into as few rows as a short search finds, a function of the lengths and the seed.

    Best-fit decreasing (Johnson et al. 1974) begins; then a few rows at a time, the emptier the likelier, are taken apart and
    filled anew, each as full as their examples can make it, which is kept where fuller rows come of it. Rows stand in the
    order of their first examples. Raises InputError when an example is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    if len(sizes) and sizes.max() > row_length:
        raise InputError(
            f"an example has {sizes.max()} tokens, a row {row_length}; raise row_length or lower the window"
        )
    rng = np.random.default_rng(seed)
    packed = _best_fit([int(i) for i in np.argsort(-sizes, kind="stable")], sizes, row_length)
    filled = np.asarray([sizes[row].sum() for row in packed])
    enough = sizes.sum() / row_length * ENOUGH
    for _ in range(TRIES * len(packed)):
        if len(packed) - 1 < enough:
            break
        empty = row_length + 1.0 - filled
        some = rng.choice(len(packed), min(TAKEN, len(packed)), replace=False, p=empty / empty.sum()).tolist()
        left = [i for r in some for i in packed[r]]
        if len(left) > MOST_TAKEN:
            continue
        after: list[Packed] = []
        while left:
            after.append(_fullest(left, sizes, row_length))
            left = [i for i in left if i not in after[-1]]
        totals = [int(sizes[row].sum()) for row in after]
        if len(after) <= len(some) and sum(n * n for n in totals) > (filled[some] ** 2).sum():
            for r, row, n in zip(some, after, totals, strict=False):
                packed[r], filled[r] = row, n
            for r in sorted(some[len(after) :], reverse=True):  # rows that are no longer needed
                packed[r], filled[r] = packed[-1], filled[-1]
                packed.pop()
                filled = filled[:-1]
    return sorted(sorted(row) for row in packed)


def _best_fit(order: Sequence[int], sizes: np.ndarray, row_length: int) -> list[Packed]:
    """Each example into the fullest row that has room for it."""
    packed: list[Packed] = []
    free: list[tuple[int, int]] = []  # room and row, ascending
    for i in order:
        size = int(sizes[i])
        fit = bisect_left(free, (size, 0))
        room, row = free.pop(fit) if fit < len(free) else (row_length, len(packed))
        if row == len(packed):
            packed.append([])
        packed[row].append(i)
        insort(free, (room - size, row))
    return packed


def _fullest(examples: list[int], sizes: np.ndarray, row_length: int) -> list[int]:
    """Those of a few examples that fill a row best."""
    total = _subsets(len(examples)) @ sizes[examples]
    best = int(np.argmax(np.where(total <= row_length, total, -1)))
    return [i for i, taken in zip(examples, _subsets(len(examples))[best], strict=True) if taken]


@cache
def _subsets(n: int) -> np.ndarray:
    """All subsets of n things, int64 [2^n, n] of 0 and 1."""
    return (np.arange(1 << n)[:, None] >> np.arange(n)) & 1


def fill_rate(lengths: Sequence[int], steps: Sequence[Sequence[Packed]], row_length: int) -> float:
    """Which share of the rows' tokens is not padding."""
    packed = [row for step in steps for row in step]
    return sum(lengths[i] for row in packed for i in row) / (len(packed) * row_length)


def schedule(lengths: Sequence[int], row_length: int, batch_rows: int, epochs: int, seed: int) -> list[list[Packed]]:
    """All steps of a training phase: each a list of ``batch_rows`` rows.

    Step i is a function of the examples, the seed and i alone, whatever the number of hosts. Every epoch sees every example
    once, its rows packed and ordered anew from (seed, epoch). The last step of an epoch may hold fewer
    rows; it is filled with empty rows (no examples) when the batch is made, which carry no weight.
    """
    steps: list[list[Packed]] = []
    for epoch in range(epochs):
        packed = pack(lengths, row_length, (seed, epoch))
        order = np.random.default_rng((seed, epoch, 1)).permutation(len(packed))
        steps += [[packed[r] for r in order[i : i + batch_rows]] for i in range(0, len(packed), batch_rows)]
    return steps


def beside(
    steps: Sequence[list[Packed]], lengths: Sequence[int], row_length: int, rows: int, first: int, seed: int
) -> list[list[Packed]]:
    """The same steps, each with ``rows`` more rows of other examples, whose numbers begin at ``first``.

    These are taken again and again, packed and ordered anew each time from (seed, pass).
    """

    def endless() -> Iterator[Packed]:
        for number in count():
            for (row,) in schedule(lengths, row_length, 1, 1, seed + number):
                yield [first + i for i in row]

    taken = endless()
    return [[*step, *islice(taken, rows)] for step in steps]


def batch(examples: Sequence[Rows], step: Sequence[Packed], row_length: int, which: range) -> Rows:
    """The rows [B, T] of one step whose numbers are ``which``; those beyond the step's own are empty."""
    empty: Packed = []
    members = (step[r] if r < len(step) else empty for r in which)
    return rows.stack([rows.pack([examples[i] for i in row], row_length) for row in members])
