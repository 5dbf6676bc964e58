"""Dropout of what an adapter reads, as a function of the row and not of how rows are batched."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.runtime.mesh import constrain


class Dropout(NamedTuple):
    """Sets a share of an adapter's inputs to zero and scales the others up, so that their mean stays (Srivastava et al. 2014).

    What is dropped hangs on a row's key, the layer and the place in it alone: not on micro-batches or the mesh.
    """

    rate: float  # the share, static
    keys: Array  # uint32 [B, 2], one a row of the batch
    layer: Array | int = 0

    def __call__(self, x: Array, place: int) -> Array:
        """x [B, T, in] as an adapter reads it; ``place`` tells the inputs of a layer apart."""

        def kept(key: Array) -> Array:
            own = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), self.layer)
            return jax.random.bernoulli(jax.random.fold_in(own, place), 1 - self.rate, x.shape[1:])

        mask = constrain(jax.vmap(kept)(self.keys), "batch", None, None)
        return jnp.where(mask, x / (1 - self.rate), 0).astype(x.dtype)
