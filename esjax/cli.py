"""The command line: one thin function for each command, which calls the same as Python does (``esjax.api``)."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from itertools import pairwise
from typing import NoReturn

from esjax import api, evaluations
from esjax.errors import InputError, RunError, is_full_disk, outcome
from esjax.evolve.models import backbone_settings, is_adapter, run_settings, start_settings
from esjax.opened import Model, prepare_jax
from esjax.options import EVALUATED
from esjax.parser import build, check_names, check_read
from esjax.runtime.context import current, open_runtime
from esjax.settings.files import Overrides
from esjax.settings.schema import Config

# The commands that go on from what a killed one finished.
CONTINUES = ("evolve", "sft", "dpo", "sample", "score", "eval", "study")


def evolve(args: argparse.Namespace, given: Overrides) -> None:
    """Run the whole method: phase 1, all rounds of phase 2, and the closing table. Resumable: run it again after a kill."""
    _print(*api.evolve(_config(given, _adapter(args)), args.run_dir, args.shared).tables())


def sft(args: argparse.Namespace, given: Overrides) -> None:
    """Run phase 1 alone: supervised fine-tuning that makes M_0 (evolve continues from it)."""
    api.sft(_config(given, _adapter(args)), args.run_dir)


def dpo(args: argparse.Namespace, given: Overrides) -> None:
    """Run DPO alone on a file of preference pairs; the model it starts from is also its reference."""
    api.dpo(_config(given, args.model), args.run_dir, args.pairs, args.model)


def sample(args: argparse.Namespace, given: Overrides) -> None:
    """Answer prompts: JSON Lines {"id", "messages"} to {"id", "text", "token_ids", "logprobs", "finish_reason"}.

    With --num-samples a prompt has several answers, one line each, numbered as "sample" from 0.
    """
    model = _model(args.model, given)
    model.sample_file(args.prompts, args.out, args.num_samples, args.regex, args.json_schema)


def score(args: argparse.Namespace, given: Overrides) -> None:
    """Score replies: JSON Lines {"id", "messages"}, the last assistant message being the target, to its log-probs.

    Chats are scored whole, whatever the run's data.window; given here, data.window cuts them as training does.
    """
    _model(args.model, given).score_file(args.data, args.out)


def eval(args: argparse.Namespace, given: Overrides) -> None:
    """Compare models on held-out dialogues: a run's models, or any systems' replies; metrics with intervals over dialogues.

    Or, of a single model, multiple choice (--choices); or how far a judge agrees with people (judge-check RATINGS).
    """
    from esjax.eval.compare import title
    from esjax.eval.table import accuracy, agreements, tables

    way = _way(args)
    if way == "choices":
        _print(accuracy(evaluations.evaluate_choices(args.choices, args.model, given, args.out)))
    elif way == "judge_check":
        _print(agreements(evaluations.judge_agreement(args.judge_check, given)))
    elif way == "predictions":
        records = evaluations.evaluate_predictions(args.predictions, args.reference_data, args.out, given, args.model)
        _print(*tables(records, str, args.all))
    elif way == "seeds":
        for key in given.settings():
            raise InputError(f"{key}: --seeds sums up what is evaluated and reads no settings; leave it out")
        _print(*tables(evaluations.evaluate_seeds(args.seeds, args.out), title, args.all))
    else:
        with current().processes.in_step():
            config = evaluations.evaluation_config(args.run_dir, given, args.out)
        _print(*api.evaluate(config, args.run_dir, args.out).tables(args.all))


def _way(args: argparse.Namespace) -> str:
    """What `esjax eval` is to do. Raises InputError for options that do not go together."""
    ways = [name for name in EVALUATED if getattr(args, name)]
    if len(ways) != 1:
        raise InputError("give one of --run-dir, --predictions, --seeds, --choices, judge-check RATINGS")
    needed, free = EVALUATED[ways[0]]
    named = {name: "--" + name.replace("_", "-") for name in ("model", "reference_data", "out", "all", *ways)}
    for name in needed:
        if getattr(args, name) is None:
            raise InputError(f"{named[ways[0]]} needs {' and '.join(named[n] for n in needed)}")
    for name in named:
        if name not in (*ways, *needed, *free) and getattr(args, name):
            raise InputError(f"{named[name]}: {named[ways[0]]} makes no use of it; leave it out")
    return ways[0]


def export(args: argparse.Namespace, given: Overrides) -> None:
    """Write a run's model, or an adapter from elsewhere, for Hugging Face or llama.cpp, after reloading and comparing it."""
    if args.run_dir is not None and not re.fullmatch(r"m\d+", args.model):
        raise InputError(f"--model {args.model}: give m0, m1, ..., a model of the run")
    spec = args.model if args.run_dir is None else f"{args.run_dir}:{args.model}"
    how = {"dtype": args.dtype, "shard_gib": args.shard_gib, "push_to": args.push_to}
    _model(spec, given).export(args.out, args.format, **how)


