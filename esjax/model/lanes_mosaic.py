"""Attention of a decoding step on TPUs: a Pallas kernel (Mosaic) that reads only blocks of slots that some lane sees.

All lanes and query heads that read the same keys are one tile, and a row's heads go together. The blocks that are seen, of all
rows one after the other, are one list of work: while one is computed the next is on its way, over the end of a row, too.
Softmax is summed up over a row's blocks (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SLOTS = 128  # a block is of a multiple of so many slots: the width of a vector register
BLOCK_BYTES = 1 << 20  # of keys and values at least, so that reading them takes longer than starting the next
MOST_SLOTS = 1024  # of a block
HEAD = 128  # a head has a multiple of so many numbers: others lie in another order than the kernel takes, and would be copied
TILE = 16  # queries, in bfloat16; a tile is of a multiple of so many
CORES = 2  # of a chip at most: each works off a list of its own
MASKED = -1e30  # a masked score
LOWEST = -1e20  # where the running maximum begins: far above MASKED, so that a block of which nothing is seen adds 0


def takes(head_size: int) -> bool:
    """Whether the kernel is for heads of this size."""
    return head_size % HEAD == 0


class Work(NamedTuple):
    """The blocks that are seen of each part of the rows: row times blocks a row, plus the block; the last one stands again
    behind the end."""

    order: Array  # int32 [cores, most]
    busy: Array  # int32 [cores], how many of them


def lanes_attention(
    q: Array, keys: Array, values: Array, seen: Array, cap: float | None = None, interpret: bool = False
) -> Array:
    """Queries [R, K, Q, H] against keys [R, K, H, S] and values [R, K, S, H] -> [R, K, Q, H]; scores scaled by H**-0.5.

    Args:
        seen: bool [R, Q, S], which slots a query sees: at least one.
        cap: softly caps scores.
    """
    r, kv, queries, h = q.shape
    slots = keys.shape[-1]
    size = block_slots(kv * h * keys.dtype.itemsize, slots)
    blocks = -(-slots // size)
    tile = -(-queries // TILE) * TILE
    q = jnp.pad(q * h**-0.5, ((0, 0), (0, 0), (0, tile - queries), (0, 0)))
    mask = jnp.pad(seen.astype(jnp.int8), ((0, 0), (0, tile - queries), (0, 0)))
    cores = CORES if r % CORES == 0 else 1
    work = work_lists(seen, size, cores)

    def at(*where: int | None) -> Any:
        """The index of a block in which ``None`` stands for the block of slots, behind the row."""

        def index(core: Array, step: Array, order: Any, count: Any) -> tuple[Any, ...]:
            row, block = _row_and_block(order[core, step], blocks)
            return row + core * (r // cores), *(block if x is None else x for x in where)

        return index

    if not interpret:  # else XLA may copy all of them near the processor beforehand, seen or not
        keys, values = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (keys, values))
    whole = pl.BlockSpec((1, kv, tile, h), at(0, 0, 0))
    return pl.pallas_call(
        partial(_kernel, size=size, slots=slots, cap=cap),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, work.busy.max()),
            in_specs=[
                whole,
                pl.BlockSpec((1, kv, h, size), at(0, 0, None)),
                pl.BlockSpec((1, kv, size, h), at(0, None, 0)),
                pl.BlockSpec((1, tile, size), at(0, None)),
            ],
            out_specs=whole,
            scratch_shapes=[
                pltpu.VMEM((kv, tile, h), jnp.float32),
                pltpu.VMEM((kv, tile, SLOTS), jnp.float32),
                pltpu.VMEM((kv, tile, SLOTS), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="lanes_attention",
    )(*work, q, keys, values, mask)[:, :, :queries]


def block_slots(slot_bytes: int, slots: int) -> int:
    """Slots of a block, where a slot has so many bytes of keys, and as many of values."""
    wanted = -(-BLOCK_BYTES // (2 * slot_bytes * SLOTS)) * SLOTS
    return min(wanted, MOST_SLOTS, -(-slots // SLOTS) * SLOTS)


def work_lists(seen: Array, size: int, cores: int) -> Work:
    """What there is to do for rows ``seen`` [R, Q, S] in blocks of so many slots, for each core's part of the rows."""
    r, _, slots = seen.shape
    blocks = -(-slots // size)
    any_query = jnp.pad(seen.any(axis=1), ((0, 0), (0, blocks * size - slots)))
    needed = any_query.reshape(cores, r // cores * blocks, size).any(axis=-1)
    order = jnp.argsort(~needed, axis=1, stable=True).astype(jnp.int32)
    count = needed.sum(axis=1, dtype=jnp.int32)
    return Work(jnp.take_along_axis(order, jnp.minimum(jnp.arange(order.shape[1]), count[:, None] - 1), axis=1), count)


def _row_and_block(number: Any, blocks: int) -> tuple[Any, Any]:
    return jax.lax.div(number, jnp.int32(blocks)), jax.lax.rem(number, jnp.int32(blocks))


def _kernel(*refs: Any, size: int, slots: int, cap: float | None) -> None:
    order, count, q, keys, values, seen, out, sums, high, total = refs
    core, step = pl.program_id(0), pl.program_id(1)
    blocks = -(-slots // size)
    row, block = _row_and_block(order[core, step], blocks)
    before, _ = _row_and_block(order[core, jnp.maximum(step - 1, 0)], blocks)
    after, _ = _row_and_block(order[core, jnp.minimum(step + 1, order.shape[1] - 1)], blocks)
    busy = step < count[core]

    @pl.when(busy & ((step == 0) | (before != row)))
    def begin() -> None:
        sums[...] = jnp.zeros_like(sums)
        high[...] = jnp.full_like(high, LOWEST)
        total[...] = jnp.zeros_like(total)

    @pl.when(busy)
    def visit() -> None:
        mask, v = seen[0].astype(jnp.int32) != 0, values[0]
        if slots % size:  # what lies behind the end of the last block is anything, even no number
            left = slots - block * size
            mask &= jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1) < left
            v = jnp.where(jax.lax.broadcasted_iota(jnp.int32, v.shape, 1) < left, v.astype(q.dtype), 0)
        s = _product("kqh,khs->kqs", q[0], keys[0].astype(q.dtype))
        s = jnp.where(mask, s if cap is None else cap * jnp.tanh(s / cap), MASKED)
        top = jnp.maximum(high[:, :, :1], s.max(axis=-1, keepdims=True))
        p, old = jnp.exp(s - top), jnp.exp(high[:, :, :1] - top)
        sums[...] = sums[...] * old + _product("kqs,ksh->kqh", p.astype(q.dtype), v.astype(q.dtype))
        total[...] = total[...] * old + p.sum(axis=-1, keepdims=True)
        high[...] = jnp.broadcast_to(top, high.shape)

    @pl.when(busy & ((step == count[core] - 1) | (after != row)))
    def end() -> None:
        sum_of_all = total[:, :, :1]
        out[0] = (sums[...] / jnp.where(sum_of_all > 0, sum_of_all, 1.0)).astype(out.dtype)


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(
        axes, a, b, preferred_element_type=jnp.float32, precision="highest" if a.dtype == jnp.float32 else None
    )
