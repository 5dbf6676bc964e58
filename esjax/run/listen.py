"""A place to listen on, taken before anything is loaded."""

from __future__ import annotations

import socket

from esjax.errors import InputError


def listen(host: str, port: int | None, default: int) -> socket.socket:
    """A socket. Raises InputError where the port is taken, or is none, or the host is not this machine's."""
    wanted = default if port is None else port
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, wanted))
    except (OSError, OverflowError) as e:
        listening.close()
        raise InputError(f"--port {wanted} of {host}: cannot be listened on ({e}); give another one") from e
    return listening
