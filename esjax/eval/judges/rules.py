"""Judges that are rules: they cost nothing, and what they prefer is known, so that the machinery around judges can be tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from esjax.corpus.text import words
from esjax.errors import InputError
from esjax.eval.judges.judge import Answer, Done, Question


def _longer(seeker: str, *replies: str) -> list[float]:
    return [float(len(words(r))) for r in replies]


def _overlap(seeker: str, *replies: str) -> list[float]:
    """The share of the seeker's words that a reply takes up."""
    own = set(words(seeker))
    return [len(own & set(words(r))) / max(1, len(own)) for r in replies]


def _first(seeker: str, *replies: str) -> list[float]:
    """The first one, whatever it says: a judge with nothing but position bias."""
    return [float(len(replies) - i) for i in range(len(replies))]


RULES: dict[str, Callable[..., list[float]]] = {"longer": _longer, "overlap": _overlap, "first": _first}


class Rule:
    """Prefers of two replies the one with the larger score; a single reply gets the choice that its score stands at."""

    alone = False

    def __init__(self, name: str) -> None:
        if name not in RULES:
            raise InputError(f"eval.judge.source=rule:{name}: no such rule; allowed: {', '.join(RULES)}")
        self.name, self._score = f"rule:{name}", RULES[name]

    def ask(self, questions: Sequence[Question], done: Done) -> None:
        for i, q in enumerate(questions):
            seeker, *replies = q.texts
            scores, last = self._score(seeker, *replies), len(q.choices) - 1
            if len(replies) == 2:
                chosen = 2 if scores[0] == scores[1] else int(scores[1] > scores[0])
            else:
                chosen = round(min(1.0, scores[0] if scores else 0.0) * last)
            done(i, Answer(tuple(float(n == chosen) for n in range(len(q.choices)))))
