"""Curves through a study's results: power laws with an offset and saturating curves, robustly, with intervals.

A curve is y = c + a g(x; k): c is where it ends, a how far from there it begins, k its shape. Given k it is linear, so k alone
is searched for (variable projection, Golub and Pereyra 1973), and what is found is polished with Huber's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from esjax.errors import InputError
from esjax.eval.statistics import LEVEL

GRID = 200  # values of k that are tried, evenly on the logarithm
HUBER, EFFICIENCY = (
    1.345,
    0.95,
)  # robust standard deviations behind which a residual counts linearly (Huber 1964), and what that costs
FEWEST = 4  # different x, for three parameters
SPREAD = 4.0  # times by which the greatest x must exceed the smallest
FAR = 4.0  # times as far as the data go that a curve may be read


class Curve(NamedTuple):
    """A family of curves; ``low`` and ``high`` bound k, in units of the typical x where k is an x."""

    name: str
    formula: str
    g: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (x, k) -> [..., x], for x over its geometric mean
    low: float
    high: float
    scaled: bool  # whether k is an x


CURVES = {
    "power": Curve("power", "c + a x^-k", lambda x, k: x ** -k[..., None], 0.02, 8.0, False),
    "saturating": Curve(
        "saturating", "c + a / (1 + x / k)", lambda x, k: 1 / (1 + x / k[..., None]), 0.005, 200.0, True
    ),
}


class Results(NamedTuple):
    """What was measured: at each x, under each seed, of each dialogue its share of the number."""

    x: np.ndarray  # float [points]
    y: np.ndarray  # float [points, seeds, dialogues]; a number of one run is the mean over dialogues

    @property
    def means(self) -> np.ndarray:
        """[points, seeds]."""
        made: np.ndarray = self.y.mean(2)
        return made


class Fit(NamedTuple):
    """A curve with intervals (low, high) of each parameter."""

    curve: Curve
    scale: float  # the geometric mean of x
    logarithmic: bool  # whether residuals are of logarithms
    params: np.ndarray  # c, a, k, for x over ``scale``
    draws: np.ndarray  # [resamples, 3], of the bootstrap
    stretch: float  # of the draws around the parameters, for few degrees of freedom
    x: np.ndarray
    means: np.ndarray  # [points, seeds]

    def at(self, x: np.ndarray) -> np.ndarray:
        """The curve's values."""
        return _value(self.curve, np.asarray(x, float) / self.scale, self.params)

    def band(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The interval of the curve at each x."""
        values = np.stack([_value(self.curve, np.asarray(x, float) / self.scale, p) for p in self.draws])
        return self._interval(self.at(x), values)

    def interval(self, name: str) -> tuple[float, float, float]:
        """Of c, a or k: the value, and its interval; of k on the logarithm, as it is positive."""
        n = "cak".index(name)
        change = np.log if name == "k" else np.asarray
        back = np.exp if name == "k" else np.asarray
        low, high = self._interval(change(self.params[n : n + 1]), change(self.draws[:, n : n + 1]))
        unit = self._unit(name)
        return float(self.params[n] * unit), float(back(low)[0] * unit), float(back(high)[0] * unit)

    def _unit(self, name: str) -> float:
        """What takes a parameter from x over its scale to x itself."""
        if name == "k":
            return self.scale if self.curve.scaled else 1.0
        return self.scale ** float(self.params[2]) if name == "a" and not self.curve.scaled else 1.0

    def _interval(self, value: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        low, high = np.quantile(draws - value, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return value + self.stretch * low, value + self.stretch * high

    @property
    def residuals(self) -> np.ndarray:
        """[points, seeds]: of logarithms, or of the numbers themselves."""
        made: np.ndarray = _residuals(self.means, self.at(self.x)[:, None], self.logarithmic)
        return made


def check(results: Results, curve: str) -> None:
    """Raise InputError, naming what is wrong, where no curve can be told from the data."""
    x, y = results.x, results.means
    if curve not in CURVES:
        raise InputError(f"--curve {curve}: allowed are {', '.join(CURVES)}")
    if (bad := x[~(np.isfinite(x) & (x > 0))]).size:
        raise InputError(f"x={bad[0]:g} is among the data, and a curve in x needs numbers above 0")
    different = np.unique(x)
    if len(different) < FEWEST:
        told = ", ".join(f"{v:g}" for v in different)
        raise InputError(
            f"{len(different)} different x ({told}) are too few for the three parameters of a curve: at least {FEWEST}"
        )
    if different[-1] / different[0] < SPREAD:
        raise InputError(
            f"x reaches from {different[0]:g} to {different[-1]:g}, less than {SPREAD:g} times; no curve can be told from that"
        )
    if not np.isfinite(y).all():
        raise InputError("a run has no number for y; take it out, or choose another --y")
    if np.ptp(y) <= 1e-9 * np.abs(y).max():
        raise InputError(f"y is {y.flat[0]:g} in all runs; there is nothing to fit")


def fit(results: Results, curve: str, resamples: int = 500, seed: int = 0) -> Fit:
    """Fit a curve. Residuals are of logarithms where all y are positive. Raises InputError for a degenerate grid.

    Intervals are of a bootstrap over seeds and dialogues. Seeds of a point are runs of their own, with one spread at all points;
    dialogues are the same in all runs, so that one that is hard moves the whole curve, and their deviations get Gaussian
    multipliers, of what is not chance within runs. Student's t stands in for the normal distribution.
    """
    check(results, curve)
    family, means = CURVES[curve], results.means
    scale = float(np.exp(np.log(results.x).mean()))
    x, seeds = results.x / scale, means.shape[1]
    logarithmic = bool((means > 0).all())
    params, weights = _best(family, np.repeat(x, seeds), means.ravel(), logarithmic)
    draws = _refits(family, x, means, weights.reshape(means.shape), params, perturbed(results, resamples, seed))
    return Fit(family, scale, logarithmic, params, draws, _stretch(means), results.x, means)


def _stretch(means: np.ndarray) -> float:
    """How much wider intervals are: the variance of seeds is estimated from few, and refits keep the weights of Huber's loss."""
    freedom = means.shape[0] * (means.shape[1] - 1)
    level = (1 + LEVEL) / 2
    few = float(stats.t.ppf(level, freedom) / stats.norm.ppf(level)) if freedom else 1.0
    return few / np.sqrt(EFFICIENCY)


def perturbed(results: Results, resamples: int, seed: int) -> np.ndarray:
    """By how much the mean at each point may be off, [resamples, points]: draws of what seeds and dialogues add."""
    rng, y = np.random.default_rng(seed), results.y
    points, seeds, dialogues = y.shape
    out = np.zeros((resamples, points))
    if seeds > 1:  # of one spread at all points, in proportion: two or three seeds of a single point would tell little
        mean = y.mean((1, 2))
        unit = np.abs(mean) if (mean > 0).all() else np.ones_like(mean)
        apart = (y.mean(2) - mean[:, None]) / unit[:, None]
        spread = np.sqrt(np.square(apart).sum() / (points * (seeds - 1)) / seeds)
        out += spread * unit * rng.standard_normal((resamples, points))
    if dialogues > 1:
        for part in _of_dialogues(y):
            normal = rng.standard_normal((resamples, dialogues))
            out += np.einsum("rd,pd->rp", normal, part) / np.sqrt(dialogues * (dialogues - 1))
    return out


def _of_dialogues(y: np.ndarray) -> list[np.ndarray]:
    """How far dialogues are from the mean, [points, dialogues]: what they share at all points, and what they do not.

    Both are shrunk by what is chance within runs (two-way analysis of variance), which is with the seeds already.
    """
    points, seeds, dialogues = y.shape
    mean = y.mean((1, 2), keepdims=True)
    unit = np.abs(mean) if (mean > 0).all() else np.ones_like(mean)  # a hard dialogue is hard in proportion
    each = ((y - mean) / unit).mean(1)
    common = np.broadcast_to(each.mean(0), each.shape)
    own = each - common
    chance = 0.0
    if seeds > 1:
        rest = (y - mean) / unit - each[:, None]
        rest = rest - rest.mean(2, keepdims=True)
        chance = np.square(rest).sum() / (points * (seeds - 1) * (dialogues - 1)) / seeds
    freedom = (points - 1) * (dialogues - 1)
    beside = np.square(own).sum() / freedom if points > 1 else 0.0
    whole = np.square(common[0]).sum() / (dialogues - 1)
    parts = [common * _share(whole, beside / points), own * _share(beside, chance)]
    return [part * unit[:, 0] for part in parts]


def _share(whole: float, chance: float) -> float:
    """What a deviation is multiplied by, so that its variance is without chance's."""
    return float(np.sqrt(max(0.0, 1 - chance / whole))) if whole > 0 else 0.0


def _value(curve: Curve, x: np.ndarray, params: np.ndarray) -> np.ndarray:
    c, a, k = params
    return c + a * curve.g(x, np.asarray(k))


def _residuals(y: np.ndarray, f: np.ndarray, logarithmic: bool) -> np.ndarray:
    if not logarithmic:
        return y - f
    return np.log(y) - np.log(np.maximum(f, 1e-12 * np.abs(y).max()))


def _grid(curve: Curve) -> np.ndarray:
    return np.geomspace(curve.low, curve.high, GRID)


def _projected(curve: Curve, x: np.ndarray, weights: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each k: what maps weighted y [n] to (c, a), [k, 2, n], and the weighted columns [k, n, 2]."""
    columns = np.stack([np.ones((len(k), len(x))), curve.g(x, k)], axis=-1) * weights[:, None]
    return np.linalg.pinv(columns), columns


def _best(curve: Curve, x: np.ndarray, y: np.ndarray, logarithmic: bool) -> tuple[np.ndarray, np.ndarray]:
    """The parameters, and the weights [n] that linear residuals have around them (1 / f for logarithms, times Huber's)."""
    k = _grid(curve)
    weights = 1 / np.abs(y) if logarithmic else np.ones_like(y)
    maps, columns = _projected(curve, x, weights, k)
    linear = maps @ (weights * y)  # [k, 2]
    lost = np.abs((columns @ linear[..., None])[..., 0] - weights * y).sum(1)  # absolute: outliers do not choose k
    n = int(lost.argmin())
    start = np.asarray([*linear[n], np.log(k[n])])

    def residuals(p: np.ndarray) -> np.ndarray:
        return _residuals(y, _value(curve, x, np.asarray([p[0], p[1], np.exp(p[2])])), logarithmic)

    spread = max(float(np.median(np.abs(residuals(start)))) / 0.6745, 1e-9)
    scale = HUBER * spread
    bounds = ([-np.inf, -np.inf, np.log(curve.low)], [np.inf, np.inf, np.log(curve.high)])
    start[2] = np.clip(start[2], np.log(curve.low) + 1e-9, np.log(curve.high) - 1e-9)
    found = optimize.least_squares(residuals, start, bounds=bounds, loss="huber", f_scale=scale, x_scale="jac")
    params = np.asarray([found.x[0], found.x[1], np.exp(found.x[2])])
    r = residuals(found.x)
    f = _value(curve, x, params)
    huber = np.sqrt(np.minimum(1.0, scale / np.maximum(np.abs(r), 1e-300)))
    return params, huber * (1 / np.abs(f) if logarithmic else 1.0)


def _refits(
    curve: Curve, x: np.ndarray, means: np.ndarray, weights: np.ndarray, params: np.ndarray, off: np.ndarray
) -> np.ndarray:
    """The parameters of means that are ``off`` [resamples, points], all at once, [resamples, 3].

    By variable projection, with the weights of the fit: its linear part is solved for each k of a grid, and the best k is read
    off a parabola through the best three.
    """
    seeds = means.shape[1]
    wide, flat = np.repeat(x, seeds), weights.ravel()
    f = _value(curve, wide, params)
    # Around the fitted curve: residuals as they are, in relative numbers those of logarithms to first order.
    y = (f + (means.ravel() - f))[None] + np.repeat(off, seeds, axis=1)
    k = _grid(curve)
    maps, columns = _projected(curve, wide, flat, k)
    weighted = (y * flat).T  # [n, resamples]
    left = np.stack(
        [np.square(columns[i] @ (maps[i] @ weighted) - weighted).sum(0) for i in range(len(k))]
    )  # [k, resamples]
    best = np.clip(left.argmin(0), 1, len(k) - 2)
    each = np.arange(y.shape[0])
    before, here, after = (left[best + i, each] for i in (-1, 0, 1))
    bend = before - 2 * here + after
    move = np.where(bend > 0, np.clip((before - after) / (2 * np.where(bend > 0, bend, 1.0)), -1, 1), 0.0)
    step = np.log(k[1] / k[0])
    chosen = np.exp(np.log(k[best]) + step * move)
    maps, _ = _projected(curve, wide, flat, chosen)
    linear = np.einsum("rcn,nr->rc", maps, weighted)
    return np.column_stack([linear, chosen])


def check_reach(found: Fit, x: float, far: bool) -> None:
    """Raise InputError where a curve is to be read farther than FAR times beyond its data, unless somebody asked for it."""
    low, high = found.x.min() / FAR, found.x.max() * FAR
    if not far and not low <= x <= high:
        raise InputError(
            f"--at {x:g} is more than {FAR:g} times beyond the data ({found.x.min():g} to {found.x.max():g}), where no curve is "
            "to be trusted; give --far to read it all the same"
        )
