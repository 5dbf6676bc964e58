"""One reply on its way: the engine's tokens become text, cut at stop sequences, never in the middle of a character."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from esjax.sample.stream import Drawn
from esjax.serve.engine import Engine, Job
from esjax.tokens.tokenizer import ChatTokenizer

HALF = "\ufffd"  # what an incomplete character is decoded as


class Late(Exception):
    """A reply took longer than it may."""


@dataclass
class Reply:
    """A reply as far as it has come."""

    tokenizer: ChatTokenizer
    stops: Sequence[str]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""  # what may be shown: no part of it will be taken back
    finish: Literal["stop", "length"] | None = None

    def take(self, drawn: Drawn) -> str:
        """Add tokens. Returns the text that came with them."""
        for number, token in enumerate(drawn.token_ids):
            self.token_ids.append(token)
            self.logprobs.append(drawn.logprobs[number])
            if self.stops and self._stopped():
                return self._upto(self.text_at_stop)
        self.finish = drawn.finish
        whole = self.tokenizer.decode(self.token_ids)
        if self.finish is None:
            whole = whole[: len(whole) - self._held(whole)]
        return self._upto(whole)

    def _stopped(self) -> bool:
        whole = self.tokenizer.decode(self.token_ids)
        found = [at for stop in self.stops if (at := whole.find(stop)) >= 0]
        if found:
            self.finish, self.text_at_stop = "stop", whole[: min(found)]
        return bool(found)

    def _upto(self, whole: str) -> str:
        if not whole.startswith(self.text):  # a tokenizer whose later tokens change earlier text
            return ""
        added = whole[len(self.text) :]
        self.text = whole
        return added

    def _held(self, whole: str) -> int:
        """How much of the end may still change: half a character, or what may become a stop sequence."""
        held = len(whole) - len(whole.rstrip(HALF))
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(whole)), held, -1):
                if whole.endswith(stop[:size]):
                    held = size
                    break
        return held

    @property
    def pieces(self) -> list[str]:
        """Each token's text."""
        return [self.tokenizer.hf.decode([i]) for i in self.token_ids]


class Drawing:
    """Replies that the engine is drawing for one request, all given up when the block ends, however it ends."""

    def __init__(self, engine: Engine, jobs: Sequence[Job], replies: Sequence[Reply], seconds: float) -> None:
        self.engine, self.jobs, self.replies, self.seconds = engine, jobs, replies, seconds
        self._said: asyncio.Queue[tuple[int, Drawn | Exception]] = asyncio.Queue()
        self._keys: list[int] = []
        self._left = set(range(len(jobs)))

    def _heard(self, loop: asyncio.AbstractEventLoop, number: int, drawn: Drawn | Exception) -> None:
        """In the engine's thread; a loop that has ended hears nothing more."""
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._said.put_nowait, (number, drawn))

    def give_up(self, number: int) -> None:
        """Let one reply end where it is."""
        self._left.discard(number)
        self.engine.drop(self._keys[number])

    async def __aenter__(self) -> Drawing:
        """Let all jobs join. Raises Busy or InputError, and then none does."""
        loop = asyncio.get_running_loop()
        try:
            for number, job in enumerate(self.jobs):
                job.tell = partial(self._heard, loop, number)
                self._keys.append(self.engine.submit(job))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for key in self._keys:
            self.engine.drop(key)

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Which reply goes on, and with what text. Raises Late, and what the engine failed with."""
        try:
            async with asyncio.timeout(self.seconds):
                while self._left:
                    number, drawn = await self._said.get()
                    if isinstance(drawn, Exception):
                        raise drawn
                    if number not in self._left:
                        continue
                    reply = self.replies[number]
                    added = reply.take(drawn)
                    if reply.finish is not None:
                        self.give_up(number)
                    yield number, added
        except TimeoutError as e:
            raise Late from e
