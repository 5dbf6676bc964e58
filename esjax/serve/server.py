"""What all routes share: who may ask, how much, and how replies are drawn for a request."""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import URL
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from esjax.errors import InputError
from esjax.safety.guard import Guard
from esjax.sample.constrain import LONGEST, Field, Template, compile_template
from esjax.sample.rowbook import row_seed
from esjax.sample.schema import schema_pattern
from esjax.serve.engine import Engine, Job, Opened
from esjax.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    Refused,
    event,
)
from esjax.serve.replies import Drawing, Late, Reply

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Limits:
    """What a client may ask of the server."""

    body: int = 1 << 20  # bytes
    seconds: float = 600.0  # of one request
    key: str | None = None  # that requests must bring
    hosts: tuple[str, ...] = LOOPBACK  # names that the server is asked by


class Server:
    """An engine, and what may be asked of it."""

    def __init__(self, engine: Engine, guard: Guard | None, limits: Limits) -> None:
        self.engine, self.guard, self.limits = engine, guard, limits
        self._forms = lru_cache(maxsize=32)(self._compiled)

    def check(self, request: Request) -> None:
        """Refuse pages from elsewhere, and who has no key. Raises Refused."""
        origin = request.headers.get("origin")
        if origin is not None and URL(origin).netloc != request.headers.get("host"):
            raise Refused(403, f"the origin {origin[:200]} is not this server's own page")
        if self.limits.key is not None:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.limits.key.encode()):
                raise Refused(401, "give the server's key as Authorization: Bearer KEY")

    def model(self, name: str) -> Opened:
        """A model by its name. Raises Refused."""
        if name not in self.engine.models:
            raise Refused(404, f"there is no model {name[:200]}; served are {', '.join(self.engine.models)}", "model")
        return self.engine.models[name]

    async def body(self, request: Request) -> bytes:
        """A request's body. Raises Refused where it is too large."""
        most, got = self.limits.body, bytearray()
        async for part in request.stream():
            got += part
            if len(got) > most:
                raise Refused(413, f"the body has more than {most} bytes")
        return bytes(got)

    async def jobs(
        self, asked: ChatRequest | CompletionRequest, opened: Opened, prompts: Sequence[list[int]], most: int | None
    ) -> tuple[list[Job], list[Reply]]:
        """``n`` replies to each prompt. Raises Refused."""
        settings, tokenizer = opened.experiment.config.reply, opened.experiment.tokenizer
        room = opened.stream.need
        new = room.new if most is None else most
        if prompts and not 1 <= new <= room.new:
            raise Refused(
                400, f"max_tokens {new}: 1 to {room.new}; start the server with a higher --reply.max_tokens for more"
            )
        given = {k: v for k in ("temperature", "top_p", "top_k") if (v := getattr(asked, k)) is not None}
        how = settings.model_copy(update=given)
        form = None
        if isinstance(asked, ChatRequest) and asked.response_format and asked.response_format.json_schema:
            schema = json.dumps(asked.response_format.json_schema.json_schema, sort_keys=False)
            form = await run_in_threadpool(self._forms, asked.model, schema, new)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        jobs, replies = [], []
        for p, prompt in enumerate(prompts):
            for k in range(asked.n):
                number = row_seed(seed, "serve", f"{p}/{k}")
                jobs.append(Job(asked.model, prompt, how, number, new, lambda _: None, form))
                replies.append(Reply(tokenizer, asked.stops))
        return jobs, replies

    def _compiled(self, model: str, schema: str, most: int) -> Template:
        """The constraint of a JSON schema. Raises Refused."""
        experiment = self.engine.models[model].experiment
        try:
            pattern = schema_pattern(schema, "response_format")
            field = Field(pattern, min(max(1, most - 1), LONGEST), min_tokens=0)
            return compile_template([field], experiment.tokenizer, experiment.backbone.arch.vocab)
        except InputError as e:
            raise Refused(400, str(e), "response_format") from e

    async def tops(self, model: str, prompt: list[int], reply: Reply, count: int) -> list[list[tuple[str, float]]]:
        """The likeliest tokens in the place of each of a reply's."""
        if not count:
            return [[] for _ in reply.token_ids]
        made = await asyncio.wrap_future(self.engine.tops(model, [*prompt, *reply.token_ids]))
        decode = reply.tokenizer.hf.decode
        rows = zip(made.ids[len(prompt) - 1 :, :count].tolist(), made.top[len(prompt) - 1 :].tolist(), strict=True)
        return [[(decode([i]), x) for i, x in zip(ids, top, strict=False)] for ids, top in rows]

    async def whole(self, request: Request, drawing: Drawing) -> None:
        """Wait for all replies. A client that leaves gives its lanes back."""

        async def all_of_them() -> None:
            async for _ in drawing.pieces():
                pass

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        async with drawing:
            work, leaving = asyncio.ensure_future(all_of_them()), asyncio.ensure_future(gone())
            try:
                await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise ClientDisconnect
                await work
            finally:
                work.cancel()
                leaving.cancel()

    async def streamed(self, drawing: Drawing, chunks: Callable[[], AsyncIterator[str]]) -> Response:
        """Send what comes as it comes. All jobs join before the status is sent, so that 429 can still be said."""
        await drawing.__aenter__()

        async def sent() -> AsyncIterator[str]:
            try:
                async for text in chunks():
                    yield text
            except Late:
                yield event(Refused(504, f"not done after {self.limits.seconds:g} s").body())
            except Exception as e:
                yield event(Refused(500, f"{type(e).__name__}: {e}").body())
            finally:
                await drawing.__aexit__()

        return StreamingResponse(sent(), media_type="text/event-stream", headers={"cache-control": "no-store"})
