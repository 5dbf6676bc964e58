"""What a reply does, by lists of expressions: English, ours, and coarse."""

from __future__ import annotations

import re

from esjax.safety.detector import sections

LISTS = "bundled:conduct/en.txt"


def find(kind: str, text: str) -> re.Match[str] | None:
    """Where a text does what a section of the list says."""
    return sections(LISTS)[kind].search(text)
