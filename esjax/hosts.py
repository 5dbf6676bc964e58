"""The processes of a run: which of them writes, how they wait for one another, and how SIGTERM stops them. No JAX here.

All processes compute the same thing in step; only the first writes and speaks. ``distributed.py`` fills this in where there
are several; alone, a process waits for nobody.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from esjax.errors import InputError, Stopped


@dataclass
class Hosts:
    """Who this process is among those of the run."""

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda name: None  # until all processes are here
    share: Callable[[int], int] = lambda value: value  # the first process' value, below 2^31
    all: Callable[[bool], bool] = lambda value: value  # whether it holds in every process
    told: Callable[[], bool] | None = None  # whether all processes stop at this point; every process asks in step

    @property
    def writer(self) -> bool:
        """Whether this process writes the run directory and speaks."""
        return self.index == 0


hosts = Hosts()
_signalled = False
_deferred = 0


def watch() -> None:
    """Handle SIGTERM in a process that is alone: at a safe point where work is ``deferred``, at once elsewhere."""

    def handle(number: int, frame: Any) -> None:
        global _signalled
        _signalled = True
        if not _deferred:
            raise Stopped

    signal.signal(signal.SIGTERM, handle)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM interrupts nothing; the function yielded says at safe points whether to stop there, in every process.

    Work within such work never stops by itself: what it belongs to has more to save.
    """
    global _deferred

    def stops() -> bool:
        return _deferred == 1 and (_signalled if hosts.told is None else hosts.told())

    _deferred += 1
    try:
        yield stops
    finally:
        _deferred -= 1


@contextmanager
def together() -> Iterator[None]:
    """What one process of the run refuses, all do; else they would wait for it."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    fine = hosts.all(error is None)
    if error is not None:
        raise error
    if not fine:
        raise InputError("another process of this run has bad input; see what it says")


def alike(value: object) -> bool:
    """Whether this process has the first process' value; every process asks."""
    number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big") >> 1
    return hosts.share(number) == number