def data(args: argparse.Namespace, given: Overrides) -> None:
    """Look at corpora: inspect one, export it as messages, check splits for leaks, or build a TFDS dataset.

    check ends with exit code 1 where it finds leaks.
    """
    from esjax import data as corpora
    from esjax.run.jsonl import json_text

    config, (first, *more) = given.load(together=False), args.sources
    if args.model is not None:
        config = run_settings(args.model, given.settings()) or backbone_settings(args.model, config, given)
    for option, value, action in (
        ("--out", args.out, "export"),
        ("--row", args.row, "inspect"),
        ("--model", args.model, "inspect"),
    ):
        if value is not None and args.action != action:
            raise InputError(f"{option}: only esjax data {action} makes use of it; leave it out")
    if more and args.action in ("inspect", "export"):
        raise InputError(f"esjax data {args.action} takes one source, not {len(args.sources)}")
    if args.action == "inspect" and args.row is not None:
        if args.model is None:
            raise InputError("--row needs --model, whose tokenizer and template make the row")
        made = corpora.row(first, config, args.row)
        _print(
            json_text(made, ensure_ascii=False) if args.json else corpora.marked(made, sys.stdout.isatty()),
            plain=args.json,
        )
    elif args.action == "inspect":
        facts = corpora.inspect(first, config, tokens=args.model is not None)
        _print(json_text(facts, ensure_ascii=False) if args.json else corpora.table(facts), plain=args.json)
    elif args.action == "export":
        if args.out is None:
            raise InputError("esjax data export needs --out FILE")
        count = corpora.export(first, config, args.out)
        _print(json_text({"dialogues": count}) if args.json else f"{count} dialogues written to {args.out}", plain=True)
    elif args.action == "build":
        from esjax.corpus.tfds_builder import build as build_dataset

        splits = dict(zip(("train", "valid", "test"), args.sources, strict=False))
        folder = build_dataset(args.name, splits, config.data.format, args.data_dir)
        read_back = ", ".join(f"tfds:esjax_dialogues/{args.name}/{split}" for split in splits)
        _print(json_text({"folder": str(folder)}) if args.json else f"{folder}; read it as {read_back}", plain=True)
    else:
        leaks = corpora.check(args.sources, config)
        if args.json:
            _print(json_text([leak._asdict() for leak in leaks]), plain=True)
        if leaks:
            listed = "; ".join(map(str, leaks[:10])) + (f"; and {len(leaks) - 10} more" if len(leaks) > 10 else "")
            raise RunError(f"{len(leaks)} leaks: {listed}; take one of each out")
        if not args.json:
            _print(f"no leaks between {' and '.join(args.sources)}", plain=True)


def study(args: argparse.Namespace, given: Overrides) -> None:
    """Many runs that differ in a few settings: plan, make or emit them, and collect, fit and report what came of them.

    Runs that have a stage in common (M_0, a round's replies) share it. Resumable: run it again after a kill.
    """
    from esjax.study.command import study

    study(args, given, _print)


def bench(args: argparse.Namespace, given: Overrides) -> None:
    """Measure sampling and training on this machine: one JSON line a job, with random weights and a workload file's sizes.

    Of the settings below model.attention, model.decoding_attention and model.remat count: the workload file says the rest. The
    task data prepares the training dialogues of data.train with the tokenizer of model.source, repeated to 2,170 dialogues; it
    uses no device.
    """
    from esjax.bench import suite
    from esjax.bench.tasks import bench

    if args.suite is not None:
        suite.run(args, given)
    else:
        if args.limit is not None:
            raise InputError("--limit: only --suite makes use of it; leave it out")
        bench(given.load(together=False), args, prepare_jax)


