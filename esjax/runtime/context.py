"""The one runtime of this process: who the processes are, whether to stop, what to tidy up, what was compiled. No JAX here.

A command opens it; without one (from Python) it is a process alone, which nobody stops.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from esjax.errors import Stopped
from esjax.runtime.processes import ALONE, Processes
from esjax.runtime.stop import POLL, Stop

STUCK = 2.0  # seconds that a thread inside a library may take to notice a signal or another process' end
SAVING = 15.0  # the same where there is something to save
STOPPED = 143, "stopped by SIGTERM; the same command continues"


class Runtime:
    """What a command runs in."""

    def __init__(self) -> None:
        self.processes: Processes = ALONE
        self.stop = Stop()
        self.at_exit: list[Callable[[], object]] = []  # to be tidied up also where ``leave`` ends the process
        self.joining = False  # other processes: the libraries' threads may hold up the interpreter's end
        self.compiled: Counter[str] = Counter()  # programs by name, and the seconds of all
        self.compile_seconds = 0.0

    def join(self, processes: Processes) -> None:
        """From now on this process is one of several."""
        self.processes = self.stop.processes = processes

    def ended_elsewhere(self) -> tuple[int, str] | None:
        """The exit code and the line of this process if another one ended first; asked when something here has failed."""
        end = time.monotonic() + STUCK
        while self.processes.board is not None and self.stop.ended is None and time.monotonic() < end:
            time.sleep(0.05)
        return self._followed()

    def _followed(self) -> tuple[int, str] | None:
        if self.stop.ended is None:
            return None
        index, code = self.stop.ended
        if code == STOPPED[0]:
            return STOPPED
        return code, f"error: process {index} of this run ended with exit code {code}; see what it says"

    def leave(self, code: int, line: str) -> NoReturn:
        """End this process now, with one line; of several, tell the others, who end as well. From any thread."""
        with suppress(OSError):
            sys.stdout.flush()
            os.write(2, f"esjax: {line}\n".encode())
        for tidy in self.at_exit:
            with suppress(Exception):
                tidy()
        board = self.processes.board
        if board is not None:
            with suppress(Exception):
                board.post(f"end/{self.processes.index}", str(code))
                # The first process carries the board: it goes last, or the runtime of the others would end them with a dump.
                end = time.monotonic() + SAVING + 2 * STUCK
                while self.processes.writer and time.monotonic() < end:
                    if sum(key.startswith("end/") for key in board.read()) == self.processes.count:
                        time.sleep(0.2)
                        break
                    time.sleep(0.05)
        os._exit(code)

    def watch(self, reader: int) -> None:
        """Follow signals, written to a pipe until it is closed, and the board; end the process where its main thread cannot.

        That may be inside a library, waiting for a compiler or another process, where no handler of ours runs.
        """
        stop, since = self.stop, dict[str, float]()

        def lasts(name: str, holds: bool, seconds: float) -> bool:
            """Whether something has held for so long."""
            if not holds:
                since.pop(name, None)
                return False
            return time.monotonic() - since.setdefault(name, time.monotonic()) > seconds

        while True:
            pause = 0.05 if stop.known and stop.point is None else POLL
            if select.select([reader], [], [], pause)[0]:
                signals = os.read(reader, 512)
                if not signals:
                    return os.close(reader)
                stop.requested |= signal.SIGTERM in signals
            if self.processes.board is not None:
                with suppress(Exception):  # of a network, or because the processes are parting
                    stop.look(self.processes.board)
            if lasts("requested", stop.requested and not stop.handled and not stop.depth, STUCK):
                self.leave(*STOPPED)
            followed = self._followed()
            if lasts("ended", followed is not None, SAVING if stop.depth or stop.known else STUCK) and followed:
                self.leave(*followed)


_current = Runtime()


def current() -> Runtime:
    """The runtime of this process."""
    return _current


@contextmanager
def open_runtime() -> Iterator[Runtime]:
    """Within, ``current()`` is a new runtime, and SIGTERM stops it: at a safe point where work is deferred, at once elsewhere."""
    global _current
    before, runtime = _current, Runtime()

    def handle(number: int, frame: Any) -> None:
        runtime.stop.requested = runtime.stop.handled = True
        if not runtime.stop.depth:
            raise Stopped

    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    handler, wakeup = signal.signal(signal.SIGTERM, handle), signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=runtime.watch, args=(reader,), daemon=True).start()
    _current = runtime
    try:
        yield runtime
    finally:
        _current = before
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, handler)
        os.close(writer)
