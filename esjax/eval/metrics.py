"""Numbers about replies that need no model."""

from __future__ import annotations

from collections.abc import Sequence

from esjax.corpus.text import spaced


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different word n-grams over all word n-grams of all texts; 0 when there are none."""
    grams = [tuple(words[i : i + n]) for words in (spaced(t.lower()) for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def mean_words(texts: Sequence[str]) -> float:
    """Mean number of words of a reply."""
    return sum(len(spaced(t)) for t in texts) / len(texts)
