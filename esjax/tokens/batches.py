"""Which examples go into which packed row, and which rows into which step: a function of lengths and seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax import rows
from esjax.errors import InputError
from esjax.rows import Rows

Packed = list[int]  # indices of the examples packed into one row
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


def pack_in_order(lengths: Sequence[int], order: Sequence[int], row_length: int) -> list[Packed]:
    """First-fit over the newest rows, in the given order; rows come out in the order in which they were opened.

    Raises InputError when an example is longer than a row.
    """
    packed: list[Packed] = []
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


def schedule(lengths: Sequence[int], row_length: int, batch_rows: int, epochs: int, seed: int) -> list[list[Packed]]:
    """All steps of a training phase: each a list of ``batch_rows`` rows.

    Every epoch sees every example once, in an order drawn from (seed, epoch). The last step of an epoch may hold fewer
    rows; it is filled with empty rows (no examples) when the batch is made, which carry no weight.
    """
    steps: list[list[Packed]] = []
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(lengths))
        packed = pack_in_order(lengths, [int(i) for i in order], row_length)
        steps += [packed[i : i + batch_rows] for i in range(0, len(packed), batch_rows)]
    return steps


def batch(examples: Sequence[Rows], step: Sequence[Packed], row_length: int, batch_rows: int) -> Rows:
    """The rows [B, T] of one step, filled up with empty rows to ``batch_rows``."""
    packed = [rows.pack([examples[i] for i in row], row_length) for row in step]
    return rows.stack([*packed, *[rows.pack([], row_length)] * (batch_rows - len(packed))])
