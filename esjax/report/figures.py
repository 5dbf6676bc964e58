"""The report's figures, made by plotly: the timeline, training curves, pairs by reason, metrics with intervals, conversations.

The page fills in colours of text and grid, which hang on its theme. A figure's ``rows`` are its numbers as a table, for whoever
cannot see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from esjax.eval.compare import title
from esjax.eval.metrics import ALL
from esjax.eval.results import HEADLINE, OVER, is_headline
from esjax.eval.table import metric_label, metric_value

Row = dict[str, Any]
# Okabe and Ito's colours, which colour-blind people can tell apart, without those that are faint on white or on black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("solid", "dash", "dot", "dashdot")
PANEL = 250  # pixels of height of a small plot
# The plots of a phase: their titles, and the series of metrics.jsonl in each with what the legend calls it.
SFT = (
    ("loss (nats a token)", (("loss", "training"), ("valid_loss", "validation"))),
    ("gradient norm", (("grad_norm", "training"),)),
)
DPO = (
    ("loss", (("loss", "training"), ("valid_loss", "validation"))),
    ("margin", (("margin", "training"), ("valid_margin", "validation"))),
    ("accuracy", (("accuracy", "training"), ("valid_accuracy", "validation"))),
    ("log-prob against the reference", (("chosen_moved", "chosen"), ("rejected_moved", "rejected"))),
    ("negative log-prob a token", (("chosen_nll", "chosen"), ("replay_nll", "replay"))),
    ("away from M_t; KL from M_0", (("drift", "drift from M_t"), ("valid_kl", "KL from M_0, validation"))),
)


class Figure(NamedTuple):
    """One figure of the page."""

    id: str
    title: str
    text: str  # what is to be seen, in a sentence
    plots: list[
        Row
    ]  # plotly's JSON, each with its own title; the page lays them out beside each other where there is room
    rows: list[list[str]]  # the same as a table, its first row the heads


def figures(page: Mapping[str, Any]) -> list[Figure]:
    """All figures that there are numbers for."""
    runs: list[Row] = page["runs"]
    made = [_timeline(runs), _curves(runs, "sft", SFT), *(_curves(runs, p, DPO) for p in _phases(runs)), _pairs(runs)]
    return [figure for figure in [*made, metrics_figure(runs), _talks(runs)] if figure is not None]


def _phases(runs: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(c["phase"] for run in runs for c in run["curves"] if c["phase"] != "sft"))


def _label_run(run: Row, runs: Sequence[Row], text: str) -> str:
    return f"{run['name']}: {text}" if len(runs) > 1 else text


def plot_json(plot: Any, height: int, heading: str = "") -> Row:
    """A plot as JSON, without plotly's template: 7 kB of defaults, whose colours are those of a light page."""
    plot.update_layout(
        height=height,
        margin={
            "l": 8,
            "r": 8,
            "t": 36 if heading else 8,
            "b": 64 if any(t.showlegend is not False for t in plot.data) else 8,
        },
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0},
        title={"text": heading, "font": {"size": 14}} if heading else None,
    )
    plot.update_xaxes(automargin=True)
    plot.update_yaxes(automargin=True)
    spec: Row = plot.to_plotly_json()
    spec["layout"].pop("template", None)
    return {"data": list(spec["data"]), "layout": spec["layout"]}


def phase_of(stage: str) -> str:
    """Which part of the method a stage belongs to."""
    first = stage.split("/")[0]
    names = {"sft": "phase 1: SFT", "eval": "evaluation", "pairs": "DPO", "dpo": "DPO"}
    return names.get(first, first.replace("round", "phase 2: round "))


