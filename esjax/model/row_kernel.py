"""Flash attention for the token row on GPUs: a Pallas kernel (Triton) that visits only blocks where a token sees another.

A block of queries needs a block of keys iff one of these is seen long enough, see ``rows.sees``. So the kernels walk lists of
blocks and have no branch inside their loops; a packed row costs what its segments cost, and a branch does not look at its
siblings.

The algorithm is FlashAttention-2 (Dao 2023): the forward pass keeps the output and the logarithm of the softmax's sum, the
backward pass makes the probabilities again, once for dq and once for dk and dv.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from esjax.rows import sees

LOG2_E = math.log2(math.e)
MASKED = -1e30  # a masked score
LOWEST = -1e20  # where the running maximum begins: far above MASKED, so that a row that sees nothing of a block adds 0


class Blocks(NamedTuple):
    """Tile sizes in tokens: queries and keys of the forward pass, and of the backward pass."""

    query: int = 128
    key: int = 64
    query_back: int = 64
    key_back: int = 64


class Lists(NamedTuple):
    """For each block, which blocks of the other side it needs: the first ``size`` entries of ``order``."""

    order: Array  # int32 [B, blocks, blocks of the other side]
    size: Array  # int32 [B, blocks, 1]


def row_attention(q: Array, k: Array, v: Array, until: Array, interpret: bool = False) -> Array:
    """Attention of rows: q [B, T, N, H], k and v [B, T, K, H], until [B, T] -> [B, T, N, H]; scores scaled by H**-0.5.

    Head n uses key/value head n // (N // K). Differentiable in q, k and v. T is padded to whole blocks inside.

    Raises:
        ValueError: H is not a power of two of at least 16, or N no multiple of K.
    """
    _, t, n, h = q.shape
    if n % k.shape[2]:
        raise ValueError(f"{n} query heads cannot share {k.shape[2]} key/value heads evenly")
    if h < 16 or h & (h - 1):
        raise ValueError(f"the head size is {h}; the kernel needs a power of two of at least 16")
    blocks = Blocks(*(min(b, max(16, pl.next_power_of_2(t))) for b in Blocks()))
    whole = -(-t // max(blocks)) * max(blocks)
    itself = jnp.broadcast_to(jnp.arange(t, whole, dtype=jnp.int32) + 1, (q.shape[0], whole - t))  # what padding sees

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, whole - t), *[(0, 0)] * (x.ndim - 2)))

    whole_until = jnp.concatenate([until.astype(jnp.int32), itself], axis=1)
    return _attend(pad(q), pad(k), pad(v), whole_until, blocks, interpret)[:, :t]


def block_lists(until: Array, query: int, key: int) -> tuple[Lists, Lists]:
    """For each block of queries its blocks of keys, and for each block of keys its blocks of queries; exact."""
    b, t = until.shape
    first = jnp.arange(0, t, query)[:, None]
    here = jnp.where(jnp.arange(t) < first + query, until[:, None], 0)  # [B, query blocks, T]
    needs = here.reshape(b, t // query, t // key, key).max(axis=3) > first

    def lists(needs: Array) -> Lists:
        order = jnp.argsort(~needs, axis=-1, stable=True).astype(jnp.int32)
        return Lists(order, needs.sum(axis=-1, dtype=jnp.int32, keepdims=True))

    return lists(needs), lists(needs.swapaxes(1, 2))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, until: Array, blocks: Blocks, interpret: bool) -> Array:
    return _forward(q, k, v, until, blocks, interpret)[0]


def _forward(
    q: Array, k: Array, v: Array, until: Array, blocks: Blocks, interpret: bool
) -> tuple[Array, tuple[Any, ...]]:
    b, t, n, h = q.shape
    group = n // k.shape[2]
    lists, _ = block_lists(until, blocks.query, blocks.key)
    tile = pl.BlockSpec((None, blocks.query, None, h), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, t, None, h), lambda i, b, n: (b, 0, n // group, 0))
    row = pl.BlockSpec((None, t), lambda i, b, n: (b, 0))
    out, lse = pl.pallas_call(
        partial(_forward_kernel, key=blocks.key),
        grid=(t // blocks.query, b, n),
        in_specs=[tile, keys, keys, row, *_list_specs(lists, lambda i, b, n: (b, i, 0))],
        out_specs=[tile, pl.BlockSpec((None, None, blocks.query), lambda i, b, n: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, n, t), jnp.float32)],
        compiler_params=_tuning(h),
        interpret=interpret,
        name="row_attention",
    )(q, k, v, until, *lists)
    return out, (q, k, v, until, out, lse)


def _backward(blocks: Blocks, interpret: bool, saved: tuple[Any, ...], dout: Array) -> tuple[Any, ...]:
    q, k, v, until, out, lse = saved
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    group = n // kv_heads
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    of_queries, of_keys = block_lists(until, blocks.query_back, blocks.key_back)
    tile = pl.BlockSpec((None, blocks.query_back, None, h), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, t, None, h), lambda i, b, n: (b, 0, n // group, 0))
    row = pl.BlockSpec((None, t), lambda i, b, n: (b, 0))
    per_score = pl.BlockSpec((None, None, blocks.query_back), lambda i, b, n: (b, n, i))
    dq = pl.pallas_call(
        partial(_dq_kernel, key=blocks.key_back),
        grid=(t // blocks.query_back, b, n),
        in_specs=[
            *(tile, keys, keys, tile, per_score, per_score, row),
            *_list_specs(of_queries, lambda i, b, n: (b, i, 0)),
        ],
        out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=_tuning(h),
        interpret=interpret,
        name="row_attention_dq",
    )(q, k, v, dout, lse, delta, until, *of_queries)
    # One program sums over all query heads of its key/value head, so nothing is added up between programs.
    heads = pl.BlockSpec((None, t, group, h), lambda i, b, m: (b, 0, m, 0))
    tile = pl.BlockSpec((None, blocks.key_back, None, h), lambda i, b, m: (b, i, m, 0))
    own = pl.BlockSpec((None, blocks.key_back), lambda i, b, m: (b, i))
    scores = pl.BlockSpec((None, group, t), lambda i, b, m: (b, m, 0))
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, query=blocks.query_back, group=group),
        grid=(t // blocks.key_back, b, kv_heads),
        in_specs=[
            *(heads, tile, tile, heads, scores, scores, own),
            *_list_specs(of_keys, lambda i, b, m: (b, i, 0)),
        ],
        out_specs=[tile, tile],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=_tuning(h),
        interpret=interpret,
        name="row_attention_dkv",
    )(q, k, v, dout, lse, delta, until, *of_keys)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(*refs: Any, key: int) -> None:
    q, k, v, until, index, count, out, lse = refs
    query_tile = q[...]
    size, h = query_tile.shape
    at_query = pl.program_id(0) * size + jnp.arange(size)

    def visit(n: Array, so_far: Sums) -> Sums:
        here = pl.ds(index[n] * key, key)
        mask = sees(until[here], at_query, index[n] * key + jnp.arange(key))
        return with_block(so_far, _scores(query_tile, k[here, :], mask), v[here, :])

    acc, high, total = jax.lax.fori_loop(0, count[0], visit, no_sums(size, h))
    out[...] = (acc / total[:, None]).astype(out.dtype)
    lse[...] = high + jnp.log2(total)


class Sums(NamedTuple):
    """Softmax over the blocks so far, for each query of a tile: sums relative to the greatest score, float32."""

    out: Array  # [queries, H]
    high: Array  # [queries], the greatest score, in units of log 2
    total: Array  # [queries]


def no_sums(queries: int, h: int) -> Sums:
    """Before the first block."""
    zero = jnp.zeros(queries, jnp.float32)
    return Sums(jnp.zeros((queries, h), jnp.float32), jnp.full(queries, LOWEST, jnp.float32), zero)


def with_block(so_far: Sums, s: Array, v: Array) -> Sums:
    """With one more block of keys: scores s [queries, keys] in units of log 2, and values v [keys, H]."""
    high = jnp.maximum(so_far.high, jnp.max(s, axis=1))
    p, shrink = jnp.exp2(s - high[:, None]), jnp.exp2(so_far.high - high)
    out = so_far.out * shrink[:, None] + dot(p.astype(v.dtype), v)
    return Sums(out, high, so_far.total * shrink + jnp.sum(p, axis=1))


def _dq_kernel(*refs: Any, key: int) -> None:
    q, k, v, dout, lse, delta, until, index, count, dq = refs
    query_tile, dout_tile, lse_tile, delta_tile = q[...], dout[...], lse[...], delta[...]
    size, h = query_tile.shape
    at_query = pl.program_id(0) * size + jnp.arange(size)

    def visit(n: Array, acc: Array) -> Array:
        here = pl.ds(index[n] * key, key)
        mask = sees(until[here], at_query, index[n] * key + jnp.arange(key))
        p = jnp.exp2(_scores(query_tile, k[here, :], mask) - lse_tile[:, None])
        ds = p * (dot(dout_tile, v[here, :].T) - delta_tile[:, None])
        return acc + dot(ds.astype(q.dtype), k[here, :])

    acc = jax.lax.fori_loop(0, count[0], visit, jnp.zeros((size, h), jnp.float32))
    dq[...] = (acc * h**-0.5).astype(dq.dtype)


def _dkv_kernel(*refs: Any, query: int, group: int) -> None:
    q, k, v, dout, lse, delta, until, index, count, dk, dv = refs
    key_tile, value_tile, until_tile = k[...], v[...], until[...]
    size, h = key_tile.shape
    at_key = pl.program_id(0) * size + jnp.arange(size)

    def visit(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        acc_k, acc_v = carry
        block, head = index[jax.lax.div(n, group)], jax.lax.rem(n, group)
        here = pl.ds(block * query, query)
        q_tile, dout_tile = q[here, head, :], dout[here, head, :]
        mask = sees(until_tile, block * query + jnp.arange(query), at_key)
        p = jnp.exp2(_scores(q_tile, key_tile, mask) - lse[head, here][:, None])
        ds = p * (dot(dout_tile, value_tile.T) - delta[head, here][:, None])
        return acc_k + dot(ds.astype(q.dtype).T, q_tile), acc_v + dot(p.astype(q.dtype).T, dout_tile)

    zeros = jnp.zeros((size, h), jnp.float32)
    acc_k, acc_v = jax.lax.fori_loop(0, count[0] * group, visit, (zeros, zeros))
    dk[...] = (acc_k * h**-0.5).astype(dk.dtype)
    dv[...] = acc_v.astype(dv.dtype)


def _scores(q: Array, k: Array, mask: Array) -> Array:
    """Scores in units of log 2, for exp2 is what the hardware has."""
    return jnp.where(mask, dot(q, k.T) * (LOG2_E * q.shape[1] ** -0.5), MASKED)


def dot(a: Array, b: Array) -> Array:
    """A product of tiles, summed in float32."""
    # HIGHEST keeps float32 inputs in float32 (no tf32); bfloat16 products are exact anyway.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _list_specs(lists: Lists, block: Any) -> list[pl.BlockSpec]:
    return [pl.BlockSpec((None, None, x.shape[2]), block) for x in lists]


def _tuning(head_size: int) -> plgpu.CompilerParams:
    return plgpu.CompilerParams(num_warps=4 if head_size <= 64 else 8, num_stages=2)
