"""Dialogues: what every corpus becomes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from esjax.corpus.text import is_empty

Role = Literal["seeker", "supporter"]
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

OPENING = (
    "(The conversation begins.)"  # stands for the seeker where the supporter speaks first: chat templates want a user
)


@dataclass(frozen=True)
class Turn:
    """One message. ``strategy`` is known for some supporter turns; one that is not ``trained`` is context only."""

    role: Role
    text: str
    strategy: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class Dialogue:
    """An alternating conversation. The labels are gold annotations where the corpus has them, else empty."""

    id: str
    turns: tuple[Turn, ...]
    profile: str = ""
    emotion: str = ""
    problem: str = ""
    situation: str = ""
    system: str = ""  # a chat's own system message
    where: str = field(default="", compare=False)  # file and line, for messages

    def __post_init__(self) -> None:
        if not self.where:
            object.__setattr__(self, "where", f"dialogue {self.id}")

    def supporter_turns(self) -> list[int]:
        """Indices of the supporter turns that answer a seeker: each is a target, and has a context C_n before it.

        An opening supporter turn answers nobody; it is context only, as is one that is not to be trained on.
        """
        return [i for i, t in enumerate(self.turns) if t.role == "supporter" and i > 0 and t.trained]

    def messages(self, stop: int) -> list[Message]:
        """The first ``stop`` turns as chat messages: the dialogue's own system message, then the user's."""
        names = {"seeker": "user", "supporter": "assistant"}
        chat = [{"role": names[t.role], "content": t.text} for t in self.turns[:stop]]
        if self.turns and self.turns[0].role == "supporter":
            chat.insert(0, {"role": "user", "content": OPENING})
        return [{"role": "system", "content": self.system}, *chat] if self.system else chat


def normalise(turns: Iterable[Turn], collapse: bool = True) -> tuple[Turn, ...]:
    """Strip texts, drop turns in which nothing can be seen, merge consecutive turns of one speaker (the first strategy stays).

    ``collapse``: white space within a text means nothing, and becomes single spaces; else texts are joined by a blank line.
    """
    out: list[Turn] = []
    for turn in turns:
        text = " ".join(turn.text.split()) if collapse else turn.text.strip()
        if is_empty(text):
            continue
        if out and out[-1].role == turn.role:
            last = out[-1]
            joined, trained = f"{last.text}{' ' if collapse else chr(10) * 2}{text}", last.trained and turn.trained
            out[-1] = replace(last, text=joined, strategy=last.strategy or turn.strategy, trained=trained)
        else:
            out.append(replace(turn, text=text))
    return tuple(out)