def _timeline(runs: Sequence[Row]) -> Figure | None:
    plot, rows, seen = go.Figure(), [["stage", "part", "status", "seconds"]], dict[str, str]()
    for run in runs:
        start = 0.0
        for stage in run["stages"]:
            part, seconds = phase_of(stage["name"]), stage["seconds"] or 0.0
            first, colour = part not in seen, seen.setdefault(part, COLOURS[len(seen) % len(COLOURS)])
            name = _label_run(run, runs, stage["name"])
            plot.add_bar(
                x=[seconds],
                y=[name],
                base=[start],
                orientation="h",
                marker_color=colour,
                name=part,
                legendgroup=part,
                showlegend=first,
                hovertemplate=f"%{{y}}: {seconds:,.0f} s<extra></extra>",
            )
            start += seconds
            rows.append([name, part, stage["status"], f"{seconds:,.0f}"])
    if len(rows) == 1:
        return None
    plot.update_layout(barmode="overlay")
    plot.update_yaxes(autorange="reversed")
    text = "Each stage of the two phases, one after the other, in seconds of work; pauses between commands are not counted."
    return Figure("timeline", "Timeline", text, [plot_json(plot, 120 + 26 * len(rows))], rows)


def _curves(runs: Sequence[Row], phase: str, plots: Sequence[tuple[str, Any]]) -> Figure | None:
    curves = [(run, c) for run in runs for c in run["curves"] if c["phase"] == phase]
    made, rows = [], [["curve", "first step", "value", "last step", "value"]]
    for heading, series in plots:
        plot = go.Figure()
        for r, (run, curve) in enumerate(curves):
            for s, (key, what) in enumerate(series):
                points = [
                    (x, y) for x, y in zip(curve["step"], curve["series"].get(key, ()), strict=False) if y is not None
                ]
                if not points:
                    continue
                told = _label_run(run, runs, what)
                plot.add_scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    mode="lines+markers" if len(points) < 3 else "lines",
                    name=told,
                    showlegend=True,
                    line={"color": COLOURS[(r if len(runs) > 1 else s) % len(COLOURS)], "dash": DASHES[s]},
                )
                rows.append(
                    [f"{heading}, {told}", *(t for x, y in (points[0], points[-1]) for t in (str(x), f"{y:.4g}"))]
                )
        if plot.data:
            made.append(plot_json(plot, PANEL, heading))
    title = {"sft": "Phase 1: SFT", "dpo": "DPO"}.get(phase) or f"DPO, {phase_of(phase).removeprefix('phase 2: ')}"
    text = "The numbers of training by optimiser step."
    if phase != "sft":
        text += " DPO starts at its reference: its usual loss, sigmoid, at ln 2, and the margin at 0. Log-probs are in nats."
    return Figure(f"curves-{phase.replace('/', '-')}", title, text, made, rows) if made else None


def rounds(run: Row) -> list[tuple[str, Row]]:
    """Each round's facts about its pairs."""
    return [(s["name"].split("/")[0], s["facts"]) for s in run["stages"] if s["name"].endswith("/pairs") and s["facts"]]


def _pairs(runs: Sequence[Row]) -> Figure | None:
    made = [(_label_run(run, runs, name), facts) for run in runs for name, facts in rounds(run) if "kept" in facts]
    if not made:
        return None
    reasons = ["kept", *dict.fromkeys(reason for _, facts in made for reason in facts.get("dropped", {}))]
    counts = {r: [f["kept"] if r == "kept" else f.get("dropped", {}).get(r, 0) for _, f in made] for r in reasons}
    plot, names = go.Figure(), [name for name, _ in made]
    for n, (reason, values) in enumerate(counts.items()):
        told = reason if reason == "kept" else f"dropped: {reason.replace('_', ' ')}"
        plot.add_bar(x=values, y=names, orientation="h", name=told, marker_color=COLOURS[n % len(COLOURS)])
    plot.update_layout(barmode="stack")
    plot.update_yaxes(autorange="reversed")
    rows = [["round", *reasons, "words of refined over draft"]]
    rows += [
        [name, *(str(counts[r][i]) for r in reasons), f"{f['length_ratio']:.2f}" if "length_ratio" in f else ""]
        for i, (name, f) in enumerate(made)
    ]
    text = "How many pairs of each round were trained on, and why the others were not."
    return Figure("pairs", "Pairs kept and dropped", text, [plot_json(plot, 150 + 40 * len(made))], rows)


