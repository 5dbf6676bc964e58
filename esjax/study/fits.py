"""``esjax study fit``: curves through a study's results, one for each combination of axes along which x does not change."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from esjax.errors import InputError, within
from esjax.eval.metrics import ALL
from esjax.eval.results import Value, read_parquet
from esjax.run.files import check_new, write_text
from esjax.run.jsonl import json_text
from esjax.study.collect import FACTS, Row, read_results
from esjax.study.curves import CURVES, Fit, Results, check, check_reach
from esjax.study.curves import fit as fit_curve
from esjax.study.make import run_folder
from esjax.study.spec import Cell, Study


class Group(NamedTuple):
    """What one curve goes through: runs that differ along the axes of x, and in their seeds."""

    name: str  # the other axes' values
    x: list[float]
    cells: list[list[Cell]]  # of each x, a run a seed


def fit(study: Study, args: argparse.Namespace, show: Callable[..., None]) -> None:
    """Fit, print, and write as JSON where --out is given. Raises InputError for what cannot be fitted."""
    if not args.x or not args.y:
        raise InputError("esjax study fit needs --x and --y, such as --x flops --y perplexity")
    if args.y not in ALL:
        raise InputError(f"--y {args.y}: measured by no evaluation; known are {', '.join(sorted(ALL))}")
    if args.x not in FACTS:
        raise InputError(f"--x {args.x}: allowed are {', '.join(FACTS)}")
    if args.out is not None:
        check_new(args.out, "file")
    made = list(fits(study, args.x, args.y, [args.curve] if args.curve else list(CURVES)))
    told = [_record(name, f, args) for name, f in made]
    show(_table(told, args))
    if args.out is not None:
        write_text(args.out, json_text(told, indent=1) + "\n")


def fits(study: Study, x: str, y: str, curves: Sequence[str]) -> Iterator[tuple[str, Fit]]:
    """Curves of the last model of every run, group by group. Raises InputError naming a group that has none."""
    for group in groups(study, x):
        data = results(study, group, y)
        for curve in curves:
            with within(f"{group.name or study.name}: {y} over {x}"):
                check(data, curve)
            yield group.name, fit_curve(data, curve)


def last_rows(study: Study) -> dict[tuple[str, str], Row]:
    """Of each run the rows of its last model, by run and metric."""
    last = {cell.name: f"m{cell.config.evolve.rounds}" for cell in study.cells}
    return {(row.run, row.metric): row for _, row in read_results(study) if row.model == last.get(row.run)}


def groups(study: Study, x: str) -> list[Group]:
    """The runs by the values of those axes along which x stays the same."""
    rows = last_rows(study)
    known = [cell for cell in study.cells if (cell.name, x) in rows]
    if not known:
        raise InputError(f"no run of the study has {x}; collect it when its runs are done (esjax study collect)")

    def value(cell: Cell) -> float:
        return rows[cell.name, x].value

    moving = [axis for axis in study.axes if _moves(known, axis, value)]
    out: dict[str, dict[tuple[str, ...], list[Cell]]] = {}
    for cell in known:
        name = ", ".join(f"{a} {v}" for a, v in cell.labels.items() if a not in moving)
        place = tuple(cell.labels.get(axis, "") for axis in moving)
        out.setdefault(name, {}).setdefault(place, []).append(cell)
    made = []
    for name, places in out.items():
        seeds = {frozenset(c.seed for c in cells) for cells in places.values()}
        if len(seeds) > 1:
            raise InputError(
                f"{name or study.name}: not all runs are done under every seed; make them first (esjax study run)"
            )
        made.append(
            Group(name, [float(np.mean([value(c) for c in cells])) for cells in places.values()], list(places.values()))
        )
    return made


def _moves(cells: Sequence[Cell], axis: str, value: Callable[[Cell], float]) -> bool:
    """Whether x changes along an axis while all else stays, by more than it does from seed to seed."""
    alike: dict[tuple[tuple[str, str], ...], dict[str, list[float]]] = {}
    for cell in cells:
        rest = tuple((a, v) for a, v in cell.labels.items() if a != axis)
        alike.setdefault(rest, {}).setdefault(cell.labels.get(axis, ""), []).append(value(cell))
    for by_value in alike.values():
        means = [float(np.mean(v)) for v in by_value.values()]
        within_one = max(np.ptp(v) for v in by_value.values())
        if len(means) > 1 and max(means) - min(means) > max(2 * within_one, 0.05 * max(map(abs, means))):
            return True
    return False


def results(study: Study, group: Group, y: str) -> Results:
    """What each run's evaluation measured of its last model, dialogue by dialogue."""
    read: list[list[dict[str, float]]] = []
    for cells in group.cells:
        ordered = sorted(cells, key=lambda c: c.seed)
        read.append([_shares(run_folder(study, c), f"m{c.config.evolve.rounds}", y) for c in ordered])
    names = [set(shares) for runs in read for shares in runs]
    common = sorted(set.intersection(*names))
    if not common:
        raise InputError(f"{group.name or study.name}: no dialogue has {y} in all runs; choose another --y")
    # A run's number is a mean over its own dialogues; where some lack the metric, over those that all runs have.
    made = [[[shares[name] for name in common] for shares in runs] for runs in read]
    return Results(np.asarray(group.x), np.asarray(made))


