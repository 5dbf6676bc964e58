"""The decoder with a cache: prefill computes prompts, a step feeds one token to each lane. cache.py says what is kept.

Decoding unrolls its layers; prefill scans training's stacked arrays where it is given those. On a mesh, weights stay where
training has them, see ``layers.Placement``. Rows are split over data and fsdp, heads over tensor; attention and the writing
of keys and values are each device's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.cache import CACHE, Cache, Chunk, Fed, attend_chunk, attend_lanes, pinned, write_chunk
from esjax.model.decoder import Decoder, Execution
from esjax.model.families import LINEARS, Architecture
from esjax.model.layers import DECODING, Block, rms_norm, rope_at
from esjax.runtime.mesh import batch_groups, constrain, per_device


class Weights(NamedTuple):
    """All weights of base + adapter as decoding reads them."""

    embed: Array  # [V, D]
    head: Array  # [V, D]; the same array as embed where the two are tied
    norm: Array  # [D]
    layers: tuple[Block, ...]  # their arrays lack the leading axis
    stacked: Block | None = None  # training's own form, where the layers are slices of it

    @property
    def arch(self) -> Architecture:
        return self.layers[0].arch


def layered(model: Decoder, merge: bool) -> Weights:
    """The weights of a bound model, layer by layer.

    Inside a decoding program these are slices of training's arrays. ``merge`` makes kernels of their own, W + scale A B in
    float32; in bfloat16 that would round away what the adapter changes by less than half a unit in the last place.
    """
    block = _merged(model.layers) if merge else model.layers

    def cut(stacked: nnx.Variable[Array], layer: int) -> nnx.Variable[Array]:
        axes = stacked.get_metadata()["axes"][1:]
        return stacked.replace(constrain(stacked[...][layer], *axes), axes=axes)

    layers = tuple(
        jax.tree.map(partial(cut, layer=i), block, is_leaf=lambda x: isinstance(x, nnx.Variable))
        for i in range(model.arch.layers)
    )
    embed, head = (constrain(x, "vocab", "embed") for x in (model.embed[...], model.head_weight))
    return Weights(embed, head, constrain(model.norm[...], "embed"), layers, None if merge else model.layers)


def _merged(block: Block) -> Block:
    block = nnx.clone(block)
    for name in LINEARS:
        linear = getattr(block, name)
        if linear.lora_a is not None:
            w, a, b = linear.kernel[...], linear.lora_a[...], linear.lora_b[...]
            moved = jnp.einsum("lri,lro->lio", a, b, preferred_element_type=jnp.float32) * linear.scale
            linear.kernel[...] = (w.astype(jnp.float32) + moved).astype(w.dtype)
            linear.lora_a = linear.lora_b = None
    return block


QUERIES, KEYS = ("batch", None, "heads"), ("batch", None, "kv_heads")  # [P, C, heads, H]


def prefill(weights: Weights, cache: Cache, chunk: Chunk, execution: Execution) -> Cache:
    """Compute the chunk's keys and values and write them into the rows."""
    rope = rope_at(weights.arch, chunk.position)
    x = _embed(weights, chunk.tokens)
    row_k, row_v = list(cache.row_k), list(cache.row_v)
    write = per_device(write_chunk, [CACHE, CACHE, KEYS, KEYS, ("batch",)], [CACHE, CACHE])
    attend = per_device(partial(attend_chunk, execution=execution), [QUERIES, CACHE, CACHE, ("batch",)])
    if weights.stacked is not None:  # many large products: unrolled, they would take minutes to compile
        definition, stacked = nnx.split(weights.stacked)
        pick = per_device(lambda rows, chunk: rows[chunk.row], [CACHE, ("batch",)])
        rows = [jnp.stack([pick(x, chunk) for x in layers]) for layers in (row_k, row_v)]
        own = chunk._replace(row=_first_of_row(chunk.row))

        def layer(x: Array, given: Any) -> tuple[Array, tuple[Array, Array]]:
            state, k_rows, v_rows = given
            made: list[Array] = []

            def attend_row(q: Array, k: Array, v: Array) -> Array:
                made.extend((k, v))
                return attend(q, *write(k_rows, v_rows, k, v, own), own)

            x = nnx.merge(definition, state)(x, rope, attend_row, DECODING)
            return x, (made[0], made[1])

        _, made = jax.lax.scan(layer, x, (stacked, *rows))
        for i, (k, v) in enumerate(zip(*made, strict=True)):
            row_k[i], row_v[i] = write(row_k[i], row_v[i], k, v, chunk)
    else:
        for i, block in enumerate(weights.layers):

            def attend_row(q: Array, k: Array, v: Array, i: int = i) -> Array:
                row_k[i], row_v[i] = write(row_k[i], row_v[i], k, v, chunk)
                return attend(q, row_k[i], row_v[i], chunk)

            x = block(x, rope, attend_row, DECODING)  # of the last layer only the keys and values are used
    return pinned(cache._replace(row_k=tuple(row_k), row_v=tuple(row_v)))


def _first_of_row(row: Array) -> Array:
    """For each window [P] the first window of its device with the same row: they must see what each of them writes."""
    of_device = row.reshape(batch_groups(), -1)
    return jnp.argmax(of_device[:, :, None] == of_device[:, None, :], axis=2).reshape(-1)


def step(weights: Weights, cache: Cache, fed: Fed, clock: Array, execution: Execution) -> tuple[Array, Cache]:
    """Feed one token to each lane [R, M]. Returns final hidden states [R M, D] and the cache.

    Args:
        clock: int32, the ring's slot (modulo N) that this step writes.
    """
    rope = rope_at(weights.arch, fed.position.reshape(-1, 1))
    x = _embed(weights, fed.token.reshape(-1, 1))
    new_k, new_v = list(cache.new_k), list(cache.new_v)
    n = new_k[0].shape[-1]
    slot = clock % n
    in_ring = (slot - jnp.arange(n)) % n < fed.newest.reshape(-1, 1)
    attend = per_device(partial(attend_lanes, execution=execution), [QUERIES, CACHE, CACHE, ("batch",), ("batch",)])
    for i, block in enumerate(weights.layers):

        def attend_row(q: Array, k: Array, v: Array, i: int = i) -> Array:
            k, v = k[:, 0, :, :, None].astype(new_k[i].dtype), v[:, 0, :, None].astype(new_v[i].dtype)
            new_k[i] = jax.lax.dynamic_update_slice(new_k[i], k, (0, 0, 0, slot))
            new_v[i] = jax.lax.dynamic_update_slice(new_v[i], v, (0, 0, slot, 0))
            return attend(q, (cache.row_k[i], cache.row_v[i]), (new_k[i], new_v[i]), fed, in_ring)

        x = block(x, rope, attend_row, DECODING)
    x = rms_norm(x[:, 0], weights.norm, weights.arch.norm_eps)
    return x, cache._replace(new_k=tuple(new_k), new_v=tuple(new_v))


def _embed(weights: Weights, tokens: Array) -> Array:
    """[n, T] -> [n, T, D]."""
    return constrain(weights.embed[tokens], "stream", None, "embed")
