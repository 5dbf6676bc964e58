"""Intervals and tests whose unit is the dialogue: contexts of one dialogue are not independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8


class Estimate(NamedTuple):
    """A number with its interval. NaN where there is no interval: of a single dialogue, and where nothing varies in a way that
    can be estimated."""

    value: float
    low: float
    high: float
    error: float  # the standard error
    p: float  # of "the true value is 0"
    by_seed: tuple[float, ...] = ()  # of several seeds, each one's number

    @property
    def detectable(self) -> float:
        """The smallest true difference from 0 that data like these would show four times in five, at the interval's level."""
        return float((stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)) * self.error)


def mean_by_cluster(values: np.ndarray, clusters: Sequence[object], resamples: int, seed: int) -> Estimate:
    """The mean of values and its bootstrap-t interval over clusters.

    Whole clusters are drawn with replacement, and what is compared with its own standard error is the ratio of sums (Efron and
    Tibshirani 1993, section 12.5; the error of a ratio as in Cochran 1977, section 6.4), which covers well also where clusters
    are few and unequal. For a difference give the paired differences. Of what hardly ever happens many draws have
    nothing, so that a quantile is infinite; then the interval is Student's.

    Args:
        values: float [n].
        clusters: of each value, the cluster (the dialogue) that it belongs to.
        resamples: how often clusters are drawn.
        seed: of the draws.
    """
    names = list(dict.fromkeys(clusters))
    number = {name: i for i, name in enumerate(names)}
    index = np.asarray([number[c] for c in clusters])
    sums: np.ndarray = np.bincount(index, values, len(names))
    counts = np.bincount(index, minlength=len(names)).astype(float)
    value = float(sums.sum() / counts.sum())
    if len(names) < 2:
        return Estimate(value, np.nan, np.nan, np.nan, np.nan)
    sums = sums - value * counts  # what is left is small, and so are the sums' rounding errors
    error = float(_error(np.ones((1, len(names))), sums, counts)[0])
    if error <= 1e-12 * float(np.abs(values).max()):  # every cluster has the same mean
        return _constant(value, len(names))
    draws = _draws(len(names), resamples, seed)
    apart = (draws @ sums) / (draws @ counts)
    errors = _error(draws, sums, counts)
    known = errors > 1e-6 * error  # a draw of one cluster alone says nothing of the error
    alone = np.where(apart == 0, 0.0, np.copysign(np.inf, apart))
    t = np.where(known, apart / np.where(known, errors, 1.0), alone)
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    seen = value / error
    if np.isfinite([low, high]).all():  # each side by itself, as the interval has it: t is often skewed
        p = min(1.0, 2 * (1 + min((t >= seen).sum(), (t <= seen).sum())) / (1 + resamples))
    else:
        low, high = stats.t.interval(LEVEL, len(names) - 1)
        p = 2 * stats.t.sf(abs(seen), len(names) - 1)
    return Estimate(value, value - float(high) * error, value - float(low) * error, error, float(p))


@lru_cache(maxsize=2)
def _draws(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each cluster is drawn, [resamples, clusters]; the same for all metrics."""
    draws = np.random.default_rng(seed).multinomial(clusters, np.full(clusters, 1 / clusters), resamples).astype(float)
    draws.setflags(write=False)
    return draws


def _error(draws: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The standard error of the ratio of sums to counts, for each row of how often each cluster was drawn."""
    n = draws.sum(1)
    total = draws @ counts
    mean = (draws @ sums) / total
    # sum of w (s - m c)^2, without the [resamples, clusters] array of residuals
    squares = draws @ sums**2 - 2 * mean * (draws @ (sums * counts)) + mean**2 * (draws @ counts**2)
    out: np.ndarray = np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total
    return out


def _constant(value: float, units: int) -> Estimate:
    """Where all units say the same there is no spread to make an interval of; p is that of so many equal signs."""
    return Estimate(value, np.nan, np.nan, 0.0, 1.0 if value == 0.0 else 2.0 ** (1 - units))


def jackknife(whole: float, without: Sequence[float]) -> Estimate:
    """A number of a whole corpus, which is no mean, and its interval from what it is without each of some groups of dialogues.

    The delete-a-group jackknife (Efron and Tibshirani 1993, chapter 11) with Student's t. For a difference give differences.
    """
    left = np.asarray(without, float)
    groups = len(left)
    if groups < 2:
        return Estimate(whole, np.nan, np.nan, np.nan, np.nan)
    error = float(np.sqrt((groups - 1) / groups * np.square(left - left.mean()).sum()))
    if error == 0.0:
        return _constant(whole, groups)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, groups - 1)) * error
    return Estimate(whole, whole - reach, whole + reach, error, float(2 * stats.t.sf(abs(whole) / error, groups - 1)))


def crossed(cells: np.ndarray) -> Estimate:
    """The mean over seeds and dialogues, each of which answered under every seed, and its interval over both.

    Two-way random effects without replication: the variance of the mean is (MS of seeds + MS of dialogues - MS of the rest) / n
    of the analysis of variance, none of the effects' own variances below 0, with Satterthwaite's (1946) degrees of freedom.

    Args:
        cells: float [seeds, dialogues], at least two of each.
    """
    seeds, units = cells.shape
    value, by_seed = float(cells.mean()), tuple(cells.mean(1).tolist())
    if units < 2:
        return Estimate(value, np.nan, np.nan, np.nan, np.nan, by_seed)
    rows, columns = cells.mean(1, keepdims=True) - value, cells.mean(0, keepdims=True) - value
    rest = cells - value - rows - columns
    freedom = np.asarray([seeds - 1, units - 1, (seeds - 1) * (units - 1)])
    squares = (
        np.asarray([units * np.square(rows).sum(), seeds * np.square(columns).sum(), np.square(rest).sum()]) / freedom
    )
    total = squares[0] + squares[1] - squares[2]
    if total >= squares[:2].max():
        degrees = float(total**2 / (squares**2 / freedom).sum()) if total > 0 else 0.0
    else:  # one effect seems to have no variance: the other's mean square holds the rest's, too
        total, degrees = squares[:2].max(), float(freedom[int(squares[:2].argmax())])
    error = float(np.sqrt(total / cells.size))
    if error <= 1e-12 * float(np.abs(cells).max()):
        return _constant(value, units)._replace(by_seed=by_seed)
    reach = float(stats.t.ppf((1 + LEVEL) / 2, degrees)) * error
    p = float(2 * stats.t.sf(abs(value) / error, degrees))
    return Estimate(value, value - reach, value + reach, error, p, by_seed)


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The interval of a share of independent cases (Wilson 1927)."""
    if n == 0:
        return np.nan, np.nan
    found = stats.binomtest(hits, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for how many there are (Holm 1979); NaN stays, and is not counted."""
    out = [float("nan")] * len(ps)
    known = sorted((p, i) for i, p in enumerate(ps) if not np.isnan(p))
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        out[i] = largest
    return out
