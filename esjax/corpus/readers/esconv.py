"""ESConv (Liu et al., ACL 2021): its raw ESConv.json and FailedESConv.json, its train/valid/test rows, its hub's rows."""

from __future__ import annotations

from typing import Any

from esjax.corpus.dialogue import Dialogue, Role, Turn
from esjax.corpus.readers.base import Counts, Format, label, objects, text_of
from esjax.corpus.readers.strategies import strategy
from esjax.run.jsonl import Line, json_object

FIELDS = ("emotion_type", "problem_type", "situation", "dialog")
# "usr" and "sys" in the prepared files, "seeker" and "supporter" in the raw one, "speaker" and "listener" in the failed set.
SPEAKERS: dict[str, Role] = {"usr": "seeker", "seeker": "seeker", "speaker": "seeker"}
SPEAKERS |= {"sys": "supporter", "supporter": "supporter", "listener": "supporter"}


def unpack(rows: list[Line]) -> list[Line]:
    """The dialogues, out of the hub's one column "text" where they lie in it as JSON."""
    packed = [list(row) == ["text"] and isinstance(row["text"], str) for row in rows]
    return [
        json_object(r["text"], r.where, r.number, halves=True) if p else r for r, p in zip(rows, packed, strict=True)
    ]


def read(row: Line, counts: Counts) -> Dialogue:
    """{"emotion_type", "problem_type", "situation", "dialog": [{"speaker", "text" | "content", "strategy" | "annotation"}]}."""
    turns = []
    for t in objects(row, "dialog"):
        if str(t["speaker"]) not in SPEAKERS:
            raise ValueError(f"speaker {t['speaker']!r} is not among {', '.join(SPEAKERS)}")
        raw = "content" in t and "text" not in t
        named = (t.get("annotation") or {}).get("strategy") if raw else t.get("strategy")
        turns.append(Turn(SPEAKERS[t["speaker"]], text_of(t["content" if raw else "text"]), strategy(named, counts)))
    return Dialogue(
        id=f"esconv-{row.number:05d}",
        turns=tuple(turns),
        emotion=label(row, "emotion_type"),
        problem=label(row, "problem_type"),
        situation=label(row, "situation"),
        where=row.where,
    )


def fits(row: dict[str, Any]) -> bool:
    """Whether a row, unpacked or not, is ESConv's."""
    return isinstance(row.get("dialog"), list) or (list(row) == ["text"] and str(row["text"]).lstrip().startswith("{"))


FORMAT = Format("esconv", FIELDS, fits, read, unpack=unpack)
