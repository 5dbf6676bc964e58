"""Attention of a decoding step on GPUs: a Pallas kernel (Triton) that reads only blocks of slots that some lane sees.

All lanes and query heads that read the same keys are one tile, so a row is read once for them, and scores never leave the
chip. Each row's blocks are shared out among a few programs, whose sums are then put together (FlashDecoding, Dao et al. 2023).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from esjax.model.row_kernel import LOG2_E, MASKED, Sums, dot, no_sums, with_block

KEYS = 64  # slots of a block
PROGRAMS = 512  # at least, as far as a row's blocks can be shared out: several for each of a GPU's processors


def takes(head_size: int) -> bool:
    """Whether the kernel can compute heads of this size."""
    return head_size >= 16 and head_size & (head_size - 1) == 0


def lanes_attention(q: Array, keys: Array, values: Array, seen: Array, interpret: bool = False) -> Array:
    """Queries [R, K, Q, H] against keys [R, K, H, S] and values [R, K, S, H] -> [R, K, Q, H]; scores scaled by H**-0.5.

    Args:
        seen: bool [R, Q, S], which slots a query sees: at least one. S is a block (``KEYS``) at least.
    """
    r, kv, queries, h = q.shape
    slots = keys.shape[-1]
    tile = max(16, pl.next_power_of_2(queries))  # the smallest product that the hardware has
    q = jnp.pad(q, ((0, 0), (0, 0), (0, tile - queries), (0, 0)))
    mask = jnp.pad(seen.astype(jnp.int8), ((0, 0), (0, tile - queries), (0, 0)))
    order, count = _blocks_seen(seen)
    shares = max(1, min(order.shape[1] // 2, PROGRAMS // (r * kv)))
    row = pl.BlockSpec((None, tile, slots), lambda r, k, s: (r, 0, 0))
    head = [pl.BlockSpec((None, None, *x.shape[2:]), lambda r, k, s: (r, k, 0, 0)) for x in (q, keys, values)]
    lists = [pl.BlockSpec((None, x.shape[1]), lambda r, k, s: (r, 0)) for x in (order, count)]
    part = pl.BlockSpec((None, None, None, tile), lambda r, k, s: (s, r, k, 0))
    out, high, total = pl.pallas_call(
        partial(_kernel, shares=shares),
        grid=(r, kv, shares),
        in_specs=[*head, row, *lists],
        out_specs=[pl.BlockSpec((None, None, None, tile, h), lambda r, k, s: (s, r, k, 0, 0)), part, part],
        out_shape=[
            jax.ShapeDtypeStruct((shares, r, kv, tile, h), jnp.float32),
            *[jax.ShapeDtypeStruct((shares, r, kv, tile), jnp.float32)] * 2,
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="lanes_attention",
    )(q, keys, values, mask, order, count)
    weight = jnp.exp2(high - high.max(axis=0))  # of each program's sums
    whole = (out * weight[..., None]).sum(axis=0) / (total * weight).sum(axis=0)[..., None]
    return whole[:, :, :queries].astype(q.dtype)


def _blocks_seen(seen: Array) -> tuple[Array, Array]:
    """Each row's blocks that any query sees, first in ``order`` int32 [R, blocks], and how many they are: int32 [R, 1]."""
    slots = seen.shape[-1]
    blocks = -(-slots // KEYS)
    any_query = jnp.pad(seen.any(axis=1), ((0, 0), (0, blocks * KEYS - slots)))
    needed = any_query.reshape(len(seen), blocks, KEYS).any(axis=-1)
    order = jnp.argsort(~needed, axis=-1, stable=True).astype(jnp.int32)
    return order, needed.sum(axis=-1, dtype=jnp.int32, keepdims=True)


def _kernel(*refs: Any, shares: int) -> None:
    q, keys, values, seen, order, count, out, high, total = refs
    query_tile, (h, slots), share = q[...], keys.shape, pl.program_id(2)

    def visit(n: Array, so_far: Sums) -> Sums:
        block = order[share + n * shares] * KEYS
        first = jnp.minimum(block, slots - KEYS)  # the last block may reach back: what is in the one before is masked
        here = pl.ds(first, KEYS)
        mask = (seen[:, here] != 0) & (first + jnp.arange(KEYS) >= block)
        s = dot(query_tile, keys[:, here].astype(query_tile.dtype)) * (LOG2_E * h**-0.5)
        return with_block(so_far, jnp.where(mask, s, MASKED), values[here, :].astype(query_tile.dtype))

    rounds = jax.lax.div(count[0] - share + shares - 1, shares)
    out[...], high[...], total[...] = jax.lax.fori_loop(0, rounds, visit, no_sums(len(query_tile), h))
