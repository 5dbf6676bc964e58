"""This project's own schema (data/sample/README.md), which the TFDS builder writes, too."""

from __future__ import annotations

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.corpus.readers.base import Counts, Format, label, lost_key, objects, text_of
from esjax.corpus.readers.strategies import strategy
from esjax.run.jsonl import Line

FIELDS = ("id", "profile", "emotion", "problem", "situation", "turns")


def read(row: Line, counts: Counts) -> Dialogue:
    """{"id", "profile", "emotion", "problem", "situation", "turns": [{"role", "text", "strategy", "trained"}], "system"}."""
    turns = []
    for t in objects(row, "turns"):
        if t["role"] not in ("seeker", "supporter"):
            raise ValueError(f"role {t['role']!r} is not seeker or supporter")
        trained = bool(t.get("trained", True))
        turns.append(Turn(t["role"], text_of(t["text"]), strategy(t.get("strategy"), counts), trained))
        if lost := lost_key(t, ("role", "text", "strategy", "trained")):
            raise ValueError(f"a turn {lost}")
    labels = {key: label(row, key) for key in (*FIELDS[1:5], "system")}
    return Dialogue(id=str(row["id"]), turns=tuple(turns), where=row.where, **labels)


FORMAT = Format("sample", FIELDS, lambda row: "turns" in row and "situation" in row, read)
