"""Words that a reply shares with its reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import TREEBANK, treebank_words
from esjax.eval.replies import Reply


def token_f1(replies: Sequence[Reply]) -> np.ndarray:
    """The harmonic mean of the share of the reply's words that the reference has, and the other way round, 0 to 1."""
    out = []
    for r in replies:
        a, b = Counter(treebank_words(r.text)), Counter(treebank_words(r.reference))
        both = (a & b).total()
        out.append(2 * both / (a.total() + b.total()) if both else 0.0)
    return np.asarray(out)


METRICS = [Metric("token_f1", "token F1", "reply", TREEBANK, "higher", "as in SQuAD (Rajpurkar et al. 2016)", token_f1)]
