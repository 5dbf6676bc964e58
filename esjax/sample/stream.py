"""Sampling that goes on for as long as requests come: they join those that are being drawn, and may be given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

from esjax.errors import InputError
from esjax.model.lora import Adapter
from esjax.sample.constrain import Constraint
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Group, Request
from esjax.sample.schedule import Completion, Scheduler
from esjax.sample.shapes import Need


class Drawn(NamedTuple):
    """What a request has got since the last time."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"] | None  # None: there is more to come


class Stream:
    """One model's lanes, open for requests at any time.

    ``tell`` is called with a request and what it got, each time that the host looks; requests whose keys are equal must not be
    there at once.
    """

    def __init__(
        self, generator: Generator, adapter: Adapter, need: Need, steps: int, tell: Callable[[Request, Drawn], None]
    ) -> None:
        """``need``: the longest prompt and reply that will be asked for; ``steps``: tokens of a lane between two looks."""
        self.generator, self.need, self._tell = generator, need, tell
        self._told: dict[object, int] = {}  # by key: tokens that were told of; these requests are here
        self._bound: set[object] = set()  # keys of those that obey a constraint
        shapes = generator.reserve(need)
        self._scheduler = Scheduler(generator.task(adapter, self._ended, True), shapes, [], steps)

    @property
    def busy(self) -> bool:
        return bool(self._told)

    @property
    def bound(self) -> bool:
        """Whether requests are here that obey the constraint, so that it must stay."""
        return bool(self._bound)

    def obey(self, constraint: Constraint) -> None:
        """Let requests that come from now on obey this one. None that obeys another may be here."""
        if self.bound:
            raise ValueError("requests that obey another constraint are still here")
        self.generator.obey(constraint)
        self._scheduler.task = replace(self._scheduler.task, constraint=self.generator.constraint)

    def check(self, request: Request) -> None:
        """Raise InputError where a request is longer than what there is room for."""
        if len(request.prompt) > self.need.longest or request.max_tokens > self.need.new:
            raise InputError(
                f"a prompt of {len(request.prompt)} tokens with {request.max_tokens} new ones: there is room for "
                f"{self.need.longest} and {self.need.new}"
            )

    def add(self, requests: list[Request]) -> None:
        """Let requests join whose prompts begin alike. Raises InputError, see ``check``."""
        for request in requests:
            self.check(request)
            self._told[request.key] = 0
            if request.state:
                self._bound.add(request.key)
        self._scheduler.backlog.append([Group.of(requests)])

    def drop(self, key: object) -> None:
        """Give a request up, if it is here."""
        if key in self._told:
            self._scheduler.drop(key)
            self._forget(key)

    def advance(self) -> None:
        """Draw for a while, and tell what was drawn."""
        self._scheduler = self._scheduler.advance() or self._scheduler
        for book in self._scheduler.books:
            for placed in book.running.values():
                key, seen = placed.request.key, self._told[placed.request.key]
                if len(placed.tokens) > seen:
                    self._told[key] = len(placed.tokens)
                    self._tell(placed.request, Drawn(placed.tokens[seen:], placed.logprobs[seen:], None))

    def _ended(self, request: Request, made: Completion) -> tuple[()]:
        seen = self._told[request.key]
        self._forget(request.key)
        self._tell(request, Drawn(made.token_ids[seen:], made.logprobs[seen:], made.finish))
        return ()

    def _forget(self, key: object) -> None:
        del self._told[key]
        self._bound.discard(key)
