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
    """One message. ``strategy`` is known for some supporter turns."""

    role: Role
    text: str
    strategy: str | None = None


@dataclass(frozen=True)
class Dialogue:
    """An alternating conversation. The labels are gold annotations where the corpus has them, else empty."""

    id: str
    turns: tuple[Turn, ...]
    profile: str = ""
    emotion: str = ""
    problem: str = ""
    situation: str = ""
    where: str = field(default="", compare=False)  # file and line, for messages

    def __post_init__(self) -> None:
        if not self.where:
            object.__setattr__(self, "where", f"dialogue {self.id}")

    def supporter_turns(self) -> list[int]:
        """Indices of the supporter turns that answer a seeker: each is a target, and has a context C_n before it.

        An opening supporter turn answers nobody; it is context only.
        """
        return [i for i, t in enumerate(self.turns) if t.role == "supporter" and i > 0]

    def messages(self, stop: int) -> list[Message]:
        """The first ``stop`` turns as chat messages, beginning with the user."""
        names = {"seeker": "user", "supporter": "assistant"}
        chat = [{"role": names[t.role], "content": t.text} for t in self.turns[:stop]]
        if self.turns and self.turns[0].role == "supporter":
            chat.insert(0, {"role": "user", "content": OPENING})
        return chat


def normalise(turns: Iterable[Turn]) -> tuple[Turn, ...]:
    """Strip texts, drop turns in which nothing can be seen, merge consecutive turns of one speaker (the first strategy stays)."""
    out: list[Turn] = []
    for turn in turns:
        text = " ".join(turn.text.split())
        if is_empty(text):
            continue
        if out and out[-1].role == turn.role:
            out[-1] = replace(out[-1], text=f"{out[-1].text} {text}", strategy=out[-1].strategy or turn.strategy)
        else:
            out.append(replace(turn, text=text))
    return tuple(out)
