"""The long table of all values, and what follows from it: means with intervals, paired differences, corrected p-values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.errors import InputError
from esjax.eval.metrics import ALL, METRICS, Metric
from esjax.eval.replies import Reply
from esjax.eval.statistics import Estimate, crossed, holm, jackknife, mean_by_cluster, wilson

MARGIN = "judge_margin"
GROUPS = 20  # of dialogues, left out one after the other for a number of the whole corpus
ALPHA = 0.05
OVER = " over "  # between two models whose replies were compared
HEADLINE = (
    *("hit_bm25", "rank_bm25", "hit_embedding", "rank_embedding", "specificity", "unhelpful", "generic", "dropped"),
    *("perplexity", "replay_loss", "words", "distinct_1", "distinct_2"),
)


def is_headline(metric: str) -> bool:
    """Whether a metric is shown first; what judges, seekers and reflections were asked for always is."""
    return metric in HEADLINE or metric.startswith(("judge_", "talk_", "reflection_", "crisis_"))


class Value(NamedTuple):
    """One row of the table. ``model`` may be two, see ``over``. ``dialogue`` and ``context`` are empty for a number of the whole
    corpus; ``without`` is then the group of dialogues that is left out, and -1 for none."""

    model: str
    metric: str
    dialogue: str
    context: str
    without: int
    value: float


Rows = Sequence[Value]


def groups(dialogues: Sequence[str]) -> list[set[str]]:
    """The dialogues in up to GROUPS parts of like size, each dialogue in one."""
    names = list(dict.fromkeys(dialogues))
    return [set(names[i::GROUPS]) for i in range(min(GROUPS, len(names)))]


def reply_values(model: str, metric: str, replies: Sequence[Reply], values: np.ndarray) -> list[Value]:
    """Rows of a metric of single replies; NaN makes none."""
    rows = zip(replies, values.tolist(), strict=True)
    return [Value(model, metric, r.dialogue, r.context, -1, x) for r, x in rows if not math.isnan(x)]


def over(model: str, other: str) -> str:
    """What a metric of two models' replies is kept under: ``model`` in comparison with ``other``."""
    return f"{model}{OVER}{other}"


def sampled_values(model: str, metric: str, units: Sequence[str], of: Callable[[np.ndarray], float]) -> list[Value]:
    """Rows of a number of the whole corpus: ``of`` a mask of those ``units`` (dialogues) that it is to be made of."""
    parts = groups(units)
    keep = [np.ones(len(units), bool), *(np.asarray([u not in part for u in units]) for part in parts)]
    return [Value(model, metric, "", "", n - 1, of(k) if k.any() else math.nan) for n, k in enumerate(keep)]


def ratio_values(
    model: str, metric: str, units: Sequence[str], tops: np.ndarray, bottoms: np.ndarray, shape: Any
) -> list[Value]:
    """The same for ``shape`` of a ratio of sums over units."""

    def ratio(k: np.ndarray) -> float:
        return float(shape(tops[k].sum() / bottoms[k].sum())) if bottoms[k].sum() else math.nan

    return sampled_values(model, metric, units, ratio)


def text_values(model: str, replies: Sequence[Reply]) -> list[Value]:
    """Rows of all metrics that need only texts."""
    out: list[Value] = []
    parts = groups([r.dialogue for r in replies])
    keep = [[True] * len(replies), *([r.dialogue not in part for r in replies] for part in parts if len(parts) > 1)]
    for metric in METRICS.values():
        if metric.each is not None:
            out += reply_values(model, metric.name, replies, metric.each(replies))
            continue
        if metric.counts is not None and metric.whole_of is not None:
            counts = metric.counts(replies)
            made = [metric.whole_of(counts[kept].sum(0)) for kept in keep]
        elif metric.whole is not None:
            made = [metric.whole([r for r, k in zip(replies, kept, strict=True) if k]) for kept in keep]
        out += [Value(model, metric.name, "", "", n - 1, x) for n, x in enumerate(made)]
    return out


