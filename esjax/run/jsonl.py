"""JSON as files of people hold it: read strictly, with the place of each row for messages; written without what JSON lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from esjax.errors import InputError, RunError
from esjax.settings.files import BOM, read_whole


def json_text(value: Any, **how: Any) -> str:
    """JSON, keys in the given order. Raises RunError for a number that JSON does not have (NaN, infinity)."""
    try:
        return json.dumps(value, allow_nan=False, **how)
    except ValueError as e:
        raise RunError(
            f"a number that is not finite would be written: {json.dumps(value)[:200]}; the model's weights or its adapter are "
            "damaged, or its numbers overflow model.dtype"
        ) from e


def json_line(row: dict[str, Any]) -> str:
    """One JSON Lines line, keys in the given order."""
    return json_text(row, ensure_ascii=False) + "\n"


class Line(dict[str, Any]):
    """A row of a file, its ``number`` there (its line, blank ones counted), and ``where`` for messages about it."""

    number: int
    where: str


def where_of(row: dict[str, Any], number: int) -> str:
    """Where a row stands: its file and line if it was read from one, else its id, else its ``number``."""
    return row.where if isinstance(row, Line) else f"id {row.get('id', number)}"


def read_jsonl(path: Path, required: Iterable[str] = (), halves: bool = False) -> list[Line]:
    """Read JSON Lines. Raises InputError naming file and line when a line is not a JSON object or lacks a field.

    ``halves``: whether texts may hold halves of characters (lone surrogates), for the reader to deal with.
    """
    rows = []
    for number, line in enumerate(read_whole(path, "a JSON Lines file").split("\n"), start=1):
        if line.strip():
            rows.append(json_object(line.removeprefix(BOM), f"{path}, line {number}", number, halves))
            require(rows[-1], required)
    return rows


def json_array(text: str, where: str, halves: bool = False) -> list[Line]:
    """The objects of one JSON array, numbered from 1. Raises InputError naming ``where`` and the object."""
    whole = _parsed(text, where, halves)
    if not isinstance(whole, list):
        raise InputError(f"{where}: expected a JSON array, found {type(whole).__name__}")
    return [line_of(row, f"{where}, object {i}", i) for i, row in enumerate(whole, start=1)]


def json_object(text: str, where: str, number: int = 0, halves: bool = False) -> Line:
    """One JSON object. Raises InputError naming ``where`` for what is none, or holds what no text or number can be."""
    return line_of(_parsed(text, where, halves), where, number)


def _parsed(text: str, where: str, halves: bool) -> Any:
    try:
        row = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=finite)
        if "\\u" in text and not halves:
            json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as e:
        place = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise InputError(f"{where}: not JSON ({e.msg} at {place})") from e
    except UnicodeEncodeError as e:
        half = str(e.object)[e.start].encode(errors="backslashreplace").decode()
        raise InputError(f"{where}: {half} is half a character (a lone surrogate); take it out") from e
    except RecursionError as e:
        raise InputError(f"{where}: nested too deeply") from e
    except ValueError as e:
        raise InputError(f"{where}: {e}") from e
    return row


def require(row: Line, fields: Iterable[str]) -> None:
    """Raise InputError when a row lacks a field."""
    for field in fields:
        if field not in row:
            raise InputError(f"{row.where}: the field {field!r} is missing; required: {', '.join(fields)}")


def line_of(row: Any, where: str, number: int) -> Line:
    """A row with its place. Raises InputError for what is no JSON object."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(row).__name__}")
    out = Line(row)
    out.number, out.where = number, where
    return out


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return out


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def finite(digits: str) -> float:
    """A number of a JSON text. Raises ValueError where it is beyond all numbers that a float can be."""
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number
