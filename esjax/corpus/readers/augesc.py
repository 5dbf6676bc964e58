"""AugESC (Zheng et al., Findings of ACL 2023): augesc.txt, a Python literal a line."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.corpus.readers.base import Counts, Format, json_rows, text_of
from esjax.corpus.readers.esconv import SPEAKERS
from esjax.run.jsonl import Line, line_of
from esjax.settings.files import read_whole


def rows(file: Path) -> list[Line]:
    """The lines of a text file, or rows of JSON with the literal in "text" (the hub's) or "dialog"."""
    text = read_whole(file, "a text file with a Python list a line")
    if text.lstrip().startswith(("{", "[{")):
        return json_rows(file)
    lines = enumerate(text.split("\n"), start=1)
    return [line_of({"text": line}, f"{file}, line {n}", n) for n, line in lines if line.strip()]


def read(row: Line, counts: Counts) -> Dialogue:
    """A list of [role, text] with the roles "usr" and "sys"."""
    written = row["text"] if "text" in row else row["dialog"]
    try:
        said = ast.literal_eval(written.strip()) if isinstance(written, str) else written
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f"not a Python literal ({(str(e) or type(e).__name__).splitlines()[0]:.80})") from e
    turns = []
    for turn in said if isinstance(said, list) else [said]:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or turn[0] not in SPEAKERS:
            raise ValueError(f"{turn!r:.60} is no pair of usr or sys and a text")
        turns.append(Turn(SPEAKERS[turn[0]], text_of(turn[1])))
    return Dialogue(id=f"augesc-{row.number:05d}", turns=tuple(turns), where=row.where)


def fits(row: dict[str, Any]) -> bool:
    """Whether a row holds such a literal."""
    return list(row) in (["text"], ["dialog"]) and str(next(iter(row.values()))).lstrip().startswith("[[")


FORMAT = Format("augesc", (), fits, read, rows)
