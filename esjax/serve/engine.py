"""The thread that computes: models that are open, and the requests that join and leave their lanes while others are drawn.

Everything of JAX happens in this one thread. Others hand it jobs, and are told what was drawn from it.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

from esjax.errors import InputError, RunError
from esjax.evolve.experiment import Experiment, open_model
from esjax.evolve.replies import lengths
from esjax.model.lora import Adapter
from esjax.opened import devices
from esjax.run.progress import say
from esjax.runtime.mesh import batch_groups
from esjax.sample.constrain import START, Constraint, Template, padded
from esjax.sample.generate import DrawSettings
from esjax.sample.rowbook import Request
from esjax.sample.score import Tops, tops
from esjax.sample.shapes import Need
from esjax.sample.stream import Drawn, Stream
from esjax.settings.schema import Config

STEPS = 16  # tokens of a lane between two looks at who came and who left
T = TypeVar("T")


class Busy(Exception):
    """As many requests wait as may."""


class EngineFailed(RunError):
    """The engine's thread ended by an error; nothing more is drawn."""


@dataclass(eq=False)
class Job:
    """A reply that is wanted. ``tell`` is called in the engine's thread and must not wait."""

    model: str
    prompt: list[int]
    how: DrawSettings
    seed: int
    max_tokens: int
    tell: Callable[[Drawn | Exception], None]
    form: Template | None = None  # what the reply obeys
    key: int = 0


@dataclass(eq=False)
class Opened:
    """A model, and its lanes."""

    experiment: Experiment
    adapter: Adapter
    stream: Stream
    chat: int  # tokens of a conversation that a reply is wanted to, at most
    form: Constraint | None = None  # that the stream obeys
    waiting: deque[Job] = field(default_factory=deque)  # until those that obey another one are done


