"""Filters: which replies and pairs are not worth learning from, each with one named reason."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from esjax.config import FilterSettings
from esjax.configfile import read_text
from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.rundir import bundled_hash

# In the order in which they are tried; a pair is counted under the first that applies. After these come the pair's own:
# near_identical, too_short, too_long, and row_too_long (it does not fit a training row).
REPLY_REASONS = ("crisis", "truncated", "empty", "scaffolding", "speaks_for_seeker", "repetition")
QUOTED_WORDS = 8  # so many words in a row from the seeker's own messages: the reply speaks as the seeker


@dataclass(frozen=True)
class Filters:
    """The limits and the compiled patterns."""

    settings: FilterSettings
    crisis: tuple[re.Pattern[str], ...]
    scaffolding: tuple[re.Pattern[str], ...]

    @classmethod
    def load(cls, settings: FilterSettings) -> Filters:
        """Compile the pattern files. Raises InputError naming a file and a broken expression."""
        return cls(settings, _patterns(settings.crisis_patterns), _patterns(settings.scaffolding_patterns))

    def reply_fault(self, context: list[Message], reply: str, finish: str) -> str | None:
        """Why a reply to this context would be dropped, or None. ``finish`` is "stop" or "length"."""
        seeker = [m["content"] for m in context if m["role"] == "user"]
        if any(p.search(text) for p in self.crisis for text in [*seeker, reply]):
            return "crisis"
        if finish != "stop":
            return "truncated"
        words = _words(reply)
        if len(words) < self.settings.min_words:
            return "empty"
        if any(p.search(reply) for p in self.scaffolding):
            return "scaffolding"
        if re.search(r"(?im)^\s*(?:seeker|user|client|patient|you|me)\s*:", reply) or _quotes(words, seeker):
            return "speaks_for_seeker"
        if repetition(words) > self.settings.max_repetition:
            return "repetition"
        return None

    def pair_fault(self, draft: str, refinement: str) -> str | None:
        """Why a pair of faultless replies would be dropped, or None."""
        a, b = _words(draft), _words(refinement)
        if difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() >= self.settings.max_similarity:
            return "near_identical"
        ratio = len(b) / len(a)
        if ratio < self.settings.min_length_ratio:
            return "too_short"
        if ratio > self.settings.max_length_ratio:
            return "too_long"
        return None


def pattern_hashes(settings: FilterSettings) -> dict[str, str]:
    """Hashes of the pattern files, by setting: inputs of whatever is filtered."""
    files = {"crisis_patterns": settings.crisis_patterns, "scaffolding_patterns": settings.scaffolding_patterns}
    return {name: bundled_hash(file) for name, file in files.items()}


def repetition(words: list[str], n: int = 4) -> float:
    """Share of a text's n-word sequences that occurred before in it."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _quotes(words: list[str], seeker: list[str]) -> bool:
    own = " ".join(_words(" ".join(seeker)))
    spans = (" ".join(words[i : i + QUOTED_WORDS]) for i in range(len(words) - QUOTED_WORDS + 1))
    return any(f" {span} " in f" {own} " for span in spans)


def _patterns(path: str) -> tuple[re.Pattern[str], ...]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    expressions = [line for line in lines if line and not line.startswith("#")]
    compiled = []
    for expression in expressions:
        try:
            compiled.append(re.compile(expression, re.IGNORECASE | re.MULTILINE))
        except re.error as e:
            raise InputError(f"{path}: {expression!r} is not a regular expression ({e})") from e
    return tuple(compiled)
