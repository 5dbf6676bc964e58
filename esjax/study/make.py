"""Make a study's runs, one after the other; stages that runs have in common are made once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from esjax import api
from esjax.errors import InputError, RunError, TransientError
from esjax.run.manifest import read_manifest
from esjax.run.progress import say
from esjax.study.spec import Cell, Study

SHARED = "stages"  # the folder beside the runs that keeps what they have in common


def run_folder(study: Study, cell: Cell) -> Path:
    """The run directory of a cell."""
    return study.folder / cell.name


def is_done(study: Study, cell: Cell) -> bool:
    """Whether a cell's run came to its end."""
    stages = read_manifest(run_folder(study, cell))["stages"]
    last = stages.get("eval/results", {})
    return bool(last.get("status") == "done") and f"m{cell.config.evolve.rounds}" in last["inputs"]


def make(study: Study) -> None:
    """Run what is not done. A run that fails does not keep the others from being made.

    A run that another process is making is left to it, so that several may work on one study. Raises RunError naming the
    runs that failed, TransientError where some are left to others.
    """
    failed, busy = dict[str, Exception](), list[Cell]()
    for number, cell in enumerate(study.cells, start=1):
        if is_done(study, cell):
            continue
        folder = run_folder(study, cell)
        say(f"run {number} of {len(study.cells)}: {cell.words} ({folder})")
        try:
            api.evolve(cell.config, folder, study.folder / SHARED)
        except (InputError, RunError) as e:
            say(f"  failed: {e}")
            failed[cell.words] = e
        except TransientError as e:
            if "in use by another process" not in str(e):
                raise
            say("  being made by another process")
            busy.append(cell)
    say(made(study))
    if failed:
        first, error = next(iter(failed.items()))
        raise RunError(f"{len(failed)} of {len(study.cells)} runs failed; the first ({first}): {error}")
    if busy:
        raise TransientError(
            f"{len(busy)} runs are being made by other processes; run the same command again when they are done"
        )


def made(study: Study) -> str:
    """What there is of a study, in words."""
    entries = [e for cell in study.cells for e in read_manifest(run_folder(study, cell))["stages"].values()]
    count = Counter("shared" if e.get("shared") else "made" for e in entries if e["status"] == "done")
    done = sum(is_done(study, cell) for cell in study.cells)
    return f"{done} of {len(study.cells)} runs are done: {count['made']} stages made, {count['shared']} taken from another run"
