"""Intervals cover what they should, corrections keep false claims rare, and formulas agree with others' numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from esjax.eval.results import Value, summarise
from esjax.eval.statistics import holm, jackknife, mean_by_cluster, wilson

DIALOGUES, REPETITIONS, RESAMPLES = 40, 400, 600


def clustered(rng: np.random.Generator, mean: float, kind: str) -> tuple[np.ndarray, list[int]]:
    """Values of contexts of dialogues of unequal length, alike within a dialogue."""
    which = np.repeat(np.arange(DIALOGUES), rng.integers(1, 8, DIALOGUES))
    if kind == "share":
        values = (rng.random(len(which)) < rng.beta(1, 2, DIALOGUES)[which]).astype(float) - 1 / 3
    else:
        values = rng.normal(0, 1, DIALOGUES)[which] + rng.normal(0, 1, len(which))
    return values + mean, which.tolist()


@pytest.mark.parametrize("kind", ["normal", "share"])
def test_intervals_cover_a_known_difference(kind: str) -> None:
    rng, covered, naive = np.random.default_rng(7), 0, 0
    for n in range(REPETITIONS):
        values, dialogues = clustered(rng, 0.3, kind)
        made = mean_by_cluster(values, dialogues, RESAMPLES, n)
        covered += made.low <= 0.3 <= made.high
        alone = mean_by_cluster(values, list(range(len(values))), RESAMPLES, n)
        naive += alone.low <= 0.3 <= alone.high
    assert 0.93 <= covered / REPETITIONS <= 0.97
    assert naive / REPETITIONS < 0.85  # control: contexts taken for independent are too sure


def test_no_difference_is_rarely_claimed() -> None:
    """Four metrics of two pairs of equal models: whether any difference is claimed after correction, and without it."""
    rng, claimed, uncorrected = np.random.default_rng(3), 0, 0
    for n in range(200):
        values = []
        for metric in ("rank_bm25", "rank_embedding", "words", "specificity"):
            common, dialogues = clustered(rng, 0.0, "normal")
            for model in ("a", "b", "c"):
                noisy = common + rng.normal(0, 1, len(common))
                values += [
                    Value(model, metric, str(d), str(i), -1, x)
                    for i, (d, x) in enumerate(zip(dialogues, noisy, strict=True))
                ]
        made = summarise(values, [("b", "a"), ("c", "a")], RESAMPLES, n)
        claimed += any(made.verdict(key) != "no difference shown" for key in made.differences)
        uncorrected += any(d.p <= 0.05 for d in made.differences.values())
    assert claimed / 200 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 200)
    assert uncorrected / 200 > 0.15


def test_a_difference_is_claimed_and_named() -> None:
    rng = np.random.default_rng(1)
    common, dialogues = clustered(rng, 0.0, "normal")
    rows = [
        Value(model, "words", str(d), str(i), -1, x + shift)
        for model, shift in (("a", 0.0), ("b", 2.0))
        for i, (d, x) in enumerate(zip(dialogues, common + rng.normal(0, 0.1, len(common)), strict=True))
    ]
    made = summarise(rows, [("b", "a")], RESAMPLES, 0)
    assert made.verdict(("words", "b", "a")) == "higher"
    difference = made.differences["words", "b", "a"]
    assert difference.value == pytest.approx(2.0, abs=0.05)
    assert difference.detectable == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * difference.error)
    (record,) = (r for r in made.rows() if r["model"] == "b")
    assert record["differences"]["a"]["verdict"] == "higher"


def test_pairs_take_away_what_is_common() -> None:
    """The same contexts, hard for all: a paired interval is far narrower than each mean's."""
    common, dialogues = clustered(np.random.default_rng(2), 5.0, "normal")
    paired = mean_by_cluster((common + 0.1) - common, dialogues, RESAMPLES, 0)
    assert paired.value == pytest.approx(0.1)
    assert paired.error == 0
    assert math.isnan(paired.low)  # without any spread there is no interval
    assert mean_by_cluster(common, dialogues, RESAMPLES, 0).error > 0.1


