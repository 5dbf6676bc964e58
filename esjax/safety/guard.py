"""The guard of a conversation: what stands in a reply's place where somebody shows signs of crisis, or a model's reply does.

The answer names where help is, in words that people wrote, asks directly and kindly, and leaves the conversation open.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import yaml

from esjax.errors import InputError
from esjax.safety import conduct
from esjax.safety.detector import Detector, Signal
from esjax.settings.files import bundled, read_text

RESOURCES = "bundled:resources.yaml"
DEFAULT = "default"
HARM = ("method", "agrees")  # sections of the list of what replies do
CLOSING = "\"')\\]\u2019\u201d\u300d\u300f\uff09"  # after a sentence's last mark, of it
# A sentence's end, where another one begins: Chinese and Japanese leave no space there.
SENTENCE = re.compile(rf"[.!?\u2026][{CLOSING}]*\s+|[\u3002\uff01\uff1f][{CLOSING}]*(?=[^{CLOSING}])|\n")


class Held(NamedTuple):
    """Why a reply was replaced, and by what."""

    side: Literal["input", "output"]
    signal: Signal
    text: str


class Guard:
    """Looks at what a person wrote before a model answers, and at what the model says before anybody reads it."""

    def __init__(self, patterns: str, locale: str = DEFAULT, resources: str = RESOURCES) -> None:
        """``patterns`` as screen.crisis_patterns; ``locale`` a key of the file of ``resources``. Raises InputError."""
        self.detector = Detector(patterns)
        known = read_resources(resources)
        if locale not in known:
            raise InputError(f"locale {locale}: {resources} has {', '.join(known)}; choose one, or add it there")
        self.locale, self.answer = locale, known[locale]

    def before(self, said: Sequence[str]) -> Held | None:
        """What to say instead of asking the model, where the newest of a person's messages shows acute signs."""
        return self._held("input", said[-1]) if said else None

    def after(self, reply: str, said: Sequence[str]) -> Held | None:
        """The same for a model's reply to what a person ``said``: acute signs in it, and, where the person has shown any sign at
        all, a method that it names, or its agreement that there is no hope."""
        if (held := self._held("output", reply)) is not None:
            return held
        for kind in HARM:
            if conduct.find(kind, reply) and any(map(self.detector.find, said)):
                return Held("output", Signal("acute", kind, 0, len(reply)), self.answer)
        return None

    def _held(self, side: Literal["input", "output"], text: str) -> Held | None:
        acute = [s for s in self.detector.find(text) if s.tier == "acute"]
        return Held(side, acute[0], self.answer) if acute else None


class Watch:
    """What may be shown of a reply that is on its way: whole sentences, each once it was looked at with those before it."""

    def __init__(self, guard: Guard | None, said: Sequence[str]) -> None:
        """Without a guard all may be shown. ``said``: the person's messages."""
        self.guard, self.said = guard, said
        self.shown = 0  # characters
        self.held: Held | None = None  # why no more of it may be shown

    def take(self, reply: str, ended: bool) -> str:
        """What may be shown now, of a reply as far as it has come, that was not shown before."""
        ready = len(reply)
        if self.guard is not None:
            self.held = self.guard.after(reply, self.said)
            if self.held is not None:
                return ""
            if not ended:
                ready = max((m.end() for m in SENTENCE.finditer(reply)), default=0)
        start, self.shown = self.shown, max(ready, self.shown)
        return reply[start : self.shown]


def read_resources(file: str = RESOURCES) -> dict[str, str]:
    """The answers by locale. Raises InputError where the file is not a table of texts with a default."""
    try:
        tree = yaml.safe_load(read_text(file))
    except yaml.YAMLError as e:
        raise InputError(f"{bundled(file)}: not YAML ({' '.join(str(e).split())[:200]})") from e
    if (
        not isinstance(tree, dict)
        or DEFAULT not in tree
        or not all(isinstance(t, str) and t.strip() for t in tree.values())
    ):
        raise InputError(f"{bundled(file)}: give a text for each locale, and one for {DEFAULT}")
    return {str(locale): text.strip() for locale, text in tree.items()}