def report(args: argparse.Namespace, given: Overrides) -> None:
    """Write a run's report.html: curves, pairs, metrics with intervals, every example. One page, which needs no network.

    With --live the page is served on this machine, and follows the run while it goes on, until the command is stopped.
    """
    if given.file is not None:
        raise InputError("--config: a report reads the settings of its runs; leave it out")
    if not args.live:
        if args.port is not None:
            raise InputError("--port: only --live makes use of it; leave it out")
        _print(str(api.write_report(args.run_dir, args.compare, args.out)), plain=True)
        return
    from esjax.report.live import serve

    if args.out is not None:
        raise InputError("--out: --live writes no file; leave one of them out")
    serve([args.run_dir, *args.compare], args.port)


def serve(args: argparse.Namespace, given: Overrides) -> None:
    """Serve models by OpenAI's protocol, on this machine alone: /v1/chat/completions, /v1/completions, /v1/models.

    A prompt and its reply have data.window tokens together, a reply at most reply.max_tokens; reply.batch are drawn at once.
    """
    from esjax.serve.run import serve

    serve(args, given)


def chat(args: argparse.Namespace, given: Overrides) -> None:
    """Talk with a model in the terminal, or on a page (--web); see what it would infer, why it answers so, and others' answers.

    A conversation and its reply have data.window tokens together: older turns are left out where they no longer fit.
    """
    from esjax.serve.run import chat

    chat(args, given)


def plan(args: argparse.Namespace, given: Overrides) -> None:
    """Compile a run's programs for hardware that need not be at hand: memory, FLOPs, network, and whether they fit.

    Exit code 1 when something does not fit.
    """
    from esjax.plan.outcome import Outcome
    from esjax.plan.stages import check_round

    config = given.load()
    if args.round is not None:
        check_round(config, args.round, args.programs)
    prepare_jax()
    made = Outcome.of(config, args.shape, args.topology, args.slices, args.programs, args.tries)
    made = made if args.round is None else made.with_round(args.round)
    if args.json:
        print(made.json())
    else:
        for table in made.tables():
            _print(table)
    if made.misfit:
        raise RunError(made.misfit)


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit codes: 0 done, 1 the run failed, 2 bad input, 75 try again, 130 interrupted, 143 stopped by SIGTERM."""
    parser, commands = build(
        (evolve, sft, dpo, sample, score, eval, report, serve, chat, plan, bench, export, data, study)
    )
    continues = True
    with open_runtime():
        try:
            arguments = sys.argv[1:] if argv is None else argv
            if not arguments:  # a launcher that has lost its command must not take this for done
                parser.print_help(sys.stderr)
                sys.exit(2)
            for option, word in pairwise([*arguments, "-"]):
                if option.startswith("--") and (not word or option.endswith("=")):
                    raise InputError(f"{option.rstrip('=')} is empty; give a value")
            if arguments[:2] == ["eval", "judge-check"]:  # no positional: a setting's value would be taken for it
                arguments = ["eval", "--judge-check", *arguments[2:]]
            args, overrides = parser.parse_known_args(arguments)
            continues = args.command in CONTINUES
            check_names(args.command, commands[args.command], overrides)
            _join(args)
            with current().processes.in_step():
                given = Overrides.of(args.config, overrides)
                check_read(args, given)
            args.function(args, given)
        except BaseException as error:
            _fail(error, continues)


def _config(given: Overrides, model: str | None = None) -> Config:
    """The settings of what trains: those of the run whose model it starts from, or of --config, with options over them."""
    with current().processes.in_step():
        own = None
        if model is not None and is_adapter(model):
            return start_settings(model, given)
        if model is not None:
            given.load(together=False)
            own = run_settings(model, given.settings(), together=True)
        return own or given.load()


def _adapter(args: argparse.Namespace) -> str | None:
    """The PEFT folder that phase 1 starts from, if one is given. Raises InputError for any other model."""
    if args.model is not None and not is_adapter(args.model):
        raise InputError(f"--model {args.model}: give a PEFT folder to start from; a backbone is --model.source")
    return None if args.model is None else str(args.model)


def _model(spec: str, given: Overrides) -> Model:
    with current().processes.in_step():
        return Model(spec, given)


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


def _print(*tables: object, plain: bool = False) -> None:
    """Print results; ``plain``: as it is, on one line however long."""
    from rich.console import Console

    if not current().processes.writer:
        return
    if plain:
        print(*tables)
        return
    wide = None if sys.stdout.isatty() else 100
    Console(width=wide).print(*tables)
