"""Metrics that a judge's answers make; see ``eval.judges``."""

from __future__ import annotations

from esjax.eval.metrics.metric import Metric

TAXONOMY = "unhelpful replies, five types"
RUBRICS = ("fluency", "empathy", "helpfulness", "personalisation")
FAULTS = ("strategy_mismatch", "template_reply", "lack_of_empathy", "emotion_misread", "advice_too_soon")


def _of(name: str, label: str, better: str, source: str, level: str = "reply", share: bool = False) -> Metric:
    return Metric(f"judge_{name}", label, level, "", better, source, share=share)  # type: ignore[arg-type]


# Of two systems' replies to a context: "M over N".
PAIRS = (
    _of("margin", "wins less losses", "higher", "ours: both orders, ties count 0"),
    _of("wins", "wins, ties half", "higher", "both orders", share=True),
    _of("first", "position bias: first less second", "neither", "ours: 0 is none, 1 is nothing else"),
    _of("same", "same verdict in both orders", "higher", "", share=True),
    _of("malformed", "answers without a verdict", "lower", "", share=True),
)
LENGTH_CONTROLLED = _of(
    "wins_lc", "wins at equal length", "higher", "Dubois et al. 2024, here on words", "corpus", share=True
)
OF_RUBRICS = tuple(_of(r, f"{r}, 0 to 5", "higher", "ours: the judge's mean mark") for r in RUBRICS)
OF_FAULTS = tuple(_of(f, f.replace("_", " "), "lower", TAXONOMY, share=True) for f in FAULTS)
UNHELPFUL = _of("unhelpful", "unhelpful in any way, by the judge", "lower", TAXONOMY, share=True)
DISCREPANCY = _of("discrepancy", "wanted and offered support differ", "lower", "ours: total variation")
JUDGED = (*PAIRS, LENGTH_CONTROLLED, *OF_RUBRICS, *OF_FAULTS, UNHELPFUL, DISCREPANCY)
