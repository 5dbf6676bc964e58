"""The processes of a run: which of them writes, how they wait for one another, and how SIGTERM stops them. No JAX here.

All processes compute the same thing in step; only the first writes and speaks. ``distributed.py`` fills this in where there
are several; alone, a process waits for nobody.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


class Stopped(Exception):
    """SIGTERM came (a preemption): what was done is saved, and the same command continues. The command exits with code 143."""


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
    """Within, SIGTERM interrupts nothing; the function yielded says at safe points whether to stop there, in every process."""
    global _deferred

    def stops() -> bool:
        return _signalled if hosts.told is None else hosts.told()

    _deferred += 1
    try:
        yield stops
    finally:
        _deferred -= 1
