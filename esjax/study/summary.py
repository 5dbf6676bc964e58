"""What a study shows: its variants beside each other, over seeds and dialogues, and how the others differ from the first."""

from __future__ import annotations

from typing import Any

from esjax.errors import InputError
from esjax.eval.compare import BACKBONE
from esjax.eval.results import OVER, Value, read_parquet, summarise, summarise_seeds
from esjax.study.make import is_done, run_folder
from esjax.study.spec import Cell, Study

FIRST = "m0"


def variant(study: Study, cell: Cell) -> str:
    """What the runs of a cell's settings are called, whatever their seed."""
    return (
        ", ".join(f"{axis} {value}" if axis != "cell" else value for axis, value in cell.labels.items()) or study.name
    )


def variants(study: Study) -> dict[str, dict[int, Cell]]:
    """The variants whose runs are done under every seed that the first one has, each with its runs. Raises InputError."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in study.cells:
        if is_done(study, cell):
            found.setdefault(variant(study, cell), {})[cell.seed] = cell
    if not found:
        raise InputError(f"{study.folder}: no run of the study is done; make them first (esjax study run)")
    seeds = next(iter(found.values())).keys()
    return {name: {s: runs[s] for s in seeds} for name, runs in found.items() if seeds <= runs.keys()}


def records(study: Study) -> list[dict[str, Any]]:
    """As of a run's evaluation, with variants (the last model of their runs) for models; and the first one's backbone and M_0.

    Differences are paired, dialogue by dialogue and seed by seed: of each variant from the first, and from the first's M_0.
    """
    known = variants(study)
    first, *others = known
    runs = []
    for seed, cell in known[first].items():
        values = _values(study, cell, {BACKBONE: BACKBONE, FIRST: FIRST, f"m{cell.config.evolve.rounds}": first})
        for name in others:
            mine = known[name][seed]
            values += _values(study, mine, {f"m{mine.config.evolve.rounds}": name})
        runs.append([v for v in values if OVER not in v.model])
    pairs = [(FIRST, BACKBONE), *((name, FIRST) for name in known), *((name, first) for name in others)]
    pairs = [(a, b) for a, b in pairs if b != BACKBONE or any(v.model == BACKBONE for v in runs[0])]
    c = known[first][next(iter(known[first]))].config
    made = summarise_seeds(runs, pairs) if len(runs) > 1 else summarise(runs[0], pairs, c.eval.resamples, c.seed)
    return made.rows()


def _values(study: Study, cell: Cell, names: dict[str, str]) -> list[Value]:
    table = read_parquet(run_folder(study, cell) / "eval" / "results.parquet")
    return [v._replace(model=names[v.model]) for v in table if v.model in names]
