"""The processes of a run: which of them writes, and how they wait for one another. No JAX here.

All processes compute the same thing in step; only the first writes and speaks. ``distributed.py`` makes the record of several;
alone, a process waits for nobody.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from esjax.errors import InputError, TransientError


class Board(Protocol):
    """What all processes of a run write on and read."""

    def post(self, key: str, value: str) -> None: ...
    def read(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class Processes:
    """Who this process is among those of the run."""

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda name: None  # until all processes are here
    share: Callable[[int], int] = lambda value: value  # the first process' value, below 2^31
    all: Callable[[bool], bool] = lambda value: value  # whether it holds in every process
    board: Board | None = None  # where there are several

    @property
    def writer(self) -> bool:
        """Whether this process writes the run directory and speaks."""
        return self.index == 0

    def same_in_all(self, value: object) -> bool:
        """Whether this process has the first process' value; every process asks."""
        number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big") >> 1
        return self.share(number) == number

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """What one process of the run refuses within, all do; else they would wait for it."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        if self.all(error is None):
            return
        passes = self.all(error is None or isinstance(error, TransientError))
        if error is not None:
            raise error
        if passes:
            raise TransientError("another process of this run met what may pass; see what it says")
        raise InputError("another process of this run has bad input; see what it says")


ALONE = Processes()
