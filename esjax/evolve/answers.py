"""What any model is asked for: answers to prompts, scores of given answers, reflections on what a seeker wrote."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.corpus.sources import check_messages
from esjax.errors import InputError, within
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.run.files import sha256
from esjax.run.journal import gather
from esjax.run.jsonl import read_jsonl
from esjax.run.progress import progress, say
from esjax.runtime.mesh import batch_groups, rows_at_once
from esjax.sample.constrain import LONGEST, START, Field, compile_template
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion
from esjax.sample.score import Scorer
from esjax.settings.files import bundled

BLOCK = 32  # times as many replies as are under way at once are drawn together
MOST = 10_000_000  # answers of one command: they are held in memory


class Chat(NamedTuple):
    """One row of a file of chats."""

    id: str | int
    messages: list[Message]
    where: str  # file, line and id


def read_chats(file: Path, last: str) -> list[Chat]:
    """Rows of {"id", "messages"} whose last message is ``last``'s, user or assistant. Raises InputError naming the line."""
    chats: list[Chat] = []
    first: dict[str, int] = {}
    for row in read_jsonl(bundled(str(file)), ("id", "messages")):
        where, name = row.where, row["id"]
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InputError(f"{where}: the id is {json.dumps(name):.60}; give a text or a whole number")
        if last == "user" and first.setdefault(str(name), row.number) != row.number:  # they would share their noise
            raise InputError(
                f"{file}, lines {first[str(name)]} and {row.number}: both have the id {str(name)!r:.60}, and 1 is the same as "
                "'1'; give each row an id of its own"
            )
        chats.append(Chat(name, _checked(row["messages"], where, last), f"{where}, id {name!r:.60}"))
    if not chats:
        raise InputError(f"{file}: empty; expected one JSON object a line with id and messages")
    return chats


def given_chats(chats: Sequence[Any], last: str) -> list[Chat]:
    """Chats that somebody has at hand, each a list of messages; they are numbered from 0. Raises InputError naming one."""
    return [Chat(i, _checked(list(chat), f"chat {i}", last), f"chat {i}") for i, chat in enumerate(chats)]


def _checked(messages: Any, where: str, last: str) -> list[Message]:
    checked = check_messages(messages, where, last=last)
    if all(m["role"] != "user" for m in checked):
        raise InputError(f"{where}: there is no user message before the assistant's")
    return checked


class Work(NamedTuple):
    """Rows that are to be made, each a JSON object, in any order."""

    label: str
    total: int
    make: Callable[
        [list[int], Callable[..., None]], None
    ]  # given the missing rows' numbers and ``add(number, row, tokens)``
    of: dict[str, Any]  # what the rows hang on, beside the model and the chats, see Journal

    def to_file(self, out: Path, of: dict[str, Any]) -> None:
        """Write JSON Lines; rows that a killed command left are kept if it was ``of`` the same."""
        gather(out, self.total, self.label, self.make, of | self.of)

    def rows(self) -> list[dict[str, Any]]:
        """All rows, in memory."""
        rows: dict[int, dict[str, Any]] = {}
        with progress(self.label, self.total) as advance:

            def add(number: int, row: dict[str, Any], tokens: int = 0) -> None:
                rows[number] = row
                advance(1, tokens)

            self.make(list(range(self.total)), add)
        return [rows[i] for i in range(self.total)]


def check_count(name: str, count: int, chats: int) -> None:
    """Raise InputError unless so many answers to each of so many chats can be made; ``name`` is what says the count."""
    if not 1 <= count <= MOST // chats:
        raise InputError(
            f"{name} {count}: at least 1, and {MOST} answers at most: {MOST // chats} to each of {chats} prompts"
        )


