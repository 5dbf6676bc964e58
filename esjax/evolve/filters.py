"""Filters: which replies and pairs are not worth learning from, each with one named reason."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from esjax.corpus.dialogue import Dialogue, Message
from esjax.corpus.text import plain, words
from esjax.errors import InputError
from esjax.run.directory import bundled_hash
from esjax.settings.files import read_text
from esjax.settings.schema import FilterSettings

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

    def calm(self, texts: Sequence[str]) -> int | None:
        """How many texts come before the first that shows signs of crisis; None when none does."""
        for n, text in enumerate(texts):
            if any(p.search(form) for form in (text, plain(text)) for p in self.crisis):
                return n
        return None

    def before_crisis(self, dialogues: Sequence[Dialogue]) -> tuple[list[Dialogue], int]:
        """Dialogues up to the first turn that shows signs of crisis, for that turn's answer and all later ones are no
        targets in any phase; those without an answer before it are left out. Also: how many answers are lost."""
        kept, lost = [], 0
        for dialogue in dialogues:
            cut = replace(dialogue, turns=dialogue.turns[: self.calm([t.text for t in dialogue.turns])])
            lost += len(dialogue.supporter_turns()) - len(cut.supporter_turns())
            if cut.supporter_turns():
                kept.append(cut)
        return kept, lost

    def chat_before_crisis(self, messages: list[Message]) -> list[Message]:
        """The same for a chat, which ends with an answer; empty when none is left."""
        calm = messages[: self.calm(["" if m["role"] == "system" else m["content"] for m in messages])]
        while calm and calm[-1]["role"] != "assistant":
            calm = calm[:-1]
        return calm if any(m["role"] == "user" for m in calm) else []

    def reply_fault(self, context: list[Message], reply: str, finish: str) -> str | None:
        """Why a reply to this context would be dropped, or None. ``finish`` is "stop" or "length"."""
        seeker = [m["content"] for m in context if m["role"] == "user"]
        if self.calm([*seeker, reply]) is not None:
            return "crisis"
        if finish != "stop":
            return "truncated"
        said = words(reply)
        if len(said) < self.settings.min_words:
            return "empty"
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


def pattern_hashes(settings: FilterSettings) -> dict[str, str]:
    """Hashes of the pattern files, by setting: inputs of whatever is filtered."""
    files = {
        "filters.crisis_patterns": settings.crisis_patterns,
        "filters.scaffolding_patterns": settings.scaffolding_patterns,
    }
    return {name: bundled_hash(file) for name, file in files.items()}


def repetition(said: list[str], n: int = 4) -> float:
    """Share of a text's n-word sequences that occurred before in it."""
    grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _quotes(said: list[str], seeker: list[str]) -> bool:
    own = " ".join(words(" ".join(seeker)))
    spans = (" ".join(said[i : i + QUOTED_WORDS]) for i in range(len(said) - QUOTED_WORDS + 1))
    return any(f" {span} " in f" {own} " for span in spans)


def _patterns(path: str) -> tuple[re.Pattern[str], ...]:
    lines = [line.strip() for line in read_text(path).split("\n")]
    expressions = [line for line in lines if line and not line.startswith("#")]
    compiled = []
    for expression in expressions:
        try:
            compiled.append(re.compile(expression, re.IGNORECASE | re.MULTILINE))
        except (re.error, OverflowError, RecursionError) as e:
            raise InputError(f"{path}: {expression!r:.200} is not a regular expression ({e})") from e
    return tuple(compiled)
