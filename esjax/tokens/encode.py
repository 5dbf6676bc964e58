"""Dialogues, conversations and preference pairs to rows; histories cut to the window at turn boundaries."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from esjax import rows
from esjax.corpus.dialogue import Dialogue, Message
from esjax.errors import InputError
from esjax.rows import Rows
from esjax.tokens.answers import CHAT, END, HEAD, MESSAGE, PROMPT, START, Answers, Chat, cut_out, stored
from esjax.tokens.skeleton import Skeletons
from esjax.tokens.tokenizer import ChatTokenizer


class Prompt(NamedTuple):
    """A context C_n: what an answer of a chat answers, and its tokens."""

    number: int  # of the chat
    chat: list[Message]  # the whole one, its system message first
    stop: int  # the message that is the answer
    start: int  # the first message after the system message that is kept
    ids: np.ndarray  # int32

    @property
    def messages(self) -> list[Message]:
        """The context as chat messages."""
        head = self.chat[:1] if self.chat[0]["role"] == "system" else []
        return [*head, *self.chat[self.start : self.stop]]


class Pair(NamedTuple):
    """A preference pair."""

    prompt: list[Message]
    chosen: str
    rejected: str
    where: str  # for messages about it


@dataclass
class Encoder:
    """Turns text into rows of at most ``window`` tokens.

    ``counts`` tells what happened on the way: "cut" histories, examples "too_long" even after every cut, dialogues
    "unshared" because the chat template is not prefix-stable.
    """

    tokenizer: ChatTokenizer
    window: int
    system: str
    folder: Path | None = None  # where encoded corpora are kept
    counts: Counter[str] = field(default_factory=Counter)
    known_pairs: dict[bytes, tuple[np.ndarray, ...]] = field(
        default_factory=dict, repr=False
    )  # by a digest of their texts

    @cached_property
    def skeletons(self) -> Skeletons:
        """What the tokenizer's template writes around messages."""
        return Skeletons(self.tokenizer)

    def with_system(self, messages: list[Message]) -> list[Message]:
        """Put the run's system message first; a chat that brings its own keeps it."""
        if not self.system or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system}, *messages]

    def chat(self, dialogue: Dialogue, system: bool = True) -> Chat:
        """A dialogue as a chat, with the run's ``system`` message or as it is, whose answers are the supporter's."""
        own = dialogue.messages(len(dialogue.turns))
        messages = self.with_system(own) if system else own
        first = len(messages) - len(dialogue.turns)  # what stands before the dialogue's own turns
        return Chat(messages, tuple(first + i for i in dialogue.supporter_turns()), dialogue.where)

    def examples(self, chats: Sequence[Chat]) -> list[list[Rows]]:
        """SFT rows of each chat: a trunk with all its answers as targets where the template allows, else a row an answer.

        Chats longer than the window lose their oldest turns. Raises InputError naming a chat.
        """
        found = self._answers(chats, self.window, whole=True)
        out: list[list[Rows]] = [[] for _ in chats]
        starts = np.flatnonzero((np.diff(found.table[:, [CHAT, HEAD]], axis=0, prepend=-1) != 0).any(axis=1))
        for same in np.split(found.table, starts[1:]) if len(starts) else []:
            tokens = np.concatenate([found.prompt(same[-1]), found.ids[same[-1, PROMPT] : same[-1, END]]])
            weight = np.zeros(len(tokens), np.float32)
            for stop, end in same[:, [PROMPT, END]] + len(tokens) - same[-1, END] - 1:
                weight[stop:end] = 1.0
            out[same[0, CHAT]].append(rows.trunk(tokens, weight))
        return out

    def prompts(self, chats: Sequence[Chat], room: int) -> list[Prompt]:
        """The contexts C_n of all answers, each cut to ``room`` tokens. Raises InputError naming a chat."""
        found = self._answers(chats, room, whole=False)
        return [
            Prompt(row[CHAT], chats[row[CHAT]].messages, row[MESSAGE], row[START], found.prompt(row))
            for row in found.table.tolist()
        ]

    def _answers(self, chats: Sequence[Chat], room: int, whole: bool) -> Answers:
        found = stored(self.folder, self.skeletons, chats, room, whole)
        self.counts.update(found.counts)
        return found

    def pairs(self, pairs: Sequence[Pair]) -> list[tuple[list[int], list[list[int]]]]:
        """Token ids of preference pairs: a prompt's, and those of chosen and rejected. Raises InputError naming a pair.

        Both go through the same template and end with the same end-of-turn token; their prompt tokens are the same by
        construction. A round asks for each of its pairs three times (to filter, to score, to train), so they are kept.
        """
        keys = [hashlib.sha256(json.dumps(pair[:3]).encode()).digest() for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.known_pairs}
        chats = [
            Chat([*p.prompt, Message(role="assistant", content=text)], (len(p.prompt),), p.where)
            for p in new.values()
            for text in (p.chosen, p.rejected)
        ]
        found = cut_out(self.skeletons, chats, sys.maxsize, whole=True)
        for key, chosen, rejected in zip(new, found.table[::2], found.table[1::2], strict=True):
            replies = (found.ids[side[PROMPT] : side[END]] for side in (chosen, rejected))
            self.known_pairs[key] = (found.prompt(chosen), *replies)
        return [(ids.tolist(), [c.tolist(), r.tolist()]) for ids, c, r in (self.known_pairs[key] for key in keys)]

    def targets(self, chats: Sequence[tuple[list[Message], str]], cut: bool = True) -> list[Rows]:
        """Scoring rows of chats, each with what to call it: the last message, the assistant's, is the only target.

        A history too long for the window loses its oldest turns, which is counted; without ``cut`` it is too long itself.
        Raises InputError naming a chat that is too long.
        """
        asked = [
            Chat(self.with_system(messages), (len(self.with_system(messages)) - 1,), where) for messages, where in chats
        ]
        found = cut_out(self.skeletons, asked, self.window if cut else sys.maxsize, whole=True)
        self.counts.update(found.counts)
        fitting = set(found.table[:, CHAT].tolist())
        for n, chat in enumerate(asked):
            if n not in fitting:
                raise InputError(
                    f"{chat.where}: the last two messages do not fit data.window={self.window} tokens; raise data.window"
                )
        out = []
        for row in found.table.tolist():
            prompt, reply = found.prompt(row), found.ids[row[PROMPT] : row[END]]
            if (size := len(prompt) + len(reply)) > self.window:
                raise InputError(
                    f"{asked[row[CHAT]].where}: its {size} tokens exceed the model's {self.window} positions; --data.window "
                    f"{self.window} leaves out its oldest turns"
                )
            out.append(rows.prompt_with_replies(prompt.tolist(), [reply.tolist()]))
        return out
