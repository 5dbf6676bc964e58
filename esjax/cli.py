"""The command line: one thin function for each command."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
from pathlib import Path
from typing import NoReturn

from esjax.config import Config
from esjax.configfile import keys, load
from esjax.errors import InputError, RunError, is_full_disk, outcome
from esjax.options import build


def evolve(args: argparse.Namespace, config: Config) -> None:
    """Run the whole method: phase 1, all rounds of phase 2, and the closing table. Resumable: run it again after a kill."""
    from esjax.eval.compare import compare, table
    from esjax.evolve import rounds
    from esjax.evolve.lab import Lab
    from esjax.programs import summary
    from esjax.rundir import RunDir
    from esjax.runlog import say

    with RunDir(args.run_dir, config) as run:
        lab = Lab.open(config)
        _ = lab.train, lab.valid, lab.test  # a broken corpus file is reported now, not after hours
        rounds.evolve(lab, run)
        rows = compare(lab, run)
        say(summary())
        _print(table(rows))


def sft(args: argparse.Namespace, config: Config) -> None:
    """Run phase 1 alone: supervised fine-tuning that makes M_0 (evolve continues from it)."""
    from esjax.evolve import phases
    from esjax.evolve.lab import Lab
    from esjax.rundir import RunDir

    with RunDir(args.run_dir, config) as run:
        phases.sft(Lab.open(config), run)


def dpo(args: argparse.Namespace, config: Config) -> None:
    """Run DPO alone on a file of preference pairs; the model it starts from is also its reference."""
    from esjax.evolve import phases
    from esjax.evolve.lab import Lab, open_model
    from esjax.evolve.pairs import read_pairs
    from esjax.rundir import RunDir

    read_pairs(args.pairs)
    if args.model is None:
        lab = Lab.open(config)
        start = lab.backbone.fresh_adapter(config.seed)
        origin = f"{config.model.source}, seed {config.seed}"
    else:
        parent, start = open_model(args.model, config)
        if parent.config.lora != config.lora or parent.config.model != config.model:
            raise InputError(
                f"--model {args.model} was made with other model or lora settings; give that run's config with --config"
            )
        lab = Lab(config, parent.backbone, parent.tokenizer, parent.encoder)
        origin = args.model
    with RunDir(args.run_dir, config) as run:
        pairs = phases.score_pairs(lab, run, args.pairs, start, origin)
        phases.dpo(lab, run, pairs, "dpo", lambda: start)


def sample(args: argparse.Namespace, config: Config) -> None:
    """Answer prompts: JSON Lines {"id", "messages"} to {"id", "text", "token_ids", "logprobs", "finish_reason"}.

    With --num-samples a prompt has several answers, one line each, numbered as "sample" from 0.
    """
    from esjax.evolve.answers import answer, read_questions
    from esjax.evolve.lab import open_model

    if not 1 <= args.num_samples <= 1_000_000:
        raise InputError(f"--num-samples {args.num_samples}: 1 to 1,000,000")
    questions, pattern = read_questions(args.prompts), _pattern(args)
    _fresh(args.out)
    answer(*open_model(args.model, config), questions, args.num_samples, pattern, config, args.out)


def _pattern(args: argparse.Namespace) -> str | None:
    """The regular expression that replies must match, of --regex or --json-schema. Raises InputError."""
    from esjax.configfile import read_text
    from esjax.sample.schema import schema_pattern

    if args.regex is not None and args.json_schema is not None:
        raise InputError("--regex and --json-schema: give one of them")
    if args.json_schema is None:
        return None if args.regex is None else str(args.regex)
    return schema_pattern(read_text(str(args.json_schema)), f"--json-schema {args.json_schema}")


def score(args: argparse.Namespace, config: Config) -> None:
    """Score replies: JSON Lines {"id", "messages"}, the last assistant message being the target, to its log-probs."""
    from esjax.corpus.sources import read_conversations
    from esjax.evolve.lab import open_model
    from esjax.runlog import progress, publish_jsonl
    from esjax.sample.score import Scorer

    chats = read_conversations(str(args.data))
    _fresh(args.out)
    lab, adapter = open_model(args.model, config)
    examples = [lab.encoder.target(lab.encoder.with_system(m), f"{args.data}, id {i}") for i, m in chats]
    scorer = Scorer(lab.backbone, max(config.data.window, max(len(e.tokens) for e in examples)), config.sft.micro_rows)
    with progress("scoring", len(examples)) as advance:
        scored = scorer.score(adapter, examples, advance)
    rows = []
    for (name, _), (logprobs,) in zip(chats, scored, strict=True):
        values = [float(x) for x in logprobs]
        rows.append({"id": name, "logprob": sum(values), "num_tokens": len(values), "token_logprobs": values})
    publish_jsonl(args.out, rows)


def export(args: argparse.Namespace, config: Config) -> None:
    """Write a run's model as a Hugging Face folder (merged) or PEFT adapter, after reloading and comparing it."""
    from esjax.evolve.lab import open_model
    from esjax.export import export

    lab, adapter = open_model(f"{args.run_dir}:{args.model}", config)
    export(lab, adapter, args.format, args.out)


