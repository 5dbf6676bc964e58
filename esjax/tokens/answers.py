"""The answers of a corpus as tokens: each dialogue is encoded once, and its contexts and answers are cut out of that.

Where a template or a text does not allow it, a chat's prompts are encoded one by one (``plain``), with the same result.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.errors import within
from esjax.run.files import write_text
from esjax.run.memo import held
from esjax.tokens.skeleton import Assembled, Skeletons
from esjax.tokens.tokenizer import ChatTokenizer

AT_ONCE = 64  # chats that are encoded together: the tokenizer's own records of them take much memory
FORMAT = 1  # of what is kept on disk
CHAT, MESSAGE, START, HEAD, HEAD_END, KEPT, PROMPT, END = range(8)  # columns of a table of answers


class Chat(NamedTuple):
    """A chat, and which of its messages are answers: the assistant's, each after one of the user's, in ascending order."""

    messages: list[Message]
    answers: tuple[int, ...]
    where: str  # for messages about it
    number: int = 0

    @property
    def head(self) -> int:
        """How many system messages it begins with: they are never cut."""
        return int(self.messages[0]["role"] == "system")


class Answers(NamedTuple):
    """The answers that fit, as tokens.

    A row of the table: the chat's number; the message that is the answer; the first message, after a system message, that its
    prompt begins with; and where among the ids its tokens are: HEAD:HEAD_END is what stands before that first message,
    KEPT:PROMPT the rest of the prompt, PROMPT:END the answer. A whole prompt has no head of its own: HEAD_END is HEAD.
    """

    ids: np.ndarray  # int32 [N]
    table: np.ndarray  # int64 [A, 8], see the columns above
    counts: dict[str, int]  # "cut" histories, "too_long" in spite of that, chats "unshared"

    def prompt(self, row: Sequence[int]) -> np.ndarray:
        """The ids of a prompt."""
        kept = self.ids[row[KEPT] : row[PROMPT]]
        return kept if row[HEAD] == row[HEAD_END] else np.concatenate([self.ids[row[HEAD] : row[HEAD_END]], kept])


class Encoded(NamedTuple):
    """One chat's tokens up to its last answer, and where they may be cut."""

    ids: np.ndarray
    spans: dict[int, tuple[int, int]]  # of each answer: the end of its prompt, its own end
    opens: dict[int, int]  # where the user's messages begin; the first of them is where the head ends


Span = tuple[int, int, int, int, int]  # HEAD to END within a piece


def stored(folder: Path | None, skeletons: Skeletons, chats: Sequence[Chat], room: int, whole: bool) -> Answers:
    """``cut_out``, kept in a folder under a hash of all that it hangs on, and mapped from there into memory."""
    if folder is None:
        return cut_out(skeletons, chats, room, whole)
    hangs_on = [FORMAT, skeletons.tokenizer.fingerprint, room, whole]
    texts = ([[[m["role"], m["content"]] for m in chat.messages], chat.answers] for chat in chats)

    def write(place: Path) -> None:
        made = cut_out(skeletons, chats, room, whole)
        place.mkdir()
        for name, array in (("ids", made.ids), ("table", made.table)):
            buffer = io.BytesIO()  # numpy's own writing does not say that a disk is full
            np.save(buffer, array)
            (place / f"{name}.npy").write_bytes(buffer.getvalue())
        write_text(place / "counts.json", json.dumps(made.counts) + "\n")

    place = held(folder, chain(hangs_on, texts), write)
    ids, table = (np.load(place / f"{name}.npy", mmap_mode="r") for name in ("ids", "table"))
    return Answers(ids, table, json.loads((place / "counts.json").read_text()))


def cut_out(skeletons: Skeletons, chats: Sequence[Chat], room: int, whole: bool) -> Answers:
    """Encode chats, without as few of their oldest turns as possible.

    Args:
        room: most tokens: of a chat up to the end of its last answer (``whole``), or of each answer's prompt for itself.

    Answers for which there is no room even then are left out. Raises InputError naming the chat where the template refuses
    it, or does not keep prompts as beginnings of what is answered.
    """
    counts: Counter[str] = Counter()
    pieces, table, size = [np.zeros(0, np.int32)], list[tuple[int, ...]](), 0
    chats = [chat._replace(number=n) for n, chat in enumerate(chats) if chat.answers]
    for chat, made in zip(chats, encode(skeletons, chats), strict=True):
        groups: list[tuple[int, ...]] = [chat.answers] if whole else [(answer,) for answer in chat.answers]
        found = None if made is None else _cut(chat, made, groups, room, whole)
        if found is None:
            with within(chat.where):
                found = cut_plain(skeletons.tokenizer, chat, groups, room, whole)
        counts += found.counts
        for answer, start, piece, span in found.rows:
            table.append((chat.number, answer, start, *(size + sum(map(len, found.pieces[:piece])) + x for x in span)))
        pieces += found.pieces
        size += sum(map(len, found.pieces))
    return Answers(np.concatenate(pieces), np.asarray(table, np.int64).reshape(-1, 8), dict(+counts))