class Engine:
    """Models by name, which share a backbone where it is the same. A context manager: within, its thread lives."""

    def __init__(self, configs: Mapping[str, tuple[str, Config]], most: int, thinks: bool = False) -> None:
        """``configs``: of each model its spec and settings; ``most``: requests that may be here at once; ``thinks``: whether
        models also reflect and refine, for which there must be room."""
        self.configs, self.most, self.thinks = configs, most, thinks
        self.models: dict[str, Opened] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._texts: list[tuple[Opened, list[int], Future[Tops]]] = []  # that are to be scored, and by which models
        self._there = threading.Condition()
        self._jobs: dict[int, Job] = {}
        self._calls: set[Future[Any]] = set()  # that nobody has answered yet
        self._keys = count()
        self._ending = False
        self._failed: EngineFailed | None = None
        self.on_failure: Callable[[], None] = lambda: None  # called in the engine's thread
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="engine", daemon=True)
        self._ready: Future[None] = Future()

    def __enter__(self) -> Engine:
        """Open all models and compile what they need. Raises InputError, TransientError."""
        self._thread.start()
        self._ready.result()
        return self

    def __exit__(self, *_: object) -> None:
        """Let what is under way be finished. Raises EngineFailed where the thread has ended by itself."""
        self._ending = True
        self._wake()
        self._thread.join()
        if self._failed is not None:
            raise self._failed

    # --- what other threads call -----------------------------------------------------------------------------------

    def submit(self, job: Job) -> int:
        """Let a job join. Returns what names it. Raises Busy, EngineFailed, and InputError where it is too long."""
        self.models[job.model].stream.check(self._request(job))
        with self._there:
            if self._failed is not None:
                raise self._failed
            if self._ending or len(self._jobs) >= self.most:
                raise Busy
            job.key = next(self._keys)
            self._jobs[job.key] = job
            self._inbox.append(lambda: self._join(job))
            self._there.notify()
        return job.key

    def drop(self, key: int) -> None:
        """Give a job up; nothing if it is done."""
        with self._there:
            if (job := self._jobs.pop(key, None)) is not None:
                self._inbox.append(lambda: self._leave(job))
                self._there.notify()

    def tops(self, model: str, ids: list[int]) -> Future[Tops]:
        """The log-probs of a text's tokens, and the likeliest ones in their places. Texts that wait are computed together."""
        opened, made = self.models[model], Future[Tops]()
        with self._there:
            if self._failed is not None:
                raise self._failed
            self._calls.add(made)
            self._texts.append((opened, ids, made))
            self._there.notify()
        return made

    def open(self, name: str, spec: str, config: Config) -> Future[None]:
        """Open one more model. Its errors are those of opening."""

        def work() -> None:
            if name not in self.models:
                self.models[name] = self._open(name, spec, config)

        return self._call(work)

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def _call(self, do: Callable[[], T]) -> Future[T]:
        made: Future[T] = Future()

        def work() -> None:
            self._answer([made], lambda: [do()])

        with self._there:
            if self._failed is not None:
                raise self._failed
            self._calls.add(made)
            self._inbox.append(work)
            self._there.notify()
        return made

    def _wake(self) -> None:
        with self._there:
            self._there.notify()

    # --- in the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with devices(next(iter(self.configs.values()))[1]):
                try:
                    for name, (spec, config) in self.configs.items():
                        self.models[name] = self._open(name, spec, config)
                    self._ready.set_result(None)
                except BaseException as e:
                    self._ready.set_exception(e)
                    return
                while self._step():
                    pass
        except BaseException as e:
            with self._there:
                self._failed = EngineFailed(f"the model's computation failed: {type(e).__name__}: {e}")
                self._failed.__cause__ = e
                jobs, self._jobs = list(self._jobs.values()), {}
            for job in jobs:
                job.tell(self._failed)
            for call in self._calls:
                if call.set_running_or_notify_cancel():
                    call.set_exception(self._failed)
            self.on_failure()

    def _step(self) -> bool:
        """Take in who came, then let each model draw for a while. False when all is done and the engine ends."""
        with self._there:
            while not self._inbox and not self._texts and not any(m.stream.busy for m in self.models.values()):
                if self._ending:
                    return False
                self._there.wait()
            taken, self._inbox = self._inbox, deque()
            texts, self._texts = self._texts, []
        for work in taken:
            work()
        for opened in dict.fromkeys(opened for opened, *_ in texts):
            self._score(opened, [(ids, made) for other, ids, made in texts if other is opened])
        for opened in list(self.models.values()):
            if opened.stream.busy:
                opened.stream.advance()
            while opened.waiting and self._fits(opened, opened.waiting[0]):
                self._add(opened, opened.waiting.popleft())
        return True

    def _score(self, opened: Opened, texts: list[tuple[list[int], Future[Tops]]]) -> None:
        ids = [ids for ids, _ in texts]
        self._answer([made for _, made in texts], lambda: tops(opened.experiment.backbone, opened.adapter, ids))

    def _answer(self, calls: list[Future[T]], do: Callable[[], list[T]]) -> None:
        """Tell those who called what comes of it, or the error; but for those who have gone."""
        try:
            found: list[T] | Exception = do()
        except Exception as e:
            found = e
        for n, call in enumerate(calls):
            if call.set_running_or_notify_cancel():
                if isinstance(found, Exception):
                    call.set_exception(found)
                else:
                    call.set_result(found[n])
            self._calls.discard(call)

    def _open(self, name: str, spec: str, config: Config) -> Opened:
        experiment, adapter = self._opened(spec, config)
        c = experiment.config
        groups = batch_groups()
        generator = replace(experiment.generator, replies=-(-c.reply.batch // groups) * groups, lanes=0, slots=0, new=0)
        positions = experiment.backbone.arch.max_positions
        room = min(c.data.window, positions)
        new = min(c.reply.max_tokens, room - 1)
        chat = room - new
        if chat < 16:
            raise InputError(
                f"{spec}: data.window={c.data.window} leaves {chat} tokens for a conversation beside a reply of {new}; "
                "raise it, or lower reply.max_tokens"
            )
        longest = chat
        if self.thinks:
            x = lengths(experiment, chat)
            refining = x.refine + new + x.opening + x.reflection
            new = max(new, x.reflection, c.evolve.refinement.max_tokens)
            longest = min(chat + max(x.reflect + x.opening, refining), positions - new)
        stream = Stream(generator, adapter, Need(longest, 0, new), STEPS, self._drawn)
        opened = Opened(experiment, adapter, stream, min(chat, longest))
        job = Job(name, [experiment.tokenizer.end_of_turn] * 2, c.reply, 0, 2, lambda _: None)
        stream.add([self._request(job)._replace(key="warm")])
        while stream.busy:  # compiles what every request needs
            stream.advance()
        return opened

    def _opened(self, spec: str, config: Config) -> tuple[Experiment, Adapter]:
        """A model; on the backbone of one that is open, where it is the same."""
        for other in self.models.values():
            e = other.experiment
            if (e.config.model, e.config.lora, e.config.train) == (config.model, config.lora, config.train):
                say(f"{spec}: on the backbone that is open")
                return open_model(spec, config, e)
        return open_model(spec, config)

    def _request(self, job: Job) -> Request:
        state = START if job.form else 0
        return Request(job.key, job.prompt, job.seed, job.how, job.max_tokens, state, name=f"request {job.key}")

    def _join(self, job: Job) -> None:
        if job.key not in self._jobs:  # it left before it came
            return
        opened = self.models[job.model]
        if (job.form is None or not opened.waiting) and self._fits(opened, job):
            self._add(opened, job)
        else:  # also behind those that wait, so that nobody waits for ever
            opened.waiting.append(job)

    def _fits(self, opened: Opened, job: Job) -> bool:
        """Whether a job can be drawn beside those that obey what the model's lanes obey now."""
        return job.form is None or job.form.automaton is opened.form or not opened.stream.bound

    def _add(self, opened: Opened, job: Job) -> None:
        if job.form is not None and job.form.automaton is not opened.form:
            opened.form = job.form.automaton
            opened.stream.obey(padded(opened.form))
        opened.stream.add([self._request(job)])

    def _leave(self, job: Job) -> None:
        opened = self.models[job.model]
        if job in opened.waiting:
            opened.waiting.remove(job)
        opened.stream.drop(job.key)

    def _drawn(self, request: Request, drawn: Drawn) -> None:
        job: Job | None = self._jobs.get(request.key)
        if job is None:
            return
        if drawn.finish is not None:
            with self._there:
                self._jobs.pop(request.key, None)
        job.tell(drawn)


def names(specs: list[str]) -> dict[str, str]:
    """Models as the command line gives them, M or NAME=M, by name; an M alone is called as it is. Raises InputError."""
    out: dict[str, str] = {}
    for spec in specs:
        name, given, model = spec.partition("=")
        name, model = (name, model) if given and "/" not in name and ":" not in name else (spec, spec)
        if not name or not model:
            raise InputError(f"--model {spec}: give M, or NAME=M")
        if name in out:
            raise InputError(f"--model {spec}: the name {name} is given twice; give each model another one")
        out[name] = model
    return out