def bench(args: argparse.Namespace, config: Config) -> None:
    """Measure sampling and training on this machine: one JSON line a job, with random weights and a workload file's sizes.

    Of the settings below only model.attention and model.remat count: the workload file says the rest.
    """
    import jax.numpy as jnp
    import numpy as np

    from esjax.bench import sampling, training
    from esjax.bench.workload import TASKS, measured_bandwidth, measured_peak, read_workload
    from esjax.model.weights import choose_execution
    from esjax.runlog import json_text

    tasks = args.tasks.split(",")
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"--tasks {task}: no such task; allowed: {', '.join(TASKS)}")
    work = read_workload(args.workload, args.profile)
    dtype = jnp.dtype(work.dtype)
    sampled = [task for task in tasks if task in ("sample", "round")]
    trained = [task for task in tasks if task not in sampled]

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
    arguments = sys.argv[1:] if argv is None else argv
    parser, commands = build((evolve, sft, dpo, sample, score, plan, bench, export))
    try:
        args, overrides = parser.parse_known_args(arguments)
        options = [o for a in commands[args.command]._actions for o in a.option_strings if o.startswith("--")]
        for word in overrides:
            name = word.partition("=")[0]
            if word.startswith("--") and "." not in name and name[2:].replace("-", "_") not in keys(Config):
                close = difflib.get_close_matches(name, options, n=1)
                raise InputError(
                    f"unknown option {name}"
                    + (f": did you mean {close[0]}?" if close else f": see esjax {args.command} --help")
                )
        config = load(args.config, overrides)
        _prepare_jax()
        with _devices(args, config):
            args.function(args, config)
    except BaseException as error:
        _fail(error)


def _fail(error: BaseException) -> NoReturn:
    """End the process: one line for what a person or time can mend, the traceback for what only we can."""
    ended = outcome(error)
    if ended is None:
        raise error
    code, line = ended
    print(f"esjax: {line}", file=sys.stderr)
    if is_full_disk(error):
        with contextlib.suppress(OSError):  # what is printed may lie on the full disk, too
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the libraries' exit handlers would write to the full disk again, and say so at length
    sys.exit(code)


def _devices(args: argparse.Namespace, config: Config) -> contextlib.AbstractContextManager[object]:
    """The processes and the mesh of a command that computes on all of its devices; one device for the others."""
    from esjax import hosts

    hosts.watch()
    if not hasattr(args, "distributed"):
        return contextlib.nullcontext()
    from esjax import distributed
    from esjax.mesh import use_mesh

    explicit = (args.coordinator, args.num_processes, args.process_id)
    if any(x is not None for x in explicit):
        if any(x is None for x in explicit) or args.distributed:
            raise InputError("--coordinator, --num-processes and --process-id: give all three, or --distributed alone")
        distributed.start(*explicit)
    elif args.distributed:
        distributed.start(None, None, None)
    if not hosts.hosts.all(hosts.alike(config)):
        raise InputError("the processes of this run have different settings; start all with the same command")
    return use_mesh(config.mesh)


def _prepare_jax() -> None:
    import jax

    from esjax.hub.fetch import cache_root
    from esjax.plan.chips import gpu_share

    gpu_share()  # JAX may take most of a GPU: nothing else runs there
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _fresh(path: Path) -> None:
    from esjax.hosts import hosts

    if not hosts.all(not path.exists()):
        raise InputError(f"{path} exists; give a new file as --out")
    if hosts.writer:
        path.with_name(path.name + ".part").unlink(missing_ok=True)  # of a killed command, perhaps with another model
    hosts.wait("output fresh")


def _print(table: object) -> None:
    from rich.console import Console

    from esjax.hosts import hosts

    if not hosts.writer:
        return
    wide = None if sys.stdout.isatty() else 100
    Console(width=wide).print(table)
