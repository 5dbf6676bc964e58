"""BLEU of the whole corpus: as sacrebleu has it, and as papers on emotional-support conversations do.

Both are functions of counts that add up over replies (matching and all n-grams of each order, words of replies and references),
so that a corpus without some dialogues costs a sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from esjax.eval.metrics.metric import Metric
from esjax.eval.metrics.words import TREEBANK, treebank_words
from esjax.eval.replies import Reply

ORDERS = 4


@cache
def _words_13a(text: str) -> tuple[str, ...]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return tuple(Tokenizer13a()(text.rstrip()).split())


def counts(replies: Sequence[Reply], words: Callable[[str], tuple[str, ...]]) -> np.ndarray:
    """int [replies, 2 ORDERS + 2]: matching n-grams of each order, all of them, and the words of reply and reference."""
    return np.asarray([_counts(words(r.text), words(r.reference)) for r in replies], np.int64).reshape(
        -1, 2 * ORDERS + 2
    )


def _papers_counts(replies: Sequence[Reply]) -> np.ndarray:
    """As nltk counts: a reply too short for an n-gram counts as having one."""
    out = counts(replies, treebank_words)
    out[:, ORDERS : 2 * ORDERS] = np.maximum(out[:, ORDERS : 2 * ORDERS], 1)
    return out


@cache
def _counts(text: tuple[str, ...], reference: tuple[str, ...]) -> tuple[int, ...]:
    matching, every = [], []
    for n in range(1, ORDERS + 1):
        mine, theirs = (Counter(w[i : i + n] for i in range(len(w) - n + 1)) for w in (text, reference))
        matching.append((mine & theirs).total())
        every.append(mine.total())
    return (*matching, *every, len(text), len(reference))


def sacre(order: int, total: np.ndarray) -> float:
    """0 to 100, of summed counts: sacrebleu's corpus_score with exponential smoothing."""
    from sacrebleu.metrics import BLEU

    matching, every, (said, wanted) = (
        total[:order].tolist(),
        total[ORDERS : ORDERS + order].tolist(),
        total[-2:].tolist(),
    )
    return float(BLEU.compute_bleu(matching, every, said, wanted, smooth_method="exp", max_ngram_order=order).score)


def papers(order: int, total: np.ndarray) -> float:
    """0 to 100, of summed counts: nltk's corpus_bleu with smoothing method 3 and equal weights."""
    from nltk.translate.bleu_score import SmoothingFunction, brevity_penalty

    matching, every, (said, wanted) = (
        total[:order].tolist(),
        total[ORDERS : ORDERS + order].tolist(),
        total[-2:].tolist(),
    )
    if matching[0] == 0:
        return 0.0
    ratios: list[Any] = [_Ratio(m, max(1, n)) for m, n in zip(matching, every, strict=True)]
    smoothed = SmoothingFunction().method3(ratios)
    mean = float(np.mean([np.log(float(x)) for x in smoothed]))
    return 100 * float(brevity_penalty(wanted, said) * np.exp(mean))


class _Ratio(Fraction):
    """A fraction that keeps its terms, which nltk's smoothing reads."""

    def __new__(cls, top: int, bottom: int) -> _Ratio:
        made = super().__new__(cls, top, bottom)
        made._numerator, made._denominator = top, bottom  # type: ignore[attr-defined]
        return made


def _of(order: int) -> list[Metric]:
    return [
        Metric(
            f"bleu_{order}",
            f"BLEU-{order}",
            "corpus",
            "sacrebleu's 13a, case kept",
            "higher",
            "Papineni et al. 2002; Post 2018 (sacrebleu)",
            counts=lambda replies: counts(replies, _words_13a),
            whole_of=lambda total: sacre(order, total),
        ),
        Metric(
            f"bleu_{order}_papers",
            f"BLEU-{order} (as ESC papers)",
            "corpus",
            TREEBANK,
            "higher",
            "nltk corpus_bleu, smoothing method 3 (Chen and Cherry 2014)",
            counts=_papers_counts,
            whole_of=lambda total: papers(order, total),
        ),
    ]


METRICS = [metric for order in range(1, ORDERS + 1) for metric in _of(order)]
