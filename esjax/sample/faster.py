"""How a decoding step attends on a GPU or TPU: of two ways the faster one, found by timing both on the device.

What a way reads does not tell: a kernel that reads less may read it more slowly.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.model.attention import KERNELS, Decoding
from esjax.model.cache import Cache, Fed, attend_lanes, cache_shapes, lanes_see
from esjax.model.decoder import Execution
from esjax.model.families import Architecture
from esjax.run.progress import say
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, make_mesh, mesh_sizes
from esjax.sample.shapes import Shapes

BYTES = 1 << 30  # of keys and values, read in turn: far more than a chip can keep near its processors
LAYERS = 16  # most that a trial has
STEPS, RUNS = 10, 5  # of one run; the fastest run counts
DIFFERENCE = 0.05  # of the two ways' results, relative to the largest: rounding to bfloat16 makes less than 0.01


class Trial(NamedTuple):
    """What is attended to: random numbers of the shapes that one device has."""

    q: Array  # [R M, 1, N, H]
    cache: Cache
    seen: Array  # bool [R, M, S]


def settled(execution: Execution, arch: Architecture, shapes: Shapes, dtype: jnp.dtype, kept: jnp.dtype) -> Decoding:
    """``execution.decoding``; where that is auto, the faster way for the sampler's shapes. Every process must ask: all take the
    same.

    Args:
        kept: the dtype of the keys and values kept.
    """
    if execution.decoding != "auto":
        return execution.decoding
    tensor, kernel = mesh_sizes()["tensor"], KERNELS[jax.default_backend()]
    share = replace(arch, heads=arch.heads // tensor, kv_heads=arch.kv_heads // tensor)
    rows = shapes._replace(rows=shapes.rows // batch_groups())
    with jax.set_mesh(make_mesh(jax.local_devices()[:1], (1, 1, 1))):  # each process times on a device of its own
        faster = _faster(execution, kernel, _trial(share, rows, dtype, kept))
    return kernel if current().processes.all(faster) else "plain"


def _faster(execution: Execution, kernel: Decoding, trial: Trial) -> bool:
    """Whether a kernel is faster than XLA's products, and computes the same; says so, and why not."""
    plain, result = _timed(execution._replace(decoding="plain"), trial)
    try:
        ours, again = _timed(execution._replace(decoding=kernel), trial)
    except Exception as e:  # whatever a kernel's compiler raises
        say(f"decoding attends plainly: our kernel ({kernel}) cannot run here: {_first_line(e)}")
        return False
    difference = float(jnp.abs(again - result).max() / jnp.abs(result).max())
    if not difference < DIFFERENCE:  # nor where it is not a number
        say(f"decoding attends plainly: our kernel ({kernel}) is wrong here by {difference:.2g}")
        return False
    say(
        f"decoding attends in {plain * 1e6:.0f} us a layer plainly, in {ours * 1e6:.0f} with {kernel}: the faster is taken"
    )
    return ours < plain


def _timed(execution: Execution, trial: Trial) -> tuple[float, Array]:
    """Seconds that a layer takes, and the first layer's result in float32."""
    _, result = jax.block_until_ready(_attend(trial, execution))
    seconds = []
    for _ in range(RUNS):
        began = time.perf_counter()
        jax.block_until_ready(_attend(trial, execution))
        seconds.append(time.perf_counter() - began)
    return min(seconds) / (STEPS * len(trial.cache.keys) + 1), result


@partial(jax.jit, static_argnums=1)
def _attend(trial: Trial, execution: Execution) -> tuple[Array, Array]:
    """Every layer in turn, again and again, each with what the one before gave; and what the first alone gives."""
    _, cache, seen = trial

    def step(_: Any, q: Array) -> Array:
        for keys, values in zip(cache.keys, cache.values, strict=True):
            q = attend_lanes(q, keys, values, seen, execution)
        return q

    first = attend_lanes(trial.q, cache.keys[0], cache.values[0], seen, execution)
    return jax.lax.fori_loop(0, STEPS, step, trial.q), first.astype(jnp.float32)


def _trial(arch: Architecture, shapes: Shapes, dtype: jnp.dtype, kept: jnp.dtype) -> Trial:
    """Rows of which three quarters are seen, and half of each ring."""
    rows, lanes, slots, new = shapes[:4]
    one = cache_shapes(replace(arch, layers=1), rows, lanes, slots, new, kept)
    layer_bytes = sum(x.size * x.dtype.itemsize for x in (*one.keys, *one.values))
    many = replace(arch, layers=min(arch.layers, LAYERS, -(-BYTES // layer_bytes)))
    abstract = cache_shapes(many, rows, lanes, slots, new, kept)

    @jax.jit
    def make() -> Trial:
        keys = iter(jax.random.split(jax.random.key(0), 1 + 2 * many.layers))

        def filled(x: Any) -> Array:
            return jax.random.normal(next(keys), x.shape).astype(x.dtype)

        q = filled(jax.ShapeDtypeStruct((rows * lanes, 1, arch.heads, arch.head_size), dtype))
        zero = jnp.zeros((rows, lanes), jnp.int32)
        spans = zero, zero + 3 * slots // 4, zero, zero
        fed = Fed(zero, zero + slots, *spans, zero + -(-new // 2))
        return Trial(q, jax.tree.map(filled, abstract), lanes_see(fed, jnp.int32(new - 1), abstract))

    return make()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
