"""EmpatheticDialogues (Rashkin et al., ACL 2019): a row an utterance, of which the rows of one conv_id are a dialogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.corpus.readers.base import Counts, Format, json_rows, label, text_of
from esjax.errors import InputError
from esjax.run.jsonl import Line, line_of, require
from esjax.settings.files import read_whole

FIELDS = ("conv_id", "utterance_idx", "context", "prompt", "speaker_idx", "utterance")


def rows(file: Path) -> list[Line]:
    """The rows of its CSV, whose commas are all separators (others are written _comma_) and whose quotes mean nothing."""
    text = read_whole(file, "its CSV file, or JSON Lines with its columns")
    if text.lstrip()[:1] in ("{", "["):
        return json_rows(file)
    head, *lines = text.split("\n")
    names = head.split(",")
    numbered = [(n, line.split(",")) for n, line in enumerate(lines, start=2) if line.strip()]
    return [line_of(dict(zip(names, parts, strict=False)), f"{file}, line {n}", n) for n, parts in numbered]


def unpack(rows: list[Line]) -> list[Line]:
    """One row a conversation, with its utterances in their order. Raises InputError naming a broken row."""
    grouped: dict[str, Line] = {}
    for row in rows:
        require(row, FIELDS)
        try:
            said = int(row["utterance_idx"]), str(row["speaker_idx"]), text_of(row["utterance"])
        except (ValueError, TypeError) as e:
            raise InputError(f"{row.where}: {e}; expected a row of format empathetic") from e
        grouped.setdefault(str(row["conv_id"]), line_of({**row, "said": []}, row.where, row.number))["said"].append(
            said
        )
    return list(grouped.values())


def read(row: Line, counts: Counts) -> Dialogue:
    """The first to speak tells of a situation, and is the seeker."""
    said = sorted(row["said"])
    turns = [Turn("seeker" if who == said[0][1] else "supporter", _commas(text)) for _, who, text in said]
    labels = {"emotion": _commas(label(row, "context")), "situation": _commas(label(row, "prompt"))}
    return Dialogue(id=str(row["conv_id"]), turns=tuple(turns), where=row.where, **labels)


def _commas(text: str) -> str:
    return text.replace("_comma_", ",")


def fits(row: dict[str, Any]) -> bool:
    """Whether a row is an utterance of it."""
    return "conv_id" in row and "utterance" in row


FORMAT = Format("empathetic", FIELDS, fits, read, rows, unpack)
