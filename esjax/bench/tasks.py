"""All tasks of ``esjax bench``, one JSON line a job as soon as it is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from esjax.bench import data
from esjax.errors import InputError
from esjax.run.files import check_writable
from esjax.run.jsonl import json_text
from esjax.settings.schema import Config

TASKS = ("sample", "round", "dpo", "sft", "data")


def bench(config: Config, args: argparse.Namespace, prepare_jax: Callable[[], None]) -> None:
    """Measure what the options ask for. ``prepare_jax`` is called before anything computes. Raises InputError before that."""
    if args.trace is not None:
        check_writable(args.trace / "trace", "--trace")
    tasks = asked_tasks(args.tasks)
    if args.micro_rows is not None and not {"dpo", "sft"} & set(tasks):
        raise InputError("--micro-rows: only the tasks dpo and sft have rows; leave it out")
    if tasks == ["data"]:  # without JAX, as `esjax data` is: its memory is told
        _show(data.bench(config, args.compare == "naive"))
    else:
        prepare_jax()
        _computed(config, args, tasks)


def asked_tasks(text: str) -> list[str]:
    """The tasks in "A,B". Raises InputError for one that there is not."""
    tasks = text.split(",")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks {task}: no such task; allowed: {', '.join(TASKS)}")
    return tasks


def _computed(config: Config, args: argparse.Namespace, tasks: list[str]) -> None:
    """Jobs that compute on the devices, and preparation before them, if it is asked for as well."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from esjax.bench import sampling, training
    from esjax.bench.workload import measured_ceilings, read_workload
    from esjax.model.weights import Choice, choose_execution

    naive, work = args.compare == "naive", read_workload(args.workload, args.profile)
    dtype = jnp.dtype(work.dtype)
    if "data" in tasks:
        _show(data.bench(config, naive))
    sampled = [task for task in tasks if task in ("sample", "round")]
    trained = [task for task in tasks if task in ("dpo", "sft")]
    how = choose_execution(Choice.of(config.model), dtype, work.architecture)
    if args.micro_rows is not None:  # said before anything runs
        for job in training.jobs(work, trained, naive=False):
            training.check_micro_rows(job, len(job.batch(np.random.default_rng(0))[0].tokens), args.micro_rows)
    ceilings, device = measured_ceilings(dtype), {"device": jax.devices()[0].device_kind}
    for task in sampled:
        for unshared in (False, True) if naive and task == "round" else (False,):
            _show(sampling.bench(work, task, how, ceilings, unshared, args.trace) | device)
    for job in training.jobs(work, trained, naive):
        _show(training.bench(work, job, how, args.micro_rows, ceilings, args.trace) | device)


def _show(line: dict[str, object]) -> None:
    print(json_text(line), flush=True)
