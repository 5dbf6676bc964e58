"""``esjax serve``: opens the models, then answers until it is stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import uvicorn

from esjax.errors import InputError
from esjax.evolve.models import model_settings
from esjax.run.listen import listen
from esjax.run.progress import say
from esjax.safety.guard import Guard
from esjax.serve.app import app
from esjax.serve.engine import Engine, names
from esjax.serve.server import LOOPBACK, Limits, Server
from esjax.settings.files import Overrides, read_whole

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
    limits = limits_of(args)
    guard = None if args.guard == "off" else Guard(first.screen.crisis_patterns, args.locale)
    listening = listen(args.host, args.port, PORT)
    with Engine(configs, args.max_waiting) as engine:
        host, port = listening.getsockname()[:2]
        say(f"http://{host}:{port}/v1 serves {', '.join(configs)}; Ctrl-C ends it")
        how = uvicorn.Config(
            app(Server(engine, guard, limits)), log_level="warning", timeout_graceful_shutdown=GRACE, lifespan="off"
        )
        uvicorn.Server(how).run(sockets=[listening])


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
