"""POST /v1/chat/completions, behind the guard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from esjax.safety.guard import Held, Watch
from esjax.serve.engine import Opened
from esjax.serve.protocol import ChatRequest, chat_logprobs, event, head, parsed, usage
from esjax.serve.replies import Drawing
from esjax.serve.server import Server

GUARDED = "content_filter"  # how OpenAI's protocol says that another text stands in a reply's place


async def chat(server: Server, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await answer(server, request, parsed(ChatRequest, await server.body(request)))


async def answer(server: Server, request: Request, asked: ChatRequest) -> Response:
    """Answer a chat, whole or streamed, unless the guard does."""
    opened = server.model(asked.model)
    chat = asked.chat
    said = [m["content"] for m in chat if m["role"] == "user"]
    if server.guard and (held := server.guard.before(said)):
        return _held(asked, held)
    prompt = await run_in_threadpool(prompt_of, opened, chat)
    jobs, replies = await server.jobs(asked, opened, [prompt], asked.most)
    drawing = Drawing(server.engine, jobs, replies, server.limits.seconds)
    if asked.stream:
        watches = [Watch(server.guard, said) for _ in replies]
        return await server.streamed(drawing, lambda: _chunks(asked, drawing, watches, len(prompt)))
    await server.whole(request, drawing)
    count = (asked.top_logprobs or 0) if asked.logprobs else 0
    tops = await asyncio.gather(*(server.tops(asked.model, prompt, reply, count) for reply in replies))
    choices = []
    for n, reply in enumerate(replies):
        text, finish, held = reply.text, reply.finish, server.guard.after(reply.text, said) if server.guard else None
        if held is not None:
            text, finish = held.text, GUARDED  # type: ignore[assignment]
        choice = {
            "index": n,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": finish,
        }
        choice["logprobs"] = None
        if asked.logprobs and held is None:
            choice["logprobs"] = chat_logprobs(reply.pieces, reply.logprobs, tops[n])
        choices.append(choice | guarded(held))
    spent = usage(len(prompt), sum(len(r.token_ids) for r in replies))
    return JSONResponse(head("chat.completion", asked.model) | {"choices": choices, "usage": spent})


def _held(asked: ChatRequest, held: Held) -> Response:
    """The guard's answer, in the form that was asked for."""
    if asked.stream:

        async def chunks() -> AsyncIterator[str]:
            first = head("chat.completion.chunk", asked.model)
            for n in range(asked.n):
                yield chunk(first, n, {"role": "assistant", "content": held.text}, None)
                yield event(first | {"choices": [{"index": n, "delta": {}, "finish_reason": GUARDED} | guarded(held)]})
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")
    message = {"role": "assistant", "content": held.text, "refusal": None}
    choices = [
        {"index": n, "message": message, "finish_reason": GUARDED, "logprobs": None} | guarded(held)
        for n in range(asked.n)
    ]
    return JSONResponse(head("chat.completion", asked.model) | {"choices": choices, "usage": usage(0, 0)})


async def _chunks(asked: ChatRequest, drawing: Drawing, watches: list[Watch], prompt: int) -> AsyncIterator[str]:
    first, told = head("chat.completion.chunk", asked.model), [0] * len(drawing.replies)
    for n in range(len(drawing.replies)):
        yield chunk(first, n, {"role": "assistant", "content": ""}, None)
    async for n, _ in drawing.pieces():
        reply, watch = drawing.replies[n], watches[n]
        text = watch.take(reply.text, reply.finish is not None)
        if (held := watch.held) is not None:
            drawing.give_up(n)
            yield chunk(first, n, {"content": "\n\n" * bool(watch.shown) + held.text}, None)
            yield event(first | {"choices": [{"index": n, "delta": {}, "finish_reason": GUARDED} | guarded(held)]})
            continue
        logprobs = None
        if asked.logprobs:
            start, told[n] = told[n], len(reply.token_ids)
            new = slice(start, told[n])
            logprobs = chat_logprobs(reply.pieces[new], reply.logprobs[new], [[]] * (told[n] - start))
        if text or logprobs:
            yield chunk(first, n, {"content": text}, None, logprobs)
        if reply.finish is not None:
            yield chunk(first, n, {}, reply.finish)
    if asked.stream_options and asked.stream_options.include_usage:
        spent = usage(prompt, sum(len(r.token_ids) for r in drawing.replies))
        yield event(first | {"choices": [], "usage": spent})
    yield "data: [DONE]\n\n"


def prompt_of(opened: Opened, chat: list[Any]) -> list[int]:
    """A chat's tokens, with the model's own system message where it has none. Raises InputError."""
    return opened.experiment.tokenizer.prompt(opened.experiment.encoder.with_system(chat))


def guarded(held: Held | None) -> dict[str, Any]:
    """What a choice says of the guard, beside OpenAI's protocol."""
    if held is None:
        return {}
    return {"guard": {"side": held.side, "tier": held.signal.tier, "kind": held.signal.kind}}


def chunk(first: dict[str, Any], n: int, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> str:
    """One piece of a streamed chat."""
    made = {"index": n, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return event(first | {"choices": [made]})
