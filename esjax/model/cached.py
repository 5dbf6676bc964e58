"""The decoder with a cache: weights laid out for decoding, rows of prompts, and what grows from them.

A *row* keeps the keys and values of prompts, trunks and branches, as ``rows.py`` lays them out, in T slots. M *lanes* a row
each grow one reply. What a lane has drawn lies in a ring of its own of N slots, written by all lanes at the same place (the
clock), so that one small in-place write serves them all, however far each has come. A step reads the weights once, a row's
slots once for its M lanes, and each lane's ring.

Layers are apart here, not stacked: a loop over stacked weights copies each layer's slice before using it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.mesh import constrain
from esjax.model.attention import Spans, sees
from esjax.model.decoder import Decoder, Execution
from esjax.model.families import Architecture
from esjax.model.layers import Linear, rms_norm, rope_at, rotate

BLOCK = 128  # slots that the CPU attends to at a time


class Dense(NamedTuple):
    """y = x W + bias + (x a) b: an adapter that is not merged is joined with those of its neighbours, scaled."""

    kernel: Array  # [in, ...out]
    bias: Array | None  # [...out]
    adapter: tuple[Array, Array] | None  # a [in, R'], b [R', ...out]

    def __call__(self, x: Array) -> Array:
        """[n, in] -> [n, ...out]."""
        y = jnp.tensordot(x, self.kernel, 1)
        y = y if self.bias is None else y + self.bias
        if self.adapter is None:
            return y
        a, b = self.adapter
        return y + jnp.tensordot(x @ a, b, 1)


class Layer(NamedTuple):
    """One layer's weights. Queries, keys and values are one product, gate and up another."""

    qkv: Dense  # [D] -> [K, N / K + 2, H]: for each key/value head its queries, its key, its value
    o: Dense  # [N H] -> [D]
    gate_up: Dense  # [D] -> [2, F]
    down: Dense  # [F] -> [D]
    attn_norm: Array  # [D]
    mlp_norm: Array  # [D]


class Weights(NamedTuple):
    """All weights of base + adapter, laid out for decoding."""

    embed: Array  # [V, D]
    head: Array  # [V, D]; the same array as embed where the two are tied
    norm: Array  # [D]
    layers: tuple[Layer, ...]


class Cache(NamedTuple):
    """Keys and values, one array a layer; keys lie transposed, so that both products of attention read memory in order."""

    row_k: tuple[Array, ...]  # [R, K, H, T]
    row_v: tuple[Array, ...]  # [R, K, T, H]
    new_k: tuple[Array, ...]  # [R M, K, H, N]
    new_v: tuple[Array, ...]  # [R M, K, N, H]


class Chunk(NamedTuple):
    """Prompt tokens to be written into C successive slots of each of P rows."""

    row: Any  # int32 [P]
    start: Any  # int32 [P], the first of the slots; start + C <= T
    tokens: Any  # int32 [P, C]
    position: Any  # int32 [P, C]
    valid: Any  # bool [P, C]; other slots keep what they hold
    trunk_start: Any  # int32 [P, C], Spans in the row's slots
    trunk_end: Any
    own_start: Any


class Seen(NamedTuple):
    """What lanes [R, M] see: two spans of their row's slots, and the newest ``fed`` slots of their ring."""

    trunk_start: Array
    trunk_end: Array
    own_start: Array
    own_end: Array
    fed: Array


def empty_cache(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """A cache of ``rows`` rows of T = ``slots`` and ``lanes`` lanes a row with rings of N = ``new``."""
    k, h = arch.kv_heads, arch.head_size
    shapes = ((rows, k, h, slots), (rows, k, slots, h), (rows * lanes, k, h, new), (rows * lanes, k, new, h))
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(arch.layers)) for shape in shapes))


# --- weights ---------------------------------------------------------------------------------------------------------


def lay_out(model: Decoder, merge: bool) -> Weights:
    """The weights of a bound model; ``merge`` adds scale A B to the kernels, in float32, instead of keeping A and B apart.

    In bfloat16 merging rounds away what the adapter changes by less than half a unit in the last place.
    """
    arch, block = model.arch, model.layers
    groups = arch.heads // arch.kv_heads
    by_head = (arch.kv_heads, groups, arch.head_size), (arch.kv_heads, 1, arch.head_size)
    projections = (block.q_proj, by_head[0]), (block.k_proj, by_head[1]), (block.v_proj, by_head[1])
    layers = tuple(
        Layer(
            qkv=_join(i, projections, 1, merge),
            o=_join(i, ((block.o_proj, (arch.width,)),), 0, merge),
            gate_up=_join(i, ((block.gate_proj, (1, arch.hidden)), (block.up_proj, (1, arch.hidden))), 0, merge),
            down=_join(i, ((block.down_proj, (arch.width,)),), 0, merge),
            attn_norm=block.attn_norm[...][i],
            mlp_norm=block.mlp_norm[...][i],
        )
        for i in range(arch.layers)
    )
    return Weights(model.embed[...], model.head_weight, model.norm[...], layers)


