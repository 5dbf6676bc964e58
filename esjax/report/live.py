"""The report of a run that goes on: a page on this machine alone, which asks for what is new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from esjax.errors import InputError
from esjax.report.gather import state
from esjax.report.page import content, html, named
from esjax.run.listen import listen
from esjax.run.progress import say

HOST, PORT = "127.0.0.1", 8642
NOTHING_NEW, NOT_NOW = 204, 503


def serve(runs: Sequence[str], port: int | None = None) -> None:
    """Serve the page on loopback until the process is stopped. Raises InputError for what is no run, or a port that is taken."""
    paths = named(runs)
    content(paths)  # said now, not to a browser
    listening = listen(HOST, port, PORT)
    say(f"http://{HOST}:{listening.getsockname()[1]}/ shows {', '.join(paths)}; Ctrl-C ends it")
    uvicorn.Server(uvicorn.Config(app(paths), log_level="warning")).run(sockets=[listening])


def app(runs: dict[str, Path]) -> Starlette:
    """The page and what it asks for. Other names than loopback's are refused, so that no foreign page reads it by one."""

    def page(_: Request) -> Response:
        try:
            return HTMLResponse(html(runs, live=True))
        except (InputError, OSError) as e:  # a file that is being replaced: the next time it is whole
            return Response(str(e), NOT_NOW)

    def data(request: Request) -> Response:
        try:
            if request.query_params.get("state") == state(runs.values()):
                return Response(status_code=NOTHING_NEW)
            return JSONResponse(content(runs))
        except (InputError, OSError) as e:
            return Response(str(e), NOT_NOW)

    routes = [Route("/", page), Route("/data", data)]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])
