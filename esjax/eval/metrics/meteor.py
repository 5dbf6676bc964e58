"""METEOR, which looks for a reply's words among the reference's, also as stems, and counts how they are ordered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import TREEBANK, treebank_words
from esjax.eval.replies import Reply


class _NoWordNet:
    """Knows no synonyms: WordNet would have to be fetched."""

    def synsets(self, word: str) -> list[object]:
        return []


def meteor(replies: Sequence[Reply]) -> np.ndarray:
    """nltk's METEOR of each reply, 0 to 1, with the stages that match words and stems, but not synonyms."""
    from nltk.translate.meteor_score import single_meteor_score

    return np.asarray(
        [
            single_meteor_score(list(treebank_words(r.reference)), list(treebank_words(r.text)), wordnet=_NoWordNet())
            if r.text and r.reference
            else 0.0
            for r in replies
        ]
    )


METRICS = [
    Metric(
        "meteor",
        "METEOR (words and stems)",
        "reply",
        TREEBANK,
        "higher",
        "Banerjee and Lavie 2005, without WordNet",
        meteor,
    )
]
