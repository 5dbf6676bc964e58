"""The training loop of both phases: a fixed schedule of steps, resumable at every checkpoint.

The host never waits for the step it has just started: a step's metrics are read after the next one is under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from esjax.errors import RunError, Stopped
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone
from esjax.rows import Rows, check, layout, stack
from esjax.run import buckets
from esjax.run.metrics import Metrics
from esjax.run.progress import progress, say
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, build_batch, rows_at_once
from esjax.settings.schema import OptimSettings
from esjax.tokens.batches import Packed, batch, beside, fill_rate, schedule
from esjax.train.checkpoint import Checkpoints
from esjax.train.fitting import compile_fitting
from esjax.train.keep import Best
from esjax.train.losses import Loss, Pairs
from esjax.train.optim import init_optimiser, learning_rate, optimiser
from esjax.train.step import Objective, Step, make_step


class Replay(NamedTuple):
    """Other examples, trunks with targets, of which every step of DPO holds some rows."""

    examples: Sequence[Rows]
    rows: int  # of a step's batch_rows
    weight: float  # of their mean negative log-likelihood, beside the pairs' mean loss


@dataclass(frozen=True)
class Phase:
    """What to train on, and how.

    ``reference`` holds, for DPO, one array [pairs, 3] an example: the log-probs of chosen and rejected under the reference, and
    each pair's weight.
    ``validate`` returns metrics of held-out data, and ``best`` keeps what was trained when one of them was best; ``watch`` is
    told every step's number (from 0), how many there are, and its metrics, and raises RunError when they are wrong.
    """

    name: str
    folder: Path
    board: Path
    settings: OptimSettings
    examples: Sequence[Rows]
    loss: Loss
    seed: int
    reference: Sequence[np.ndarray] | None = None
    validate: Callable[[Adapter], dict[str, float]] | None = None
    validate_every: int = 0
    watch: Callable[[int, int, dict[str, float]], None] | None = None
    replay: Replay | None = None
    dropout: float = 0.0  # of what an adapter reads; only without ``reference``
    best: Best | None = None
    wandb: str | None = None  # a project that gets the metrics, too


def train(phase: Phase, backbone: Backbone, adapter: Adapter) -> Adapter:
    """Run a phase from ``adapter``, or from its newest checkpoint; returns the trained adapter.

    Raises InputError when an example does not fit a row, RunError when the loss is not finite or the first step is wrong.
    """
    s = phase.settings
    micro_rows = rows_at_once(phase.name, s)
    rows_a_step = max(s.batch_rows, micro_rows)
    if rows_a_step > s.batch_rows:
        say(
            f"  {phase.name}: {s.batch_rows} rows a step leave {rows_a_step - s.batch_rows} of {rows_a_step} devices idle"
        )
    examples, steps = planned(phase)
    for example in examples:
        check(stack([example]))
    lengths = [len(e.tokens) for e in examples]
    full = fill_rate(lengths, steps, s.row_length)
    say(f"  {phase.name}: {len(lengths)} examples in {sum(map(len, steps))} rows of {s.epochs} epochs, {full:.1%} full")
    most = max(len(r) for step in steps for r in step)
    execution = backbone.execution._replace(layout=layout(examples, packed=most > 1))
    tx = optimiser(s, len(steps))
    targets = _most_targets(examples, steps, micro_rows)
    objective = Objective(backbone.definition, phase.loss, targets, execution, backbone.trained_dtype, phase.dropout)
    adapter = jax.tree.map(jnp.copy, adapter)  # the step donates its adapter, and the caller may need his own
    opt_state = init_optimiser(tx, adapter)
    checkpoints = Checkpoints(buckets.checkpoints(phase.folder / "checkpoint"), s.checkpoints_kept)
    done, (adapter, opt_state) = checkpoints.restore((adapter, opt_state))
    if phase.best is not None:
        phase.best.rewind(done)
    if done:
        say(f"  {phase.name}: continuing after step {done} of {len(steps)}")

    def feed(number: int) -> tuple[Rows, Any]:
        """The batch of a step, built while the devices compute the step before it."""

        def build(which: range) -> tuple[Rows, Any]:
            rows = batch(examples, steps[number], s.row_length, which)
            if phase.replay is not None:  # a batch of pairs has no targets on trunks but those of replay
                scale = _replay_scale(phase, examples, steps[number])
                rows = rows._replace(weight=np.where(rows.branch == 0, rows.weight * scale, rows.weight))
            if phase.dropout > 0:
                return rows, dropout_keys(phase.seed, number, which)
            return rows, None if phase.reference is None else _pairs(phase.reference, steps[number], which, most)

        return build_batch(rows_a_step, build)

    if done < len(steps):
        arguments = (adapter, opt_state, backbone.base, *feed(done))
        compiled = compile_step(phase.name, objective, lambda made: make_step(made, tx, micro_rows), arguments)
        del arguments
    log = StepLog(phase, learning_rate(s, len(steps)), done, len(steps))
    label = f"{phase.name} steps"
    with closing(log.metrics), progress(label, len(steps), done) as advance, current().stop.deferred() as stops:
        for number in range(done, len(steps)):
            adapter, opt_state, computed = compiled(adapter, opt_state, backbone.base, *feed(number))
            log.finish()  # the step before
            log.start(number, computed)
            last = number + 1 == len(steps)
            if phase.validate is not None and (last or (number + 1) % phase.validate_every == 0):
                values = phase.validate(adapter)
                log.add(**values)
                if phase.best is not None:
                    phase.best.offer(number + 1, values, adapter)
            stop = stops()
            if last or stop or (number + 1) % s.checkpoint_every == 0:
                log.finish()  # nothing broken is kept
                log.metrics.keep()
                checkpoints.save(number + 1, (adapter, opt_state))
            advance(1)
            if stop:
                checkpoints.close()
                say(f"  {phase.name}: stopped by SIGTERM; step {number + 1} of {len(steps)} is saved")
                raise Stopped
        checkpoints.close()
    return adapter if phase.best is None else phase.best.taken()


def planned(phase: Phase) -> tuple[list[Rows], list[list[Packed]]]:
    """All examples of a phase, those of replay last, and the steps that hold them."""
    s, own, replay = phase.settings, list(phase.examples), phase.replay
    count = 0 if replay is None else replay.rows
    steps = schedule([len(e.tokens) for e in own], s.row_length, s.batch_rows - count, s.epochs, phase.seed)
    if replay is None:
        return own, steps
    lengths = [len(e.tokens) for e in replay.examples]
    return [*own, *replay.examples], beside(steps, lengths, s.row_length, count, len(own), phase.seed)


def dropout_keys(seed: int, step: int, rows: range) -> np.ndarray:
    """uint32 [rows, 2]: what is dropped in each of a step's rows, however the rows lie on devices."""
    return np.stack([np.random.SeedSequence((seed, step, row)).generate_state(2) for row in rows])


