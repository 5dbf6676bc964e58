"""A frozen linear layer in few bits, as qwix has them: int8 with a scale a column, nf4 (Dettmers et al. 2023) with one a block.

What is computed with is made from it where it is used, a layer at a time: products and their gradients are those of the
dequantised weights.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

BLOCK, FEWEST = 32, 16  # numbers of the input that share a scale, where so many divide it; fewer would not pay
FACTORS = [
    sign * size / 20 for size in range(20, 13, -1) for sign in (1, -1)
]  # of a block's largest number, as its scale
QTYPES = {"int8": jnp.int8, "nf4": jnp.uint8}  # what is stored; of nf4 two numbers in a byte, on every platform


SCALES = {"int8": jnp.float32, "nf4": jnp.bfloat16}


def scale_rows(kind: Literal["int8", "nf4"], size: int) -> int:
    """How many scales a column of ``size`` numbers has."""
    block = math.gcd(size, BLOCK)
    return 1 if kind == "int8" or block < FEWEST else size // block


def stored_rows(kind: Literal["int8", "nf4"], size: int) -> int:
    """How many rows the stored numbers of ``size`` inputs take."""
    return size if kind == "int8" else -(-size // 2)


@partial(jax.jit, static_argnums=1)
def quantise(kernel: Array, kind: Literal["int8", "nf4"]) -> tuple[Array, Array]:
    """Stacked kernels [L, in, out] as numbers of few bits [L, stored rows, out] and scales [L, scale rows, out].

    Scales are float32 for int8, and bfloat16 for nf4: with a block of 32 they take half a bit a number.
    """
    import qwix

    size = kernel.shape[1]
    if kind == "int8":
        made = qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=(0, 2), scale_dtype=jnp.float32)
        return made.qvalue.astype(jnp.int8), made.scale.reshape(kernel.shape[0], 1, kernel.shape[2])
    numbers, scales = jax.lax.map(_nf4, kernel)
    numbers = jnp.pad(numbers, ((0, 0), (0, size % 2), (0, 0)))
    return numbers[:, ::2] | (numbers[:, 1::2] << 4), scales


def _nf4(kernel: Array) -> tuple[Array, Array]:
    """One kernel [in, out] as uint8 [in, out] below 16, and its scales, each of which of some that were tried errs least.

    The levels are denser above zero than below, so scales of both signs are tried, and such as cut a block's largest numbers:
    on a small model that takes a third off the squared error that the largest number as the scale would make.
    """
    import qwix

    levels = qwix.dequantize(qwix.QArray(jnp.arange(16).astype(jnp.uint4), jnp.ones((1,), jnp.float32), None, "nf4"))
    between = (levels[1:] + levels[:-1]) / 2
    size, out = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(scale_rows("nf4", size), -1, out)
    largest = jnp.maximum(jnp.abs(blocks).max(1, keepdims=True), jnp.finfo(jnp.float32).tiny * 1e6)

    def numbers(scale: Array) -> Array:
        return sum(((blocks / scale) > edge).astype(jnp.uint8) for edge in between)

    def better(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
        scale = (largest * factor).astype(jnp.bfloat16).astype(jnp.float32)
        error = jnp.square(blocks - levels[numbers(scale)] * scale).sum(1, keepdims=True)
        return (jnp.where(error < best[1], scale, best[0]), jnp.minimum(error, best[1])), None

    start = (largest, jnp.full_like(largest, jnp.inf))
    (scale, _), _ = jax.lax.scan(better, start, jnp.asarray(FACTORS))
    return numbers(scale).reshape(size, out), scale[:, 0].astype(jnp.bfloat16)


def dequantise(numbers: Array, scale: Array, kind: Literal["int8", "nf4"], size: int) -> Array:
    """One layer's kernel, float32 [in, out] with ``size`` inputs, from its stored numbers and scales [scale rows, out]."""
    import qwix

    if kind == "nf4":
        both = jnp.stack([numbers & 15, numbers >> 4], axis=1)
        numbers = both.reshape(-1, numbers.shape[1])[:size].astype(jnp.uint4)
    return qwix.dequantize(qwix.QArray(numbers, scale.astype(jnp.float32), None, kind))
