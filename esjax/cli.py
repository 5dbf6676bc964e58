"""The command line: one thin function for each command."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
import traceback
from itertools import pairwise
from typing import NoReturn

from esjax.errors import InputError, RunError, is_full_disk, outcome
from esjax.options import FIXED, READ, build, read_by
from esjax.runtime.context import current, open_runtime
from esjax.settings.files import Given, keys, load, similar
from esjax.settings.schema import Config

CONTINUES = ("evolve", "sft", "dpo", "sample", "score")  # the commands that go on from what a killed one finished


def evolve(args: argparse.Namespace, config: Config) -> None:
    """Run the whole method: phase 1, all rounds of phase 2, and the closing table. Resumable: run it again after a kill."""
    from esjax.eval.compare import compare, table
    from esjax.evolve import preflight, rounds
    from esjax.evolve.experiment import Experiment
    from esjax.run.directory import RunDir
    from esjax.run.progress import say
    from esjax.runtime.programs import summary

    with RunDir(args.run_dir, config) as run:
        experiment = Experiment.open(config)
        preflight.check_evolve(experiment, run)
        rounds.evolve(experiment, run)
        rows = compare(experiment, run)
        say(summary())
        _print(table(rows))


def sft(args: argparse.Namespace, config: Config) -> None:
    """Run phase 1 alone: supervised fine-tuning that makes M_0 (evolve continues from it)."""
    from esjax.evolve import phases, preflight
    from esjax.evolve.experiment import Experiment
    from esjax.run.directory import RunDir

    with RunDir(args.run_dir, config) as run:
        experiment = Experiment.open(config)
        preflight.check_sft(experiment, run)
        phases.sft(experiment, run)


def dpo(args: argparse.Namespace, config: Config) -> None:
    """Run DPO alone on a file of preference pairs; the model it starts from is also its reference."""
    from esjax.evolve import phases, preflight
    from esjax.evolve.experiment import Experiment, start_of_dpo
    from esjax.evolve.filters import Filters
    from esjax.evolve.pairs import read_pairs, without_crisis
    from esjax.run.directory import RunDir

    pairs = without_crisis(read_pairs(args.pairs), Filters.load(config.filters))
    with RunDir(args.run_dir, config) as run:
        experiment = Experiment.open(config)
        start, origin = start_of_dpo(args.model, experiment)
        preflight.check_dpo(experiment, run, pairs)
        scored = phases.score_pairs(experiment, run, args.pairs, start, origin)
        phases.dpo(experiment, run, scored, "dpo", lambda: start)


def sample(args: argparse.Namespace, config: Config) -> None:
    """Answer prompts: JSON Lines {"id", "messages"} to {"id", "text", "token_ids", "logprobs", "finish_reason"}.

    With --num-samples a prompt has several answers, one line each, numbered as "sample" from 0.
    """
    from esjax.evolve.answers import MOST, answer, identity, read_chats
    from esjax.evolve.experiment import model_hash, open_model
    from esjax.run.outfile import held

    chats, pattern = read_chats(args.prompts, "user"), _pattern(args)
    if not 1 <= args.num_samples <= MOST // len(chats):
        raise InputError(
            f"--num-samples {args.num_samples}: at least 1, and {MOST} answers at most: {MOST // len(chats)} to each of "
            f"{len(chats)} prompts"
        )
    with held(args.out):
        experiment, adapter = open_model(args.model, config, args.told)
        of = identity(model_hash(args.model, experiment), args.prompts)
        answer(experiment, adapter, chats, args.out, of, args.num_samples, pattern)


def _pattern(args: argparse.Namespace) -> str | None:
    """The regular expression that replies must match, of --regex or --json-schema. Raises InputError."""
    from esjax.sample.schema import schema_pattern
    from esjax.settings.files import read_text

    if args.regex is not None and args.json_schema is not None:
        raise InputError("--regex and --json-schema: give one of them")
    if args.json_schema is None:
        return None if args.regex is None else str(args.regex)
    return schema_pattern(read_text(str(args.json_schema)), f"--json-schema {args.json_schema}")


def score(args: argparse.Namespace, config: Config) -> None:
    """Score replies: JSON Lines {"id", "messages"}, the last assistant message being the target, to its log-probs.

    Chats are scored whole, whatever the run's data.window; given here, data.window cuts them as training does.
    """
    from esjax.evolve import answers
    from esjax.evolve.experiment import model_hash, open_model
    from esjax.run.outfile import held

    chats = answers.read_chats(args.data, "assistant")
    with held(args.out):
        experiment, adapter = open_model(args.model, config, args.told)
        of = answers.identity(model_hash(args.model, experiment), args.data)
        window = experiment.config.data.window if "data.window" in args.told.settings else None
        answers.score(experiment, adapter, chats, args.out, of, window)


def export(args: argparse.Namespace, config: Config) -> None:
    """Write a run's model as a Hugging Face folder (merged) or PEFT adapter, after reloading and comparing it."""
    from esjax.evolve.experiment import open_model
    from esjax.export import export
    from esjax.run.outfile import held

    with held(args.out, "folder"):
        experiment, adapter = open_model(f"{args.run_dir}:{args.model}", config, args.told)
        export(experiment, adapter, args.format, args.out)


