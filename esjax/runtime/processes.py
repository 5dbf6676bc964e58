"""The processes of a run: which of them writes, how they wait for one another, and how SIGTERM stops them. No JAX here.

All processes compute the same thing in step; only the first writes and speaks. ``distributed.py`` fills this in where there
are several; alone, a process waits for nobody. The one owner of "has somebody been told to stop" is ``Stop``.
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from esjax.errors import InputError, Stopped, TransientError

STUCK = 2.0  # seconds that a thread inside a library may take to notice a signal or another process' end
SAVING = 15.0  # the same where there is something to save
LOOK = 0.5  # seconds between two looks at the board


class Board(Protocol):
    """What all processes of a run write on and read."""

    def post(self, key: str, value: str) -> None: ...
    def read(self) -> dict[str, str]: ...


@dataclass
class Hosts:
    """Who this process is among those of the run."""

    index: int = 0
    count: int = 1
    wait: Callable[[str], None] = lambda name: None  # until all processes are here
    share: Callable[[int], int] = lambda value: value  # the first process' value, below 2^31
    all: Callable[[bool], bool] = lambda value: value  # whether it holds in every process
    board: Board | None = None  # where there are several
    joined: bool = False  # or are to be: the runtime's threads may hold up the interpreter's end

    @property
    def writer(self) -> bool:
        """Whether this process writes the run directory and speaks."""
        return self.index == 0


class Stop:
    """Whether somebody was told to stop, and where all processes do.

    Alone, SIGTERM counts from the next safe point on. Several processes pass the same safe points in the same order, and each
    counts them. Whoever is told says so on the board; thereupon each process, in a thread of its own, writes there how many
    points it has passed, and its next one waits until all have written. All stop at the first point that nobody had passed.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.told = False  # this process, by SIGTERM
        self.handled = False  # the main thread knows, too
        self.depth = 0  # of work within work that SIGTERM does not interrupt
        self.passed = 0
        self.promised: int | None = None  # safe points passed when somebody had been told
        self.point: int | None = None  # where all stop
        self.ended: tuple[int, int] | None = None  # the first process that ended before its time, and its exit code
        self._changed = threading.Condition()

    def here(self) -> bool:
        """Whether to stop at this safe point; every process asks, in step."""
        if self.hosts.board is None:
            return self.told
        with self._changed:
            while self.promised is not None and self.point is None:
                self._changed.wait(LOOK)
            if self.point is not None and self.passed >= self.point:
                return True
            self.passed += 1
            return False

    @property
    def known(self) -> bool:
        """Whether this process knows that somebody was told."""
        return self.told or self.promised is not None

    def look(self, board: Board) -> None:
        """Write on the board what this process knows, and take from it what others do."""
        notes = board.read()
        gone = [(int(key.partition("/")[2]), int(code)) for key, code in notes.items() if key.startswith("end/")]
        self.ended = min((g for g in gone if g[0] != self.hosts.index), key=lambda g: g[1] == 143, default=None)
        if not self.told and "stop" not in notes:
            return
        if "stop" not in notes:
            board.post("stop", str(self.hosts.index))
        with self._changed:
            if self.promised is None:
                self.promised = self.passed
        board.post(f"at/{self.hosts.index}", str(self.promised))
        points = [int(value) for key, value in board.read().items() if key.startswith("at/")]
        if len(points) == self.hosts.count:
            with self._changed:
                self.point = max(points)
                self._changed.notify_all()


hosts = Hosts()
stop = Stop(hosts)
goodbyes: list[Callable[[], object]] = []  # what must be tidied up also where the interpreter does not end by itself
_wakeup: int | None = None


def watch() -> None:
    """Handle SIGTERM: at a safe point where work is ``deferred``, at once elsewhere.

    A thread watches, too: the main thread may be inside a library, waiting for a compiler or another process, where no handler
    of ours runs; then the thread ends the process.
    """
    global _wakeup

    def handle(number: int, frame: Any) -> None:
        stop.told = stop.handled = True
        if not stop.depth:
            raise Stopped

    signal.signal(signal.SIGTERM, handle)
    if _wakeup is None:
        reader, _wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)


def _watch(reader: int) -> None:
    since: dict[str, float] = {}

    def lasts(name: str, holds: bool, seconds: float) -> bool:
        """Whether something has held for so long."""
        if not holds:
            since.pop(name, None)
            return False
        return time.monotonic() - since.setdefault(name, time.monotonic()) > seconds

    while True:
        pause = 0.05 if stop.known and stop.point is None else LOOK
        if select.select([reader], [], [], pause)[0] and signal.SIGTERM in os.read(reader, 512):
            stop.told = True
        if hosts.board is not None:
            with suppress(Exception):  # of a network, or because the processes are parting
                stop.look(hosts.board)
        if lasts("told", stop.told and not stop.handled and not stop.depth, STUCK):
            leave(143, "stopped by SIGTERM; the same command continues")
        followed = _followed(stop.ended)
        if lasts("ended", followed is not None, SAVING if stop.depth or stop.known else STUCK) and followed:
            leave(*followed)


def elsewhere() -> tuple[int, str] | None:
    """The exit code and the line of this process if another one ended first; asked when something here has failed."""
    end = time.monotonic() + STUCK
    while hosts.board is not None and stop.ended is None and time.monotonic() < end:
        time.sleep(0.05)
    return _followed(stop.ended)


def _followed(ended: tuple[int, int] | None) -> tuple[int, str] | None:
    if ended is None:
        return None
    index, code = ended
    if code == 143:
        return code, "stopped by SIGTERM; the same command continues"
    return code, f"error: process {index} of this run ended with exit code {code}; see what it says"


def leave(code: int, line: str) -> NoReturn:
    """End this process now, with one line; of several, tell the others, who end as well. From any thread."""
    with suppress(OSError):
        sys.stdout.flush()
        os.write(2, f"esjax: {line}\n".encode())
    for goodbye in goodbyes:
        with suppress(Exception):
            goodbye()
    board = hosts.board
    if board is not None:
        with suppress(Exception):
            board.post(f"end/{hosts.index}", str(code))
            # The first process carries the board: it goes last, or the runtime of the others would end them with a dump.
            end = time.monotonic() + SAVING + 2 * STUCK
            while hosts.writer and time.monotonic() < end:
                if sum(key.startswith("end/") for key in board.read()) == hosts.count:
                    time.sleep(0.2)
                    break
                time.sleep(0.05)
    os._exit(code)


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM interrupts nothing; the function yielded says at safe points whether to stop there, in every process.

    Work within such work never stops by itself: what it belongs to has more to save. Raises Stopped at the end of the
    outermost where somebody was told meanwhile.
    """
    stop.depth += 1
    try:
        yield lambda: stop.depth == 1 and stop.here()
    finally:
        stop.depth -= 1
    if stop.known and not stop.depth:
        raise Stopped


@contextmanager
def together() -> Iterator[None]:
    """What one process of the run refuses, all do; else they would wait for it."""
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    if hosts.all(error is None):
        return
    passes = hosts.all(error is None or isinstance(error, TransientError))
    if error is not None:
        raise error
    if passes:
        raise TransientError("another process of this run met what may pass; see what it says")
    raise InputError("another process of this run has bad input; see what it says")


def alike(value: object) -> bool:
    """Whether this process has the first process' value; every process asks."""
    number = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:4], "big") >> 1
    return hosts.share(number) == number
