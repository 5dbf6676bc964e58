"""How varied replies are: of the whole corpus, as the measure was defined, and of each reply, as some papers compute it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import SPACED, spaced_grams
from esjax.eval.replies import Reply


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n: different word n-grams over all word n-grams of all texts; 0 when there are none."""
    grams = [gram for text in texts for gram in spaced_grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _of(n: int) -> list[Metric]:
    def each(replies: Sequence[Reply]) -> np.ndarray:
        return np.asarray([distinct([r.text], n) for r in replies])

    source = "Li et al. 2016"
    return [
        Metric(
            f"distinct_{n}",
            f"Distinct-{n}",
            "corpus",
            SPACED,
            "higher",
            source,
            whole=lambda replies: distinct([r.text for r in replies], n),
        ),
        Metric(
            f"distinct_{n}_reply",
            f"Distinct-{n} of each reply",
            "reply",
            SPACED,
            "higher",
            f"{source}, a reply at a time",
            each,
        ),
    ]


METRICS = [metric for n in (1, 2, 3) for metric in _of(n)]