def bench(args: argparse.Namespace, config: Config) -> None:
    """Measure sampling and training on this machine: one JSON line a job, with random weights and a workload file's sizes.

    Of the settings below only model.attention and model.remat count: the workload file says the rest.
    """
    import jax.numpy as jnp
    import numpy as np

    from esjax.bench import sampling, training
    from esjax.bench.workload import TASKS, measured_bandwidth, measured_peak, read_workload
    from esjax.model.weights import choose_execution
    from esjax.run.files import check_writable
    from esjax.run.jsonl import json_text

    if args.trace is not None:
        check_writable(args.trace / "trace", "--trace")
    tasks = args.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks {task}: no such task; allowed: {', '.join(TASKS)}")
    work = read_workload(args.workload, args.profile)
    dtype = jnp.dtype(work.dtype)
    sampled = [task for task in tasks if task in ("sample", "round")]
    trained = [task for task in tasks if task not in sampled]
    if args.micro_rows is not None and not trained:
        raise InputError("--micro-rows: only the tasks dpo and sft have rows; leave it out")

    def show(line: dict[str, object]) -> None:
        print(json_text(line), flush=True)

    how = choose_execution(config.model.attention, config.model.remat, dtype)
    if args.micro_rows is not None:  # said before anything runs
        for job in training.jobs(work, trained, naive=False):
            training.check_micro_rows(job, len(job.batch(np.random.default_rng(0))[0].tokens), args.micro_rows)
    peak, naive = measured_peak(dtype), args.compare == "naive"
    bandwidth = measured_bandwidth() if sampled else 0.0
    for task in sampled:
        for unshared in (False, True) if naive and task == "round" else (False,):
            show(sampling.bench(work, task, how, peak, bandwidth, unshared))
    for job in training.jobs(work, trained, naive):
        trace = args.trace and args.trace / f"{job.task}-{job.variant}".replace(", ", "-")
        show(training.bench(work, job, how, args.micro_rows, trace, peak))


def plan(args: argparse.Namespace, config: Config) -> None:
    """Compile a run's programs for hardware that need not be at hand: memory, FLOPs, network, and whether they fit.

    Exit code 1 when something does not fit.
    """
    from esjax.plan.outcome import Outcome

    made = Outcome.of(config, args.shape, args.topology, args.slices, args.programs, args.tries)
    if args.json:
        print(made.json())
    else:
        for table in made.tables():
            _print(table)
    if made.misfit:
        raise RunError(made.misfit)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 bad input, 75 try again, 130 interrupted, 143 stopped by SIGTERM."""
    parser, commands = build((evolve, sft, dpo, sample, score, plan, bench, export))
    continues = True
    with open_runtime():
        try:
            arguments = sys.argv[1:] if argv is None else argv
            for option, word in pairwise([*arguments, "-"]):
                if option.startswith("--") and (not word or option.endswith("=")):
                    raise InputError(f"{option.rstrip('=')} is empty; give a value")
            args, overrides = parser.parse_known_args(arguments)
            continues = args.command in CONTINUES
            _check_names(args.command, commands[args.command], overrides)
            _join(args)
            with current().processes.in_step():
                config = _settings(args, overrides)
                _prepare_jax()
            with _devices(args, config):
                args.function(args, config)
        except BaseException as error:
            _fail(error, continues)


def _check_names(command: str, parser: argparse.ArgumentParser, overrides: list[str]) -> None:
    """Refuse what is neither an option nor a setting, with what may have been meant. Raises InputError."""
    options = [o for a in parser._actions for o in a.option_strings if o.startswith("--") and o != "--help"]
    for word in overrides:
        name = word.partition("=")[0]
        if not word.startswith("--") or "." in name or name[2:].replace("-", "_") in keys(Config):
            continue
        close = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
        close = close or [f"--{key}" for key in similar(name[2:], read_by(command))]
        hint = f"did you mean {' or '.join(close)}?" if close else f"see esjax {command} --help"
        raise InputError(f"unknown option {name}: {hint}")


def _settings(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The settings of a command: those of the run whose model it opens, or of its --config; its options over them.

    What it was told in so many words is kept as ``args.told``. Raises InputError for a setting that it does not read.
    """
    told, read = Given.of(args.config, overrides), read_by(args.command)
    opens = getattr(args, "model", None)
    if args.command == "export":
        if not re.fullmatch(r"m\d+", args.model):
            raise InputError(f"--model {args.model}: give m0, m1, ..., a model of the run")
        opens = f"{args.run_dir}:{args.model}"
    for key in sorted(told.typed - {*read, *(FIXED if opens else ())}):
        raise InputError(
            f"--{key}: esjax {args.command} makes no use of it; `esjax {args.command} --help` lists what it reads"
        )
    args.told = Given({k: v for k, v in told.settings.items() if k in read or k in FIXED}, told.typed)
    whole = args.command not in READ  # it trains, or plans that
    config = load(args.config, overrides, together=whole and opens is None)
    if opens is None:
        return config
    from esjax.evolve.models import settings_of

    own = settings_of(opens, args.told, together=whole)
    if own is None and whole:
        config.validate_together()
    if own is None and args.command != "dpo":
        for key in sorted(told.typed & set(FIXED)):
            raise InputError(f"--{key}: {opens} is a bare backbone, which has nothing to set there; leave it out")
    return own or config


