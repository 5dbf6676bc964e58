"""Context identification: how well a reply picks its own context out of several. One that would fit anybody picks at random."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from esjax.eval.replies import Reply


def candidates(replies: Sequence[Reply], count: int, seed: int) -> list[list[int]]:
    """For each context, other contexts to tell it from: ``count`` - 1 of other dialogues, or all that there are, one a dialogue.

    Dialogues with the same problem come first, as they are the hardest to tell apart; which of them, and which of their
    contexts, the seed and the context's name decide, so that all systems are asked the same.
    """
    by_dialogue: dict[str, list[int]] = {}
    for i, r in enumerate(replies):
        by_dialogue.setdefault(r.dialogue, []).append(i)
    names = list(by_dialogue)
    out = []
    for r in replies:
        rng = np.random.default_rng([seed, *r.context.encode()])
        others = [names[i] for i in rng.permutation(len(names)) if names[i] != r.dialogue]
        others.sort(key=lambda name: not r.problem or replies[by_dialogue[name][0]].problem != r.problem)
        out.append([by_dialogue[name][int(rng.integers(len(by_dialogue[name])))] for name in others[: count - 1]])
    return out


def rank(scores: np.ndarray, others: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Hit@1 and reciprocal rank of each reply's own context, expected over random order among equal scores.

    Args:
        scores: float [replies, contexts], how well a reply fits a context; reply i's own context is context i.
        others: for each reply, the contexts that it is told from.

    Returns two float [replies], NaN where there is no other context.
    """
    hits, reciprocal = [], []
    for i, given in enumerate(others):
        if not given:  # nothing to be told from
            hits.append(np.nan)
            reciprocal.append(np.nan)
            continue
        own, rest = scores[i, i], scores[i, list(given)]
        above, equal = int((rest > own).sum()), int((rest == own).sum())
        hits.append(1 / (1 + equal) if above == 0 else 0.0)
        reciprocal.append(float(np.mean([1 / (1 + above + k) for k in range(equal + 1)])))
    return np.asarray(hits), np.asarray(reciprocal)


def bm25_scores(replies: Sequence[Reply]) -> np.ndarray:
    """Each reply as the query, the seeker's words of each context as documents: float [replies, contexts].

    BM25 in Lucene's variant with its parameters (Robertson and Zaragoza 2009; bm25s), stop words left out.
    """
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)

    def cut(texts: list[str]) -> list[list[str]]:
        made = bm25s.tokenize(texts, stopwords="en", show_progress=False, return_ids=False)
        return [list(words) for words in made]

    documents, queries = cut([r.seeker for r in replies]), cut([r.text for r in replies])
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    known = index.vocab_dict
    out = np.zeros((len(replies), len(replies)), np.float32)
    for i, query in enumerate(queries):
        if found := [word for word in query if word in known]:
            out[i] = index.get_scores(found)
    return out
