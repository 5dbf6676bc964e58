"""Support strategies: the names of all corpora, unified to ESConv's eight (Liu et al. 2021, table 1)."""

from __future__ import annotations

from esjax.corpus.readers.base import Counts

EIGHT = {
    "Question": ("Questions", "Clarification"),
    "Restatement or Paraphrasing": ("Restatement", "Paraphrasing", "Reflective Statements"),
    "Reflection of feelings": ("Reflection of Feelings", "Emotional Validation", "Empathetic Statements"),
    "Self-disclosure": ("Self disclosure",),
    "Affirmation and Reassurance": (
        *("Affirmation", "Reassurance", "Offer Hope", "Normalize Experiences", "Avoid Judgment and Criticism"),
    ),
    "Providing Suggestions": (
        *("Providing Suggestions or Information", "Suggest Options", "Collaborative Planning", "Stress Management"),
        *("Promote Self-Care Practices", "Provide Different Perspectives", "Reframe Negative Thoughts"),
    ),
    "Information": ("Share Information",),
    "Others": ("Other",),
}
# The variants are of ESConv's raw file and its failed set, and of ExTES (Zheng et al. 2023, table 3).
KNOWN = {name.lower(): one for one, names in EIGHT.items() for name in (one, *names)}


def strategy(name: object, counts: Counts) -> str | None:
    """The one name of a strategy; one that no corpus is known for stays, and is counted ("unknown_strategies")."""
    if not isinstance(name, str) or not name.strip():
        return None
    given = " ".join(name.split())
    if given.lower() not in KNOWN:
        counts["unknown_strategies"] += 1
    return KNOWN.get(given.lower(), given)
