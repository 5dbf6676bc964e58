"""The command line's parser, made of its options, and what it says of words that are none."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from esjax import __version__
from esjax.errors import InputError
from esjax.evolve.models import FIXED, uses
from esjax.options import OPTIONS, READ
from esjax.settings.files import Overrides, keys, similar
from esjax.settings.schema import Config


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
        told = "YAML config; the quickstart's when left out" if read_by(function.__name__) else argparse.SUPPRESS
        p.add_argument("--config", metavar="FILE", help=told)
        p.set_defaults(function=function)
        commands[function.__name__] = p
    return parser, commands


def _settings_help(command: str) -> str:
    """The settings that a command reads, with type, default and meaning, from the one place where they are defined."""
    if not read_by(command):
        return ""
    lines = ["settings (in the config file, or as --section.key value):"]
    known = keys(Config)
    for name in read_by(command):
        kind, default, text = known[name]
        if kind == "list":
            kind, default = "A,B,...", ",".join(default)
        elif "|" in kind and "|null" not in kind and "list" not in kind:
            kind = "{" + kind.replace("|", ",") + "}"
        else:
            kind = kind.upper().replace("|NULL", "|null")
        if default is None or isinstance(default, bool):
            default = json.dumps(default)
        shown = "required" if repr(default) == "PydanticUndefined" else f"default {default}"
        lines += [f"  --{name} {kind}  ({shown})", "      " + text.replace("\n", "\n      ")]
    return "\n".join(lines)


def check_names(command: str, parser: argparse.ArgumentParser, overrides: list[str]) -> None:
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


def check_read(args: argparse.Namespace, given: Overrides) -> None:
    """Refuse a setting on the command line that the command does not read. Raises InputError."""
    opens = args.command == "export" or getattr(args, "model", None) is not None
    for key in sorted(given.single.keys() - {*read_by(args.command), *(FIXED if opens else ())}):
        raise InputError(
            f"--{key}: esjax {args.command} makes no use of it; `esjax {args.command} --help` lists what it reads"
        )
