"""Keys and values kept: where they lie, how new ones are written, and attention to them.

A *row* keeps the keys and values of prompts, trunks and branches, in T slots. M *lanes* a row each grow one reply. What they
draw lies behind these slots in a ring of N places for each, the lanes' side by side, all written at once at the same place
(the clock), however far each has come. So a step reads a row once, for all of its lanes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from esjax.model.decoder import Execution
from esjax.model.families import Architecture
from esjax.model.layers import Scores, softcap
from esjax.rows import near, sees
from esjax.runtime.mesh import constrain, sharding_here

BLOCK = 128  # slots that a CPU attends to at a time in prefill
PARTS = 4  # of the slots that a CPU may leave out in decoding


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["slots"])
@dataclass(frozen=True)
class Cache:
    """Keys and values, one array a layer; keys lie transposed, so that both products of attention read memory in order."""

    keys: tuple[Array, ...]  # [R, K, H, S], S = T + N M
    values: tuple[Array, ...]  # [R, K, S, H]
    slots: int  # T


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
    slot_position: Any  # int32 [P, T], the position of what lies in the slot, where a token sees it


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
    """A cache of ``rows`` rows of T = ``slots`` with ``lanes`` rings of N = ``new`` each, every array in its place."""
    k, h, s = arch.kv_heads, arch.head_size, slots + new * lanes
    where = sharding_here(*CACHE, None, None)
    keys, values = (
        (jax.ShapeDtypeStruct((rows, k, *shape), dtype, sharding=where),) * arch.layers for shape in ((h, s), (s, h))
    )
    return Cache(keys, values, slots)  # type: ignore[arg-type]


def empty_cache(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """The same, filled with zeros."""
    shapes = cache_shapes(arch, rows, lanes, slots, new, dtype)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def pinned(keys: list[Array], values: list[Array], cache: Cache) -> Cache:
    """The cache with these arrays, where it belongs: what a program gives back must lie as it was given."""
    return replace(
        cache,
        keys=tuple(constrain(x, *CACHE, None, None) for x in keys),
        values=tuple(constrain(x, *CACHE, None, None) for x in values),
    )


def lanes_see(fed: Fed, clock: Array, cache: Cache, window: int | None = None) -> Array:
    """Which of their row's slots and rings the lanes see in a step: bool [R, M, S]; of a ``window``, the nearest."""
    m = fed.token.shape[1]
    slot = jnp.arange(cache.slots)
    trunk = (fed.trunk_start[..., None] <= slot) & (slot < fed.trunk_end[..., None])
    own = (fed.own_start[..., None] <= slot) & (slot < fed.own_end[..., None])
    n = (cache.keys[0].shape[-1] - cache.slots) // m
    age = (clock - jnp.arange(n)) % n
    newest = fed.newest
    if window is not None:  # a trunk begins at position 0, and what lies in a span follows without a gap
        seen, here = fed.trunk_end - fed.trunk_start, fed.position[..., None]
        trunk &= near(window, here, slot - fed.trunk_start[..., None])[..., 0, :]
        own &= near(window, here, slot - (fed.own_start - seen)[..., None])[..., 0, :]
        newest = jnp.minimum(newest, window)
    ring = (age < newest[..., None])[..., None] & jnp.eye(m, dtype=bool)[:, None]  # [R, M, N, M]
    return jnp.concatenate([trunk | own, ring.reshape(*fed.token.shape, n * m)], axis=-1)


