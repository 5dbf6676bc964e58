"""Metrics of reflections; see ``eval.reflections``."""

from __future__ import annotations

from esjax.eval.metrics.metric import Metric

BM25 = "bm25s' words, no stop words"
FOUND = Metric(
    "reflection_hit",
    "own context found by the reflection, BM25",
    "reply",
    BM25,
    "higher",
    "ours: as hit_bm25",
    share=True,
)
RANK = Metric("reflection_rank", "own context rank by the reflection", "reply", BM25, "higher", "ours: as rank_bm25")
EMOTION = Metric(
    "reflection_emotion", "gold emotion named", "reply", "words' first four letters", "higher", "ours", share=True
)
REFLECTED = (FOUND, RANK, EMOTION)
