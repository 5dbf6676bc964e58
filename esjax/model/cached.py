"""The decoder with a cache: prefill computes prompts, a step feeds one token to each lane. cache.py says what is kept.

Layers are unrolled: a loop over stacked weights would copy each of them to where a product can read it. On a mesh, weights
stay where training has them, see ``layers.Placement``. Rows are split over data and fsdp, heads over tensor; attention and
the writing of keys and values are each device's own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.cache import (
    CACHE,
    Cache,
    Chunk,
    Fed,
    attend_chunk,
    attend_lanes,
    lanes_see,
    pinned,
    write_chunk,
    write_step,
)
from esjax.model.decoder import Decoder, Execution, embedded
from esjax.model.families import Architecture
from esjax.model.layers import DECODING, Block, Rope, Scores, rms_norm, rope_at
from esjax.runtime.mesh import constrain, per_device


class Weights(NamedTuple):
    """All weights of base + adapter as decoding reads them."""

    embed: Array  # [V, D]
    head: Array  # [V, D]; the same array as embed where the two are tied
    norm: Array  # [D]
    layers: tuple[Block, ...]  # their arrays lack the leading axis

    @property
    def arch(self) -> Architecture:
        return self.layers[0].arch


def layered(model: Decoder, form: Callable[[Block], Block] | None = None) -> Weights:
    """The weights of a bound model, layer by layer: slices of training's arrays, or of what ``form`` makes of them."""
    block = model.layers if form is None else form(model.layers)

    def cut(stacked: nnx.Variable[Array], layer: int) -> nnx.Variable[Array]:
        axes = stacked.get_metadata()["axes"][1:]
        return stacked.replace(constrain(stacked[...][layer], *axes), axes=axes)

    layers = tuple(
        jax.tree.map(partial(cut, layer=i), block, is_leaf=lambda x: isinstance(x, nnx.Variable))
        for i in range(model.arch.layers)
    )
    embed, head = (constrain(x, "vocab", "embed") for x in (model.embed[...], model.head_weight))
    return Weights(embed, head, constrain(model.norm[...], "embed"), layers)


QUERIES, KEYS = ("batch", None, "heads"), ("batch", None, "kv_heads")  # [P, C, heads, H]


def prefill(weights: Weights, cache: Cache, chunk: Chunk, execution: Execution) -> Cache:
    """Compute the chunk's keys and values and write them into the rows."""
    ropes = _ropes(weights.arch, chunk.position)
    x = _embed(weights, chunk.tokens)
    keys, values = list(cache.keys), list(cache.values)
    write = per_device(
        partial(write_chunk, execution=execution), [CACHE, CACHE, KEYS, KEYS, ("batch",)], [CACHE, CACHE]
    )
    for i, (block, kind) in enumerate(zip(weights.layers, weights.arch.kind_of, strict=True)):
        scores = Scores(weights.arch.kinds[kind].window, weights.arch.attention_cap)
        way = partial(attend_chunk, execution=execution, scores=scores)
        attend = per_device(way, [QUERIES, CACHE, CACHE, ("batch",)])

        def attend_row(q: Array, k: Array, v: Array, i: int = i, attend: Any = attend) -> Array:
            keys[i], values[i] = write(keys[i], values[i], k, v, chunk)
            return attend(q, keys[i], values[i], chunk)

        x = block(x, ropes[kind], attend_row, DECODING)  # of the last layer only the keys and values are used
    return pinned(keys, values, cache)


def step(weights: Weights, cache: Cache, fed: Fed, clock: Array, execution: Execution) -> tuple[Array, Cache]:
    """Feed one token to each lane [R, M]. Returns final hidden states [R M, D] and the cache.

    Args:
        clock: int32, the ring's slot (modulo N) that this step writes.
    """
    ropes = _ropes(weights.arch, fed.position.reshape(-1, 1))
    x = _embed(weights, fed.token.reshape(-1, 1))
    keys, values = list(cache.keys), list(cache.values)
    ring = cache.keys[0].shape[-1] - cache.slots
    at = cache.slots + clock * fed.token.shape[1] % ring
    arch = weights.arch
    seen = {window: lanes_see(fed, clock, cache, window) for window in arch.windows}
    write = per_device(write_step, [CACHE, CACHE, KEYS, KEYS, ()], [CACHE, CACHE])
    way = partial(attend_lanes, execution=execution, cap=arch.attention_cap)
    attend = per_device(way, [QUERIES, CACHE, CACHE, ("batch",)])
    for i, (block, kind) in enumerate(zip(weights.layers, arch.kind_of, strict=True)):

        def attend_row(q: Array, k: Array, v: Array, i: int = i, kind: int = kind) -> Array:
            keys[i], values[i] = write(keys[i], values[i], k, v, at)
            return attend(q, keys[i], values[i], seen[arch.kinds[kind].window])

        x = block(x, ropes[kind], attend_row, DECODING)
    x = rms_norm(x[:, 0], weights.norm, arch)
    return x, pinned(keys, values, cache)


def _embed(weights: Weights, tokens: Array) -> Array:
    """[n, T] -> [n, T, D]."""
    return constrain(embedded(weights.embed, tokens, weights.arch, "vocab", "embed"), "stream", None, "embed")


def _ropes(arch: Architecture, position: Array) -> list[Rope | None]:
    """Rotary tables of each kind of layer, computed once.

    XLA's CPU compiler would compute a table anew in each layer and for each head, whatever stands between but a product; so
    there the tables go through one with the identity, which is exact.
    """
    ropes = [rope_at(kind, position) for kind in arch.kinds]
    return jax.lax.platform_dependent(ropes, cpu=partial(jax.tree.map, _through_a_product), default=lambda x: x)


def _through_a_product(x: Array) -> Array:
    return jnp.matmul(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision="highest")
