"""The closing tables: means of every model, and what differs between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from esjax.eval.judges.check import PUBLISHED
from esjax.eval.metrics import ALL
from esjax.eval.results import HEADLINE, OVER, is_headline

Record = Mapping[str, Any]
NONE, UNSHOWN = "-", "no difference shown"


def tables(records: Sequence[Record], title: Callable[[str], str], all_metrics: bool = False) -> list[Table]:
    """The headline metrics of the summary's records, or all: a table of means and, of several models, one of differences."""
    names = list(dict.fromkeys(r["metric"] for r in records))
    shown = [n for n in HEADLINE if n in names]
    shown += [n for n in names if n not in HEADLINE and (all_metrics or is_headline(n))]
    by = {(r["metric"], r["model"]): r for r in records}
    models = list(dict.fromkeys(r["model"] for r in records if OVER not in r["model"]))
    shown = [n for n in shown if (n, models[0]) in by]
    first = by["words", models[0]]
    several = first.get("seeds", 1) > 1
    seeds, over = (f", {first['seeds']} seeds", "seeds and dialogues") if several else ("", "dialogues")
    means = Table(
        title=f"Held-out dialogues: {first['contexts']} replies a model, {first['dialogues']} dialogues{seeds}",
        title_justify="left",
        caption="lower is better where marked v, higher where marked ^",
    )
    means.add_column("")
    for model in models:
        means.add_column(title(model), justify="right")
    for name in shown:
        means.add_row(
            metric_label(name), *(metric_value(name, by[name, m]["value"]) if (name, m) in by else NONE for m in models)
        )
    pairs = [(m, other) for m in models for other in next((by[n, m]["differences"] for n in shown if (n, m) in by), {})]
    judged = _judged([r for r in records if OVER in r["model"]], title)
    if not pairs:
        return [means, *judged]
    wide = Table(
        title=f"Differences, with 95% intervals over {over}",
        title_justify="left",
        caption="*: shown, after Holm's correction for all of this table; without it: no difference shown",
    )
    wide.add_column("")
    for model, other in pairs:
        wide.add_column(f"{title(model)} - {title(other)}", justify="right")
    for name in shown:
        found = [by[name, m]["differences"].get(other) if (name, m) in by else None for m, other in pairs]
        wide.add_row(metric_label(name), *(NONE if d is None else _difference(name, d) for d in found))
    return [means, wide, *judged]


def _judged(records: Sequence[Record], title: Callable[[str], str]) -> list[Table]:
    """What a judge said of two models' replies: one table, or none."""
    pairs = list(dict.fromkeys(r["model"] for r in records))
    if not pairs:
        return []
    table = Table(title="By the judge, both orders, with 95% intervals over dialogues", title_justify="left")
    table.caption = "*: shown, after Holm's correction; a judge's verdicts are no ratings by people: see judge-check"
    table.add_column("")
    for pair in pairs:
        table.add_column(title(pair), justify="right")
    for name in dict.fromkeys(r["metric"] for r in records):
        cells = []
        for pair in pairs:
            r = next((r for r in records if (r["metric"], r["model"]) == (name, pair)), None)
            told = [d["verdict"] for d in r["differences"].values()] if r else []
            cells.append(NONE if r is None else _difference(name, {**r, "verdict": [*told, UNSHOWN][0]}, False))
        table.add_row(metric_label(name), *cells)
    return [table]


def accuracy(records: Sequence[Record]) -> Table:
    """What `esjax eval --choices` found."""
    table = Table(title="The likeliest of the given answers", title_justify="left")
    table.caption = "right by the mean log-prob of an answer's tokens, with Wilson's 95% interval, and by their sum"
    for name in ("", "n", "right", "[95%]", "by sum", "chance"):
        table.add_column(name, justify="right" if name else "left")
    for r in records:
        label = f"  {r['category']}" if r["category"] else r["task"]
        numbers = (
            f"{r['by_mean']:.0%}",
            f"[{r['low']:.0%}, {r['high']:.0%}]",
            f"{r['by_sum']:.0%}",
            f"{r['chance']:.0%}",
        )
        table.add_row(label, str(r["items"]), *numbers)
    return table


def agreements(records: Sequence[Record]) -> Table:
    """What `esjax eval judge-check` found, beside the published figures."""
    table = Table(title="Agreement of the judge with people", title_justify="left")
    published = ", ".join(f"{who} {kappa:.2f}" for who, kappa in PUBLISHED.items())
    table.caption = (
        f"kappa of marks is weighted with squares; with experts, published medians: {published} (Kumar et al. 2025)"
    )
    for name in ("", "n", "kappa [95%]", "same answer", "same in both orders", "no verdict"):
        table.add_column(name, justify="right" if name else "left")

    def share(x: float | None) -> str:
        return NONE if x is None else f"{x:.0%}"

    for r in records:
        numbers = [NONE if r[k] is None else f"{r[k]:.2f}" for k in ("kappa", "low", "high")]
        kappa = f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"
        table.add_row(r["what"], str(r["rated"]), kappa, share(r["equal"]), share(r["same"]), share(r["malformed"]))
    return table


def metric_label(name: str) -> str:
    mark = {"higher": " ^", "lower": " v", "neither": ""}[ALL[name].better]
    return ALL[name].label + mark


def _difference(name: str, d: Record, signed: bool = True) -> str:
    interval = f"[{metric_value(name, d['low'], signed)}, {metric_value(name, d['high'], signed)}]"
    star = "" if d["verdict"] == UNSHOWN else "*"
    return f"{metric_value(name, d['value'], signed)}{star} {interval}"


def metric_value(name: str, x: float | None, signed: bool = False) -> str:
    if x is None:
        return NONE
    sign = "+" if signed else ""
    if ALL[name].share:
        return f"{100 * x:{sign}.0f}%"
    return f"{x:{sign}.{2 if abs(x) >= 1 or name in ('perplexity', 'words') else 3}f}"
