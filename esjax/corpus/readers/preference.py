"""Preference pairs, in the three forms in which TRL takes them."""

from __future__ import annotations

from typing import Any

from esjax.corpus.dialogue import Dialogue, Message
from esjax.corpus.readers.base import Counts, Format
from esjax.run.jsonl import Line


def normal(row: Line) -> None:
    """Give a pair's row the form of messages: {"prompt", "chosen", "rejected"}, each a list. Raises ValueError.

    A prompt, or an answer, may be a plain text; without "prompt", what two whole chats begin with is the prompt.
    """
    sides = {name: row[name] for name in ("chosen", "rejected")}
    for name, value in sides.items():
        if isinstance(value, str):
            row[name] = [Message(role="assistant", content=value)]
    if isinstance(row.get("prompt"), str):
        row["prompt"] = [Message(role="user", content=row["prompt"])]
    if "prompt" in row:
        return
    chosen, rejected = sides.values()
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ValueError(
            "the field 'prompt' is missing; without it chosen and rejected must be whole chats, lists of messages"
        )
    same = next((n for n, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
    if not same:
        raise ValueError("the field 'prompt' is missing, and chosen and rejected do not begin with the same messages")
    row["prompt"], row["chosen"], row["rejected"] = chosen[:same], chosen[same:], rejected[same:]


def read(row: Line, counts: Counts) -> Dialogue:
    """A pair is no dialogue: ``esjax dpo --pairs`` trains on it."""
    raise ValueError("a preference pair is no dialogue; give the file to `esjax dpo --pairs`")


def fits(row: dict[str, Any]) -> bool:
    """Whether a row is a pair."""
    return {"chosen", "rejected"} <= set(row)


FORMAT = Format("preference", ("chosen", "rejected"), fits, read, collapse=False)
