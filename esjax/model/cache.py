"""Keys and values kept: where they lie, how new ones are written, and attention to them.

A *row* keeps the keys and values of prompts, trunks and branches, in T slots. M *lanes* a row each grow one reply. What a
lane has drawn lies in a ring of its own of N slots, written by all lanes at the same place (the clock), so that one small
in-place write serves them all, however far each has come. A step reads a row's slots once for its M lanes, and each lane's
ring.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.model.decoder import Execution
from esjax.model.families import Architecture
from esjax.rows import sees
from esjax.runtime.mesh import constrain, sharding_here

BLOCK = 128  # slots that the CPU attends to at a time


class Cache(NamedTuple):
    """Keys and values, one array a layer; keys lie transposed, so that both products of attention read memory in order."""

    row_k: tuple[Array, ...]  # [R, K, H, T]
    row_v: tuple[Array, ...]  # [R, K, T, H]
    new_k: tuple[Array, ...]  # [R M, K, H, N]
    new_v: tuple[Array, ...]  # [R M, K, N, H]


CACHE = ("batch", "kv_heads")  # the leading logical axes of every array of a Cache


class Chunk(NamedTuple):
    """Prompt tokens to be written into C successive slots of each of P rows; on a mesh each device has its P / devices.

    Which of its row's slots the chunk's tokens 0 ... C - 1 see is said as for rows: slot s from token ``since[s]`` on until
    ``until[s]``, see ``rows.sees``.
    """

    row: Any  # int32 [P], among the rows of the device
    start: Any  # int32 [P], the first of the slots; start + C <= T
    tokens: Any  # int32 [P, C]
    position: Any  # int32 [P, C]
    valid: Any  # bool [P, C]; other slots keep what they hold
    since: Any  # int32 [P, T]
    until: Any  # int32 [P, T]; 0 where no token sees the slot


class Fed(NamedTuple):
    """What a step feeds to the lanes [R, M], and what they see: two spans of their row and the newest of their ring."""

    token: Array  # int32
    position: Array  # int32, the token's
    trunk_start: Array
    trunk_end: Array
    own_start: Array
    own_end: Array
    newest: Array  # int32, the token itself counted


def cache_shapes(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """A cache of ``rows`` rows of T = ``slots`` and ``lanes`` lanes a row with rings of N = ``new``, each array in its place."""
    k, h = arch.kv_heads, arch.head_size
    shapes = ((rows, k, h, slots), (rows, k, slots, h), (rows * lanes, k, h, new), (rows * lanes, k, new, h))
    where = sharding_here(*CACHE, None, None)
    return Cache(*((jax.ShapeDtypeStruct(s, dtype, sharding=where),) * arch.layers for s in shapes))  # type: ignore[arg-type]


def empty_cache(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """The same, filled with zeros."""
    shapes = cache_shapes(arch, rows, lanes, slots, new, dtype)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def pinned(cache: Cache) -> Cache:
    """The same cache, where it belongs: what a program gives back must lie as it was given."""
    return jax.tree.map(lambda x: constrain(x, *CACHE, None, None), cache)


def write_chunk(row_k: Array, row_v: Array, k: Array, v: Array, chunk: Chunk) -> tuple[Array, Array]:
    """The cache with new keys and values [P, C, K, H] in its rows; one small in-place update for each of the P."""
    for p in range(len(k)):
        row_k = _put(row_k, k[p].transpose(1, 2, 0), chunk.valid[p], (chunk.row[p], 0, 0, chunk.start[p]))
        row_v = _put(row_v, v[p].transpose(1, 0, 2), chunk.valid[p][:, None], (chunk.row[p], 0, chunk.start[p], 0))
    return row_k, row_v


def _put(cache: Array, new: Array, valid: Array, at: tuple[Any, ...]) -> Array:
    old = jax.lax.dynamic_slice(cache, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(cache, jnp.where(valid, new.astype(cache.dtype)[None], old), at)


def _grouped(q: Array, kv_heads: int) -> Array:
    """Scaled queries [..., N, H] by the key/value head that they use: [..., K, G, H]."""
    return (q * q.shape[-1] ** -0.5).reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])


def attend_chunk(q: Array, row_k: Array, row_v: Array, chunk: Chunk, execution: Execution) -> Array:
    """Queries [P, C, N, H] of a chunk against their rows -> [P, C, N, H]."""
    p, c, _, _ = q.shape
    if execution.attention == "chunked":
        parts = []
        for i in range(p):
            k, v = (jax.lax.dynamic_index_in_dim(x, chunk.row[i], keepdims=False) for x in (row_k, row_v))
            parts.append(_blocked_chunk(_grouped(q[i], len(k)), k, v, chunk.since[i], chunk.until[i]))
        return jnp.stack(parts).reshape(q.shape)
    mask = sees(chunk.until, jnp.arange(c), chunk.since)
    k, v = row_k[chunk.row].transpose(0, 3, 1, 2), row_v[chunk.row].transpose(0, 2, 1, 3)
    library: Literal["cudnn", "xla"] = "cudnn" if execution.attention == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None], implementation=library
    )


class Running(NamedTuple):
    """Softmax over blocks (Milakov and Gimelshein 2018): the greatest score so far, and sums relative to it."""

    top: Array  # [..., Q]
    total: Array  # [..., Q]
    out: Array  # [..., Q, H]


def _add_block(so_far: Running, q: Array, k: Array, v: Array, mask: Array) -> Running:
    """One more block of keys: q [..., Q, H], k [..., H, S], v [..., S, H], mask [..., Q, S] broadcast."""
    scores = jnp.where(mask, jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32), NEVER)
    top = jnp.maximum(so_far.top, scores.max(axis=-1))
    p = jnp.exp(scores - top[..., None])
    old = jnp.exp(so_far.top - top)
    out = so_far.out * old[..., None] + jnp.matmul(
        p.astype(q.dtype), v.astype(q.dtype), preferred_element_type=jnp.float32
    )
    return Running(top, so_far.total * old + p.sum(axis=-1), out)


NEVER = -1e30


def _none_yet(q: Array) -> Running:
    return Running(jnp.full(q.shape[:-1], NEVER), jnp.zeros(q.shape[:-1], jnp.float32), jnp.zeros(q.shape, jnp.float32))


def _blocks(k: Array, v: Array, index: Array) -> tuple[Array, Array, Array]:
    """The index-th block of keys [..., H, T] and values [..., T, H], and its slots. The last block may reach back."""
    slots = k.shape[-1]
    size = min(BLOCK, slots)
    start = jnp.minimum(index * size, slots - size)
    slot = start + jnp.arange(size)
    block_k, block_v = (
        jax.lax.dynamic_slice_in_dim(x, start, size, axis) for x, axis in ((k, k.ndim - 1), (v, v.ndim - 2))
    )
    return block_k, block_v, jnp.where(slot >= index * size, slot, -1)  # -1: seen in the block before


def _blocked_chunk(q: Array, k: Array, v: Array, since: Array, until: Array) -> Array:
    """For CPUs: queries [C, K, G, H] of one row against the blocks of its slots [T] between the first and the last they see."""
    c, kv, g, h = q.shape
    q_KxGCxH = q.transpose(1, 2, 0, 3).reshape(kv, g * c, h)
    query = jnp.tile(jnp.arange(c), g)

    def add(index: Array, so_far: Running) -> Running:
        block_k, block_v, slot = _blocks(k, v, index)
        mask = sees(jnp.where(slot < 0, 0, jnp.take(until, slot)), query, jnp.take(since, slot))
        return _add_block(so_far, q_KxGCxH, block_k, block_v, mask[None])

    size, slots = min(BLOCK, k.shape[-1]), k.shape[-1]
    seen = until > 0
    first, last = jnp.argmax(seen), slots - jnp.argmax(seen[::-1])
    done = jax.lax.fori_loop(first // size, (last + size - 1) // size, add, _none_yet(q_KxGCxH))
    out = (done.out / done.total[..., None]).astype(q.dtype)
    return out.reshape(kv, g, c, h).transpose(2, 0, 1, 3)


def attend_lanes(
    q: Array, row: tuple[Array, Array], ring: tuple[Array, Array], fed: Fed, in_ring: Array, execution: Execution
) -> Array:
    """One query a lane [R M, 1, N, H] against keys and values of its row, read once for all its lanes, and its ring."""
    (row_k, row_v), (new_k, new_v) = row, ring
    q_RMxKxGxH = _grouped(q[:, 0], row_k.shape[1])
    r, m = fed.newest.shape
    b, kv, g, h = q_RMxKxGxH.shape
    q_RxKxMGxH = q_RMxKxGxH.reshape(r, m, kv, g, h).swapaxes(1, 2).reshape(r, kv, m * g, h)

    def spread(x: Array) -> Array:
        """[R, M, S] -> [R, 1, M G, S]."""
        return jnp.repeat(x, g, axis=1)[:, None]

    def back(x: Array) -> Array:
        """[R, K, M G, ...] -> [R M, K, G, ...]."""
        return x.reshape(r, kv, m, g, *x.shape[3:]).swapaxes(1, 2).reshape(b, kv, g, *x.shape[3:])

    add_row = partial(_add_block, q=q_RxKxMGxH)
    if execution.attention == "chunked":
        first, last = _extent(fed, row_k.shape[-1])

        def add(index: Array, so_far: Running) -> Running:
            block_k, block_v, slot = _blocks(row_k, row_v, index)
            return add_row(so_far, k=block_k, v=block_v, mask=spread(_seen_slots(fed, slot)))

        on_row = jax.lax.fori_loop(first, last, add, _none_yet(q_RxKxMGxH))
    else:
        mask = spread(_seen_slots(fed, jnp.arange(row_k.shape[-1])))
        on_row = add_row(_none_yet(q_RxKxMGxH), k=row_k, v=row_v, mask=mask)
    both = _add_block(Running(*map(back, on_row)), q_RMxKxGxH, new_k, new_v, in_ring[:, None, None])
    return (both.out / both.total[..., None]).astype(q.dtype).reshape(q.shape)


def _seen_slots(fed: Fed, slot: Array) -> Array:
    """Which slots [S] of their row the lanes see: bool [R, M, S]."""
    trunk = (fed.trunk_start[..., None] <= slot) & (slot < fed.trunk_end[..., None])
    return trunk | ((fed.own_start[..., None] <= slot) & (slot < fed.own_end[..., None]))


def _extent(fed: Fed, slots: int) -> tuple[Array, Array]:
    """From which block to before which block any lane sees something."""
    size = min(BLOCK, slots)
    spans = (fed.trunk_start, fed.trunk_end), (fed.own_start, fed.own_end)
    first = jnp.minimum(*(jnp.min(jnp.where(a < b, a, slots)) for a, b in spans))
    last = jnp.maximum(*(jnp.max(jnp.where(a < b, b, 0)) for a, b in spans))
    return first // size, (last + size - 1) // size
