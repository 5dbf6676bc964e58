"""One reader for each format: a row of a file or of a hub's dataset becomes a dialogue, as it was written."""

from __future__ import annotations

from esjax.corpus.readers import (
    alpaca,
    augesc,
    empathetic,
    esconv,
    extes,
    messages,
    pesconv,
    preference,
    sample,
    sharegpt,
)
from esjax.corpus.readers.base import Format

FORMATS: dict[str, Format] = {
    reader.FORMAT.name: reader.FORMAT
    for reader in (sample, pesconv, esconv, extes, augesc, empathetic, messages, sharegpt, alpaca, preference)
}