class _Found(NamedTuple):
    """The answers of one chat that fit: message, first message kept, piece, span."""

    pieces: list[np.ndarray]
    rows: list[tuple[int, int, int, Span]]
    counts: Counter[str]


def _cut(chat: Chat, made: Encoded, groups: list[tuple[int, ...]], room: int, whole: bool) -> _Found | None:
    """Cut an encoded chat; None where its template does not allow that."""
    first, counts, rows = chat.head, Counter[str](), list[tuple[int, int, int, Span]]()
    for group in groups:
        size, start, head, kept = made.spans[group[-1]][int(whole)], first, 0, 0
        if size > room:
            if first not in made.opens:
                return None
            head = made.opens[first]
            later = [u for u in made.opens if first < u < group[-1] and head + size - made.opens[u] <= room]
            if not later:
                counts["too_long"] += 1
                continue
            start, kept = later[0], made.opens[later[0]]
            counts["cut"] += 1
        rows += [(answer, start, 0, (0, head, kept, *made.spans[answer])) for answer in group if answer > start]
    return _Found([made.ids], rows, counts)


def cut_plain(tokenizer: ChatTokenizer, chat: Chat, groups: list[tuple[int, ...]], room: int, whole: bool) -> _Found:
    """The same, each prompt and each answer encoded for itself.

    Raises InputError where the chat template does not keep a prompt as a prefix of the answered chat, or does not end answers.
    """
    out, messages = _Found([], [], Counter()), chat.messages
    for group in groups:
        users = [chat.head, *(i for i in range(chat.head + 1, group[-1]) if messages[i]["role"] == "user")]
        for start in users:
            kept = [*messages[: chat.head], *messages[start:]]
            moved = start - chat.head
            prompt = tokenizer.prompt(kept[: group[-1] - moved])
            size = len(prompt) + (len(tokenizer.reply(prompt, kept[: group[-1] + 1 - moved])) if whole else 0)
            if size <= room:
                break
        else:
            out.counts["too_long"] += 1
            continue
        out.counts["cut"] += start > users[0]
        answers = [a for a in group if a > start]
        prompts = [tokenizer.prompt(kept[: a - moved]) for a in answers]
        replies = [tokenizer.reply(p, kept[: a + 1 - moved]) for a, p in zip(answers, prompts, strict=True)]
        pieces = [np.asarray([*p, *r], np.int32) for p, r in zip(prompts, replies, strict=True)]
        shared = all(np.array_equal(pieces[-1][: len(piece)], piece) for piece in pieces)
        for n, answer in enumerate(answers):
            place = len(out.pieces) + (0 if shared else n)
            out.rows.append((answer, start, place, (0, 0, 0, len(prompts[n]), len(pieces[n]))))
        out.pieces.extend(pieces[-1:] if shared else pieces)
        out.counts["unshared"] |= not shared
    return out


def encode(skeletons: Skeletons, chats: Sequence[Chat]) -> list[Encoded | None]:
    """The tokens of chats whose prompts are beginnings of the whole, as text and as tokens; None of others."""
    out: list[Encoded | None] = []
    for begin in range(0, len(chats), AT_ONCE):
        assembled = []
        for chat in chats[begin : begin + AT_ONCE]:
            with within(chat.where):
                assembled.append(skeletons.assemble(chat.messages[: chat.answers[-1] + 1]))
        records = iter(skeletons.tokenizer.records([a.text for a in assembled if a is not None]))
        for chat, text in zip(chats[begin : begin + AT_ONCE], assembled, strict=True):
            out.append(None if text is None else _encoded(skeletons.tokenizer, next(records), text, chat.answers))
    return out


def _encoded(tokenizer: ChatTokenizer, record: Any, text: Assembled, answers: Sequence[int]) -> Encoded | None:
    """Where the answers lie among a text's tokens; None where a token spans a prompt's end, or would be another without what
    follows: from its last control token on the prompt alone has the tokens ``header``."""
    ids = np.asarray(record.ids, np.int32)
    ends = np.flatnonzero(ids == tokenizer.end_of_turn)
    spans = {}
    for answer in answers:
        token = _token_at(record, text.prompts.get(answer))
        if token is None or ends[-1] < token:
            return None
        header = text.header[answer]
        if tuple(ids[token - len(header) : token]) != header:
            return None
        spans[answer] = (token, int(ends[np.searchsorted(ends, token)]) + 1)
    opens = {user: _token_at(record, at) for user, at in text.opens.items()}
    return Encoded(ids, spans, {user: token for user, token in opens.items() if token is not None})


def _token_at(record: Any, at: int | None) -> int | None:
    """The token that begins at a character, if one does."""
    token = None if at is None else record.char_to_token(at)
    return token if token is not None and record.token_to_chars(token)[0] == at else None
