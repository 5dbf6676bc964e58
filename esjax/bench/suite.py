"""``esjax bench --suite``: all that is worth measuring on a machine, in one command and under a limit of time.

Each measurement is a process of its own, so that memory is its own and one that fails costs no other. The files are written
anew after each, so that what was measured is kept however the command ends.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from esjax.bench.tasks import asked_tasks
from esjax.bench.workload import read_workload
from esjax.errors import InputError, RunError
from esjax.run.files import check_writable, write_text
from esjax.run.jsonl import json_text
from esjax.run.progress import say
from esjax.settings.files import Overrides

Line = dict[str, Any]
DATA, PAGE = "suite.json", "suite.html"
# What is measured, what matters most first: a task and its options.
ITEMS = (
    ("sample",),
    ("dpo", "--model.remat", "dots"),
    ("sft", "--model.remat", "dots"),
    ("round", "--compare", "naive"),
    ("dpo", "--model.remat", "full", "--compare", "naive"),
    ("sft", "--model.remat", "full"),
)
# Above, the faster of these two; and our kernel for training.
ON_GPUS = (
    ("sample", "--model.decoding_attention", "plain"),
    ("sample", "--model.decoding_attention", "pallas"),
    ("dpo", "--model.remat", "dots", "--model.attention", "pallas"),
)
COLUMNS = ("figure", "spread", "mem_gib", "mfu", "prefill_mfu", "step_ms", "step_limit_ms", "moved_gib", "needed_gib")
LIMIT, MINUTE = 12, 60.0  # minutes that it may take when nothing is said; seconds
LIBRARIES = ("jax", "flax", "optax", "transformers")


def run(args: argparse.Namespace, given: Overrides) -> None:
    """Measure, and write FOLDER/suite.json and FOLDER/suite.html. Raises InputError before anything is measured."""
    for name, value in (("--compare", args.compare), ("--micro-rows", args.micro_rows), ("--trace", args.trace)):
        if value is not None:
            raise InputError(f"{name}: a suite measures with options of its own; leave it out")
    if asked := list(given.settings()):
        raise InputError(f"--{asked[0]}: a suite measures with settings of its own; leave it out")
    minutes = LIMIT if args.limit is None else args.limit
    if minutes < 1:
        raise InputError(f"--limit {minutes}: minutes, at least 1")
    items = ITEMS if args.profile in ("cpu", "tiny") else ITEMS + ON_GPUS
    known, tasks = dict.fromkeys(item[0] for item in items), asked_tasks(args.tasks)
    if other := [task for task in tasks if task not in known]:
        raise InputError(f"--tasks {other[0]}: a suite measures {', '.join(known)}; leave it out")
    read_workload(args.workload, args.profile)
    folder: Path = args.suite
    check_writable(folder / DATA, "--suite")
    end = time.monotonic() + MINUTE * minutes
    made: Line = {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "profile": args.profile,
        "workload": args.workload,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "lines": [],
        "missing": {},
    }
    for task, *options in (item for item in items if item[0] in tasks):
        words = ["--tasks", task, *options]
        left, name = end - time.monotonic(), " ".join((task, *options))
        say(f"bench: {name}, {max(0.0, left) / MINUTE:.1f} of {minutes} minutes left")
        lines, why = _measured(["--profile", args.profile, "--workload", args.workload, *words], left)
        for line in lines:
            print(json_text(line), flush=True)
        made["lines"] += lines
        if why:
            made["missing"][name] = why
        write_text(folder / DATA, json_text(made) + "\n")
        write_text(folder / PAGE, page(made))
    say(f"bench: {folder / PAGE}")
    if not made["lines"]:
        first, why = next(iter(made["missing"].items()))
        raise RunError(f"nothing could be measured; the first ({first}): {why}")


def _measured(words: Sequence[str], seconds: float) -> tuple[list[Line], str]:
    """What one command printed, and, where it did not end well, why."""
    if seconds <= 0:
        return [], "no time was left"
    why = ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "esjax", "bench", *words], capture_output=True, timeout=seconds, check=False
        )
        out = done.stdout
        if done.returncode:
            why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except subprocess.TimeoutExpired as e:
        out, why = e.stdout or b"", "stopped at the limit"
    return [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")], why


def page(made: Line) -> str:
    """One HTML page: every line as a row, where its memory traffic goes, and what is missing."""
    console = Console(record=True, width=200, file=io.StringIO(), highlight=False, markup=False)
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    device = next((line["device"] for line in made["lines"]), "nothing measured")
    console.print(f"esjax bench --suite, profile {made['profile']} of {made['workload']}, {made['began']}")
    console.print(f"{device}; {versions}")
    table = Table(title="Measured", title_justify="left")
    for name in ("task", "variant", "remat", "unit", *COLUMNS):
        table.add_column(name)
    for line in made["lines"]:
        table.add_row(*(_cell(line.get(name)) for name in ("task", "variant", "remat", "unit", *COLUMNS)))
    console.print(table)
    parts = Table(
        title="Most of the memory traffic, GiB (of a decoding step; of a training step)", title_justify="left"
    )
    for row in _traffic(made["lines"]):
        parts.add_row(*row)
    console.print(parts)
    for name, why in made["missing"].items():
        console.print(f"not (wholly) measured: {name}: {why}")
    return console.export_html()


def _traffic(lines: Sequence[Line]) -> Iterator[list[str]]:
    for line in lines:
        most = [f"{size:.3g} {part}" for part, size in line["moved_most_gib"].items()]
        yield [f"{line['task']} {line['variant']} {line.get('remat', '')}".strip(), *most]


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(str, value))
    return "" if value is None else str(value)
