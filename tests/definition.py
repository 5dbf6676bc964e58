"""Who sees whom in a row by its definition, over segments, branches and positions: the oracle of ``rows.sees``."""

from __future__ import annotations

import numpy as np

from esjax.rows import Rows


def limits(rows: Rows) -> np.ndarray:
    """How much of its trunk each token [B, T] sees: what lies before the position at which its branch leaves; 0 for trunks."""
    segment, branch = rows.segment, rows.branch
    own = (segment[:, :, None] == segment[:, None]) & (branch[:, :, None] == branch[:, None])
    first = np.where(own, rows.position[:, None], np.iinfo(np.int32).max).min(axis=2)
    return np.where(branch > 0, first, 0)


def visible(rows: Rows, limit: np.ndarray | None = None) -> np.ndarray:
    """Bool [B, T, T]: i sees j iff they are of one segment, j is not after i, and they are of one branch, or j is of the trunk
    before the place where i's branch leaves it. Padding sees itself alone."""
    limit = limits(rows) if limit is None else limit
    index = np.arange(rows.tokens.shape[1])
    pair = [(x[:, :, None], x[:, None, :]) for x in (rows.segment, rows.branch, index[None])]
    (segment_i, segment_j), (branch_i, branch_j), (i, j) = pair
    stem = (branch_j == 0) & (rows.position[:, None, :] < limit[:, :, None])
    seen = (segment_i == segment_j) & (j <= i) & ((branch_i == branch_j) | stem)
    return np.where((segment_i == 0) | (segment_j == 0), i == j, seen)


def remasked(rows: Rows, by: int = 0, **changes: np.ndarray) -> Rows:
    """The rows with the mask of others: ``changes`` of their fields, branches that see ``by`` trunk tokens more."""
    limit = limits(rows)
    seen = visible(rows._replace(**changes), limit + by * (rows.branch > 0))
    return rows._replace(until=np.max(seen * np.arange(1, seen.shape[1] + 1)[:, None], axis=1).astype(np.int32))
