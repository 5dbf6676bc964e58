"""One optimiser step as one program: micro-batches scanned, gradients accumulated exactly, the weights updated in place.

What is trained is a part of the model's state: the adapter, or (in ``esjax bench``) all parameters. The rest is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from esjax.model.decoder import Decoder, Execution, token_logprobs
from esjax.model.dropout import Dropout
from esjax.model.weights import bind
from esjax.rows import Rows
from esjax.runtime.mesh import constrain
from esjax.runtime.programs import program
from esjax.train.losses import Loss, Totals

Trained = nnx.State  # float32: an Adapter, or all parameters
Step = Callable[[Trained, Any, nnx.State, Rows, Any], tuple[Trained, Any, dict[str, Array]]]


class Objective(NamedTuple):
    """What a step computes and differentiates. Static."""

    definition: nnx.GraphDef[Decoder]
    loss: Loss
    targets: int  # at least the target tokens of a micro-batch on one device
    execution: Execution
    dtype: jnp.dtype | None = (
        None  # of a copy of the trained parameters that is computed with; an adapter's layers make theirs
    )
    dropout: float = 0.0  # of what an adapter reads; above 0, a batch's extra data are its rows' keys, uint32 [B, 2]


def gradients(
    objective: Objective, trained: Trained, frozen: nnx.State, rows: Rows, extra: Any
) -> tuple[Totals, Trained]:
    """Totals of a batch and the gradient of its loss *sum* with respect to what is trained."""
    definition, loss, targets, execution, dtype, rate = objective
    dropout = Dropout(rate, extra) if rate > 0 else None

    def total(trained: Trained) -> tuple[Array, Totals]:
        if dtype is not None:
            trained = jax.tree.map(lambda x: x.astype(dtype), trained)
        logprobs = token_logprobs(bind(definition, trained, frozen), rows, targets, execution, dropout)
        totals = loss(logprobs, rows, extra)
        return totals.loss, totals

    grads, totals = jax.grad(total, has_aux=True)(trained)
    return totals, grads


def make_step(objective: Objective, optimiser: optax.GradientTransformation, micro_rows: int) -> Step:
    """The jitted step ``(trained, opt_state, frozen, rows [B, T], extra) -> (trained, opt_state, metrics)``.

    The batch is computed ``micro_rows`` rows at a time. Loss sums, counts and gradients are added up and divided once, so
    that the result does not depend on how targets fall into micro-batches; micro-batches without a target cost nothing.
    What is trained and its optimiser state are donated.
    """

    def step(
        trained: Trained, opt_state: Any, frozen: nnx.State, rows: Rows, extra: Any
    ) -> tuple[Trained, Any, dict[str, Array]]:
        def compute(part: tuple[Rows, Any]) -> tuple[Totals, Trained]:
            return gradients(objective, trained, frozen, *part)

        if rows.tokens.shape[0] == micro_rows:  # nothing to accumulate
            totals, grads = compute((rows, extra))
        else:
            totals, grads = _accumulated(compute, (rows, extra), micro_rows)
        grads = jax.tree.map(lambda g: g / totals.weight, grads)
        metrics = {"loss": totals.loss / totals.weight} | {k: v / totals.weight for k, v in totals.metrics.items()}
        metrics |= {"weight": totals.weight, "grad_norm": optax.global_norm(grads)}
        with jax.named_scope("optimiser"):
            updates, opt_state = optimiser.update(grads, opt_state, trained)
            return optax.apply_updates(trained, updates), opt_state, metrics

    return cast(Step, program("train", step, donate_argnums=(0, 1)))


def _accumulated(
    compute: Callable[[tuple[Rows, Any]], tuple[Totals, Trained]], batch: tuple[Rows, Any], micro_rows: int
) -> tuple[Totals, Trained]:
    """The sum of ``compute`` over micro-batches."""

    def split(x: Array) -> Array:
        parts = x.reshape(-1, micro_rows, *x.shape[1:])
        return constrain(parts, None, "batch", *[None] * (x.ndim - 1))

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: tuple[Totals, Trained], part: tuple[Rows, Any]) -> tuple[tuple[Totals, Trained], None]:
        new = jax.lax.cond(jnp.any(part[0].weight != 0), compute, lambda _: zeros, part)
        return jax.tree.map(jnp.add, total, new), None

    return jax.lax.scan(add, zeros, parts)[0]
