"""``esjax chat --web``: the same conversation as a small page, over the server's own routes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from esjax.corpus.dialogue import Message
from esjax.serve.app import answered
from esjax.serve.chat import answer
from esjax.serve.protocol import ChatRequest, Refused, parsed
from esjax.serve.server import Server
from esjax.serve.talk import NOTICE, SIGN, check_asked, fitted, infer, open_also, said, why
from esjax.settings.files import Overrides

PAGE = Path(__file__).parent / "page"


class _Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: str = Field(pattern="user|assistant")
    content: str


class Asked(BaseModel):
    """What the page asks of a conversation that ends with the user's message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    messages: list[_Said] = Field(min_length=1)
    seed: int = Field(ge=0, lt=1 << 32)
    draft: str = ""

    @property
    def chat(self) -> list[Message]:
        return [Message(role=m.role, content=m.content) for m in self.messages]


def routes(server: Server, given: Overrides) -> list[Route]:
    """The page, and what it asks for. ``given``: settings of models that are opened to compare with."""

    async def page(server: Server, _: Request) -> Response:
        template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
            (PAGE / "chat.html").read_text(encoding="utf-8")
        )
        parts = {name: (PAGE / f"chat.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
        trusted = {name: jinja2.utils.markupsafe.Markup(text) for name, text in parts.items()}
        models = list(server.engine.models)
        return HTMLResponse(template.render(notice=NOTICE, sign=SIGN, models=models, **trusted))

    async def turn(server: Server, request: Request) -> Response:
        """The next reply, streamed as chat completions are; what no longer fits of the conversation is left out."""
        asked = parsed(Asked, await server.body(request))
        fit = await run_in_threadpool(fitted, server.model(asked.model), asked.chat)
        body: dict[str, Any] = {"model": asked.model, "messages": fit.chat, "stream": True, "seed": asked.seed}
        response = await answer(server, request, parsed(ChatRequest, json.dumps(body).encode()))
        response.headers["x-cut-messages"] = str(fit.cut)
        return response

    async def inferred(server: Server, request: Request) -> Response:
        asked = parsed(Asked, await server.body(request))
        server.model(asked.model)
        check_asked(server.guard, asked.chat)
        return JSONResponse(await run_in_threadpool(infer, server.engine, asked.model, asked.chat, asked.seed))

    async def behind(server: Server, request: Request) -> Response:
        asked = parsed(Asked, await server.body(request))
        server.model(asked.model)
        check_asked(server.guard, asked.chat)
        made = await run_in_threadpool(why, server.engine, asked.model, asked.chat, asked.draft, asked.seed)
        if server.guard and (held := server.guard.after(made.refinement, said(asked.chat))):
            made = made._replace(refinement=held.text)
        return JSONResponse(made._asdict())

    async def opened(server: Server, request: Request) -> Response:
        """Open m0, m1, ... of the first model's run, and nothing else: what a page may name is no path."""
        name = request.path_params["name"]
        if not (name[:1] == "m" and name[1:].isdigit()):
            raise Refused(400, f"{name[:50]}: give m0, m1, ... of this model's run")
        await run_in_threadpool(open_also, server.engine, name, given)
        return JSONResponse({"models": list(server.engine.models)})

    made = {"/chat/turn": turn, "/chat/infer": inferred, "/chat/why": behind, "/chat/open/{name}": opened}
    posts = [Route(path, answered(server, work), methods=["POST"]) for path, work in made.items()]
    return [Route("/", answered(server, page)), *posts]
