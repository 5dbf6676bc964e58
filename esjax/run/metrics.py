"""The numbers of a training phase, step by step: a JSON Lines file, and TensorBoard's."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from esjax.errors import InputError, TransientError
from esjax.run import buckets
from esjax.run.files import publish_jsonl
from esjax.run.jsonl import json_line
from esjax.runtime.context import current


class Metrics:
    """One phase's ``metrics.jsonl`` (a function of the run alone: no clock in it) and its TensorBoard scalars.

    On resume, ``rewind(step)`` drops what was logged after the restored checkpoint.
    """

    def __init__(self, path: Path, tensorboard: Path, wandb: str | None = None) -> None:
        """``wandb``: a project of Weights & Biases; a phase that goes on is the same run there. Raises TransientError."""
        self.path, self.tensorboard = path, tensorboard
        self.board = SummaryWriter(str(tensorboard)) if current().processes.writer else None
        self.tracked = None if self.board is None or wandb is None else _tracked(wandb, path.parent)

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
        if self.tracked is not None:
            self.tracked.log(values, step=step)

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
        if self.tracked is not None:
            self.tracked.finish()


def check_tracked(project: str | None) -> None:
    """Raise InputError where Weights & Biases is asked for and not installed."""
    if project is not None and find_spec("wandb") is None:
        raise InputError(
            f"train.wandb={project}: needs esjax's wandb extra (pip install 'esjax[wandb]'); or set it to null"
        )


def _tracked(project: str, phase: Path) -> Any:
    """A phase's run at Weights & Biases, begun or taken up again. Raises TransientError."""
    import wandb

    run, name = phase.parent.resolve(), phase.name
    if name == "dpo" and run.name.startswith("round"):
        run, name = run.parent, f"{run.name}-dpo"
    known = hashlib.sha256(f"{run}/{name}".encode()).hexdigest()[:16]
    try:
        return wandb.init(project=project, group=run.name, name=f"{run.name}/{name}", id=known, resume="allow")
    except wandb.Error as e:
        raise TransientError(f"train.wandb={project}: {' '.join(str(e).split())}; run the same command again") from e