def _join(layer: int, parts: tuple[tuple[Linear, tuple[int, ...]], ...], axis: int, merge: bool) -> Dense:
    """Linear layers of one input as one, each with its output shape, joined along an axis of those."""
    kernels: list[Array] = []
    biases: list[Array] = []
    adapters: list[tuple[Array, Array]] = []
    for which, (linear, shape) in enumerate(parts):
        kernel = linear.kernel[...][layer]
        if linear.lora_a is not None and linear.lora_b is not None:
            a, b = linear.lora_a[...][layer].T * linear.scale, linear.lora_b[...][layer]  # [in, R], [R, out]
            if merge:
                kernel = (kernel.astype(jnp.float32) + a @ b).astype(kernel.dtype)
            else:  # B acts on its own part of the output alone
                blocks = [jnp.zeros((len(b), *s), kernel.dtype) for _, s in parts]
                blocks[which] = b.astype(kernel.dtype).reshape(-1, *shape)
                adapters.append((a.astype(kernel.dtype), jnp.concatenate(blocks, axis + 1)))
        kernels.append(kernel.reshape(-1, *shape))
        if linear.bias is not None:
            biases.append(linear.bias[...][layer].reshape(shape))
    adapter = None
    if adapters:
        adapter = jnp.concatenate([a for a, _ in adapters], 1), jnp.concatenate([b for _, b in adapters], 0)
    bias = jnp.concatenate(biases, axis) if biases else None
    return Dense(jnp.concatenate(kernels, axis + 1), bias, adapter)


CACHE_AXES = ("batch", "kv_heads", None, None)  # of every array of a Cache


def weight_axes(weights: Weights) -> Weights:
    """The logical axes of every array: a tree like ``weights`` whose leaves are tuples."""

    def dense(d: Dense, into: tuple[str | None, ...], out: tuple[str | None, ...]) -> Any:
        bias = None if d.bias is None else out
        return Dense((*into, *out), bias, None if d.adapter is None else ((*into, None), (None, *out)))  # type: ignore[arg-type]

    layers = tuple(
        Layer(
            qkv=dense(x.qkv, ("embed",), ("kv_heads", None, None)),
            o=dense(x.o, ("heads",), ("embed",)),
            gate_up=dense(x.gate_up, ("embed",), (None, "mlp")),
            down=dense(x.down, ("mlp",), ("embed",)),
            attn_norm=("embed",),  # type: ignore[arg-type]
            mlp_norm=("embed",),  # type: ignore[arg-type]
        )
        for x in weights.layers
    )
    return Weights(("vocab", "embed"), ("vocab", "embed"), ("embed",), layers)  # type: ignore[arg-type]


# --- the two passes --------------------------------------------------------------------------------------------------


def load(arch: Architecture, weights: Weights, cache: Cache, chunk: Chunk, how: Execution) -> Cache:
    """Prefill: compute the chunk's keys and values and write them into the rows."""
    rope = rope_at(arch, chunk.position)
    x = weights.embed[chunk.tokens]
    p, c, _ = x.shape
    row_k, row_v = list(cache.row_k), list(cache.row_v)
    spans = Spans(chunk.trunk_start, chunk.trunk_end, chunk.own_start)
    for i, layer in enumerate(weights.layers):
        q, k, v = _qkv(arch, layer, x.reshape(p * c, -1), (p, c), rope)
        row_k[i] = _write(row_k[i], k.transpose(0, 2, 3, 1), chunk, axis=3)
        row_v[i] = _write(row_v[i], v.transpose(0, 2, 1, 3), chunk, axis=2)
        if i + 1 < arch.layers:  # the last layer's keys and values are all that is wanted of it
            attended = _attend_chunk(q, row_k[i], row_v[i], chunk, spans, how)
            x = _rest(arch, layer, x.reshape(p * c, -1), attended.reshape(p * c, -1)).reshape(p, c, -1)
    return cache._replace(row_k=tuple(row_k), row_v=tuple(row_v))


