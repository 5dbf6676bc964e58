"""A study's page: its variants, curves with bands, and quality against FLOPs and against time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from esjax.errors import InputError
from esjax.eval.metrics import ALL
from esjax.eval.table import metric_label
from esjax.report.figures import COLOURS, Figure, differences, interval, metrics_figure, plot_json
from esjax.report.page import rendered
from esjax.run.files import check_writable, write_text
from esjax.run.manifest import read_manifest
from esjax.study.collect import FACTS, collect
from esjax.study.fits import fits, last_rows
from esjax.study.make import made, run_folder
from esjax.study.spec import Study
from esjax.study.summary import records, variant, variants

Row = dict[str, Any]
CURVE = "power"  # drawn through what allows one
AXES = ("flops", "tokens", "parameters", "contexts", "pairs_kept")  # what curves may be over
BAND = 60  # places of a curve
NO_CURVES = (
    f"No curves: they need runs at several values of one of {', '.join(AXES)}; `esjax study fit` says what is missing."
)
# By what quality is shown against: heading, axis and text.
FRONTIERS = {
    "flops": (
        "Quality against FLOPs",
        "FLOPs of training and sampling",
        "The last model of each variant over what it cost to train and to draw replies for it.",
    ),
    "time": (
        "Quality against time",
        "seconds of all stages",
        "The same over seconds on the machines that made the runs; compare within one kind of machine alone.",
    ),
}


def write(study: Study, out: Path | None) -> Path:
    """Collect what is done and write the page, into the study's folder unless ``out`` names a file. Raises InputError."""
    place = out or study.folder / "report.html"
    check_writable(place, "--out")
    collect(study)
    found = records(study)
    shown = [metric for metric in study.metrics if any(r["metric"] == metric for r in found)]
    mine = [r for r in found if r["metric"] in shown]
    curves = _curves(study, shown)
    figures = [metrics_figure([{"records": mine, "name": study.name}]), *_frontiers(study, mine, shown), *curves]
    notes = _notes(study) + ([] if any(curves) else [NO_CURVES])
    page: Row = {"runs": [], "examples": [], "messages": [], "state": "", "notes": notes}
    page |= {
        "figures": [f._asdict() for f in figures if f is not None],
        "differences": differences([{"records": mine}]),
    }
    page |= {"tables": _tables(study), "labels": {name: m.label for name, m in ALL.items()}}
    write_text(place, rendered(page, study.name, "A study"))
    return place


def _notes(study: Study) -> list[str]:
    known = variants(study)
    seeds = len(next(iter(known.values())))
    told = [made(study) + "."]
    if left := sorted({variant(study, c) for c in study.cells} - known.keys()):
        told.append(f"Not shown, as their runs are not all done: {'; '.join(left)}.")
    if seeds == 1:
        told.append("One seed: intervals are over dialogues alone, and what another seed would change is not in them.")
    return told


def _frontiers(study: Study, found: Sequence[Row], shown: Sequence[str]) -> list[Figure | None]:
    """Quality against FLOPs, and against the seconds of all stages, those taken from other runs among them."""
    rows, known = last_rows(study), variants(study)
    seconds = {cell.name: _seconds(run_folder(study, cell)) for runs in known.values() for cell in runs.values()}
    cost = {
        "flops": {
            name: float(np.mean([rows[c.name, "flops"].value for c in runs.values()])) for name, runs in known.items()
        },
        "time": {name: float(np.mean([seconds[c.name] for c in runs.values()])) for name, runs in known.items()},
    }
    return [_frontier(kind, found, shown, cost[kind]) for kind in FRONTIERS]


def _seconds(folder: Path) -> float:
    stages = read_manifest(folder)["stages"].items()
    return float(sum(entry["seconds"] for name, entry in stages if not name.startswith("eval")))


