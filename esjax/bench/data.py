"""Preparation timed: how long the tokens of a corpus take, for phase 1 and for all contexts, at first and from the cache."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from esjax.corpus.sources import read
from esjax.hub.fetch import resolve
from esjax.settings.files import read_text
from esjax.settings.schema import Config
from esjax.tokens import answers
from esjax.tokens.batches import fill_rate, schedule
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

DIALOGUES = 2170  # so many are made of the training dialogues, which differ by a number in each turn
PLAIN = 20  # the plain way is timed on every so many-th of them
ROW = 2048  # tokens of the rows whose fill is told


def bench(config: Config, naive: bool) -> dict[str, Any]:
    """The settings' training dialogues and tokenizer. ``naive``: each prompt and answer encoded for itself beside it."""
    began = time.perf_counter()
    own = read(config.data.train, config.data.format, config.seed).dialogues
    dialogues = []
    for n in range(DIALOGUES):
        d = own[n % len(own)]
        turns = tuple(replace(t, text=f"{t.text} {n // len(own)}") for t in d.turns)
        dialogues.append(replace(d, id=str(n), turns=turns))
    tokenizer = ChatTokenizer(resolve(config.model.source, config.model.sha256), config.model.chat_template)
    system, facts = read_text(config.prompts.system), dict[str, Any]()
    facts |= {"task": "data", "dialogues": DIALOGUES, "start_seconds": round(time.perf_counter() - began, 2)}
    with TemporaryDirectory() as folder:
        for turn in ("", "again_"):
            encoder = Encoder(tokenizer, config.data.window, system, Path(folder))
            chats, began = [encoder.chat(d) for d in dialogues], time.perf_counter()
            contexts = encoder.prompts(chats, config.context_room)
            facts[f"contexts_{turn}seconds"] = round(time.perf_counter() - began, 2)
            facts.setdefault("contexts_peak_mib", _peak())
            began = time.perf_counter()
            rows = [row for made in encoder.examples(chats) for row in made]
            facts[f"rows_{turn}seconds"] = round(time.perf_counter() - began, 2)
    tokens = sum(len(row.tokens) for row in rows)
    facts |= {"contexts": len(contexts), "row_tokens": tokens}
    facts["row_tokens_per_second"] = round(tokens / facts["rows_seconds"])
    if naive:
        some = chats[::PLAIN]
        for name, whole, room in (("contexts", False, config.context_room), ("rows", True, config.data.window)):
            began = time.perf_counter()
            for chat in some:
                groups: list[tuple[int, ...]] = [chat.answers] if whole else [(a,) for a in chat.answers]
                answers.cut_plain(tokenizer, chat, groups, room, whole)
            facts[f"naive_{name}_seconds"] = round((time.perf_counter() - began) * len(chats) / len(some), 1)
    began = time.perf_counter()
    lengths = [len(row.tokens) for row in rows if len(row.tokens) <= ROW]
    steps = schedule(lengths, ROW, 8, 1, config.seed)
    facts |= {
        "packing_seconds": round(time.perf_counter() - began, 2),
        "fill_rate": round(fill_rate(lengths, steps, ROW), 4),
    }
    return facts | {"peak_mib": _peak()}


def _peak() -> int:
    """The most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
