"""The numbers of a training phase, step by step: a JSON Lines file, and TensorBoard's."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from tensorboardX import SummaryWriter

from esjax.run import buckets
from esjax.run.files import publish_jsonl
from esjax.run.jsonl import json_line
from esjax.runtime.context import current


class Metrics:
    """One phase's ``metrics.jsonl`` (a function of the run alone: no clock in it) and its TensorBoard scalars.

    On resume, ``rewind(step)`` drops what was logged after the restored checkpoint.
    """

    def __init__(self, path: Path, tensorboard: Path) -> None:
        self.path, self.tensorboard = path, tensorboard
        self.board = SummaryWriter(str(tensorboard)) if current().processes.writer else None

    def rewind(self, step: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        rows = []
        for line in lines:  # a kill or a power cut may have left anything at the end
            with suppress(ValueError, TypeError, LookupError):
                row = json.loads(line)
                if line.endswith(b"\n") and row["step"] <= step:
                    rows.append(row)
        publish_jsonl(self.path, rows)

    def log(self, step: int, **values: float) -> None:
        if self.board is None:
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json_line({"step": step, **values}))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def keep(self) -> None:
        """What was logged so far outlives this machine, as a checkpoint that follows will."""
        if self.board is not None:
            self.board.flush()
            self._send()

    def _send(self) -> None:
        buckets.keep(self.path, now=True)
        buckets.keep(self.tensorboard, now=True)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
            self._send()
