"""The server's routes: models, chat completions, completions, as OpenAI's protocol has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from esjax.errors import InputError
from esjax.serve.chat import chat
from esjax.serve.completions import completions
from esjax.serve.engine import Busy, EngineFailed
from esjax.serve.protocol import Refused
from esjax.serve.replies import Late
from esjax.serve.server import Server

Work = Callable[[Server, Request], Awaitable[Response]]


def app(server: Server, *more: Route) -> Starlette:
    """The application; ``more`` routes are those of a page that talks with it."""
    routes = [
        Route("/v1/models", answered(server, models)),
        Route("/v1/models/{name:path}", answered(server, models)),
        Route("/v1/chat/completions", answered(server, chat), methods=["POST"]),
        Route("/v1/completions", answered(server, completions), methods=["POST"]),
        Route("/health", answered(server, health)),
        *more,
    ]
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=list(server.limits.hosts), www_redirect=False)
    return Starlette(routes=routes, middleware=[] if "*" in server.limits.hosts else [hosts])


def answered(server: Server, work: Work) -> Callable[[Request], Awaitable[Response]]:
    """A route whose errors are one line of JSON."""

    async def route(request: Request) -> Response:
        try:
            server.check(request)
            return await work(server, request)
        except Refused as e:
            return JSONResponse(e.body(), e.status)
        except InputError as e:
            return JSONResponse(Refused(400, str(e)).body(), 400)
        except Busy:
            busy = Refused(429, f"{server.engine.waiting} replies are wanted already; try again later")
            return JSONResponse(busy.body(), 429, headers={"retry-after": "1"})
        except Late:
            return JSONResponse(Refused(504, f"not done after {server.limits.seconds:g} s").body(), 504)
        except EngineFailed as e:
            return JSONResponse(Refused(500, str(e)).body(), 500)
        except ClientDisconnect:
            return Response(status_code=499)

    return route


async def health(server: Server, _: Request) -> Response:
    """Whether the server answers, and how many replies are wanted of it."""
    return JSONResponse({"status": "ok", "replies": server.engine.waiting})


async def models(server: Server, request: Request) -> Response:
    """The list of models, or one of them."""
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "esjax"} for name in server.engine.models]
    name = request.path_params.get("name")
    if name is None:
        return JSONResponse({"object": "list", "data": listed})
    server.model(name)
    return JSONResponse(next(m for m in listed if m["id"] == name))
