"""How fast the real training steps are on this machine.

Weights are random, so that speed alone is measured and nothing is downloaded. Lengths are exact and nothing stops early.
Warm-up steps and compilation are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax import rows
from esjax.bench.workload import Ceilings, DpoWork, SftWork, Workload, lora_of, memory, parts, spread, tracing, traffic
from esjax.errors import InputError
from esjax.model.costs import training_flops
from esjax.model.decoder import Decoder, Execution
from esjax.model.families import Architecture
from esjax.model.linear import Lora
from esjax.plan.needed import Step, multiplied
from esjax.plan.needed import training as needed_by_training
from esjax.rows import Rows
from esjax.runtime import programs
from esjax.runtime.mesh import batch_groups
from esjax.settings.schema import DpoSettings, OptimSettings, SftSettings
from esjax.train.fitting import compile_fitting
from esjax.train.losses import Loss, Pairs, dpo_loss, sft_loss
from esjax.train.optim import optimiser
from esjax.train.step import Objective, make_step

TILE = 32  # tokens


class Job(NamedTuple):
    """One thing to measure: a training step and its batches."""

    task: str
    variant: str
    unit: str
    units: int  # pairs or tokens in a step
    loss: Loss
    settings: OptimSettings
    lora: Lora | None  # None trains all parameters
    batch: Callable[[np.random.Generator], tuple[Rows, Any]]
    layout: rows.Layout
    steps: int
    warmup: int
    dtype: jnp.dtype | None = None  # of the copy that is computed with, where all parameters are trained


def jobs(work: Workload, tasks: list[str], naive: bool) -> Iterator[Job]:
    """The jobs of the tasks; ``naive`` puts beside each preference step its unshared form, one row a sequence."""
    vocab = work.model["vocab_size"]

    def ids(rng: np.random.Generator, n: int) -> list[int]:
        return [int(i) for i in rng.integers(10, vocab, n)]

    for task in tasks:
        if task == "dpo":
            d = work.dpo

            def shared(rng: np.random.Generator, d: DpoWork = d) -> tuple[Rows, Pairs]:
                made = [
                    rows.prompt_with_replies(ids(rng, d.prompt), [ids(rng, d.response), ids(rng, d.response)])
                    for _ in range(d.pairs)
                ]
                return _stacked(made), _no_reference(d.pairs)

            def unshared(rng: np.random.Generator, d: DpoWork = d) -> tuple[Rows, Pairs]:
                made = []
                for _ in range(d.pairs):
                    prompt = ids(rng, d.prompt)
                    for _ in range(2):
                        made.append(rows.prompt_with_replies(prompt, [ids(rng, d.response)]))
                return _stacked(made), _no_reference(d.pairs)

            settings, lora = DpoSettings(learning_rate=1e-5), lora_of(d.lora_rank)
            loss = dpo_loss(settings)
            job = Job("dpo", "lora", "pairs/s", d.pairs, loss, settings, lora, shared, "branched", d.steps, d.warmup)
            yield job
            if naive:
                yield job._replace(variant="lora, unshared", loss=unshared_pairs(loss), batch=unshared, layout="causal")
        if task == "sft":
            s = work.sft

            def sequences(rng: np.random.Generator, s: SftWork = s) -> tuple[Rows, None]:
                weight = [1.0] * (s.length - 1) + [0.0]
                return rows.stack([rows.trunk(ids(rng, s.length), weight) for _ in range(s.batch)]), None

            for variant, lora_or_all in (("lora", lora_of(s.lora_rank)), ("full", None)):
                yield Job(
                    task="sft",
                    variant=variant,
                    unit="tokens/s",
                    units=s.batch * s.length,
                    loss=sft_loss,
                    settings=SftSettings(learning_rate=1e-5),
                    lora=lora_or_all,
                    batch=sequences,
                    layout="causal",
                    steps=s.steps,
                    warmup=s.warmup,
                    dtype=None if lora_or_all else jnp.dtype(work.dtype),
                )


def _stacked(made: list[Rows]) -> Rows:
    """Rows of one length as a batch; on a GPU filled up to whole tiles, as a run's rows are (their length is a setting)."""
    length = len(made[0].tokens)
    if jax.default_backend() == "gpu":
        length = -(-length // TILE) * TILE
    return rows.stack([rows.pack([row], length) for row in made])


def _no_reference(pairs: int) -> Pairs:
    return Pairs(np.zeros((pairs, 1, 1, 2), np.float32), np.ones((pairs, 1, 1), np.float32))


def unshared_pairs(loss: Loss) -> Loss:
    """The preference loss of one row a sequence: rows 2p and 2p + 1 are chosen and rejected of pair p, trunks only."""

    def on_trunks(logprobs: jax.Array, batch: Rows, extra: Pairs) -> Any:
        def joined(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // 2, -1)

        side = jnp.broadcast_to(1 + jnp.arange(batch.tokens.shape[0])[:, None] % 2, batch.tokens.shape)
        pairs = Rows(*(joined(x) for x in batch))._replace(branch=joined(side))
        return loss(joined(logprobs), pairs, extra)

    return on_trunks


def bench(
    work: Workload, job: Job, how: Execution, micro_rows: int | None, ceilings: Ceilings, trace: Path | None
) -> dict[str, Any]:
    """Measure one job: its figure with what it costs, and what part of the ceiling its FLOPs reach."""
    dtype, how = jnp.dtype(work.dtype), how._replace(layout=job.layout)
    rng = np.random.default_rng(0)
    example, extra = job.batch(rng)
    micro = micro_rows or example.tokens.shape[0]
    definition, make = parts(work.architecture, job.lora, dtype)
    trained, frozen = make()
    opt_state = build(definition, job, trained, example, micro, how)[1]
    made = compile_fitting(
        lambda form: build(definition, job, trained, example, micro, form)[0],
        how,
        (trained, opt_state, frozen, example, extra),
        programs.compile_named,
    )
    compiled, how = made.step, made.form

    took: list[float] = []
    for number in range(job.warmup + job.steps):
        batch = job.batch(rng)
        with tracing(trace, job.task, job.variant) if trace and number == job.warmup - 1 else nullcontext():
            started = time.perf_counter()
            trained, opt_state, metrics = jax.block_until_ready(compiled(trained, opt_state, frozen, *batch))
            took.append(time.perf_counter() - started)
    timed = took[job.warmup :]
    seconds = float(np.mean(timed))
    flops = training_flops(work.architecture, job.lora, example)
    counted = program_flops(work.architecture, job.lora, dtype, job.loss, how, (example, extra))
    rows_in_batch, length = example.tokens.shape
    sizes = Step(rows_in_batch, length, micro, job.lora, dtype.itemsize)
    needed = needed_by_training(work.architecture, sizes, multiplied(frozen, trained), trained, opt_state)
    return {
        "system": "esjax",
        "task": job.task,
        "figure": round(job.units / seconds, 2),
        "spread": spread(job.units, timed),
        "unit": job.unit,
        "variant": job.variant,
        **memory(compiled),
        "loss": round(float(metrics["loss"]), 4),
        "step_s": round(seconds, 4),
        "compile_s": round(made.seconds, 1),
        "tflop_formula": round(flops / 1e12, 4),
        "tflop_program": round(counted / 1e12, 4),
        **traffic(compiled, needed.bytes),
        "mfu": round(flops / seconds / ceilings.flops, 3),
        "attention": how.attention,
        "remat": how.remat,
        "micro_rows": micro,
    }


def build(
    definition: nnx.GraphDef[Decoder],
    job: Job,
    trained: nnx.State,
    example: Rows,
    micro_rows: int,
    how: Execution,
) -> tuple[Any, Any]:
    """The job's jitted step, and its optimiser state. Raises InputError when ``micro_rows`` does not divide the batch."""
    rows_in_batch = example.tokens.shape[0]
    check_micro_rows(job, rows_in_batch, micro_rows)
    share = micro_rows // batch_groups()
    targets = max(int((w != 0).sum()) for w in np.split(example.weight, rows_in_batch // share))
    tx = optimiser(job.settings, job.steps + job.warmup)
    step = make_step(Objective(definition, job.loss, targets, how, job.dtype), tx, micro_rows)
    return step, tx.init(trained)


def check_micro_rows(job: Job, rows_in_batch: int, micro_rows: int) -> None:
    """Raise InputError unless ``micro_rows`` divides the batch, and the devices divide it."""
    if micro_rows < 1 or rows_in_batch % micro_rows or micro_rows % batch_groups():
        raise InputError(
            f"--micro-rows {micro_rows}: it must divide the {rows_in_batch} rows of the {job.task} step and be a multiple "
            f"of the {batch_groups()} devices that a batch is split over"
        )


def program_flops(
    arch: Architecture, lora: Lora | None, dtype: jnp.dtype, loss: Loss, how: Execution, example: tuple[Rows, Any]
) -> float:
    """FLOPs of the products in a whole step on one batch, with padding and with what is recomputed.

    Attention counts as its dense form: every pair of a row's tokens, though a path may skip what nobody sees.
    """
    batch, extra = example
    definition, make = parts(arch, lora, dtype)
    trained, frozen = jax.eval_shape(make)
    targets, compute = int((batch.weight != 0).sum()), None if lora is not None else dtype
    tx = optimiser(SftSettings(), 2)
    objective = Objective(definition, loss, targets, how._replace(attention="dense"), compute)
    step: Any = make_step(objective, tx, batch.tokens.shape[0])
    return programs.products(step.trace(trained, jax.eval_shape(tx.init, trained), frozen, batch, extra).jaxpr.jaxpr)
