"""What a reply says again: of itself, and of what the supporter said earlier in the conversation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import SPACED, spaced_grams
from esjax.eval.replies import Reply

N = 4


def across_turns(replies: Sequence[Reply]) -> np.ndarray:
    """The share of a reply's 4-word sequences that an earlier turn of the supporter has, 0 to 1."""
    out = []
    for r in replies:
        said = {gram for m in r.messages if m["role"] == "assistant" for gram in spaced_grams(m["content"], N)}
        own = spaced_grams(r.text, N)
        out.append(sum(gram in said for gram in own) / len(own) if own else 0.0)
    return np.asarray(out)


METRICS = [
    Metric("repeats_turns", "4-grams said in earlier turns", "reply", SPACED, "lower", "ours", across_turns, share=True)
]
