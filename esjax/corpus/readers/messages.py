"""Chats: OpenAI's "messages", which most hub datasets and trainers use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esjax.corpus.dialogue import Dialogue, Role, Turn
from esjax.corpus.readers.base import Counts, Format, label, lost_key, text_of
from esjax.corpus.text import is_empty
from esjax.run.jsonl import Line

ROLES: dict[str, Role] = {"user": "seeker", "assistant": "supporter"}
KEYS = ("role", "content", "weight")


def dialogue(row: Line, said: Sequence[tuple[str, str, bool]], name: str) -> Dialogue:
    """Of (role, text, trained): the system's message, if there is one, comes first. Raises ValueError."""
    system = "".join(text for role, text, _ in said[:1] if role == "system")
    for n, (role, text, _) in enumerate(said):
        if role not in ROLES and (role != "system" or n > 0):
            raise ValueError(f"message {n} must have a role among system (the first only), user, assistant")
        if role == "assistant" and is_empty(text):
            raise ValueError(f"message {n} is an answer in which nothing can be seen; take the row out")
    turns = tuple(Turn(ROLES[role], text, None, trained) for role, text, trained in said if role in ROLES)
    labels = {key: label(row, key) for key in ("profile", "emotion", "problem", "situation")}
    return Dialogue(
        id=str(row.get("id", f"{name}-{row.number:05d}")), turns=turns, system=system, where=row.where, **labels
    )


def read(row: Line, counts: Counts) -> Dialogue:
    """{"messages": [{"role", "content", "weight"}]}; an answer of weight 0 is read, and is no target."""
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a non-empty list of messages, objects with role and content")
    said = []
    for n, m in enumerate(messages):
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            raise ValueError(f"message {n} must have a role among system, user, assistant and a text as content")
        if m.get("weight", 1) not in (0, 1, None):
            raise ValueError(f"message {n} has the weight {m['weight']!r}; allowed: 0, no target, and 1")
        if lost := lost_key(m, KEYS):
            raise ValueError(f"message {n} {lost}")
        try:
            said.append((m["role"], text_of(m.get("content")), m.get("weight", 1) != 0))
        except ValueError as e:
            raise ValueError(f"message {n}: {e}") from e
    return dialogue(row, said, "chat")


def fits(row: dict[str, Any]) -> bool:
    """Whether a row is a chat."""
    return isinstance(row.get("messages"), list)


FORMAT = Format("messages", ("messages",), fits, read, collapse=False)