class Summary(NamedTuple):
    """What the table says: ``means`` by metric and model; ``differences`` by metric, model and the model it is compared with."""

    means: dict[str, dict[str, Estimate]]
    differences: dict[tuple[str, str, str], Estimate]
    corrected: dict[
        tuple[str, str, str], float
    ]  # Holm's p-values, over the headline's differences and over all others'
    counts: dict[str, tuple[int, int]]  # by metric: contexts and dialogues
    seeds: int = 1

    def verdict(self, key: tuple[str, str, str]) -> str:
        """In words: higher, lower, or that no difference was shown."""
        p = self.corrected[key]
        if math.isnan(p) or p > ALPHA:
            return "no difference shown"
        return "higher" if self.differences[key].value > 0 else "lower"

    def rows(self) -> list[dict[str, Any]]:
        """As records for JSON: one a metric and model, with its differences."""
        out = []
        for metric, models in self.means.items():
            about = ALL[metric]
            contexts, dialogues = self.counts[metric]
            for model, mean in models.items():
                row: dict[str, Any] = {"metric": metric, "label": about.label, "model": model, **_record(mean)}
                row |= {"level": about.level, "tokens": about.tokens, "better": about.better, "source": about.source}
                row |= {"contexts": contexts, "dialogues": dialogues, "seeds": self.seeds}
                row["differences"] = {
                    other: _record(d)
                    | {"p": _number(d.p), "p_holm": _number(self.corrected[key]), "verdict": self.verdict(key)}
                    | {"detectable": _number(d.detectable)}
                    for key, d in self.differences.items()
                    if (other := key[2]) and key[:2] == (metric, model)
                }
                out.append(row)
        return out


def _record(e: Estimate) -> dict[str, Any]:
    made: dict[str, Any] = {"value": _number(e.value), "low": _number(e.low), "high": _number(e.high)}
    return made | {"by_seed": [_number(x) for x in e.by_seed]} if e.by_seed else made


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def summarise(values: Sequence[Value], compared: Sequence[tuple[str, str]], resamples: int, seed: int) -> Summary:
    """Means of every metric and model, and the paired differences of ``compared`` models, (model, the one to compare with)."""

    def estimate(metric: Metric, rows: Sequence[Rows], others: Sequence[Rows] | None) -> Estimate:
        return _estimate(metric, rows[0], None if others is None else others[0], resamples, seed)

    return _summary([values], compared, estimate)


def summarise_seeds(runs: Sequence[Sequence[Value]], compared: Sequence[tuple[str, str]]) -> Summary:
    """The same of runs that differ in their seed alone: means over seeds, intervals over seeds and dialogues (``crossed``)."""
    return _summary(runs, compared, _across)


def _summary(
    runs: Sequence[Rows],
    compared: Sequence[tuple[str, str]],
    estimate: Callable[[Metric, Sequence[Rows], Sequence[Rows] | None], Estimate],
) -> Summary:
    table: dict[str, dict[str, list[list[Value]]]] = {}
    for number, values in enumerate(runs):
        for v in values:
            table.setdefault(v.metric, {}).setdefault(v.model, [[] for _ in runs])[number].append(v)
    means: dict[str, dict[str, Estimate]] = {}
    differences: dict[tuple[str, str, str], Estimate] = {}
    counts = {}
    for name, found in table.items():
        metric, models = ALL[name], {model: rows for model, rows in found.items() if all(rows)}
        means[name] = {model: estimate(metric, rows, None) for model, rows in models.items()}
        for model, other in compared:
            if model in models and other in models:
                differences[name, model, other] = estimate(metric, models[model], models[other])
        if name == MARGIN:  # a difference by itself
            differences |= {(name, both, both.partition(OVER)[2]): e for both, e in means[name].items()}
        any_rows = next(iter(found.values()))[0]
        counts[name] = len({v.context for v in any_rows}), len({v.dialogue for v in any_rows})
    corrected: dict[tuple[str, str, str], float] = {}
    for headline in (True, False):  # two families: what is shown first, and all the rest
        family = {key: d.p for key, d in differences.items() if is_headline(key[0]) == headline}
        corrected |= dict(zip(family, holm(list(family.values())), strict=True))
    return Summary(means, differences, corrected, counts, len(runs))