def answering(experiment: Experiment, adapter: Adapter, chats: list[Chat], count: int, pattern: str | None) -> Work:
    """``count`` answers to each chat, drawn as the settings' ``reply`` says; all match ``pattern``, if there is one.

    An answer hangs on the seed, its chat's id and its number alone; the first is that of a count of one. Raises InputError,
    before anything is drawn, where a chat does not fit.
    """
    seed, how, tokenizer = experiment.config.seed, experiment.config.reply, experiment.tokenizer
    most, positions = how.max_tokens, experiment.backbone.arch.max_positions
    form = None
    if pattern is not None:
        field = Field(pattern, min(max(1, most - 1), LONGEST), min_tokens=0)
        with within(f"--regex or --json-schema, in reply.max_tokens={most}"):
            form = compile_template([field], tokenizer, experiment.backbone.arch.vocab)
    prompts = []
    for chat in chats:
        with within(chat.where):
            prompts.append(tokenizer.prompt(experiment.encoder.with_system(chat.messages)))
            size = len(prompts[-1])
            if size + most > positions:
                remedy = f"lower reply.max_tokens to {positions - size}, or " if size < positions else ""
                raise InputError(
                    f"its {size} tokens and reply.max_tokens={most} new ones exceed the model's {positions} positions; "
                    f"{remedy}shorten or remove it"
                )
    devices, total = batch_groups(), count * len(prompts)
    replies = min(how.batch, -(-total // devices) * devices)
    generator = replace(experiment.generator, replies=replies, lanes=0, slots=0, new=0)

    def requests(indices: range | list[int]) -> list[Request]:
        out = []
        for i in indices:
            n, k = divmod(i, count)
            number = row_seed(seed, "sample", chats[n].id, *([k] if k else []))
            out.append(Request(i, prompts[n], number, how, most, START if form else 0, str(chats[n].id)))
        return out

    def make(missing: list[int], add: Callable[..., None]) -> None:
        left = set(missing)

        def done(request: Request, made: Completion) -> tuple[()]:
            n, k = divmod(request.key, count)
            row = {
                "id": chats[n].id,
                **({"sample": k} if count > 1 else {}),
                "text": tokenizer.decode(made.token_ids),
                "token_ids": made.token_ids,
                "logprobs": made.logprobs,
                "finish_reason": made.finish,
            }
            if request.key in left:
                add(request.key, row, len(made.token_ids))
            return ()

        # Which prompts share what they begin with moves log-probs in their last digits. So that a continued command ends
        # with the same bytes, a block that lacks a reply is made anew as a whole, with the shapes of all.
        generator.fit(generator.grouped(requests(range(total))))
        for start in range(0, total, BLOCK * generator.replies):
            block = range(start, min(total, start + BLOCK * generator.replies))
            if not left.isdisjoint(block):
                generator.work(adapter, generator.grouped(requests(block)), done, form.automaton if form else None)
        say(f"  {generator.usage}")

    drawn = {f"reply.{key}": getattr(how, key) for key in ("temperature", "top_p", "top_k", "max_tokens")}
    of = {"--num-samples": count, "--regex or --json-schema": pattern, "seed": seed, **drawn}
    return Work("replies", total, make, of | _read_as(experiment, prompts))


def scoring(experiment: Experiment, adapter: Adapter, chats: list[Chat], window: int | None) -> Work:
    """The log-probs of each chat's last message, given all before it.

    A chat longer than ``window`` loses its oldest turns, counted and said; without one, none does, and the model's
    positions are the limit. Raises InputError, before anything is computed, where a chat does not fit.
    """
    positions = experiment.backbone.arch.max_positions
    if window is not None and window > positions:
        raise InputError(f"data.window={window} exceeds the model's {positions} positions; lower it")
    encoder = replace(experiment.encoder, window=window or positions)
    examples = encoder.targets([(chat.messages, chat.where) for chat in chats], cut=window is not None)
    if encoder.counts["cut"]:
        say(
            f"{encoder.counts['cut']} of {len(chats)} chats lost their oldest turns to data.window={window}; raise it, or "
            f"leave it out for the model's {positions} positions"
        )
    row_length = max(experiment.config.data.window if window is None else 0, *(len(e.tokens) for e in examples))
    scorer = Scorer(experiment.backbone, row_length, rows_at_once("sft", experiment.config.sft))

    def make(missing: list[int], add: Callable[..., None]) -> None:
        def done(i: int, branches: list[np.ndarray]) -> None:
            values = [float(x) for x in branches[0]]
            row = {"id": chats[i].id, "logprob": sum(values), "num_tokens": len(values), "token_logprobs": values}
            add(i, row, len(values))

        scorer.score(adapter, examples, done, missing)

    return Work("scores", len(chats), make, _read_as(experiment, [e.tokens.tolist() for e in examples]))


def reflecting(experiment: Experiment, adapter: Adapter, chats: list[Chat]) -> Work:
    """A reflection on each chat: what the model infers of the seeker, under the principles, as evolve.reflection says."""

    def make(missing: list[int], add: Callable[..., None]) -> None:
        def done(request: Request, made: Completion) -> tuple[()]:
            add(request.key, experiment.reflection(made.token_ids), len(made.token_ids))
            return ()

        asked, seed = [experiment.encoder.with_system(chats[i].messages) for i in missing], experiment.config.seed
        requests = [
            experiment.reflection_request(i, chat, row_seed(seed, "reflect", chats[i].id), chats[i].where)
            for i, chat in zip(missing, asked, strict=True)
        ]
        generator = experiment.generator
        generator.work(adapter, generator.grouped(requests), done, experiment.form.automaton)

    return Work("reflections", len(chats), make, {})


def _read_as(experiment: Experiment, tokens: list[list[int]]) -> dict[str, Any]:
    """What else rows hang on: the tokens that chats became, and how they were computed."""
    return {
        "model.dtype": experiment.backbone.dtype.name,
        "prompts.system": _digest(experiment.encoder.system),
        "tokenizer, chat template or window": _digest(tokens),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def identity(model: str, file: Path) -> dict[str, Any]:
    """What identifies a model, by its hash, and the content of a file of chats."""
    return {"--model": model, "content of the file": sha256(bundled(str(file)))}