def metrics_figure(runs: Sequence[Row]) -> Figure | None:
    records = [r for run in runs for r in run["records"] if OVER not in r["model"] and r["value"] is not None]
    names = [n for n in HEADLINE if any(r["metric"] == n for r in records)]
    names += [n for n in dict.fromkeys(r["metric"] for r in records) if n not in HEADLINE and is_headline(n)]
    models = list(dict.fromkeys(r["model"] for r in records))
    made, rows = [], [["metric", *map(model_title, models)]]
    for name in names:
        by = {r["model"]: r for r in records if r["metric"] == name}
        plot = go.Figure()
        for model in (m for m in models if m in by):
            r = by[model]
            low, high = (r["value"] if r[k] is None else r[k] for k in ("low", "high"))
            plot.add_scatter(
                x=[r["value"]],
                y=[model_title(model)],
                error_x={"type": "data", "array": [high - r["value"]], "arrayminus": [r["value"] - low]},
                mode="markers",
                marker={"color": COLOURS[models.index(model) % len(COLOURS)], "size": 9},
                showlegend=False,
                hovertemplate=f"{model_title(model)}: {interval(name, r)}<extra></extra>",
            )
        plot.update_yaxes(autorange="reversed", type="category")
        if ALL[name].share:
            plot.update_xaxes(tickformat=".0%")
        made.append(plot_json(plot, 90 + 24 * len(models), metric_label(name)))
        rows.append([metric_label(name), *(interval(name, by[m]) if m in by else "" for m in models)])
    text = "Means with 95% intervals over dialogues; lower is better where marked v, higher where marked ^."
    return Figure("metrics", "Metrics", text, made, rows) if made else None


def model_title(model: str) -> str:
    """How the page calls a model: M_1, or RUN: M_1."""
    run, _, name = model.rpartition("/")
    return f"{run}: {title(name)}" if run else title(name)


def interval(metric: str, r: Mapping[str, Any]) -> str:
    """A value with its interval in words."""
    if r["low"] is None:
        return metric_value(metric, r["value"])
    return f"{metric_value(metric, r['value'])} [{metric_value(metric, r['low'])}, {metric_value(metric, r['high'])}]"


def differences(runs: Sequence[Row]) -> list[list[str]]:
    """The paired differences of the headline metrics, as a table with heads, each with its verdict in words."""
    rows = [
        ["metric", "model", "compared with", "difference [95%]", "after Holm's correction", "would have been shown"]
    ]
    for run in runs:
        for r in run["records"]:
            for other, d in r["differences"].items() if is_headline(r["metric"]) and OVER not in r["model"] else ():
                size = "" if d.get("detectable") is None else metric_value(r["metric"], d["detectable"])
                told = interval(r["metric"], d) if d["value"] is not None else ""
                rows.append(
                    [metric_label(r["metric"]), model_title(r["model"]), model_title(other), told, d["verdict"], size]
                )
    return rows


def _talks(runs: Sequence[Row]) -> Figure | None:
    felt: dict[str, list[list[float]]] = {}
    for run in runs:
        for talk in run["talks"]:
            values = [s["value"] for s in talk["steps"] if s["kind"] in ("feeling", "answer")]
            felt.setdefault(talk["model"], []).append(values)
    if not felt:
        return None
    plot, rows = go.Figure(), [["model", "people", "feeling at first (mean)", "at the end (mean)"]]
    mean: Callable[[Sequence[float]], float] = lambda xs: sum(xs) / len(xs)  # noqa: E731
    for number, (model, people) in enumerate(felt.items()):
        length = min(map(len, people))
        means = [mean([p[i] for p in people]) for i in range(length)]
        colour = COLOURS[number % len(COLOURS)]
        plot.add_scatter(
            x=list(range(length)), y=means, mode="lines+markers", name=model_title(model), line_color=colour
        )
        rows.append([model_title(model), str(len(people)), f"{means[0]:.2f}", f"{means[-1]:.2f}"])
    plot.update_layout(xaxis_title="replies so far", yaxis_title="feeling, 1 to 5")
    text = "How simulated seekers said that they felt, after each reply; the mean of all."
    return Figure("talks", "Simulated conversations", text, [plot_json(plot, 340)], rows)
