"""What a chat template writes around the messages of a chat, found once: so a chat's text is put together, not rendered anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.tokens.tokenizer import ChatTokenizer

ALTERNATING = 64  # messages of a skeleton that serves all shorter chats, too


class Skeleton(NamedTuple):
    """For chats whose roles are the first of these, and which end with an assistant's message."""

    roles: tuple[str, ...]
    before: tuple[str, ...]  # of each message, what stands between the text of the one before and its own
    asked: tuple[int, ...]  # how many characters of ``before`` the prompt has that an assistant's message answers
    after: tuple[str, ...]  # what follows an assistant's text, its end-of-turn token included; "" for other roles
    header: tuple[tuple[int, ...], ...]  # the ids with which that prompt ends, from its last control token on
    opens: int  # how many characters before a user's text the control token stands that opens it, 0 where a chat cannot be cut


class Assembled(NamedTuple):
    """A chat's text up to the end of its last message, an assistant's, and places in it."""

    text: str
    prompts: dict[int, int]  # where the prompt ends that an assistant's message answers
    header: dict[int, tuple[int, ...]]  # the ids with which it ends, from its last control token on
    opens: dict[
        int, int
    ]  # where a user's message begins, with the control token that opens it, if a chat can be cut there


class Skeletons:
    """The skeletons of one tokenizer's template, each found when first asked for."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: list[tuple[tuple[str, ...], Skeleton | None]] = []

    def assemble(self, messages: Sequence[Message]) -> Assembled | None:
        """The text of a chat that ends with the assistant's message, where its prompts are beginnings of the whole.

        None where they are not, where the template does more than to write around texts, and where a text holds the name of
        a control token: such chats are rendered and encoded prompt by prompt.
        """
        found = self._of(tuple(m["role"] for m in messages))
        if found is None or self.tokenizer.holds_control(messages):
            return None
        parts, at = list[str](), 0
        prompts, header, opens = dict[int, int](), dict[int, tuple[int, ...]](), dict[int, int]()
        for i, m in enumerate(messages):
            if m["role"] == "assistant" and found.header[i]:
                prompts[i], header[i] = at + found.asked[i], found.header[i]
            at += len(found.before[i])
            if m["role"] == "user" and found.opens:
                opens[i] = at - found.opens
            at += len(m["content"])
            parts += [found.before[i], m["content"]]
        text = "".join(parts) + found.after[len(messages) - 1]
        return Assembled(text, prompts, header, opens) if self.tokenizer.render(messages).startswith(text) else None

    def _of(self, roles: tuple[str, ...]) -> Skeleton | None:
        for known, found in self._known:
            if known[: len(roles)] == roles:
                return found
        head = roles[:1] if roles[0] == "system" else ()
        longer = head + ("user", "assistant") * max(ALTERNATING // 2, len(roles))
        self._known.append((roles, None))
        for tried in (longer, roles) if longer[: len(roles)] == roles else (roles,):
            try:
                self._known[-1] = tried, self._find(tried)
            except InputError:  # the template refuses such a chat, or such a long one
                continue
            break
        return self._known[-1][1]

    def _find(self, roles: tuple[str, ...]) -> Skeleton | None:
        """The template shown messages that can be told apart."""
        tokenizer, end = self.tokenizer, self.tokenizer.end_text
        chat: list[Message] = [{"role": role, "content": f"message-{i}-of-these"} for i, role in enumerate(roles)]
        whole, at = tokenizer.render(chat), 0
        before, asked, after, header = [], [], [], []
        for i, m in enumerate(chat):
            start = whole.find(m["content"], at)
            if start < 0 or whole.count(m["content"]) != 1:
                return None
            before.append(whole[at:start])
            at, size, tail, ids = start + len(m["content"]), 0, "", tuple[int, ...]()
            if m["role"] == "assistant" and any(x["role"] == "user" for x in chat[:i]):
                prompt, stop = tokenizer.render(chat[:i], header=True), whole.find(end, at)
                size = len(prompt) - (start - len(before[-1]))
                last = tokenizer.last_control(prompt)
                if not whole.startswith(prompt) or not 0 <= size <= len(before[-1]) or last < len(prompt) - size:
                    return None
                if stop < 0 or not tokenizer.render(chat[: i + 1]).startswith(whole[: stop + len(end)]):
                    return None
                tail, ids = whole[at : stop + len(end)], tuple(tokenizer.ids(prompt[last:]))
            asked.append(size)
            after.append(tail)
            header.append(ids)
        opens = self._opens(roles, before)
        return Skeleton(roles, tuple(before), tuple(asked), tuple(after), tuple(header), opens)

    def _opens(self, roles: tuple[str, ...], before: list[str]) -> int:
        """See ``Skeleton.opens``: what is written around messages hangs on their roles alone, so the oldest can be left out."""
        first = int(roles[0] == "system")
        if roles[first:] != ("user", "assistant") * ((len(roles) - first) // 2) or len(set(before[first + 1 :])) > 2:
            return 0
        opening = {piece[at:] if (at := self.tokenizer.last_control(piece)) >= 0 else "" for piece in before[first::2]}
        return len(opening.pop()) if len(opening) == 1 else 0
