"""Dialogues, conversations and preference pairs to rows; histories cut to the window at turn boundaries."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from esjax import rows
from esjax.corpus.dialogue import Dialogue, Message
from esjax.errors import InputError, within
from esjax.rows import Rows
from esjax.tokens.tokenizer import ChatTokenizer


@dataclass
class Encoder:
    """Turns text into rows of at most ``window`` tokens.

    ``counts`` tells what happened on the way: "cut" histories, examples "too_long" even after every cut, dialogues
    "unshared" because the chat template is not prefix-stable.
    """

    tokenizer: ChatTokenizer
    window: int
    system: str
    counts: Counter[str] = field(default_factory=Counter)
    pairs: dict[bytes, tuple[np.ndarray, ...]] = field(default_factory=dict, repr=False)  # by a digest of their texts

    def context(self, dialogue: Dialogue, turn: int) -> list[Message]:
        """C_n as chat messages: everything before supporter turn ``turn``, with the system message if there is one."""
        return self.with_system(dialogue.messages(turn))

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Put the run's system message first; a chat that brings its own keeps it."""
        if not self.system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def fit(self, messages: list[Message], size: Callable[[list[Message]], int], room: int) -> list[Message] | None:
        """Drop the oldest turns, in user/assistant pairs, until ``size(messages) <= room``.

        The system message and the newest turn stay. Returns None when even those are too long. Counts a "cut".
        """
        head = messages[:1] if messages[0]["role"] == "system" else []
        body = messages[len(head) :]
        cut = False
        while size([*head, *body]) > room:
            rest = body[1:]
            while rest and rest[0]["role"] != "user":
                rest = rest[1:]
            if not any(m["role"] == "user" for m in rest):
                self.counts["too_long"] += 1
                return None
            body, cut = rest, True
        if cut:
            self.counts["cut"] += 1
        return [*head, *body]

    def prompt(self, messages: list[Message], room: int) -> tuple[list[Message], list[int]] | None:
        """A chat that awaits its answer, cut to ``room`` tokens: the messages kept and their ids, or None (too long)."""
        kept = self.fit(messages, lambda m: len(self.tokenizer.prompt(m)), room)
        return None if kept is None else (kept, self.tokenizer.prompt(kept))

    def dialogue(self, dialogue: Dialogue) -> list[Rows]:
        """SFT rows: one trunk with every supporter turn as a target where the template allows, else one row a turn."""
        with within(dialogue.where):
            whole = self.with_system(dialogue.messages(len(dialogue.turns)))
            return self.chat(whole, opening=dialogue.turns[0].role == "supporter")

    def chat(self, messages: list[Message], opening: bool = False) -> list[Rows]:
        """Rows whose targets are all assistant messages of a chat that answer somebody.

        One before the first user message does not; nor does the first one if that message stands for nobody (``opening``).
        """
        first = next(i for i, m in enumerate(messages) if m["role"] == "user")
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i > first]
        skipped = answers[0] if opening else -1
        last = answers[-1] + 1
        kept = self.fit(messages[:last], lambda m: sum(map(len, self._parts(m))), self.window)
        if kept is None:
            return []
        dropped = last - len(kept)
        first = next(i for i, m in enumerate(kept) if m["role"] == "user")
        targets = [
            i
            for i, m in enumerate(kept)
            if m["role"] == "assistant" and i > first and not (dropped == 0 and i == skipped)
        ]
        prompts = {i: self.tokenizer.prompt(kept[:i]) for i in targets}
        replies = {i: self.tokenizer.reply(prompts[i], kept[: i + 1]) for i in targets}
        whole = [*prompts[targets[-1]], *replies[targets[-1]]]
        if all(whole[: len(prompts[i]) + len(replies[i])] == [*prompts[i], *replies[i]] for i in targets):
            weight = [0.0] * len(whole)
            for i in targets:
                start = len(prompts[i]) - 1
                weight[start : start + len(replies[i])] = [1.0] * len(replies[i])
            return [rows.trunk(whole, weight)]
        self.counts["unshared"] += 1
        return [rows.prompt_with_replies(prompts[i], [replies[i]]) for i in targets]

    def pair(self, prompt: list[Message], chosen: str, rejected: str) -> tuple[list[int], list[list[int]]]:
        """Token ids of a preference pair: its prompt's, and those of chosen and rejected.

        Both go through the same template and end with the same end-of-turn token; their prompt tokens are the same by
        construction. A round asks for each of its pairs three times (to filter, to score, to train), so they are kept.
        """
        key = hashlib.sha256(json.dumps([prompt, chosen, rejected]).encode()).digest()
        if key not in self.pairs:
            ids = self.tokenizer.prompt(prompt)
            answers = ([*prompt, Message(role="assistant", content=text)] for text in (chosen, rejected))
            self.pairs[key] = tuple(
                np.asarray(x, np.int32) for x in (ids, *(self.tokenizer.reply(ids, a) for a in answers))
            )
        ids, *replies = (x.tolist() for x in self.pairs[key])
        return ids, replies

    def target(self, messages: list[Message], cut: bool = True) -> Rows:
        """A scoring row: the last assistant message is the target. Raises InputError when it is too long.

        A history too long for the window loses its oldest turns; without ``cut`` it is too long itself.
        """
        kept = messages
        if not cut and (size := sum(map(len, self._parts(messages)))) > self.window:
            raise InputError(
                f"its {size} tokens exceed the model's {self.window} positions; --data.window {self.window} leaves "
                "out its oldest turns"
            )
        if cut:
            kept = self.fit(messages, lambda m: sum(map(len, self._parts(m))), self.window) or []
            if len(kept) < 2:
                raise InputError(
                    f"the last two messages do not fit data.window={self.window} tokens; raise data.window"
                )
        prompt, reply = self._parts(kept)
        return rows.prompt_with_replies(prompt, [reply])

    def _parts(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Token ids of a chat's prompt and of its last message, the reply."""
        prompt = self.tokenizer.prompt(messages[:-1])
        return prompt, self.tokenizer.reply(prompt, messages)