@jax.named_scope("cache")
def write_step(keys: Array, values: Array, k: Array, v: Array, at: Array) -> tuple[Array, Array]:
    """A layer's cache with the new keys and values [R M, 1, K, H] of all lanes from slot ``at`` on."""
    rm, _, kv, h = k.shape
    split = (len(keys), rm // len(keys), kv, h)
    keys = jax.lax.dynamic_update_slice(keys, k.reshape(split).transpose(0, 2, 3, 1).astype(keys.dtype), (0, 0, 0, at))
    new = v.reshape(split).swapaxes(1, 2).astype(values.dtype)
    return keys, jax.lax.dynamic_update_slice(values, new, (0, 0, at, 0))


def rows_of(keys: Array, values: Array, chunk: Chunk) -> tuple[Array, Array]:
    """The slots of the chunk's rows: [P, K, H, T] and [P, K, T, H]."""
    slots, (_, k, h, _) = chunk.until.shape[1], keys.shape
    take_k = jax.vmap(lambda row: jax.lax.dynamic_slice(keys, (row, 0, 0, 0), (1, k, h, slots))[0])
    take_v = jax.vmap(lambda row: jax.lax.dynamic_slice(values, (row, 0, 0, 0), (1, k, slots, h))[0])
    return take_k(chunk.row), take_v(chunk.row)


@jax.named_scope("cache")
def write_chunk(
    keys: Array, values: Array, k: Array, v: Array, chunk: Chunk, execution: Execution
) -> tuple[Array, Array]:
    """The cache with new keys and values [P, C, K, H] in its rows."""
    if execution.attention in ("cudnn", "pallas"):  # a GPU: one program that scatters, rather than one for each window
        slot = chunk.start[:, None] + jnp.arange(k.shape[1])
        slot = jnp.where(chunk.valid, slot, keys.shape[-1])  # behind the end: dropped
        at = chunk.row[:, None]
        keys = keys.at[at, :, :, slot].set(k.astype(keys.dtype), mode="drop", unique_indices=True)
        return keys, values.at[at, :, slot].set(v.astype(values.dtype), mode="drop", unique_indices=True)
    for p in range(len(k)):
        keys = _put(keys, k[p].transpose(1, 2, 0), chunk.valid[p], (chunk.row[p], 0, 0, chunk.start[p]))
        values = _put(values, v[p].transpose(1, 0, 2), chunk.valid[p][:, None], (chunk.row[p], 0, chunk.start[p], 0))
    return keys, values


def _put(cache: Array, new: Array, valid: Array, at: tuple[Any, ...]) -> Array:
    old = jax.lax.dynamic_slice(cache, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(cache, jnp.where(valid, new.astype(cache.dtype)[None], old), at)


def _grouped(q: Array, kv_heads: int) -> Array:
    """Scaled queries [..., N, H] by the key/value head that they use: [..., K, G, H]."""
    return (q * q.shape[-1] ** -0.5).reshape(*q.shape[:-2], kv_heads, -1, q.shape[-1])


def attend_chunk(
    q: Array,
    keys: Array,
    values: Array,
    chunk: Chunk,
    execution: Execution,
    scores: Scores = Scores(),  # noqa: B008  immutable
) -> Array:
    """Queries [P, C, N, H] of a chunk against their rows -> [P, C, N, H]."""
    p, c, _, _ = q.shape
    if execution.attention == "chunked":
        grouped, windows = _grouped(q, keys.shape[1]), [jax.tree.map(lambda x, i=i: x[i], chunk) for i in range(p)]
        parts = [_blocked_chunk(grouped[i], keys, values, windows[i], scores) for i in range(p)]
        return jnp.stack(parts).reshape(q.shape)
    mask = sees(chunk.until, jnp.arange(c), chunk.since)
    if scores.window is not None:
        mask &= near(scores.window, chunk.position, chunk.slot_position)
    # A TPU's compiler would rather turn all of the cache than what is taken out of it.
    if execution.attention == "splash":
        keys, values = (with_layout_constraint(x, Layout((0, 1, 2, 3))) for x in (keys, values))
    k, v = rows_of(keys, values, chunk)
    # Keys are transposed apart: fused with the taking of rows, that would read memory against the order in which they lie.
    k = with_layout_constraint(k, Layout((0, 1, 2, 3)))
    if scores.cap is not None:
        grouped = _grouped(q, k.shape[1]).transpose(0, 2, 3, 1, 4)  # [P, K, G, C, H]
        s = jnp.einsum("pkgch,pkht->pkgct", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], softcap(s, scores.cap), NEVER), axis=-1)
        out = jnp.einsum("pkgct,pkth->pckgh", weights.astype(q.dtype), v.astype(q.dtype))
        return out.reshape(q.shape)
    k, v = k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)
    library: Literal["cudnn", "xla"] = "cudnn" if execution.attention == "cudnn" else "xla"
    return jax.nn.dot_product_attention(
        q, k.astype(q.dtype), v.astype(q.dtype), mask=mask[:, None], implementation=library
    )


class Running(NamedTuple):
    """Softmax over blocks (Milakov and Gimelshein 2018): the greatest score so far, and sums relative to it."""

    top: Array  # [..., Q]
    total: Array  # [..., Q]
    out: Array  # [..., Q, H]


def _add_block(so_far: Running, q: Array, k: Array, v: Array, mask: Array, cap: float | None) -> Running:
    """One more block of keys: q [..., Q, H], k [..., H, S], v [..., S, H], mask [..., Q, S] broadcast."""
    scores = softcap(jnp.matmul(q, k.astype(q.dtype), preferred_element_type=jnp.float32), cap)
    scores = jnp.where(mask, scores, NEVER)
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


