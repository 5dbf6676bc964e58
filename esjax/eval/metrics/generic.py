"""Stock phrases: how much of a reply would fit any conversation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import numpy as np
import regex

from esjax.corpus.text import plain, words
from esjax.eval.metrics.metric import Metric
from esjax.eval.replies import Reply


def generic_share(text: str) -> float:
    """The share of a text's words that stock phrases cover, 0 to 1; 0 of a text without words."""
    text = plain(text).lower()
    all_words = len(words(text))
    covered = sum(len(words(match[0])) for match in _phrases().finditer(text))
    return covered / all_words if all_words else 0.0


@cache
def _phrases() -> regex.Pattern[str]:
    """The list (generic.txt says how it was made), the longest phrase first."""
    lines = (files("esjax.eval.metrics") / "generic.txt").read_text(encoding="utf-8").splitlines()
    phrases = sorted((plain(x) for x in lines if x and not x.startswith("#")), key=len, reverse=True)
    return regex.compile(r"(?<![\w'])(?:" + "|".join(map(regex.escape, phrases)) + r")(?![\w'])")


def each(replies: Sequence[Reply]) -> np.ndarray:
    return np.asarray([generic_share(r.text) for r in replies])


METRICS = [
    Metric(
        "generic",
        "words in stock phrases",
        "reply",
        "words, no punctuation",
        "lower",
        "ours (generic.txt)",
        each,
        share=True,
    )
]