def _parts(rows: Rows, others: Rows | None) -> dict[int, float]:
    """A number of the whole corpus, and what it is without each group of dialogues; or the same of its difference."""
    mine = {v.without: v.value for v in rows}
    theirs = {v.without: v.value for v in others} if others is not None else dict.fromkeys(mine, 0.0)
    return {n: x - theirs[n] for n, x in mine.items()}


def _paired(rows: Rows, others: Rows | None) -> dict[str, Value]:
    """By context a metric's values, or their differences where both models have one."""
    taken = {v.context: v.value for v in others} if others is not None else {v.context: 0.0 for v in rows}
    return {v.context: v._replace(value=v.value - taken[v.context]) for v in rows if v.context in taken}


def _estimate(metric: Metric, rows: Rows, others: Rows | None, resamples: int, seed: int) -> Estimate:
    """Of a metric of one model; or of its difference from another's."""
    if metric.level == "corpus":
        each = _parts(rows, others)
        return jackknife(each[-1], [x for n, x in each.items() if n >= 0 and not math.isnan(x)])
    both = list(_paired(rows, others).values())
    if not both:
        return Estimate(*(math.nan,) * 5)
    values = np.asarray([v.value for v in both])
    made = mean_by_cluster(values, [v.dialogue for v in both], resamples, seed)
    constant = set(values.tolist()) in ({0.0}, {1.0})
    if others is None and metric.share and (constant or not (math.isnan(made.low) or 0 < made.low < made.high < 1)):
        # Few, none, or all: Wilson's, of as many cases as would have this error; where nothing varies, of so many dialogues.
        n = (
            len({v.dialogue for v in both})
            if constant
            else max(1, round(made.value * (1 - made.value) / made.error**2))
        )
        low, high = wilson(round(made.value * n), n)
        return made._replace(low=low, high=high)
    return made


def _across(metric: Metric, runs: Sequence[Rows], others: Sequence[Rows] | None) -> Estimate:
    """The same over seeds, from what each dialogue (or group of them) adds to each seed's number."""
    pairs = list(zip(runs, others if others is not None else [None] * len(runs), strict=True))
    if metric.level == "corpus":
        parts = [_parts(mine, theirs) for mine, theirs in pairs]
        known = [n for n in parts[0] if n >= 0 and all(not math.isnan(p.get(n, math.nan)) for p in parts)]
        left = np.asarray([[p[n] for n in known] for p in parts])
        whole = np.asarray([[p[-1]] for p in parts])
        if not known:
            return crossed(whole)
        return crossed(whole - (len(known) - 1) * (left - left.mean(1, keepdims=True)))  # jackknife pseudo-values
    found = [_paired(mine, theirs) for mine, theirs in pairs]
    shared = [context for context in found[0] if all(context in f for f in found)]
    if not shared:
        return Estimate(*(math.nan,) * 5)
    values = np.asarray([[f[context].value for context in shared] for f in found])
    names = list(dict.fromkeys(found[0][context].dialogue for context in shared))
    member = np.asarray([[found[0][context].dialogue == name for name in names] for context in shared], float)
    mean = values.mean(1, keepdims=True)
    return crossed(mean + (values - mean) @ member * len(names) / len(shared))


def write_parquet(path: Path, values: Sequence[Value]) -> None:
    """The table as Parquet, one column a field of ``Value``."""
    import pyarrow as pa
    from pyarrow import parquet

    columns = {name: [getattr(v, name) for v in values] for name in Value._fields}
    parquet.write_table(pa.table(columns), path)


def read_parquet(path: Path) -> list[Value]:
    """What ``write_parquet`` wrote. Raises InputError where it is another table."""
    from pyarrow import ArrowException, parquet

    try:
        columns = parquet.read_table(path, columns=list(Value._fields)).to_pydict()
        return [Value(*row) for row in zip(*(columns[name] for name in Value._fields), strict=True)]
    except (ArrowException, KeyError, OSError) as e:
        raise InputError(
            f"{path}: not a table of results ({str(e).splitlines()[0][:200]}); run `esjax eval` again"
        ) from e
