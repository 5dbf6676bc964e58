"""The optimiser of both phases."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib

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
    """Clip by global norm, then the optimiser's rule with decoupled weight decay."""
    rate, decay = learning_rate(settings, steps), settings.weight_decay
    match settings.optimiser:
        case "adamw":
            rule = optax.adamw(rate, weight_decay=decay)
        case "lion":
            rule = optax.lion(rate, weight_decay=decay)
        case "adafactor":  # Shazeer and Stern 2018, without its own learning rate: ours is the step's size
            rule = optax.chain(
                optax.scale_by_factored_rms(),
                optax.clip_by_block_rms(1.0),
                optax.add_decayed_weights(decay),
                optax.scale_by_learning_rate(rate),
            )
        case "muon":
            rule = optax.contrib.muon(
                rate, weight_decay=decay, adam_weight_decay=decay, muon_weight_dimension_numbers=_matrices
            )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), rule)


def _matrices(trained: Any) -> Any:
    """For Muon: the stacked matrices [L, in, out], a layer at a time; embeddings, norms and biases are not among them."""
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers(1, 2) if x.ndim == 3 else None, trained)


def init_optimiser(transformation: optax.GradientTransformation, trained: Any) -> Any:
    """The optimiser's first state; moments lie where their parameters do, counters everywhere."""
    where = shardings_here(jax.eval_shape(transformation.init, trained))
    return transformation.init(trained) if where is None else jax.jit(transformation.init, out_shardings=where)(trained)
