"""Whether a run was asked to stop by SIGTERM, and the safe point at which all of its processes do. No JAX here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from esjax.errors import Stopped
from esjax.runtime.processes import ALONE, Board, Processes

POLL = 0.5  # seconds between two looks at the board


class Stop:
    """Whether this process or another was asked to stop, and where all processes do.

    Alone, SIGTERM counts from the next safe point on. Several processes pass the same safe points in the same order, and each
    counts them. Whoever is asked says so on the board; thereupon each process, in a thread of its own, writes there how many
    points it has passed, and its next one waits until all have written. All stop at the first point that nobody had passed.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.requested = False  # of this process, by SIGTERM
        self.handled = False  # the main thread knows, too
        self.depth = 0  # of work within work that SIGTERM does not interrupt
        self.passed = 0
        self.promised: int | None = None  # safe points passed when it became known that somebody was asked
        self.point: int | None = None  # where all stop
        self.ended: tuple[int, int] | None = None  # the first process that ended before its time, and its exit code
        self._changed = threading.Condition()

    @property
    def known(self) -> bool:
        """Whether this process knows that somebody was asked."""
        return self.requested or self.promised is not None

    @contextmanager
    def deferred(self) -> Iterator[Callable[[], bool]]:
        """Within, SIGTERM interrupts nothing; the function yielded says at safe points whether to stop there, in every process.

        Work within such work never stops by itself: what it belongs to has more to save. Raises Stopped at the end of the
        outermost where somebody was asked meanwhile.
        """
        self.depth += 1
        try:
            yield lambda: self.depth == 1 and self.here()
        finally:
            self.depth -= 1
        if self.known and not self.depth:
            raise Stopped

    def here(self) -> bool:
        """Whether to stop at this safe point; every process asks, in step."""
        if self.processes.board is None:
            return self.requested
        with self._changed:
            while self.promised is not None and self.point is None:
                self._changed.wait(POLL)
            if self.point is not None and self.passed >= self.point:
                return True
            self.passed += 1
            return False

    def look(self, board: Board) -> None:
        """Write on the board what this process knows, and take from it what others do."""
        notes, index = board.read(), self.processes.index
        gone = [(int(key.partition("/")[2]), int(code)) for key, code in notes.items() if key.startswith("end/")]
        self.ended = min((g for g in gone if g[0] != index), key=lambda g: g[1] == 143, default=None)
        if not self.requested and "stop" not in notes:
            return
        if "stop" not in notes:
            board.post("stop", str(index))
        with self._changed:
            if self.promised is None:
                self.promised = self.passed
        board.post(f"at/{index}", str(self.promised))
        points = [int(value) for key, value in board.read().items() if key.startswith("at/")]
        if len(points) == self.processes.count:
            with self._changed:
                self.point = max(points)
                self._changed.notify_all()