def step(
    arch: Architecture,
    weights: Weights,
    cache: Cache,
    token: Array,
    position: Array,
    seen: Seen,
    clock: Array,
    how: Execution,
) -> tuple[Array, Cache]:
    """Feed one token to each lane [R, M]. Returns final hidden states [R M, D] and the cache.

    Args:
        clock: int32, the ring's slot (modulo N) that this step writes.
    """
    r, m = token.shape
    rope = rope_at(arch, position.reshape(-1, 1))
    x = weights.embed[token.reshape(-1)]
    new_k, new_v = list(cache.new_k), list(cache.new_v)
    n = new_k[0].shape[-1]
    slot = clock % n
    age = (slot - jnp.arange(n)) % n
    in_ring = age < seen.fed.reshape(-1, 1)
    for i, layer in enumerate(weights.layers):
        q, k, v = (y[:, 0] for y in _qkv(arch, layer, x, (r * m, 1), rope))
        new_k[i] = jax.lax.dynamic_update_slice(new_k[i], k[..., None].astype(new_k[i].dtype), (0, 0, 0, slot))
        new_v[i] = jax.lax.dynamic_update_slice(new_v[i], v[:, :, None].astype(new_v[i].dtype), (0, 0, slot, 0))
        attended = _attend_lanes(q, cache.row_k[i], cache.row_v[i], new_k[i], new_v[i], seen, in_ring, how)
        x = _rest(arch, layer, x, attended.reshape(r * m, -1))
    return rms_norm(x, weights.norm, arch.norm_eps), cache._replace(new_k=tuple(new_k), new_v=tuple(new_v))


def _qkv(arch: Architecture, layer: Layer, x: Array, shape: tuple[int, int], rope: Any) -> tuple[Array, Array, Array]:
    """Scaled, rotated queries [B, T, K, G, H], rotated keys and values [B, T, K, H] of x [B T, D]."""
    g = arch.heads // arch.kv_heads
    y = layer.qkv(rms_norm(x, layer.attn_norm, arch.norm_eps)).reshape(*shape, arch.kv_heads, g + 2, arch.head_size)
    y = constrain(y, None, None, "kv_heads", None, None)
    turned = rotate(y[..., : g + 1, :].reshape(*shape, -1, arch.head_size), rope).reshape(
        *shape, -1, g + 1, arch.head_size
    )
    return turned[..., :g, :] * arch.head_size**-0.5, turned[..., g, :], y[..., g + 1, :]


def _rest(arch: Architecture, layer: Layer, x: Array, attended: Array) -> Array:
    """Output projection and MLP, both added to x [n, D]."""
    x = x + layer.o(attended)
    both = constrain(layer.gate_up(rms_norm(x, layer.mlp_norm, arch.norm_eps)), None, None, "mlp")
    return x + layer.down(jax.nn.silu(both[:, 0]) * both[:, 1])


def _write(cache: Array, new: Array, chunk: Chunk, axis: Literal[2, 3]) -> Array:
    """The cache [R, ...] with new [P, ...] in its rows; one small in-place update for each of the P."""
    new = new.astype(cache.dtype)
    valid = chunk.valid[:, None, None, :] if axis == 3 else chunk.valid[:, None, :, None]
    for p in range(new.shape[0]):
        at = [chunk.row[p], 0, 0, 0]
        at[axis] = chunk.start[p]
        old = jax.lax.dynamic_slice(cache, at, (1, *new.shape[1:]))
        cache = jax.lax.dynamic_update_slice(cache, jnp.where(valid[p : p + 1], new[p : p + 1], old), at)
    return cache


# --- attention -------------------------------------------------------------------------------------------------------


def _attend_chunk(q: Array, row_k: Array, row_v: Array, chunk: Chunk, spans: Spans, how: Execution) -> Array:
    """Queries [P, C, K, G, H] of a chunk against their rows -> [P, C, K, G, H]."""
    p, c, kv, g, h = q.shape
    slots = row_k.shape[-1]
    at = chunk.start[:, None] + jnp.arange(c)  # slot of each query
    if how.attention == "chunked":
        parts = []
        for one in range(p):
            k, v = (jax.lax.dynamic_index_in_dim(x, chunk.row[one], keepdims=False) for x in (row_k, row_v))
            mine = Spans(*(x[one] for x in spans))
            parts.append(_blocked_chunk(q[one], k, v, mine, at[one]))
        return jnp.stack(parts)
    mask = jax.vmap(lambda s, i: sees(s, i, jnp.arange(slots)))(spans, at)
    k, v = row_k[chunk.row].transpose(0, 3, 1, 2), row_v[chunk.row].transpose(0, 2, 1, 3)
    library: Literal["cudnn", "xla"] = "cudnn" if how.attention == "cudnn" else "xla"
    out = jax.nn.dot_product_attention(
        q.reshape(p, c, kv * g, h),
        k.astype(q.dtype),
        v.astype(q.dtype),
        mask=mask[:, None],
        scale=1.0,
        implementation=library,
    )
    return out.reshape(p, c, kv, g, h)


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