@pytest.mark.parametrize(("dialogues", "claimed"), [(2, False), (5, False), (6, True), (40, True)])
def test_few_equal_differences_are_no_proof(dialogues: int, claimed: bool) -> None:
    """Two dialogues that both differ by one word show nothing: so many equal signs come about by chance."""
    values = [
        Value(model, "words", str(d), str(d), -1, x) for d in range(dialogues) for model, x in (("a", 5.0), ("b", 6.0))
    ]
    made = summarise(values, [("b", "a")], RESAMPLES, 0)
    assert made.differences["words", "b", "a"].p == 2.0 ** (1 - dialogues)
    assert (made.verdict(("words", "b", "a")) == "higher") == claimed


def test_p_says_what_the_interval_says() -> None:
    """Also of skewed values, whose intervals reach further on one side."""
    rng, shown, skewed = np.random.default_rng(5), 0, 0
    for n in range(60):
        clusters = [str(i // 3) for i in range(60)]
        values = rng.lognormal(0, 1.2, 60) - 1.0 - 0.05 * n
        made = mean_by_cluster(values, clusters, RESAMPLES, n)
        apart = made.low > 0 or made.high < 0
        assert apart == (made.p < 0.05) or abs(made.p - 0.05) < 0.005
        shown += apart
        skewed += made.high - made.value > 1.5 * (made.value - made.low)
    assert 5 < shown < 55
    assert skewed > 20


def test_a_share_of_none_has_wilson_s_interval() -> None:
    values = [Value("a", "unhelpful", str(d), f"{d}/{i}", -1, 0.0) for d in range(10) for i in range(3)]
    made = summarise(values, [], RESAMPLES, 0).means["unhelpful"]["a"]
    assert (made.low, made.high) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_what_hardly_ever_happens_has_an_interval_within_its_range() -> None:
    """Once in 700 replies of 70 dialogues: each reply is a case of its own, whose interval is Wilson's."""
    values = [
        Value("a", "unhelpful", str(d), f"{d}/{i}", -1, float(d == i == 3)) for d in range(70) for i in range(10)
    ] + [Value("b", "unhelpful", str(d), f"{d}/{i}", -1, 0.0) for d in range(70) for i in range(10)]
    made = summarise(values, [("a", "b")], RESAMPLES, 0)
    mean, difference = made.means["unhelpful"]["a"], made.differences["unhelpful", "a", "b"]
    proportion = stats.binomtest(1, 700).proportion_ci(method="wilson")
    assert (mean.low, mean.high) == pytest.approx((proportion.low, proportion.high), rel=0.05)
    assert difference.value == pytest.approx(1 / 700)
    assert (difference.low, difference.high) == pytest.approx((1 / 700 - 1.995 / 700, 1 / 700 + 1.995 / 700), rel=0.02)
    assert made.verdict(("unhelpful", "a", "b")) == "no difference shown"


def test_one_dialogue_has_no_interval() -> None:
    made = mean_by_cluster(np.asarray([1.0, 2.0]), ["d", "d"], RESAMPLES, 0)
    assert made.value == 1.5
    assert math.isnan(made.low)
    assert math.isnan(made.p)
    assert math.isnan(jackknife(1.0, [1.0]).error)


def test_the_jackknife_of_a_mean_is_the_mean_s_error() -> None:
    values = np.random.default_rng(0).normal(size=17)
    made = jackknife(float(values.mean()), [float(np.delete(values, i).mean()) for i in range(17)])
    assert made.error == pytest.approx(stats.sem(values))
    low, high = stats.t.interval(0.95, 16, values.mean(), stats.sem(values))
    assert (made.low, made.high) == pytest.approx((low, high))
    assert made.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


def test_holm_and_wilson() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # Holm's own procedure by hand
    corrected = holm([0.5, math.nan, 0.02])
    assert corrected[0] == 0.5
    assert corrected[2] == 0.04
    assert math.isnan(corrected[1])
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)  # Wilson 1927; Brown, Cai and DasGupta 2001
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
