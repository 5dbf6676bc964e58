"""Screening: what texts hold that no model should learn, found by patterns and kept out of every phase."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.text import plain
from esjax.errors import InputError
from esjax.run.memo import remembered
from esjax.safety.detector import Detector
from esjax.settings.files import read_text
from esjax.settings.schema import ScreenSettings

KINDS = ("crisis", "personal", "names", "experience")
SUPPORTERS = ("experience",)  # what only a supporter's text is screened for
SIMPLE = re.compile(r"[A-Za-z0-9 .,;:!?'\"()/$%&@+=<>\[\]#-]*")  # texts whose plain form is themselves, but for spaces
EXCERPT = 80  # characters


class Finding(NamedTuple):
    """What stands where."""

    kind: str
    excerpt: str


class Found(NamedTuple):
    """A finding in a corpus."""

    kind: str
    action: str  # "mark" or "drop"
    id: str  # of the dialogue
    turn: int
    excerpt: str


class Screened(NamedTuple):
    """Dialogues, each up to its first turn that holds what is dropped, and what was found."""

    kept: list[Dialogue]  # those that have an answer left
    numbers: list[int]  # which of the dialogues given these are
    answers: Counter[str]  # answers that are lost, by kind
    found: list[Found]


@dataclass(frozen=True)
class Screen:
    """The detector of crises and the patterns, and what is to be done about what they find."""

    actions: dict[str, str]
    crisis: Detector
    patterns: dict[str, tuple[re.Pattern[str], ...]]
    known: dict[tuple[str, bool], tuple[Finding, ...]] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, settings: ScreenSettings) -> Screen:
        """Compile the pattern files. Raises InputError naming a file and a broken expression."""
        actions = {kind: str(getattr(settings, kind)) for kind in KINDS}
        patterns = {kind: compiled(getattr(settings, f"{kind}_patterns")) for kind in KINDS[1:]}
        return cls(actions, Detector(settings.crisis_patterns), patterns)

    def find(self, text: str, supporter: bool) -> tuple[Finding, ...]:
        """What a text holds of the kinds that are looked for, the first of each."""
        if (text, supporter) not in self.known:
            forms = (text,) if SIMPLE.fullmatch(text) else (text, plain(text))
            looked_for = [k for k in KINDS if self.actions[k] != "keep" and (supporter or k not in SUPPORTERS)]
            matches = {kind: self._first(kind, forms) for kind in looked_for}
            self.known[text, supporter] = tuple(Finding(kind, m) for kind, m in matches.items() if m is not None)
        return self.known[text, supporter]

    def _first(self, kind: str, forms: Sequence[str]) -> str | None:
        if kind != "crisis":
            return first_match(self.patterns[kind], forms)
        for form in forms:
            if signs := self.crisis.find(form):
                return _excerpt(form, signs[0].start, signs[0].end)
        return None

    def dropped(self, text: str, supporter: bool) -> str | None:
        """The kind for which a text is not trained on, if it is not."""
        return next((f.kind for f in self.find(text, supporter) if self.actions[f.kind] == "drop"), None)

    def screened(self, dialogues: Sequence[Dialogue], folder: Path | None = None) -> Screened:
        """Screen a corpus: what comes from the first turn on that holds what is dropped is neither target nor context.

        The whole history is looked at, whatever the window leaves of it. ``folder``: where findings are kept.
        """
        out = Screened([], [], Counter(), [])
        for number, (dialogue, findings) in enumerate(zip(dialogues, self._findings(dialogues, folder), strict=True)):
            end = None
            for turn, kind, excerpt in findings:
                if end is not None and turn > end:
                    break
                out.found.append(Found(kind, self.actions[kind], dialogue.id, turn, excerpt))
                if self.actions[kind] == "drop" and end is None:
                    end, reason = turn, kind
            cut = dialogue if end is None else replace(dialogue, turns=dialogue.turns[:end])
            if end is not None:
                out.answers[reason] += len(dialogue.supporter_turns()) - len(cut.supporter_turns())
            if cut.supporter_turns():
                out.kept.append(cut)
                out.numbers.append(number)
        return out

    def _findings(self, dialogues: Sequence[Dialogue], folder: Path | None) -> list[list[tuple[int, str, str]]]:
        """Turn, kind and excerpt of all findings of each dialogue."""
        patterns = {kind: [p.pattern for p in patterns] for kind, patterns in self.patterns.items()}
        patterns["crisis"] = self.crisis.expressions
        texts = ([[t.role, t.text] for t in d.turns] for d in dialogues)
        hangs_on = chain([self.actions, patterns], texts)
        found: list[list[tuple[int, str, str]]] = remembered(
            folder, hangs_on, lambda: [list(self._of(d)) for d in dialogues]
        )
        return found

    def _of(self, dialogue: Dialogue) -> Iterable[tuple[int, str, str]]:
        turns = enumerate(dialogue.turns)
        return ((n, f.kind, f.excerpt) for n, t in turns for f in self.find(t.text, t.role == "supporter"))


def first_match(patterns: Sequence[re.Pattern[str]], forms: Sequence[str]) -> str | None:
    """What the first pattern that matches one of a text's forms finds there, with some of what stands around it."""
    for form in forms:
        for pattern in patterns:
            if match := pattern.search(form):
                return _excerpt(form, match.start(), match.end())
    return None


def _excerpt(text: str, start: int, end: int) -> str:
    """What stands from ``start`` to ``end``, with some of what stands around it."""
    first = max(0, start - (EXCERPT - (end - start)) // 2)
    return text[first : first + EXCERPT]


def compiled(path: str) -> tuple[re.Pattern[str], ...]:
    """The expressions of a file, one a line, joined into one where they can be. Raises InputError naming a broken one."""
    lines = [line.strip() for line in read_text(path).split("\n")]
    single = []
    for expression in (line for line in lines if line and not line.startswith("#")):
        try:
            single.append(re.compile(expression, re.IGNORECASE | re.MULTILINE))
        except (re.error, OverflowError, RecursionError) as e:
            raise InputError(f"{path}: {expression!r:.200} is not a regular expression ({e})") from e
    if any(
        p.groups or (p.pattern.startswith("(?") and not p.pattern.startswith(("(?:", "(?<", "(?=", "(?!")))
        for p in single
    ):
        return tuple(single)  # groups are counted through a whole expression, and flags are of a whole one
    whole = "|".join(f"(?:{p.pattern})" for p in single)
    return (re.compile(whole, re.IGNORECASE | re.MULTILINE),) if single else ()
