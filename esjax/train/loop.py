"""The training loop of both phases: a fixed schedule of steps, resumable at every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from esjax.config import OptimSettings
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone
from esjax.rows import Rows
from esjax.runlog import Metrics, RunError, progress, say
from esjax.tokens.batches import Row, batch, schedule
from esjax.train.checkpoint import Checkpoints
from esjax.train.losses import Loss, Pairs
from esjax.train.optim import learning_rate, optimiser
from esjax.train.step import make_step


@dataclass(frozen=True)
class Phase:
    """What to train on, and how.

    ``reference`` holds, for DPO, the log-probs of chosen and rejected under M_t: one array [pairs, 2] an example.
    ``validate`` returns a validation loss; ``check_first`` raises RunError when the first step's metrics are wrong.
    """

    name: str
    folder: Path
    board: Path
    settings: OptimSettings
    examples: Sequence[Rows]
    loss: Loss
    seed: int
    remat: bool
    reference: Sequence[np.ndarray] | None = None
    validate: Callable[[Adapter], float] | None = None
    validate_every: int = 0
    check_first: Callable[[dict[str, float]], None] | None = None


def train(phase: Phase, backbone: Backbone, adapter: Adapter) -> Adapter:
    """Run a phase from ``adapter``, or from its newest checkpoint; returns the trained adapter.

    Raises InputError when an example does not fit a row, RunError when the loss is not finite or the first step is wrong.
    """
    s = phase.settings
    lengths = [len(e.tokens) for e in phase.examples]
    steps = schedule(lengths, s.row_length, s.batch_rows, s.epochs, phase.seed)
    tx = optimiser(s, len(steps))
    step_fn = make_step(
        backbone.definition, phase.loss, tx, s.micro_rows, _most_targets(phase.examples, steps, s), phase.remat
    )
    rate = learning_rate(s, len(steps))
    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates its adapter, and the caller may need his own
    opt_state = tx.init(adapter)
    checkpoints = Checkpoints(phase.folder / "checkpoint")
    done = checkpoints.latest() or 0
    if done:
        adapter, opt_state = checkpoints.restore(done, (adapter, opt_state))
        say(f"  {phase.name}: continuing after step {done} of {len(steps)}")
    metrics = Metrics(phase.folder / "metrics.jsonl", phase.board)
    metrics.rewind(done)
    most = max(len(r) for step in steps for r in step)
    with progress(f"{phase.name} steps", len(steps), done) as advance:
        for number in range(done, len(steps)):
            rows = batch(phase.examples, steps[number], s.row_length, s.batch_rows)
            extra = None if phase.reference is None else _pairs(phase.reference, steps[number], s.batch_rows, most)
            adapter, opt_state, computed = step_fn(adapter, opt_state, backbone.base, rows, extra)
            values = {k: float(v) for k, v in computed.items()}
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                raise RunError(
                    f"{phase.name}, step {number + 1}: the loss is {values['loss']}; lower {phase.name}.learning_rate"
                )
            if number == 0 and phase.check_first is not None:
                phase.check_first(values)
            last = number + 1 == len(steps)
            if phase.validate is not None and (last or (number + 1) % phase.validate_every == 0):
                values["valid_loss"] = phase.validate(adapter)
            metrics.log(number + 1, learning_rate=float(rate(number)), **values)
            if last or (number + 1) % s.checkpoint_every == 0:
                checkpoints.save(number + 1, (adapter, opt_state))
            advance(1)
    checkpoints.close()
    metrics.close()
    return adapter


def _most_targets(examples: Sequence[Rows], steps: list[list[Row]], s: OptimSettings) -> int:
    """The most target tokens that any micro-batch holds: a static bound for the head."""
    count = [int((e.weight != 0).sum()) for e in examples]
    if min(count) == 0:
        raise AssertionError(f"example {count.index(0)} has no target token")
    micros = [step[i : i + s.micro_rows] for step in steps for i in range(0, len(step), s.micro_rows)]
    return max(sum(count[i] for r in micro for i in r) for micro in micros)


def _pairs(reference: Sequence[np.ndarray], step: list[Row], batch_rows: int, segments: int) -> Pairs:
    pairs = max(len(r) for r in reference)
    values = np.zeros((batch_rows, segments, pairs, 2), np.float32)
    valid = np.zeros((batch_rows, segments, pairs), bool)
    for b, packed in enumerate(step):
        for s, i in enumerate(packed):
            values[b, s, : len(reference[i])] = reference[i]
            valid[b, s, : len(reference[i])] = True
    return Pairs(values, valid)
