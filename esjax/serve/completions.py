"""POST /v1/completions: plain text or tokens go on; with echo, the log-probs of what was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from esjax.serve.engine import Opened
from esjax.serve.protocol import CompletionRequest, Refused, event, head, parsed, text_logprobs, usage
from esjax.serve.replies import Drawing, Reply
from esjax.serve.server import Server


async def completions(server: Server, request: Request) -> Response:
    """POST /v1/completions."""
    asked = parsed(CompletionRequest, await server.body(request))
    opened = server.model(asked.model)
    prompts = [await run_in_threadpool(tokens_of, opened, prompt) for prompt in asked.prompts]
    wanted = 16 if asked.max_tokens is None else asked.max_tokens
    jobs, replies = await server.jobs(asked, opened, prompts if wanted else [], wanted)
    drawing = Drawing(server.engine, jobs, replies, server.limits.seconds)
    if asked.stream:
        return await server.streamed(drawing, lambda: _chunks(asked, drawing, sum(map(len, prompts))))
    if jobs:
        await server.whole(request, drawing)

    async def choice(n: int) -> dict[str, Any]:
        prompt = prompts[n // asked.n]
        reply = replies[n] if replies else Reply(opened.experiment.tokenizer, [], finish="length")
        text = (opened.experiment.tokenizer.hf.decode(prompt) if asked.echo else "") + reply.text
        logprobs = None
        if asked.logprobs is not None:
            logprobs = await _logprobs(server, asked, opened, prompt, reply)
        return {"index": n, "text": text, "logprobs": logprobs, "finish_reason": reply.finish}

    choices = await asyncio.gather(*map(choice, range(len(prompts) * asked.n)))
    spent = usage(sum(map(len, prompts)), sum(len(r.token_ids) for r in replies))
    return JSONResponse(head("text_completion", asked.model) | {"choices": choices, "usage": spent})


async def _chunks(asked: CompletionRequest, drawing: Drawing, prompt: int) -> AsyncIterator[str]:
    first = head("text_completion", asked.model)
    async for n, text in drawing.pieces():
        finish = drawing.replies[n].finish
        if text or finish:
            made = {"index": n, "text": text, "logprobs": None, "finish_reason": finish}
            yield event(first | {"choices": [made]})
    if asked.stream_options and asked.stream_options.include_usage:
        spent = usage(prompt, sum(len(r.token_ids) for r in drawing.replies))
        yield event(first | {"choices": [], "usage": spent})
    yield "data: [DONE]\n\n"


async def _logprobs(
    server: Server, asked: CompletionRequest, opened: Opened, prompt: list[int], reply: Reply
) -> dict[str, Any]:
    """Of the reply's tokens, with echo of the prompt's before them; the first token of a text has none."""
    decode = opened.experiment.tokenizer.hf.decode
    ids = [*prompt, *reply.token_ids] if asked.echo else reply.token_ids
    values: list[float | None] = list(reply.logprobs)
    likeliest: list[dict[str, float] | None] = [None] * len(ids)
    if (asked.echo and len(prompt) > 1) or asked.logprobs:
        made = await asyncio.wrap_future(server.engine.tops(asked.model, [*prompt, *reply.token_ids]))
        start = 0 if asked.echo else len(prompt)
        if asked.echo:
            values = [None, *made.logprobs[: len(prompt) - 1].tolist(), *values]
        if asked.logprobs:
            found = zip(made.ids[:, : asked.logprobs].tolist(), made.top.tolist(), strict=True)
            every = [None, *({decode([i]): x for i, x in zip(row, top, strict=False)} for row, top in found)]
            likeliest = every[start:]
    elif asked.echo:
        values = [*[None] * len(prompt), *values]
    return text_logprobs([decode([i]) for i in ids], values, likeliest)


def tokens_of(opened: Opened, prompt: str | list[int]) -> list[int]:
    """A plain prompt's tokens, as transformers makes them; control tokens' names in it are text. Raises Refused."""
    vocab = opened.experiment.backbone.arch.vocab
    text = isinstance(prompt, str)
    ids = list(opened.experiment.tokenizer.hf(prompt, split_special_tokens=True).input_ids if text else prompt)
    if not ids:
        raise Refused(400, "prompt: empty; a model continues something", "prompt")
    if len(ids) > (most := opened.experiment.backbone.arch.max_positions):
        raise Refused(400, f"prompt: {len(ids)} tokens exceed the model's {most} positions", "prompt")
    if max(ids) >= vocab:
        raise Refused(400, f"prompt: the token {max(ids)} is not among the model's {vocab}", "prompt")
    return ids
