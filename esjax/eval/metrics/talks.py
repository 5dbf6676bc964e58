"""Metrics of simulated conversations; see ``eval.seekers``."""

from __future__ import annotations

from esjax.eval.metrics.metric import Metric

OURS = "ours: a simulated seeker's own words for it"
END = Metric("talk_end", "seeker's feeling at the end, 1 to 5", "reply", "", "higher", OURS)
GAIN = Metric("talk_gain", "seeker's feeling, end less start", "reply", "", "higher", OURS)
HELPED = Metric("talk_helped", "seeker's mark, 1 to 5", "reply", "", "higher", OURS)
SUCCESS = Metric("talk_better", "seekers who feel better", "reply", "", "higher", OURS, share=True)
WORSE = Metric("talk_worse", "seekers who feel worse", "reply", "", "lower", OURS, share=True)
# One value a turn, its context being SEEKER/TURN: the curve.
FELT_AFTER = Metric("talk_feeling", "seeker's feeling, mean over turns", "reply", "", "higher", OURS)
TALKS = (FELT_AFTER, END, GAIN, HELPED, SUCCESS, WORSE)
