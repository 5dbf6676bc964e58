"""Read and write a config: one YAML file plus ``--section.key value`` overrides, and the files that settings name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from esjax.config import CONTENT, EXECUTION, Config, Settings
from esjax.errors import InputError

BOM = "\ufeff"  # a byte order mark, which some editors write


def bundled(path: str) -> Path:
    """Resolve a path from a setting: ``bundled:P`` is a file shipped with esjax, anything else is taken as it is.

    Prompts lie inside the package. Configs and the sample corpus lie at the top of a checkout, and under
    ``esjax/bundled`` in an installed wheel.
    """
    if not path.startswith("bundled:"):
        return Path(path)
    name, package = path.removeprefix("bundled:"), Path(__file__).parent
    roots = (package / "evolve", package / "bundled", package.parent)
    for root in roots:
        if (root / name).exists():
            return root / name
    raise InputError(f"{path}: no such bundled file; looked in {', '.join(map(str, roots))}")


def read_text(path: str) -> str:
    """The text of a setting's file, stripped. Raises InputError naming the file."""
    return read_whole(bundled(path), "a text file").strip()


def read_whole(file: Path, kind: str) -> str:
    """The text of a UTF-8 file, a byte order mark left out. Raises InputError naming the file; ``kind`` says what to give."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror or type(e).__name__}); give {kind}") from e
    except UnicodeDecodeError as e:
        what = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
        raise InputError(f"{file}: cannot be read ({what}); save it as UTF-8") from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def load(file: str | None, overrides: list[str]) -> Config:
    """Read FILE (the quickstart's when None), apply ``--section.key value`` overrides, check everything.

    Raises InputError with one line on any unknown key, wrong type or out-of-range value.
    """
    where = file or "bundled:configs/quickstart.yaml"
    try:
        tree = yaml.safe_load(read_text(where))
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise InputError(f"{where}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    _apply(tree, overrides)
    known = set(keys(Config))
    for key in _flat(tree):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise InputError(f"unknown setting {key}{nearest(key, known)} (in {where} or on the command line)")
    try:
        return Config.model_validate(tree).validate_together()
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        value = "" if first["type"] == "missing" else f"={first['input']!r}"
        raise InputError(f"setting {key}{value}: {first['msg']} (in {where} or on the command line)") from e


def _apply(tree: dict[str, Any], overrides: list[str]) -> None:
    """Write ``--section.key value`` or ``--section.key=value`` into the tree; values are YAML."""
    left = list(overrides)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise InputError(f"unexpected argument {word!r}: settings are given as --section.key value")
        key, eq, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not eq:
            if not left:
                raise InputError(f"--{key} needs a value: --{key} VALUE")
            text = left.pop(0)
        known = set(keys(Config))
        if key not in known:
            raise InputError(f"unknown setting --{key}{nearest(key, known)}")
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"--{key}: the file gives {section} as {node!r}; expected a mapping of settings there")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[last] = text


def nearest(word: str, known: set[str]) -> str:
    """``": did you mean X?"`` for the most similar known name, or where to look."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ": `esjax evolve --help` lists all settings"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def keys(section: type[Settings], prefix: str = "") -> dict[str, tuple[str, Any, str]]:
    """All settings below a section: dotted name -> (type, default, description)."""
    out: dict[str, tuple[str, Any, str]] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            out |= keys(kind, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = (_type_name(kind), info.default, info.description or "")
    return out


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join("null" if a is type(None) else _type_name(a) for a in get_args(kind))
    if get_origin(kind) is tuple:
        return "list"
    return str(getattr(kind, "__name__", kind))


def dump(config: Config) -> str:
    """The resolved config as YAML, in the order of the fields."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000)
    return str(text)


def differing(a: Config, b: Config) -> list[str]:
    """Dotted names of the settings that define the result and in which two configs differ.

    Left out are those that only say how to compute, with which a run may go on, and the spelling of files' places: what is
    in them counts, and the stages of a run hash it.
    """
    execution, content = marked(Config, EXECUTION), marked(Config, CONTENT)
    return [
        key
        for key, (old, new) in changes(a, b).items()
        if key not in execution and (key not in content or (key != "model.sha256" and None in (old, new)))
    ]


def changes(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """All settings in which two configs differ, by dotted name, with both values."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return out

    left, right = leaves(a.model_dump(mode="json")), leaves(b.model_dump(mode="json"))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def marked(section: type[Settings], mark: str, prefix: str = "") -> set[str]:
    """Dotted names of the settings below a section that have this mark."""
    out: set[str] = set()
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            out |= marked(kind, mark, f"{prefix}{name}.")
        elif mark in info.metadata:
            out.add(f"{prefix}{name}")
    return out
