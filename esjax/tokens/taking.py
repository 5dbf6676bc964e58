"""What a chat template takes of a chat, found by trying, and how a chat is put that it would refuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from esjax.corpus.dialogue import Message

Render = Callable[[Sequence[Any]], str]  # a template: messages to text; it can raise anything


class Taking(NamedTuple):
    """What a template takes. Of a template that takes no chat at all this says that it takes everything."""

    text: bool = True  # contents that are texts; else lists of parts
    system: bool = True  # a system message, whose text it writes
    repeats: bool = True  # two messages of a role in a row
    opening: bool = True  # an assistant's message before the first user's

    @classmethod
    def of(cls, render: Render) -> Taking:
        """Try chats of each kind. A template that leaves a message out does not take it."""

        def takes(*roles: str, text: bool) -> bool:
            chat = [{"role": role, "content": f"zxqv{i}"} for i, role in enumerate(roles)]
            try:
                written = render(chat if text else _parts(chat))
            except Exception:
                return False
            return all(f"zxqv{i}" in written for i in range(len(roles)))

        text = takes("user", text=True)
        if not text and not takes("user", text=False):
            return cls()
        return cls(
            text,
            takes("system", "user", text=text),
            takes("user", "user", text=text),
            takes("assistant", "user", text=text),
        )

    def fit(self, messages: Sequence[Message]) -> list[Any]:
        """A chat as the template takes it.

        A system message's text opens the first user message, a blank line between them; messages of a role in a row are one,
        a line break between their texts; what the assistant says before the first user message is left out.
        """
        chat: list[Message] = list(messages)
        first = next((i for i, m in enumerate(chat) if m["role"] == "user"), None)
        if first is not None and not self.system and chat[0]["role"] == "system":
            opened: Message = {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[first]['content']}"}
            chat, first = [*chat[1:first], opened, *chat[first + 1 :]], first - 1
        if first is not None and not self.opening:
            chat = [m for i, m in enumerate(chat) if m["role"] != "assistant" or i > first]
        if not self.repeats:
            merged: list[Message] = []
            for m in chat:
                if merged and merged[-1]["role"] == m["role"]:
                    merged[-1] = {"role": m["role"], "content": f"{merged[-1]['content']}\n{m['content']}"}
                else:
                    merged.append(m)
            chat = merged
        return chat if self.text else _parts(chat)

    def said(self) -> list[str]:
        """What is done with a chat that the template would refuse, in words."""
        rules = {
            "a system message's text opens the first user message": self.system,
            "messages of a role in a row become one": self.repeats,
            "what the assistant says before the first user message is left out": self.opening,
        }
        return [rule for rule, taken in rules.items() if not taken]


def _parts(chat: Sequence[Any]) -> list[Any]:
    return [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in chat]