def _fail(error: BaseException, continues: bool) -> NoReturn:
    """End the process: one line for what a person or time can mend, the traceback for what only we can."""
    runtime, ended = current(), outcome(error, continues)
    if runtime.joining and (ended is None or ended[0] in (1, 75)):
        ended = runtime.ended_elsewhere() or ended  # what ended another process is the reason for what this one met
    if runtime.joining and ended is None:
        traceback.print_exception(error)
        ended = 1, f"error: process {runtime.processes.index} of this run failed; see above"
    if ended is None:
        raise error
    if runtime.joining or is_full_disk(error):
        # The libraries' exit handlers would wait for the others, or write to the full disk again.
        runtime.leave(*ended)
    print(f"esjax: {ended[1]}", file=sys.stderr)
    sys.exit(ended[0])


def _join(args: argparse.Namespace) -> None:
    """Join the other processes, where there are others. Raises InputError, TransientError."""
    if not hasattr(args, "distributed"):
        return
    explicit = (args.coordinator, args.num_processes, args.process_id)
    given = any(x is not None for x in explicit)
    if given and (args.distributed or any(x is None for x in explicit)):
        raise InputError("--coordinator, --num-processes and --process-id: give all three, or --distributed alone")
    if not 1 <= args.join_timeout <= 10**6:
        raise InputError(f"--join-timeout {args.join_timeout}: 1 to 1,000,000 seconds")
    if given or args.distributed:
        from esjax.runtime import distributed

        current().join(distributed.start(*explicit, args.join_timeout))


def _devices(args: argparse.Namespace, config: Config) -> contextlib.AbstractContextManager[object]:
    """The mesh of a command that computes on all of its devices; one device for the others."""
    if not hasattr(args, "distributed"):
        return contextlib.nullcontext()
    from esjax.runtime.mesh import use_mesh

    processes = current().processes
    if not processes.all(processes.same_in_all(config)):
        raise InputError("the processes of this run have different settings; start all with the same command")
    return use_mesh(config.mesh)


def _prepare_jax() -> None:
    import jax

    from esjax.hub.fetch import cache_root
    from esjax.plan.chips import GPU_SHARE, gpu_share
    from esjax.run.files import check_writable

    if not cache_root().exists():
        check_writable(cache_root() / "xla", "folder as $ESJAX_CACHE")
    elif not cache_root().is_dir():
        raise InputError(f"{cache_root()}: the cache is no folder; give another one as $ESJAX_CACHE")
    os.environ.setdefault(GPU_SHARE, "0.9")  # JAX may take most of a GPU: nothing else runs there
    gpu_share()
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))


def _print(table: object) -> None:
    from rich.console import Console

    if not current().processes.writer:
        return
    wide = None if sys.stdout.isatty() else 100
    Console(width=wide).print(table)
