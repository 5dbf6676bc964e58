"""Which examples go into which packed row, and which rows into which step: a function of lengths and seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from esjax import rows
from esjax.config import InputError
from esjax.rows import Rows

Row = list[int]  # indices of the examples packed into one row
LEAVES = 4  # prompts that one row grows
SAVING = 0.25  # share of a batch's prompt tokens that must be saved: a row of several prompts costs more at every step
Group = tuple[list[int], Rows, list[int]]  # which prompts, their row, and where in it each one ends
OPEN_ROWS = 64  # an example is offered to so many of the newest rows, so that packing stays linear


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


class Planted(NamedTuple):
    """Prompts as rows to grow."""

    rows: Rows  # [B, T]
    leaves: np.ndarray  # int32 [B, M], row index of each prompt's last token; 0 where there is none
    place: list[int]  # of each prompt, in leaves.reshape(-1)


def plant(prompts: Sequence[Sequence[int]], batch: int, bucket: int) -> Planted:
    """Lay out at most ``batch`` prompts so that what they begin with together is computed once, where that pays.

    Either a row for each prompt, or rows of LEAVES prompts when sharing saves SAVING of the tokens; in both B * M is
    ``batch`` (which need be no multiple of LEAVES for the first). T is a multiple of ``bucket``.
    """
    groups = [(g, *rows.trunk_with_prompts([prompts[i] for i in g])) for g in _alike(prompts)]
    shared = sum(len(row.tokens) for _, row, _ in groups)
    beds: list[list[Group]] = [[] for _ in range(batch // LEAVES)]
    if batch % LEAVES == 0 and shared <= (1 - SAVING) * sum(map(len, prompts)):
        for group in sorted(groups, key=lambda g: (-len(g[1].tokens), g[0])):
            room = [bed for bed in beds if sum(len(g[0]) for g in bed) + len(group[0]) <= LEAVES]
            if not room:
                break
            min(room, key=_tokens).append(group)
        else:
            return _planted(beds, len(prompts), bucket)
    alone: list[list[Group]] = [[([i], *rows.trunk_with_prompts([p]))] for i, p in enumerate(prompts)]
    return _planted([*alone, *[[] for _ in range(batch - len(prompts))]], len(prompts), bucket)


def _alike(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of at most LEAVES prompts that share at least half of the shorter one with the group's first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i), reverse=True):
        newest = groups[-1] if groups else None
        if newest and len(newest) < LEAVES:
            shared = rows.common_prefix(prompts[newest[0]], prompts[i])
            if 2 * shared >= min(len(prompts[newest[0]]), len(prompts[i])):
                newest.append(i)
                continue
        groups.append([i])
    return groups


def _tokens(bed: list[Group]) -> int:
    return sum(len(row.tokens) for _, row, _ in bed)


def _planted(beds: list[list[Group]], prompts: int, bucket: int) -> Planted:
    m = max(sum(len(g[0]) for g in bed) for bed in beds)
    m = 1 if m == 1 else LEAVES
    leaves, place = np.zeros((len(beds), m), np.int32), [0] * prompts
    for r, bed in enumerate(beds):
        start = number = 0
        for members, row, ends in bed:
            for i, end in zip(members, ends, strict=True):
                leaves[r, number], place[i] = start + end, r * m + number
                number += 1
            start += len(row.tokens)
    length = -(-max(map(_tokens, beds)) // bucket) * bucket
    return Planted(rows.stack([rows.pack([row for _, row, _ in bed], length) for bed in beds]), leaves, place)


def pack_in_order(lengths: Sequence[int], order: Sequence[int], row_length: int) -> list[Row]:
    """First-fit over the newest rows, in the given order; rows come out in the order in which they were opened.

    Raises InputError when an example is longer than a row.
    """
    packed: list[Row] = []
    free: list[int] = []
    for i in order:
        if lengths[i] > row_length:
            raise InputError(
                f"an example has {lengths[i]} tokens, a row {row_length}; raise row_length or lower the window"
            )
        slot = next((r for r in range(max(0, len(free) - OPEN_ROWS), len(free)) if free[r] >= lengths[i]), None)
        if slot is None:
            packed.append([])
            free.append(row_length)
            slot = len(packed) - 1
        packed[slot].append(i)
        free[slot] -= lengths[i]
    return packed


def schedule(lengths: Sequence[int], row_length: int, batch_rows: int, epochs: int, seed: int) -> list[list[Row]]:
    """All steps of a training phase: each a list of ``batch_rows`` rows.

    Every epoch sees every example once, in an order drawn from (seed, epoch). The last step of an epoch may hold fewer
    rows; it is filled with empty rows (no examples) when the batch is made, which carry no weight.
    """
    steps: list[list[Row]] = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        packed = pack_in_order(lengths, [int(i) for i in order], row_length)
        steps += [packed[i : i + batch_rows] for i in range(0, len(packed), batch_rows)]
    return steps


def batch(examples: Sequence[Rows], step: Sequence[Row], row_length: int, batch_rows: int) -> Rows:
    """The rows [B, T] of one step, filled up with empty rows to ``batch_rows``."""
    packed = [rows.pack([examples[i] for i in row], row_length) for row in step]
    return rows.stack([*packed, *[rows.pack([], row_length)] * (batch_rows - len(packed))])


def in_order(examples: Sequence[Rows], row_length: int, batch_rows: int) -> Iterator[tuple[Rows, list[Row]]]:
    """Batches for scoring: every example once, in order, packed. Yields the rows and which examples lie in each."""
    packed = pack_in_order([len(e.tokens) for e in examples], range(len(examples)), row_length)
    for i in range(0, len(packed), batch_rows):
        step = packed[i : i + batch_rows]
        yield batch(examples, step, row_length, batch_rows), step
