"""What a reader is, and what several of them need."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue
from esjax.run.jsonl import Line, json_array, read_jsonl
from esjax.settings.files import read_whole

Counts = Counter[str]


def json_rows(file: Path) -> list[Line]:
    """The rows of JSON Lines, or of one JSON array."""
    text = read_whole(file, "a JSON Lines file, or a JSON array of dialogues").strip()
    if text.startswith("[") and text.endswith("]"):
        return json_array(text, str(file), halves=True)
    return read_jsonl(file, halves=True)


@dataclass(frozen=True)
class Format:
    """A format of rows.

    ``read`` makes a dialogue of a row, its texts as they stand there, and counts what it leaves out; it raises ValueError,
    KeyError, TypeError or AttributeError for a row that is none of this format.
    """

    name: str
    fields: tuple[str, ...]  # that every row has
    fits: Callable[[dict[str, Any]], bool]  # whether a row has this shape
    read: Callable[[Line, Counts], Dialogue]
    rows: Callable[[Path], list[Line]] = json_rows  # of a file
    unpack: Callable[[list[Line]], list[Line]] = field(
        default=lambda rows: rows
    )  # rows of a file or a hub to dialogues'
    collapse: bool = True  # whether white space within a text means nothing


def text_of(value: Any) -> str:
    """A turn's text: a text, or parts {"type": "text", "text": ...}, which follow one another. Raises ValueError."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(text_of(part["text"]) for part in value)
    raise ValueError(f"a turn's text is {json.dumps(value):.40}, and must be a text")


def objects(row: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The turns of a row. Raises ValueError."""
    found = row[name]
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise ValueError(f"{name} must be a list of objects")
    return found


def lost_key(message: dict[str, Any], known: tuple[str, ...]) -> str | None:
    """Which key of a message says something that no reader would hear, if one does."""
    for key, value in message.items():
        says_nothing = value is None or value in ([], {}, "") or (key == "weight" and value == 1)
        if key not in known and not says_nothing:
            return (
                f"has the key {key!r} ({json.dumps(value)[:40]}), which would be lost; allowed: {', '.join(known)}; "
                "take the key or the row out"
            )
    return None


def label(row: dict[str, Any], name: str) -> str:
    """A label of a dialogue; empty where the row has none. Raises ValueError."""
    value = row.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} is {json.dumps(value):.40}, and must be a text")
    return value or ""
