"""PESConv (Cheng et al., ACL 2023): ESConv with the seeker's inferred persona beside each dialogue."""

from __future__ import annotations

from dataclasses import replace

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.readers import esconv
from esjax.corpus.readers.base import Counts, Format, text_of
from esjax.run.jsonl import Line


def read(row: Line, counts: Counts) -> Dialogue:
    """ESConv's row with "persona", a text or a list of sentences."""
    persona = row["persona"]
    sentences = [text_of(part) for part in (persona if isinstance(persona, list) else [persona])]
    return replace(esconv.read(row, counts), profile=" ".join(" ".join(sentences).split()))


FORMAT = Format(
    "pesconv",
    (*esconv.FIELDS, "persona"),
    lambda row: "persona" in row and esconv.fits(row),
    read,
    unpack=esconv.unpack,
)
