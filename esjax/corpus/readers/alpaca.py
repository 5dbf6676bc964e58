"""Alpaca's instructions (Taori et al. 2023): data for replay."""

from __future__ import annotations

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.readers.base import Counts, Format, label
from esjax.corpus.readers.messages import dialogue
from esjax.run.jsonl import Line


def read(row: Line, counts: Counts) -> Dialogue:
    """{"instruction", "input", "output"}: the input follows the instruction after a blank line."""
    asked = "\n\n".join(part for name in ("instruction", "input") if (part := label(row, name)))
    return dialogue(row, [("user", asked, True), ("assistant", label(row, "output"), True)], "alpaca")


FORMAT = Format(
    *("alpaca", ("instruction", "output")), lambda row: {"instruction", "output"} <= set(row), read, collapse=False
)