def _shares(folder: Path, model: str, metric: str) -> dict[str, float]:
    """By dialogue (of a corpus' number, by group of dialogues) what it adds: their mean is the number."""
    rows = [v for v in _measured(folder) if (v.model, v.metric) == (model, metric)]
    if not rows:
        return {}
    if rows[0].context == "":  # of the whole corpus: jackknife pseudo-values
        parts = {v.without: v.value for v in rows}
        left = {n: v for n, v in parts.items() if n >= 0 and not math.isnan(v)}
        if not left:
            return {"all": parts[-1]}
        center = float(np.mean(list(left.values())))
        return {str(n): parts[-1] - (len(left) - 1) * (v - center) for n, v in left.items()}
    by_dialogue: dict[str, list[float]] = {}
    for v in rows:
        by_dialogue.setdefault(v.dialogue, []).append(v.value)
    mean = len(rows) / len(by_dialogue)
    whole = sum(map(sum, by_dialogue.values())) / len(rows)
    return {name: whole + (sum(v) - whole * len(v)) / mean for name, v in by_dialogue.items()}


@cache
def _measured(folder: Path) -> list[Value]:
    """A finished run's table; curves of several metrics over several x are all made of it."""
    return read_parquet(folder / "eval" / "results.parquet")


def _record(name: str, f: Fit, args: argparse.Namespace) -> dict[str, Any]:
    made: dict[str, Any] = {"group": name, "curve": f.curve.name, "formula": f.curve.formula}
    for p in "cak":
        made[p] = dict(zip(("value", "low", "high"), f.interval(p), strict=True))
    r = f.residuals
    made |= {
        "residuals_of": "logarithms" if f.logarithmic else "y",
        "residual_sd": float(r.std(ddof=min(3, r.size - 1))),
    }
    made["points"] = [
        {"x": float(x), "y": y.tolist(), "fitted": float(v), "residuals": each.tolist()}
        for x, y, v, each in zip(f.x, f.means, f.at(f.x), r, strict=True)
    ]
    if args.at is not None:
        check_reach(f, args.at, args.far)
        low, high = f.band(np.asarray([args.at]))
        made["at"] = {
            "x": args.at,
            "value": float(f.at(np.asarray([args.at]))[0]),
            "low": float(low[0]),
            "high": float(high[0]),
        }
    return made


def _table(records: Sequence[dict[str, Any]], args: argparse.Namespace) -> Table:
    columns = ["group", "curve", "c", "a", "k", "residual sd", *([f"at {args.at:g}"] if args.at is not None else [])]
    table = Table(title=f"{args.y} over {args.x}: value [95% interval over seeds and dialogues]")
    for column in columns:
        table.add_column(column, overflow="fold")
    for r in records:
        shown = [f"{r[p]['value']:.4g} [{r[p]['low']:.4g}, {r[p]['high']:.4g}]" for p in "cak"]
        at = [f"{r['at']['value']:.4g} [{r['at']['low']:.4g}, {r['at']['high']:.4g}]"] if args.at is not None else []
        table.add_row(r["group"] or "all", r["formula"], *shown, f"{r['residual_sd']:.3g} of {r['residuals_of']}", *at)
    return table
