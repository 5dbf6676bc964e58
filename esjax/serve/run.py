"""``esjax serve`` and ``esjax chat``: open the models, then answer until somebody ends it."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from esjax.errors import InputError
from esjax.evolve.models import model_settings, run_model
from esjax.run.listen import listen
from esjax.run.progress import say
from esjax.safety.guard import Guard
from esjax.serve.app import app
from esjax.serve.engine import Engine, names
from esjax.serve.server import LOOPBACK, Limits, Server
from esjax.serve.terminal import Terminal
from esjax.serve.web import routes
from esjax.settings.files import Overrides, read_whole
from esjax.settings.schema import Config

PORT = 8641
GRACE = 30  # seconds that requests which are under way have to end when the server is stopped


def serve(args: argparse.Namespace, given: Overrides) -> None:
    """Serve until the process is stopped. Raises InputError before anything is loaded, TransientError for a network."""
    configs = {name: (spec, model_settings(spec, given)) for name, spec in names(args.model).items()}
    first = next(iter(configs.values()))[1]
    for name, (_, config) in configs.items():
        if config.mesh != first.mesh:
            raise InputError(
                f"--model {name}: its mesh differs from the first model's; give --mesh.data and the like for all"
            )
    limits, guard = limits_of(args), guard_of(args, first)
    listening = listen(args.host, args.port, PORT)
    with Engine(configs, args.max_waiting) as engine:
        host, port = listening.getsockname()[:2]
        say(f"http://{host}:{port}/v1 serves {', '.join(configs)}; Ctrl-C ends it")
        answer(app(Server(engine, guard, limits)), listening, engine)


def chat(args: argparse.Namespace, given: Overrides) -> None:
    """Talk with one model, in the terminal or on a page. Raises as ``serve``."""
    config = model_settings(args.model, given)
    guard, listening = guard_of(args, config), None
    if args.web:
        listening = listen("127.0.0.1", args.port, PORT)
    elif args.port is not None:
        raise InputError("--port: only --web makes use of it; leave it out")
    name = args.model.rpartition("/" if run_model(args.model) is None else ":")[2]
    with Engine({name: (args.model, config)}, most=16, thinks=True) as engine:
        if listening is None:
            Terminal(engine, name, guard, given).run()
        else:
            say(f"http://127.0.0.1:{listening.getsockname()[1]}/ talks as {name}; Ctrl-C ends it")
            server = Server(engine, guard, Limits())
            answer(app(server, *routes(server, given)), listening, engine)


def guard_of(args: argparse.Namespace, config: Config) -> Guard | None:
    """The guard that the options ask for. Raises InputError."""
    return None if args.guard == "off" else Guard(config.screen.crisis_patterns, args.locale)


def answer(application: Starlette, listening: socket.socket, engine: Engine) -> None:
    """Answer whoever comes, until the process is stopped or the engine fails."""
    how = uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=GRACE, lifespan="off")
    server = uvicorn.Server(how)

    def end() -> None:
        server.should_exit = True

    engine.on_failure = end
    server.run(sockets=[listening])


def limits_of(args: argparse.Namespace) -> Limits:
    """What clients may ask. Raises InputError where the server would be open to all."""
    key = None
    if args.api_key_file is not None:
        key = read_whole(Path(args.api_key_file), "a file with the key").strip()
        if len(key) < 16 or not key.isascii():
            raise InputError(
                f"--api-key-file {args.api_key_file}: the key has {len(key)} characters; 16 or more of ASCII are needed"
            )
    local = args.host in ("127.0.0.1", "localhost", "::1")
    if not local and not (args.allow_remote and key):
        raise InputError(
            f"--host {args.host}: others could reach it; give --allow-remote and --api-key-file FILE, or leave --host out"
        )
    if args.max_waiting < 1:
        raise InputError(f"--max-waiting {args.max_waiting}: 1 or more")
    if not args.timeout > 0:
        raise InputError(f"--timeout {args.timeout}: a number of seconds above 0")
    return Limits(seconds=args.timeout, key=key, hosts=LOOPBACK if local else ("*",))
