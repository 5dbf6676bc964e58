"""The decoder with a cache: rows of prompts, and what grows from them.

A *row* keeps the keys and values of prompts, trunks and branches, as ``rows.py`` lays them out, in T slots. M *lanes* a row
each grow one reply. What a lane has drawn lies in a ring of its own of N slots, written by all lanes at the same place (the
clock), so that one small in-place write serves them all, however far each has come. A step reads the weights once, a row's
slots once for its M lanes, and each lane's ring.

Decoding unrolls its layers; prefill scans training's stacked arrays where it is given those. On a mesh, weights stay where
training has them: a step has few tokens and many weights, so the tokens' width is split over fsdp as the weights' is,
products are summed over devices, and no weight moves. Rows are split over data and fsdp, heads over tensor; attention and
the writing of keys and values are each device's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.attention import Spans, sees
from esjax.model.decoder import Decoder, Execution
from esjax.model.families import LINEARS, Architecture
from esjax.model.layers import Block, project, rms_norm, rope_at, rotate
from esjax.runtime.mesh import batch_groups, constrain, home, per_device

BLOCK = 128  # slots that the CPU attends to at a time


class Weights(NamedTuple):
    """All weights of base + adapter as decoding reads them."""

    embed: Array  # [V, D]
    head: Array  # [V, D]; the same array as embed where the two are tied
    norm: Array  # [D]
    layers: tuple[Block, ...]  # their arrays lack the leading axis
    stacked: Block | None = None  # training's own form, where the layers are slices of it


class Cache(NamedTuple):
    """Keys and values, one array a layer; keys lie transposed, so that both products of attention read memory in order."""

    row_k: tuple[Array, ...]  # [R, K, H, T]
    row_v: tuple[Array, ...]  # [R, K, T, H]
    new_k: tuple[Array, ...]  # [R M, K, H, N]
    new_v: tuple[Array, ...]  # [R M, K, N, H]


CACHE = ("batch", "kv_heads")  # the leading logical axes of every array of a Cache


class Chunk(NamedTuple):
    """Prompt tokens to be written into C successive slots of each of P rows; on a mesh each device has its P / devices."""

    row: Any  # int32 [P], among the rows of the device
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


def cache_shapes(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """A cache of ``rows`` rows of T = ``slots`` and ``lanes`` lanes a row with rings of N = ``new``, each array in its place."""
    k, h = arch.kv_heads, arch.head_size
    shapes = ((rows, k, h, slots), (rows, k, slots, h), (rows * lanes, k, h, new), (rows * lanes, k, new, h))
    where = home(*CACHE, None, None)
    return Cache(*((jax.ShapeDtypeStruct(s, dtype, sharding=where),) * arch.layers for s in shapes))  # type: ignore[arg-type]


def empty_cache(arch: Architecture, rows: int, lanes: int, slots: int, new: int, dtype: jnp.dtype) -> Cache:
    """The same, filled with zeros."""
    shapes = cache_shapes(arch, rows, lanes, slots, new, dtype)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), shapes)


def pinned(cache: Cache) -> Cache:
    """The same cache, where it belongs: what a program gives back must lie as it was given."""
    return jax.tree.map(lambda x: constrain(x, *CACHE, None, None), cache)


# --- weights ---------------------------------------------------------------------------------------------------------


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


# --- the two passes --------------------------------------------------------------------------------------------------


def load(arch: Architecture, weights: Weights, cache: Cache, chunk: Chunk, how: Execution) -> Cache:
    """Prefill: compute the chunk's keys and values and write them into the rows."""
    rope = rope_at(arch, chunk.position)
    x = _embed(weights, chunk.tokens)
    row_k, row_v = list(cache.row_k), list(cache.row_v)
    write = per_device(_write, [CACHE, CACHE, KEYS, KEYS, ("batch",)], [CACHE, CACHE])
    attend = per_device(partial(_attend_chunk, how=how), [KEYS, CACHE, CACHE, ("batch",)])
    if weights.stacked is not None:  # many large products: unrolled, they would take minutes to compile
        definition, stacked = nnx.split(weights.stacked)
        pick = per_device(lambda rows, chunk: rows[chunk.row], [CACHE, ("batch",)])
        rows = [jnp.stack([pick(x, chunk) for x in layers]) for layers in (row_k, row_v)]
        own = chunk._replace(row=_first_of_row(chunk.row))

        def layer(x: Array, given: Any) -> tuple[Array, tuple[Array, Array]]:
            state, k_rows, v_rows = given
            block = nnx.merge(definition, state)
            q, k, v = _qkv(arch, block, x, rope)
            k_rows, v_rows = write(k_rows, v_rows, k, v, own)
            return _rest(arch, block, x, attend(q, k_rows, v_rows, own)), (k, v)

        _, made = jax.lax.scan(layer, x, (stacked, *rows))
        for i, (k, v) in enumerate(zip(*made, strict=True)):
            row_k[i], row_v[i] = write(row_k[i], row_v[i], k, v, chunk)
    else:
        for i, block in enumerate(weights.layers):
            q, k, v = _qkv(arch, block, x, rope)
            row_k[i], row_v[i] = write(row_k[i], row_v[i], k, v, chunk)
            if i + 1 < arch.layers:  # the last layer's keys and values are all that is wanted of it
                x = _rest(arch, block, x, attend(q, row_k[i], row_v[i], chunk))
    return pinned(cache._replace(row_k=tuple(row_k), row_v=tuple(row_v)))


