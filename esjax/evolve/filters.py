"""Filters: which replies and pairs are not worth learning from, each with one named reason."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from esjax.corpus.dialogue import Message
from esjax.corpus.text import words
from esjax.run.directory import bundled_hash
from esjax.safety.screen import KINDS, Screen, compiled
from esjax.settings.schema import FilterSettings, ScreenSettings

# In the order in which they are tried; a pair is counted under the first that applies. After these come the pair's own:
# near_identical, too_short, too_long, and row_too_long (it does not fit a training row).
REPLY_REASONS = (*KINDS, "truncated", "few_words", "scaffolding", "speaks_for_seeker", "repetition")
QUOTED_WORDS = 8  # so many words in a row from the seeker's own messages: the reply speaks as the seeker


@dataclass(frozen=True)
class Filters:
    """The limits and the compiled patterns."""

    settings: FilterSettings
    screen: Screen
    scaffolding: tuple[re.Pattern[str], ...]

    @classmethod
    def load(cls, settings: FilterSettings, screen: ScreenSettings) -> Filters:
        """Compile the pattern files. Raises InputError naming a file and a broken expression."""
        return cls(settings, Screen.load(screen), compiled(settings.scaffolding_patterns))

    def reply_fault(self, context: list[Message], reply: str, finish: str) -> str | None:
        """Why a reply to this context would be dropped, or None. ``finish`` is "stop" or "length"."""
        seeker = [m["content"] for m in context if m["role"] == "user"]
        asked = [self.screen.dropped(text, supporter=False) for text in seeker]
        if kind := next(filter(None, [*asked, self.screen.dropped(reply, supporter=True)]), None):
            return kind
        if finish != "stop":
            return "truncated"
        said = words(reply)
        if len(said) < self.settings.min_words:
            return "few_words"
        if any(p.search(reply) for p in self.scaffolding):
            return "scaffolding"
        if re.search(r"(?im)^[\s*_>#-]*(?:seeker|user|client|patient|you|me)[\s*_]*[:：]", reply) or _quotes(
            said, seeker
        ):
            return "speaks_for_seeker"
        if repetition(said) > self.settings.max_repetition:
            return "repetition"
        return None

    def pair_fault(self, draft: str, refinement: str) -> str | None:
        """Why a pair of faultless replies would be dropped, or None."""
        a, b = words(draft), words(refinement)
        if difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() >= self.settings.max_similarity:
            return "near_identical"
        ratio = len(b) / len(a)
        if ratio < self.settings.min_length_ratio:
            return "too_short"
        if ratio > self.settings.max_length_ratio:
            return "too_long"
        return None


def pattern_hashes(filters: FilterSettings, screen: ScreenSettings) -> dict[str, str]:
    """Hashes of the pattern files, by setting: inputs of whatever is filtered."""
    return screen_hashes(screen) | {"filters.scaffolding_patterns": bundled_hash(filters.scaffolding_patterns)}


def screen_hashes(screen: ScreenSettings) -> dict[str, str]:
    """The same of what is screened, for those kinds that are looked for."""
    looked_for = [kind for kind in KINDS if getattr(screen, kind) != "keep"]
    return {f"screen.{kind}_patterns": bundled_hash(getattr(screen, f"{kind}_patterns")) for kind in looked_for}


def repetition(said: list[str], n: int = 4) -> float:
    """Share of a text's n-word sequences that occurred before in it."""
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _quotes(said: list[str], seeker: list[str]) -> bool:
    own = " ".join(words(" ".join(seeker)))
    spans = (" ".join(said[i : i + QUOTED_WORDS]) for i in range(len(said) - QUOTED_WORDS + 1))
    return any(f" {span} " in f" {own} " for span in spans)
