"""Windows of prompts that wait to be computed, each on the device that has their row, and which are computed together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from esjax.model.cache import Chunk
from esjax.sample.shapes import Shapes

FILLED = 0.75  # of a call's windows at least, where nothing is urgent


class Prefills:
    """A queue for each device that shares the batch.

    A call computes as many windows on each of them, so devices would wait for the one that has most to do; what is not
    urgent waits until the others have something, too.
    """

    def __init__(self, devices: int, shapes: Shapes) -> None:
        self.shapes = shapes
        self.queues: list[deque[Chunk]] = [deque() for _ in range(devices)]
        self.done = [0] * devices  # windows computed so far

    def __bool__(self) -> bool:
        return any(self.queues)

    def add(self, device: int, chunks: Sequence[Chunk]) -> int:
        """Queue windows. Returns how many of this device's will have been computed when these are."""
        self.queues[device] += chunks
        return self.done[device] + len(self.queues[device])

    def next(self, urgent: Callable[[], bool]) -> Chunk | None:
        """What a call is to compute now, in the order in which it was queued; None where it is not worth one."""
        longest = max(map(len, self.queues))
        size = self.shapes.windows if longest > self.shapes.few else self.shapes.few
        taken = [min(len(queue), size) for queue in self.queues]
        if not longest or not (sum(taken) >= FILLED * size * len(self.queues) or urgent()):
            return None
        self.done = [n + more for n, more in zip(self.done, taken, strict=True)]
        return stack_windows(
            [[queue.popleft() for _ in range(n)] for queue, n in zip(self.queues, taken, strict=True)], size
        )


def stack_windows(chunks: Sequence[Sequence[Chunk]], count: int) -> Chunk:
    """Each device's chunks of one row each as one chunk of ``count`` rows a device, filled up with some that write nothing."""
    first = next(c for device in chunks for c in device)
    empty = first._replace(valid=np.zeros_like(first.valid))
    filled = [c for device in chunks for c in [*device, *[empty] * (count - len(device))]]
    return Chunk(*(np.stack(x) for x in zip(*filled, strict=True)))