def _frontier(kind: str, found: Sequence[Row], shown: Sequence[str], cost: dict[str, float]) -> Figure | None:
    heading, axis, text = FRONTIERS[kind]
    if len(cost) < 2:
        return None
    plots, table = [], [["variant", axis, *map(metric_label, shown)]]
    by = {(r["metric"], r["model"]): r for r in found}
    for metric in shown:
        plot = go.Figure()
        for n, (name, x) in enumerate(cost.items()):
            r = by.get((metric, name))
            if r is None or r["value"] is None:
                continue
            low, high = (r["value"] if r[k] is None else r[k] for k in ("low", "high"))
            plot.add_scatter(
                x=[x],
                y=[r["value"]],
                error_y={"type": "data", "array": [high - r["value"]], "arrayminus": [r["value"] - low]},
                mode="markers",
                name=name,
                marker={"color": COLOURS[n % len(COLOURS)], "size": 9},
                hovertemplate=f"{name}: {interval(metric, r)} at {x:.3g}<extra></extra>",
            )
        plot.update_xaxes(type="log", title=axis)
        plots.append(plot_json(plot, 320, metric_label(metric)))
    for name, x in cost.items():
        told = [interval(m, by[m, name]) if (m, name) in by and by[m, name]["value"] is not None else "" for m in shown]
        table.append([name, f"{x:.3g}", *told])
    return Figure(f"frontier-{kind}", heading, text, plots, table)


def _curves(study: Study, shown: Sequence[str]) -> list[Figure | None]:
    """Curves with bands, where a study has enough different x for them."""
    out: list[Figure | None] = []
    for x in AXES:
        plots, table = [], [["quality", "runs", "curve", "c", "a", "k"]]
        for metric in shown:
            try:
                found = list(fits(study, x, metric, [CURVE]))
            except InputError:  # no curve is to be had over this x
                continue
            plot = go.Figure()
            for n, (name, f) in enumerate(found):
                colour = COLOURS[n % len(COLOURS)]
                wide = np.geomspace(f.x.min(), f.x.max(), BAND)
                low, high = f.band(wide)
                edge = {
                    "mode": "lines",
                    "line": {"width": 0, "color": colour},
                    "showlegend": False,
                    "hoverinfo": "skip",
                }
                plot.add_scatter(x=wide.tolist(), y=low.tolist(), **edge)
                plot.add_scatter(x=wide.tolist(), y=high.tolist(), fill="tonexty", opacity=0.3, **edge)
                plot.add_scatter(
                    x=wide.tolist(), y=f.at(wide).tolist(), mode="lines", line={"color": colour}, name=name or "all"
                )
                seeds = f.means.shape[1]
                points = np.repeat(f.x, seeds).tolist()
                plot.add_scatter(
                    x=points, y=f.means.ravel().tolist(), mode="markers", marker={"color": colour}, showlegend=False
                )
                told = [f"{v:.4g} [{lo:.4g}, {hi:.4g}]" for v, lo, hi in map(f.interval, "cak")]
                table.append([metric_label(metric), name or "all", f.curve.formula, *told])
            plot.update_xaxes(type="log", title=x)
            plots.append(plot_json(plot, 320, metric_label(metric)))
        text = f"{FACTS[x].capitalize()}. Points are runs, bands 95% intervals over seeds and dialogues."
        out.append(Figure(f"curve-{x}", f"Quality over {x.replace('_', ' ')}", text, plots, table) if plots else None)
    return out


def _tables(study: Study) -> list[Row]:
    rows, known = last_rows(study), variants(study)
    facts = [name for name in FACTS if any((c.name, name) in rows for runs in known.values() for c in runs.values())]
    cost = [["variant", "seeds", *facts]]
    for name, runs in known.items():
        means = [
            np.mean([rows[c.name, fact].value for c in runs.values() if (c.name, fact) in rows] or [np.nan])
            for fact in facts
        ]
        cost.append([name, str(len(runs)), *(f"{x:.4g}" for x in means)])
    cells = [["run", "variant", "seed", "folder"]]
    cells += [[c.name, variant(study, c), str(c.seed), str(run_folder(study, c))] for c in study.cells]
    return [
        {"title": "What the variants cost", "rows": cost, "folded": False},
        {"title": "Runs", "rows": cells, "folded": True},
    ]