def _replay_scale(phase: Phase, examples: Sequence[Rows], step: list[Packed]) -> np.float32:
    """What the weights of a step's replay are multiplied by.

    A step's sum is divided by its number of pairs. So scaled, replay adds its weight times its own mean.
    """
    if phase.replay is None or phase.reference is None:
        raise AssertionError("replay stands beside pairs")
    numbers, own = [i for row in step for i in row], len(phase.examples)
    pairs = sum(len(phase.reference[i]) for i in numbers if i < own)
    targets = sum(float(examples[i].weight.sum()) for i in numbers if i >= own)
    return np.float32(phase.replay.weight * pairs / targets)


def compile_step(
    name: str, objective: Objective, make: Callable[[Objective], Step], arguments: tuple[Any, ...]
) -> Step:
    """Compile ahead of the first step, so that its time is not taken for the step's, and say what it came to."""
    made = compile_fitting(
        lambda form: make(objective._replace(execution=form)),
        objective.execution,
        arguments,
        lambda lowered: lowered.compile(),
    )
    memory = made.step.memory_analysis()
    room = "" if memory is None else f"; it works in {memory.temp_size_in_bytes / 2**20:.0f} MiB beside its arguments"
    chosen = f", with model.remat={made.form.remat}" if objective.execution.remat == "auto" else ""
    say(f"  {name}: the step compiled in {made.seconds:.1f} s{chosen}{room}")
    return cast(Step, made.step)


class StepLog:
    """Metrics of the newest step, read and written down when the next one has started."""

    def __init__(self, phase: Phase, rate: Callable[[int], Any], done: int, steps: int) -> None:
        self.phase, self.rate, self.steps = phase, rate, steps
        self.metrics = Metrics(phase.folder / "metrics.jsonl", phase.board, phase.wandb)
        self.metrics.rewind(done)
        self.pending: tuple[int, dict[str, Any]] | None = None

    def start(self, number: int, computed: dict[str, jax.Array]) -> None:
        """A step is under way; its metrics are not looked at yet."""
        self.pending = number, dict(computed)

    def add(self, **values: float) -> None:
        """Put more values beside those of the step under way."""
        if self.pending is not None:
            self.pending[1].update(values)

    def finish(self) -> None:
        """Wait for the step under way. Raises RunError when its loss is not finite, or the first step is wrong."""
        if self.pending is None:
            return
        (number, computed), self.pending = self.pending, None
        values = {k: float(v) for k, v in computed.items()}
        if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
            name = self.phase.name
            raise RunError(f"{name}, step {number + 1}: the loss is {values['loss']}; lower {name}.learning_rate")
        if self.phase.watch is not None:
            self.phase.watch(number, self.steps, values)
        self.metrics.log(number + 1, learning_rate=float(self.rate(number)), **values)


def _most_targets(examples: Sequence[Rows], steps: list[list[Packed]], micro_rows: int) -> int:
    """The most target tokens that one device's rows of any micro-batch hold: a static bound for the head."""
    count = [int((e.weight != 0).sum()) for e in examples]
    share = micro_rows // batch_groups()
    parts = [step[i : i + share] for step in steps for i in range(0, len(step), share)]
    return max(sum(count[i] for r in part for i in r) for part in parts)


def _pairs(reference: Sequence[np.ndarray], step: list[Packed], which: range, segments: int) -> Pairs:
    pairs = max(len(r) for r in reference)
    values = np.zeros((len(which), segments, pairs, 2), np.float32)
    weight = np.zeros((len(which), segments, pairs), np.float32)
    for b, r in enumerate(which):
        for s, i in enumerate(step[r] if r < len(step) else ()):
            if i < len(reference):  # what lies behind is replay
                values[b, s, : len(reference[i])] = reference[i][:, :2]
                weight[b, s, : len(reference[i])] = reference[i][:, 2]
    return Pairs(values, weight)