def _blocked_chunk(q: Array, keys: Array, values: Array, chunk: Chunk, scores: Scores) -> Array:
    """For CPUs: queries [C, K, G, H] of one window against those blocks of its row that lie between the first and the last
    slot that they see. Blocks are taken out of the cache one by one: the whole row would be written and read once more."""
    since, until = chunk.since, chunk.until
    c, kv, g, h = q.shape
    q_KxGCxH = q.transpose(1, 2, 0, 3).reshape(kv, g * c, h)
    query, slots = jnp.tile(jnp.arange(c), g), len(until)
    size = min(BLOCK, slots)

    def add(index: Array, so_far: Running) -> Running:
        start = jnp.minimum(index * size, slots - size)  # the last block may reach back
        k = jax.lax.dynamic_slice(keys, (chunk.row, 0, 0, start), (1, kv, h, size))[0]
        v = jax.lax.dynamic_slice(values, (chunk.row, 0, start, 0), (1, kv, size, h))[0]
        slot = start + jnp.arange(size)
        mask = sees(jnp.where(slot < index * size, 0, jnp.take(until, slot)), query, jnp.take(since, slot))
        if scores.window is not None:
            mask &= near(scores.window, jnp.take(chunk.position, query), jnp.take(chunk.slot_position, slot))
        return _add_block(so_far, q_KxGCxH, k, v, mask[None], scores.cap)

    seen = until > 0
    first, last = jnp.argmax(seen), slots - jnp.argmax(seen[::-1])
    done = jax.lax.fori_loop(first // size, (last + size - 1) // size, add, _none_yet(q_KxGCxH))
    out = (done.out / done.total[..., None]).astype(q.dtype)
    return out.reshape(kv, g, c, h).transpose(2, 0, 1, 3)


def attend_lanes(
    q: Array, keys: Array, values: Array, seen: Array, execution: Execution, cap: float | None = None
) -> Array:
    """One query a lane [R M, 1, N, H] against its row and its ring, read once for all lanes; ``seen`` as of ``lanes_see``.

    A kernel (triton, mosaic) reads what some lane sees.
    """
    (r, m, _), (_, kv, h, _) = seen.shape, keys.shape
    g = q.shape[2] // kv
    q_RxKxMGxH = q.reshape(r, m, kv, g, h).swapaxes(1, 2).reshape(r, kv, m * g, h)
    mask = jnp.repeat(seen, g, axis=1)
    if execution.decoding == "mosaic":
        from esjax.model.lanes_mosaic import lanes_attention

        out = lanes_attention(q_RxKxMGxH, keys, values, mask, cap, execution.interpret)
    elif execution.decoding == "triton":
        from esjax.model import lanes_triton  # not without Pallas' Triton backend

        out = lanes_triton.lanes_attention(q_RxKxMGxH, keys, values, mask, execution.interpret)
    else:
        scaled = q_RxKxMGxH * h**-0.5
        way = _parts_of_lanes if execution.attention == "chunked" else _whole_lanes
        out = way(scaled, keys, values, mask[:, None], cap)
    return out.reshape(r, kv, m, g, h).swapaxes(1, 2).reshape(q.shape)


def _whole_lanes(q: Array, keys: Array, values: Array, mask: Array, cap: float | None) -> Array:
    """Queries [R, K, M G, H] against all slots; mask [R, 1, M G, S]."""
    scores = jnp.matmul(q, keys.astype(q.dtype), preferred_element_type=jnp.float32)
    p = jax.nn.softmax(jnp.where(mask, softcap(scores, cap), NEVER), axis=-1).astype(q.dtype)
    return jnp.matmul(p, values.astype(q.dtype), preferred_element_type=jnp.float32).astype(q.dtype)


def _parts_of_lanes(q: Array, keys: Array, values: Array, mask: Array, cap: float | None) -> Array:
    """For CPUs: the same, against those of the slots' ``PARTS`` that any query sees. One costs a third more than its share of
    all slots at once, and these are taken where few would be left out."""
    size = -(-mask.shape[-1] // PARTS)
    bounds = [(start, min(start + size, mask.shape[-1])) for start in range(0, mask.shape[-1], size)]
    live = jnp.stack([mask[..., start:stop].any() for start, stop in bounds])

    def some() -> Array:
        so_far = _none_yet(q)
        for alive, (start, stop) in zip(live, bounds, strict=True):

            def add(so_far: Running, start: int = start, stop: int = stop) -> Running:
                part = slice(start, stop)
                return _add_block(so_far, q, keys[..., part], values[:, :, part], mask[..., part], cap)

            so_far = jax.lax.cond(alive, add, lambda so_far: so_far, so_far)
        return (so_far.out / so_far.total[..., None]).astype(q.dtype)

    return jax.lax.cond(live.sum() > PARTS // 2, lambda: _whole_lanes(q, keys, values, mask, cap), some)
