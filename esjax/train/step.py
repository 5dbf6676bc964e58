"""One optimiser step as one program: micro-batches scanned, gradients accumulated exactly, the adapter updated in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from esjax.model.decoder import Decoder, token_logprobs
from esjax.model.lora import Adapter
from esjax.model.weights import bind
from esjax.rows import Rows
from esjax.train.losses import Loss, Totals

Step = Callable[[Adapter, Any, nnx.State, Rows, Any], tuple[Adapter, Any, dict[str, Array]]]


def gradients(
    definition: nnx.GraphDef[Decoder],
    loss: Loss,
    adapter: Adapter,
    base: nnx.State,
    rows: Rows,
    extra: Any,
    targets: int,
    remat: bool,
) -> tuple[Totals, Adapter]:
    """Totals of a batch and the gradient of its loss *sum* with respect to the adapter."""

    def total(adapter: Adapter) -> tuple[Array, Totals]:
        logprobs = token_logprobs(bind(definition, adapter, base), rows, targets, remat)
        totals = loss(logprobs, rows, extra)
        return totals.loss, totals

    grads, totals = jax.grad(total, has_aux=True)(adapter)
    return totals, grads


def make_step(
    definition: nnx.GraphDef[Decoder],
    loss: Loss,
    optimiser: optax.GradientTransformation,
    micro_rows: int,
    targets: int,
    remat: bool,
) -> Step:
    """The jitted step ``(adapter, opt_state, base, rows [B, T], extra) -> (adapter, opt_state, metrics)``.

    The batch is computed ``micro_rows`` rows at a time. Loss sums, counts and gradients are added up and divided once, so
    that the result does not depend on how targets fall into micro-batches; micro-batches without a target cost nothing.
    ``targets`` bounds the target tokens of a micro-batch. Adapter and optimiser state are donated.
    """

    def step(
        adapter: Adapter, opt_state: Any, base: nnx.State, rows: Rows, extra: Any
    ) -> tuple[Adapter, Any, dict[str, Array]]:
        parts = jax.tree.map(lambda x: x.reshape(-1, micro_rows, *x.shape[1:]), (rows, extra))

        def compute(part: tuple[Rows, Any]) -> tuple[Totals, Adapter]:
            return gradients(definition, loss, adapter, base, *part, targets, remat)

        shapes = jax.eval_shape(compute, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def accumulate(total: tuple[Totals, Adapter], part: tuple[Rows, Any]) -> tuple[tuple[Totals, Adapter], None]:
            new = jax.lax.cond(jnp.any(part[0].weight != 0), compute, lambda _: zeros, part)
            return jax.tree.map(jnp.add, total, new), None

        (totals, grads), _ = jax.lax.scan(accumulate, zeros, parts)
        grads = jax.tree.map(lambda g: g / totals.weight, grads)
        metrics = {"loss": totals.loss / totals.weight} | {k: v / totals.weight for k, v in totals.metrics.items()}
        metrics |= {"weight": totals.weight, "grad_norm": optax.global_norm(grads)}
        updates, opt_state = optimiser.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, metrics

    return jax.jit(step, donate_argnums=(0, 1))
