"""All tasks of ``esjax bench``, one JSON line a job as soon as it is measured."""

from __future__ import annotations

import argparse

import jax.numpy as jnp
import numpy as np

from esjax.bench import data, sampling, training
from esjax.bench.workload import TASKS, measured_ceilings, read_workload
from esjax.errors import InputError
from esjax.model.weights import choose_execution
from esjax.run.files import check_writable
from esjax.run.jsonl import json_text
from esjax.settings.schema import Config


def bench(config: Config, args: argparse.Namespace) -> None:
    """Measure what the options ask for. Raises InputError before anything runs."""
    if args.trace is not None:
        check_writable(args.trace / "trace", "--trace")
    tasks = args.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks {task}: no such task; allowed: {', '.join(TASKS)}")
    work = read_workload(args.workload, args.profile)
    dtype = jnp.dtype(work.dtype)
    sampled = [task for task in tasks if task in ("sample", "round")]
    trained = [task for task in tasks if task in ("dpo", "sft")]
    if args.micro_rows is not None and not trained:
        raise InputError("--micro-rows: only the tasks dpo and sft have rows; leave it out")
    naive = args.compare == "naive"
    if "data" in tasks:
        _show(data.bench(config, naive))
    if tasks == ["data"]:
        return
    how = choose_execution(config.model.attention, config.model.remat, dtype)
    if args.micro_rows is not None:  # said before anything runs
        for job in training.jobs(work, trained, naive=False):
            training.check_micro_rows(job, len(job.batch(np.random.default_rng(0))[0].tokens), args.micro_rows)
    ceilings = measured_ceilings(dtype)
    for task in sampled:
        for unshared in (False, True) if naive and task == "round" else (False,):
            _show(sampling.bench(work, task, how, ceilings, unshared, args.trace))
    for job in training.jobs(work, trained, naive):
        _show(training.bench(work, job, how, args.micro_rows, ceilings, args.trace))


def _show(line: dict[str, object]) -> None:
    print(json_text(line), flush=True)
