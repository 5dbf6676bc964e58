"""A conversation with an open model: its replies, what it would infer of the person, and what stands behind a reply."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.evolve.models import model_settings, run_model
from esjax.safety.guard import Guard
from esjax.sample.rowbook import row_seed
from esjax.sample.stream import Drawn
from esjax.serve.engine import Engine, Job, Opened
from esjax.serve.replies import Reply
from esjax.settings.files import Overrides

NOTICE = (
    "This is a language model, for research. It is no person and no therapist, it can be wrong or hurtful, and it is not for "
    "crises: if you are in danger, call your local emergency number. Nothing is stored unless you save it."
)
SIGN = "AI, for research, not therapy"


class Fitted(NamedTuple):
    """A chat as a prompt, and how many of its oldest messages had to go."""

    chat: list[Message]
    prompt: list[int]
    cut: int


def fitted(opened: Opened, chat: Sequence[Message]) -> Fitted:
    """A chat that ends with the user's message, with the model's system message, without as few of its oldest turns as possible.

    Raises InputError where the newest message alone is too long.
    """
    e = opened.experiment
    whole = e.encoder.with_system(list(chat))
    head, rest = (whole[:1], whole[1:]) if whole[0]["role"] == "system" else ([], whole)
    for cut in range(0, len(rest), 2):
        prompt = e.tokenizer.prompt([*head, *rest[cut:]])
        if len(prompt) <= opened.chat:
            return Fitted([*head, *rest[cut:]], prompt, cut)
    raise InputError(
        f"the message is too long: {len(prompt)} tokens with what stands around it, of {opened.chat}; shorten it"
    )


def said(chat: Sequence[Message]) -> list[str]:
    """What the person wrote."""
    return [m["content"] for m in chat if m["role"] == "user"]


def check_asked(guard: Guard | None, chat: Sequence[Message]) -> None:
    """Raise InputError where it was the guard that answered the last message: the model is not asked about that one."""
    if guard is not None and guard.before([chat[-1]["content"]]) is not None:
        raise InputError(
            "the guard answered that message, not the model; there is nothing behind it, and nothing to compare"
        )


def speak(engine: Engine, job: Job) -> Iterator[Reply]:
    """The reply after each piece of it. Raises Busy, and what the engine failed with; given up where the caller stops."""
    said: queue.Queue[Drawn | Exception] = queue.Queue()
    job.tell = said.put
    reply = Reply(engine.models[job.model].experiment.tokenizer, [])
    key = engine.submit(job)
    try:
        while reply.finish is None:
            drawn = said.get()
            if isinstance(drawn, Exception):
                raise drawn
            reply.take(drawn)
            yield reply
    finally:
        engine.drop(key)


def reply_job(engine: Engine, name: str, prompt: list[int], seed: int) -> Job:
    """Asks for a reply, drawn as the model's settings say."""
    how = engine.models[name].experiment.config.reply
    return Job(name, prompt, how, seed, min(how.max_tokens, engine.models[name].stream.need.new), lambda _: None)


def infer(engine: Engine, name: str, chat: Sequence[Message], seed: int) -> dict[str, str]:
    """What the model would infer of the person: profile, emotional state, situation."""
    e, given = engine.models[name].experiment, fitted(engine.models[name], chat)
    request = e.reflection_request(None, given.chat, row_seed(seed, "reflect", "chat"), "the conversation")
    job = Job(name, request.prompt, request.how, request.seed, request.max_tokens, lambda _: None, e.form)
    return e.reflection(_all(engine, job).token_ids)


class Why(NamedTuple):
    """What stands behind a reply: what the model infers, the reply as a draft, and how it would refine it in that light."""

    reflection: dict[str, str]
    draft: str
    refinement: str


def why(engine: Engine, name: str, chat: Sequence[Message], draft: str, seed: int) -> Why:
    """The steps of phase 2 for one reply, ``draft``, to a chat that ends with the user's message."""
    e, given = engine.models[name].experiment, fitted(engine.models[name], chat)
    reflection = infer(engine, name, chat, seed)
    prompt = e.tokenizer.prompt(e.instructions.refinement_prompt(given.chat, reflection, draft))
    how = e.config.evolve.refinement
    job = Job(name, prompt, how, row_seed(seed, "refine", "chat"), how.max_tokens, lambda _: None)
    return Why(reflection, draft, _all(engine, job).text.strip())


def _all(engine: Engine, job: Job) -> Reply:
    *_, reply = speak(engine, job)
    return reply


def open_also(engine: Engine, name: str, given: Overrides) -> None:
    """Open a model to compare with: m0, m1, ... of the first model's run, or any that can be named. Raises InputError."""
    if name in engine.models:
        return
    first = next(iter(engine.configs.values()))[0]
    run = run_model(first)
    own = f"{first.rpartition(':')[0]}:{name}" if run is not None and name[:1] == "m" and name[1:].isdigit() else name
    engine.open(name, own, model_settings(own, given)).result()