KEYS = ("batch", None, "kv_heads")  # of queries, keys and values [P, C, K, ...]


def _first_of_row(row: Array) -> Array:
    """For each window [P] the first window of its device with the same row: they must see what each of them writes."""
    of_device = row.reshape(batch_groups(), -1)
    return jnp.argmax(of_device[:, :, None] == of_device[:, None, :], axis=2).reshape(-1)


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
    rope = rope_at(arch, position.reshape(-1, 1))
    x = _embed(weights, token.reshape(-1, 1))
    new_k, new_v = list(cache.new_k), list(cache.new_v)
    n = new_k[0].shape[-1]
    slot = clock % n
    age = (slot - jnp.arange(n)) % n
    in_ring = age < seen.fed.reshape(-1, 1)
    attend = per_device(partial(_attend_lanes, how=how), [CACHE, CACHE, CACHE, CACHE, CACHE, ("batch",), ("batch",)])
    for i, block in enumerate(weights.layers):
        q, k, v = (y[:, 0] for y in _qkv(arch, block, x, rope))
        new_k[i] = jax.lax.dynamic_update_slice(new_k[i], k[..., None].astype(new_k[i].dtype), (0, 0, 0, slot))
        new_v[i] = jax.lax.dynamic_update_slice(new_v[i], v[:, :, None].astype(new_v[i].dtype), (0, 0, slot, 0))
        attended = attend(q, cache.row_k[i], cache.row_v[i], new_k[i], new_v[i], seen, in_ring)
        x = _rest(arch, block, x, attended[:, None])
    x = rms_norm(x[:, 0], weights.norm, arch.norm_eps)
    return x, cache._replace(new_k=tuple(new_k), new_v=tuple(new_v))


def _embed(weights: Weights, tokens: Array) -> Array:
    """[n, T] -> [n, T, D]."""
    return constrain(weights.embed[tokens], "stream", None, "embed")


def _qkv(arch: Architecture, block: Block, x: Array, rope: Any) -> tuple[Array, Array, Array]:
    """Scaled, rotated queries [B, T, K, G, H], rotated keys and values [B, T, K, H] of x [B, T, D]."""
    h = rms_norm(x, block.attn_norm[...], arch.norm_eps)
    made = project(h, (block.q_proj, block.k_proj, block.v_proj), gather=False)
    q, k, v = (
        _own(y.reshape(*x.shape[:2], -1, arch.head_size), heads, None)
        for y, heads in zip(made, ("heads", "kv_heads", "kv_heads"), strict=True)
    )
    q = rotate(q, rope) * arch.head_size**-0.5
    return q.reshape(*x.shape[:2], arch.kv_heads, -1, arch.head_size), rotate(k, rope), v


def _rest(arch: Architecture, block: Block, x: Array, attended: Array) -> Array:
    """Output projection and MLP, both added to x [B, T, D]."""
    (o,) = project(
        constrain(attended.reshape(*x.shape[:2], -1), "stream", None, "heads"), (block.o_proj,), gather=False
    )
    x = constrain(x + o, "stream", None, "embed")
    h = rms_norm(x, block.mlp_norm[...], arch.norm_eps)
    made = project(h, (block.gate_proj, block.up_proj), gather=False)
    gate, up = (_own(y, "mlp") for y in made)  # so that their product alone is sent on
    (down,) = project(constrain(jax.nn.silu(gate) * up, "stream", None, "mlp"), (block.down_proj,), gather=False)
    return constrain(x + down, "stream", None, "embed")


def _own(y: Array, *axes: str | None) -> Array:
    """Each device's rows of a product [B, T, ...] that is summed over devices.

    Two steps: asked for its rows at once, the compiler may split the product by rows to overlap it with sending, and reads
    the weights as often as there are devices. That suits many tokens; here the weights are what costs.
    """
    return constrain(constrain(y, "stream", None, *axes), "batch", None, *axes)


def _write(row_k: Array, row_v: Array, k: Array, v: Array, chunk: Chunk) -> tuple[Array, Array]:
    """The cache with new keys and values [P, C, K, H] in its rows; one small in-place update for each of the P."""
    for p in range(len(k)):
        row_k = _put(row_k, k[p].transpose(1, 2, 0), chunk.valid[p], (chunk.row[p], 0, 0, chunk.start[p]))
        row_v = _put(row_v, v[p].transpose(1, 0, 2), chunk.valid[p][:, None], (chunk.row[p], 0, chunk.start[p], 0))
    return row_k, row_v


def _put(cache: Array, new: Array, valid: Array, at: tuple[Any, ...]) -> Array:
    old = jax.lax.dynamic_slice(cache, at, (1, *new.shape))
    return jax.lax.dynamic_update_slice(cache, jnp.where(valid, new.astype(cache.dtype)[None], old), at)


# --- attention -------------------------------------------------------------------------------------------------------


def _attend_chunk(q: Array, row_k: Array, row_v: Array, chunk: Chunk, how: Execution) -> Array:
    """Queries [P, C, K, G, H] of a chunk against their rows -> [P, C, K, G, H]."""
    p, c, kv, g, h = q.shape
    spans = Spans(chunk.trunk_start, chunk.trunk_end, chunk.own_start)
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
