"""How long replies are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import SPACED, spaced_words
from esjax.eval.replies import Reply


def words(replies: Sequence[Reply]) -> np.ndarray:
    return np.asarray([float(len(spaced_words(r.text))) for r in replies])


METRICS = [Metric("words", "words a reply", "reply", SPACED, "neither", "a count", words)]