def _blocked_chunk(q: Array, k: Array, v: Array, spans: Spans, at: Array) -> Array:
    """For CPUs: queries [C, K, G, H] of one row, at slots ``at``, against the blocks of which they see something.

    A branch may lie before its trunk, so the blocks that they see may lie before and after their own.
    """
    c, kv, g, h = q.shape
    q_KxGCxH = q.transpose(1, 2, 0, 3).reshape(kv, g * c, h)

    def add(index: Array, so_far: Running) -> Running:
        block_k, block_v, slot = _blocks(k, v, index)
        mask = sees(spans, at, slot)  # a slot of -1 is before every span
        return _add_block(so_far, q_KxGCxH, block_k, block_v, jnp.tile(mask, (g, 1))[None])

    size = min(BLOCK, k.shape[-1])
    in_trunk = spans.trunk_start < spans.trunk_end
    first = jnp.min(jnp.where(in_trunk, jnp.minimum(spans.trunk_start, spans.own_start), spans.own_start))
    last = jnp.maximum(jnp.max(jnp.where(in_trunk, spans.trunk_end, 0)), jnp.max(at) + 1)
    done = jax.lax.fori_loop(first // size, (last + size - 1) // size, add, _none_yet(q_KxGCxH))
    out = (done.out / done.total[..., None]).astype(q.dtype)
    return out.reshape(kv, g, c, h).transpose(2, 0, 1, 3)


def _attend_lanes(
    q: Array, row_k: Array, row_v: Array, new_k: Array, new_v: Array, seen: Seen, in_ring: Array, how: Execution
) -> Array:
    """One query a lane [R M, K, G, H] against its row, which is read once for the row's lanes, and its ring."""
    r, m = seen.fed.shape
    b, kv, g, h = q.shape
    q_RxKxMGxH = q.reshape(r, m, kv, g, h).swapaxes(1, 2).reshape(r, kv, m * g, h)

    def spread(x: Array) -> Array:
        """[R, M, S] -> [R, 1, M G, S]."""
        return jnp.repeat(x, g, axis=1)[:, None]

    def back(x: Array) -> Array:
        """[R, K, M G, ...] -> [R M, K, G, ...]."""
        return x.reshape(r, kv, m, g, *x.shape[3:]).swapaxes(1, 2).reshape(b, kv, g, *x.shape[3:])

    add_row = partial(_add_block, q=q_RxKxMGxH)
    if how.attention == "chunked":
        first, last = _extent(seen, row_k.shape[-1])

        def add(index: Array, so_far: Running) -> Running:
            block_k, block_v, slot = _blocks(row_k, row_v, index)
            return add_row(so_far, k=block_k, v=block_v, mask=spread(_seen_slots(seen, slot)))

        on_row = jax.lax.fori_loop(first, last, add, _none_yet(q_RxKxMGxH))
    else:
        mask = spread(_seen_slots(seen, jnp.arange(row_k.shape[-1])))
        on_row = add_row(_none_yet(q_RxKxMGxH), k=row_k, v=row_v, mask=mask)
    both = _add_block(Running(*map(back, on_row)), q, new_k, new_v, in_ring[:, None, None])
    return (both.out / both.total[..., None]).astype(q.dtype)


def _seen_slots(seen: Seen, slot: Array) -> Array:
    """Which slots [S] of their row the lanes see: bool [R, M, S]."""
    trunk = (seen.trunk_start[..., None] <= slot) & (slot < seen.trunk_end[..., None])
    return trunk | ((seen.own_start[..., None] <= slot) & (slot < seen.own_end[..., None]))


def _extent(seen: Seen, slots: int) -> tuple[Array, Array]:
    """From which block to before which block any lane sees something."""
    size = min(BLOCK, slots)
    first = jnp.minimum(*(jnp.min(jnp.where(a < b, a, slots)) for a, b in (seen[:2], seen[2:4])))
    last = jnp.maximum(*(jnp.max(jnp.where(a < b, b, 0)) for a, b in (seen[:2], seen[2:4])))
    return first // size, (last + size - 1) // size
