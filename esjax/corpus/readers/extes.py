"""ExTES (Zheng et al., Findings of ACL 2024): dialogues written by a language model, some items of which are malformed."""

from __future__ import annotations

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.corpus.readers.base import Counts, Format, label
from esjax.corpus.readers.strategies import strategy
from esjax.run.jsonl import Line

FIELDS = ("scene", "description", "content")


def read(row: Line, counts: Counts) -> Dialogue:
    """{"scene", "description", "content": [{"User": text} | {"AI Strategy": name, "AI": text}]}; the strategy may stand in an
    item of its own before the text. Items that are neither are left out and counted ("malformed_items")."""
    turns: list[Turn] = []
    if not isinstance(row["content"], list):
        raise ValueError("content must be a list of objects")
    named = None
    for item in row["content"]:
        said = [item.get(key) for key in ("User", "AI", "AI Strategy")] if isinstance(item, dict) else [None] * 3
        user, ai, new = (x if isinstance(x, str) else None for x in said)
        named = new or named
        if user is not None and ai is None:
            turns.append(Turn("seeker", user))
        elif ai is not None and user is None:
            turns.append(Turn("supporter", ai, strategy(named, counts)))
            named = None
        elif new is None or user is not None:
            counts["malformed_items"] += 1
    return Dialogue(
        id=f"extes-{row.number:05d}",
        turns=tuple(turns),
        problem=label(row, "scene"),
        situation=label(row, "description"),
        where=row.where,
    )


FORMAT = Format("extes", FIELDS, lambda row: "scene" in row and "content" in row, read)
