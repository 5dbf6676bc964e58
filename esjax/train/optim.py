"""The optimiser of both phases."""

from __future__ import annotations

from typing import Any

import jax
import optax

from esjax.runtime.mesh import shardings_here
from esjax.settings.schema import OptimSettings


def learning_rate(settings: OptimSettings, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to final_fraction of the peak at the last step. Steps count from 0."""
    warmup = int(steps * settings.warmup_fraction)
    peak, last = settings.learning_rate, settings.learning_rate * settings.final_fraction
    return optax.warmup_cosine_decay_schedule(
        peak if warmup == 0 else 0.0, peak, warmup, max(steps - 1, warmup + 1), last
    )


def optimiser(settings: OptimSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW."""
    adamw = optax.adamw(learning_rate(settings, steps), weight_decay=settings.weight_decay)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)


def init_optimiser(transformation: optax.GradientTransformation, trained: Any) -> Any:
    """The optimiser's first state; moments lie where their parameters do, counters everywhere."""
    where = shardings_here(jax.eval_shape(transformation.init, trained))
    return transformation.init(trained) if where is None else jax.jit(transformation.init, out_shardings=where)(trained)
