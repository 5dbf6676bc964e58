"""ROUGE-L of each reply: by rouge-score, and with recall weighted as in image captioning and the papers that took it over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import TREEBANK, treebank_words
from esjax.eval.replies import Reply

BETA = 1.2


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def rouge(replies: Sequence[Reply]) -> np.ndarray:
    """The F-measure with equal weights, 0 to 1."""
    return np.asarray([_scorer().score(r.reference, r.text)["rougeL"].fmeasure for r in replies])


def papers(replies: Sequence[Reply]) -> np.ndarray:
    """(1 + b^2) P R / (R + b^2 P) of the longest common subsequence, with b = 1.2 (Lin 2004), 0 to 1."""
    out = []
    for r in replies:
        reference, text = treebank_words(r.reference), treebank_words(r.text)
        common = longest_common(reference, text)
        if common == 0:
            out.append(0.0)
            continue
        precision, recall = common / len(text), common / len(reference)
        out.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision))
    return np.asarray(out)


def longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    number: dict[str, int] = {}
    x, y = (np.asarray([number.setdefault(w, len(number)) for w in words], int) for words in (a, b))
    row = np.zeros(len(y) + 1, int)
    for word in x:  # a row's maximum from the left is what a cell takes from its neighbour
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], np.where(y == word, row[:-1] + 1, 0)))
    return int(row[-1])


METRICS = [
    Metric("rouge_l", "ROUGE-L", "reply", "rouge-score's: lower case, letters and digits", "higher", "Lin 2004", rouge),
    Metric(
        "rouge_l_papers",
        "ROUGE-L (as ESC papers)",
        "reply",
        TREEBANK,
        "higher",
        "Lin 2004, beta 1.2 of pycocoevalcap",
        papers,
    ),
]
