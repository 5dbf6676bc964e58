"""Read and write a config: one YAML file plus ``--section.key value`` overrides, and the files that settings name."""

from __future__ import annotations

import difflib
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from esjax.errors import InputError
from esjax.settings.schema import Config, Settings

DEFAULT = "bundled:configs/quickstart.yaml"  # the config of who names none
# A SHA-256 and what it is the hash of: put over a config with another source, that config's hash says nothing of it.
HASH_OF = {
    "model.source": "model.sha256",
    "eval.embedding": "eval.embedding_sha256",
    "eval.judge.source": "eval.judge.sha256",
    "eval.seekers.model": "eval.seekers.sha256",
}
BOM = "\ufeff"  # a byte order mark, which some editors write


def bundled(path: str) -> Path:
    """Resolve a path from a setting: ``bundled:P`` is a file shipped with esjax, anything else is taken as it is.

    Prompts lie inside the package. Configs and the sample corpus lie at the top of a checkout, and under
    ``esjax/bundled`` in an installed wheel.
    """
    if not path.startswith("bundled:"):
        return Path(path)
    name, package = path.removeprefix("bundled:"), Path(__file__).parents[1]
    roots = (package / "evolve", package / "eval", package / "safety", package / "bundled", package.parent)
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


@dataclass(frozen=True)
class Overrides:
    """What somebody asked for in so many words: a config file that was named, and single settings over it."""

    file: str | None = None
    single: Mapping[str, Any] = field(default_factory=dict)  # dotted name -> value, not yet checked

    @classmethod
    def of(cls, file: str | Path | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Overrides:
        """``overrides`` as for ``load``. Raises InputError for a name that is no setting."""
        return cls(None if file is None else str(file), _by_name(overrides))

    def load(self, together: bool = True) -> Config:
        """The file's settings (the quickstart's without one), and the single ones over them; see ``load``."""
        return load(self.file, self.single, together)

    def settings(self) -> dict[str, Any]:
        """All settings that were asked for, by dotted name; without a file nobody asked for the quickstart's."""
        if not self.file:
            return dict(self.single)
        tree = read_yaml(self.file)
        _put_all(tree, self.single)
        return dict(flat(tree))


def load(file: str | None, overrides: Sequence[str] | Mapping[str, Any] = (), together: bool = True) -> Config:
    """Read FILE (the quickstart's when None), put the overrides over it, check everything.

    Another source than the file's goes without the file's hash for it; give its own beside it.

    Args:
        file: a YAML file; bundled:PATH is one that comes with esjax.
        overrides: the words of a command line (``--section.key value``), or values by dotted name.
        together: whether settings must also fit one another; what trains nothing does not need that.

    Raises InputError, one line, on any unknown key, wrong type or out-of-range value.
    """
    where = file or DEFAULT
    tree = read_yaml(where)
    _put_all(tree, _by_name(overrides))
    return _checked(tree, together, f"(in {where}, or given over it)")


def changed(config: Config, values: Mapping[str, Any]) -> Config:
    """A config with other values, by dotted name, each checked by itself; hashes as for ``load``. Raises InputError."""
    tree = config.model_dump(mode="json")
    _put_all(tree, _by_name(values))
    return _checked(tree, False, "")


def _checked(tree: dict[str, Any], together: bool, where: str) -> Config:
    known = keys(Config)
    try:
        for key, value in flat(tree):
            if key not in known and not any(k.startswith(key + ".") for k in known):
                raise InputError(f"unknown setting {key}{nearest(key, known)}")
            if isinstance(value, bool) and "bool" not in known.get(key, ("bool",))[0]:  # pydantic takes true for 1
                raise InputError(f"setting {key}={value}: expected {known[key][0]}")
        config = Config.model_validate(tree)
        for source, hashed in HASH_OF.items():
            value, digest = (reduce(getattr, name.split("."), config) for name in (source, hashed))
            if str(value).removeprefix("model:").startswith("pypi:") and digest is None:
                raise InputError(f"{hashed} is missing: {source}={value} needs the wheel's SHA-256 beside it")
        return config.validate_together() if together else config
    except ValidationError as e:
        first = e.errors()[0]
        # Of a setting that may be one of several types all are told of; the place that lies deepest is what is wrong.
        first = max((x for x in e.errors() if x["loc"][:2] == first["loc"][:2]), key=lambda x: len(x["loc"]))
        key = ".".join(str(p) for p in first["loc"] if p not in ("str", "constrained-str") and "[" not in str(p))
        value = "" if first["type"] == "missing" else f"={first['input']!r:.100}"
        raise InputError(f"setting {key}{value}: {first['msg']} {where}".rstrip()) from e
    except InputError as e:
        raise InputError(f"{e} {where}".rstrip()) from e


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, not the later one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in getattr(node, "value", []) if isinstance(node, yaml.MappingNode) else []:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(where: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError."""
    try:
        tree = yaml.load(read_text(where), Loader=_Loader)
    except (
        yaml.YAMLError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        RecursionError,
    ) as e:  # of odd scalars, too
        raise InputError(f"{where}: not YAML: {' '.join(str(e).split())[:300]}") from e
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    return tree


def _by_name(overrides: Sequence[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Overrides as dotted names and values: a mapping's, or those of words ``--section.key value`` and
    ``--section.key=value``, of which the last one of a name counts."""
    known, out = keys(Config), {}
    if isinstance(overrides, Mapping):
        for key in overrides:
            if key not in known:
                raise InputError(f"unknown setting {key}{nearest(str(key), known)}")
        return {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    left = list(overrides)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise InputError(f"unexpected argument {word!r}: settings are given as --section.key value")
        key, eq, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if key not in known:
            raise InputError(f"unknown setting --{key}{nearest(key, known)}")
        if not eq:
            if not left or left[0].startswith("--"):
                raise InputError(f"--{key} needs a value: --{key} VALUE, or --{key}=VALUE where it begins with --")
            text = left.pop(0)
        out[key] = _value(key, known[key][0], text)
    return out


def _value(key: str, kind: str, text: str) -> Any:
    """A value as it was typed, for pydantic to read: YAML would make numbers and dates of names, and 8 of 010.

    Quotes around it are YAML's, a list is ``a,b`` or YAML's ``[a, b]``, and null is none.
    """
    if not text:
        raise InputError(f"--{key} is empty; give a value{', or null for none' if 'null' in kind.split('|') else ''}")
    if text == "null":
        return None
    if text[0] in "'\"" or ("list" in kind.split("|") and text[0] == "["):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return [part.strip() for part in text.split(",")] if kind == "list" else text


def _put_all(tree: dict[str, Any], values: Mapping[str, Any]) -> None:
    before = dict(flat(tree))
    for source, hashed in HASH_OF.items():
        if source in values and hashed not in values and hashed in before and values[source] != before.get(source):
            _put(tree, hashed, None)
    for key, value in values.items():
        _put(tree, key, value)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    node = tree
    *sections, last = key.split(".")
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise InputError(f"--{key}: the file gives {section} as {node!r}; expected a mapping of settings there")
    node[last] = value


def nearest(word: str, known: Collection[str]) -> str:
    """``": did you mean X?"`` for the most similar known names, or where to look."""
    close = similar(word, known)
    return f": did you mean {' or '.join(close)}?" if close else ": `esjax evolve --help` lists all settings"


def similar(word: str, known: Collection[str]) -> list[str]:
    """Known settings that a word may mean: by their last part (``temperature``), its initials (``lr``), or nearly so."""
    ends = {key: key.rpartition(".")[2] for key in known}
    name = word.rpartition(".")[2].replace("-", "_")
    exact = [k for k, end in ends.items() if name in (end, "".join(part[0] for part in end.split("_")))]
    near = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    if exact and not ("." in word and near and near[0] in exact):
        return exact[:4]
    ending = difflib.get_close_matches(name, sorted(set(ends.values())), n=1, cutoff=0.75)
    return [k for k, end in ends.items() if end == ending[0]][:4] if ending and "." not in word else near


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values. No setting lies five sections deep; an alias within itself would go on for ever."""
    for key, value in tree.items():
        if isinstance(value, dict) and prefix.count(".") < 5:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fields(section: type[Settings], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings below a section, by dotted name."""
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            yield from fields(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", info


def keys(section: type[Settings]) -> dict[str, tuple[str, Any, str]]:
    """All settings below a section: dotted name -> (type, default, description)."""
    return {name: (_type_name(i.annotation), i.default, i.description or "") for name, i in fields(section)}


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
