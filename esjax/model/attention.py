"""Attention that understands the row, one function for each platform's best way to compute it.

| path | platform | what it is |
| --- | --- | --- |
| dense | any | the plain form with a mask [B, T, T]: the oracle of the others |
| chunked | CPU | one row and one chunk of queries at a time, against the keys before the chunk's end |
| cudnn | GPU | cuDNN's flash attention; causal rows without a mask, other rows with a mask [B, 1, T, T] |
| pallas | GPU | our own kernel, which visits only blocks where some token sees some other |
| splash | TPU | JAX's splash kernel; causal rows with a computed mask, other rows with a dynamic one, empty blocks skipped |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SegmentIds, SplashAttentionKernel

from esjax.errors import InputError
from esjax.model.families import Architecture
from esjax.model.layers import Scores, softcap
from esjax.rows import Layout, Rows, near, sees
from esjax.runtime.mesh import per_device

Path = Literal["dense", "chunked", "cudnn", "pallas", "splash"]
Decoding = Literal["auto", "plain", "triton", "mosaic"]
KERNELS: dict[str, Decoding] = {"gpu": "triton", "tpu": "mosaic"}  # ours for decoding: Pallas' backends
Library = Literal["cudnn", "xla"]
Attention = Callable[[Array, Array, Array], Array]  # q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]
PLATFORMS: dict[str, tuple[str, ...]] = {
    "dense": ("cpu", "gpu", "tpu"),
    "chunked": ("cpu", "gpu", "tpu"),
    "cudnn": ("gpu",),
    "pallas": ("gpu",),
    "splash": ("tpu",),
}


def choose_path(setting: str, platform: str, dtype: jnp.dtype, arch: Architecture | None = None) -> Path:
    """The path for ``model.attention`` on a platform, and for a model. Raises InputError where they do not go together."""
    half = dtype.itemsize == 2
    cannot = {path: found for path in PLATFORMS if (found := _lacks(path, arch))}
    if setting == "auto":
        path: Any = {"cpu": "chunked", "tpu": "splash"}.get(platform, "cudnn" if half else "pallas")
        return "dense" if path in cannot else path
    if setting in cannot:
        raise InputError(
            f"model.attention={setting} has no {cannot[setting]}, which this model needs: choose auto or dense"
        )
    if platform not in PLATFORMS[setting]:
        allowed = ", ".join(p for p, where in PLATFORMS.items() if platform in where)
        raise InputError(f"model.attention={setting} does not run on {platform}: choose auto, {allowed}")
    if setting == "cudnn" and not half:
        raise InputError("model.attention=cudnn computes in bfloat16 only: set model.dtype=bfloat16 or choose pallas")
    return setting  # type: ignore[return-value]


def _lacks(path: str, arch: Architecture | None) -> str:
    """What a model needs and a path does not have."""
    if arch is None:
        return ""
    if arch.attention_cap is not None and path in ("cudnn", "pallas"):
        return "soft cap of scores"
    return "sliding window" if path == "pallas" and arch.windows != (None,) else ""


def choose_decoding(setting: str, platform: str, arch: Architecture | None = None) -> Decoding:
    """``model.decoding_attention`` on a platform, and for a model: auto is left only where there is a choice.

    Raises InputError where they do not go together.
    """
    lacks = _kernel_lacks(platform, arch)
    if setting == "pallas" and lacks:
        raise InputError(f"model.decoding_attention=pallas {lacks}: choose auto or plain")
    if setting == "plain" or lacks:
        return "plain"
    return "auto" if setting == "auto" else KERNELS[platform]


def _kernel_lacks(platform: str, arch: Architecture | None) -> str:
    """What stands against our kernel for decoding."""
    if platform not in KERNELS:
        return f"does not run on {platform}"
    if platform == "tpu":
        from esjax.model.lanes_mosaic import HEAD, takes

        sizes = f"multiples of {HEAD}"
    else:
        try:
            from esjax.model.lanes_triton import takes
        except ImportError as e:
            return f"needs Pallas' Triton backend, which JAX {jax.__version__} lacks ({e})"
        sizes = "powers of 2 from 16 on"
    if arch is not None and not takes(arch.head_size):
        return f"does not take this model's heads of {arch.head_size} numbers, only {sizes}"
    capped = arch is not None and arch.attention_cap is not None
    return "has no soft cap of scores, which this model needs" if capped and platform == "gpu" else ""


class How(Protocol):
    """How to compute: the part of ``decoder.Execution`` that attention needs."""

    @property
    def attention(self) -> Path: ...
    @property
    def layout(self) -> Layout: ...  # what the rows hold at most (``rows.layout``): simpler rows take a shorter way
    @property
    def interpret(self) -> bool: ...  # run kernels on the host, for tests


def attention(how: How, rows: Rows, scores: Scores = Scores()) -> Attention:  # noqa: B008  immutable
    """The attention of rows [B, T], prepared once for all layers that are alike in their ``scores``."""
    path, layout, interpret = how.attention, how.layout, how.interpret
    until, position = rows.until, rows.position
    if scores.window is not None and scores.window >= until.shape[1]:
        scores = scores._replace(window=None)  # no two tokens of a row are further apart
    elif scores.window is not None:
        layout = "branched"  # the short ways know no windows
    if path == "chunked":
        chunked = partial(_chunked, scores=scores)
        return lambda q, k, v: per_device(chunked, [*[QUERY] * 3, ("batch",), ("batch",)])(q, k, v, until, position)
    if path == "pallas":
        # Imported here, as Pallas' Triton backend is deprecated: without it, this path alone is gone.
        from esjax.model.row_kernel import row_attention

        kernel = partial(row_attention, interpret=interpret)
        return lambda q, k, v: per_device(kernel, [*[QUERY] * 3, ("batch",)])(q, k, v, until)
    if path == "splash":
        causal = layout != "branched"
        return _splash_causal(until, scores, interpret) if causal else _splash_branched(rows, scores, interpret)
    library: Library = "cudnn" if path == "cudnn" else "xla"
    if layout == "causal" and scores.cap is None:
        return partial(jax.nn.dot_product_attention, is_causal=True, implementation=library)
    mask = partial(_mask, rows, scores.window)
    if scores.cap is not None:
        return partial(_capped, mask, scores.cap)
    return _masked_cudnn(mask) if path == "cudnn" else partial(_masked, mask, "xla")


def _mask(rows: Rows, window: int | None, longer: int = 0) -> Array:
    """Who attends to whom in rows [B, T] with so many more tokens, which see themselves: bool [B, T, T]."""
    t = rows.until.shape[1]
    until = jnp.concatenate(
        [rows.until, jnp.broadcast_to(t + 1 + jnp.arange(longer), (len(rows.until), longer))], axis=1
    )
    index = jnp.arange(t + longer)
    mask = sees(until, index, index)
    if window is None:
        return mask
    position = jnp.pad(rows.position, ((0, 0), (0, longer)))
    return mask & near(window, position, position)


Mask = Callable[..., Array]


def _masked(mask: Mask, library: Library, q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask()[:, None], implementation=library)


def _capped(mask: Mask, cap: float, q: Array, k: Array, v: Array) -> Array:
    """The plain form with softly capped scores, which no library has."""
    (b, t, n, h), groups = q.shape, k.shape[2]
    q = (q * h**-0.5).reshape(b, t, groups, n // groups, h)
    scores = softcap(jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32), cap)
    p = jax.nn.softmax(jnp.where(mask()[:, None, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(b, t, n, h)


def _masked_cudnn(mask: Mask) -> Attention:
    """cuDNN's attention with a mask has a gradient for even lengths alone, so an odd row is given one more token."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        t = q.shape[1]
        if t % 2 == 0:
            return _masked(mask, "cudnn", q, k, v)
        longer = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        return _masked(partial(mask, longer=1), "cudnn", *longer)[:, :t]

    return attend


QUERY = ("batch", None, "heads")
CPU_CHUNK = 128  # queries at a time


def _chunked(q: Array, k: Array, v: Array, until: Array, position: Array, scores: Scores) -> Array:
    """For CPUs: the scores of one row and one chunk stay in the cache.

    At T = 512 this is 8 times faster than the batched form, and 4 times with the backward pass (two cores, float32).
    """
    _, t, n, h = q.shape
    groups = k.shape[2]
    index = jnp.arange(t)

    @jax.checkpoint
    def chunk(q_KxGxCxH: Array, k_KxSxH: Array, v_KxSxH: Array, until_S: Array, at: tuple[Array, ...]) -> Array:
        _, g, c, _ = q_KxGxCxH.shape
        index_C, position_C, position_S = at
        mask_CxS = sees(until_S, index_C, index[: len(until_S)])
        if scores.window is not None:
            mask_CxS &= near(scores.window, position_C, position_S)
        s = jnp.einsum("kth,ksh->kts", q_KxGxCxH.reshape(groups, g * c, h), k_KxSxH).reshape(groups, g, c, -1)
        s = softcap(s, scores.cap)
        p = jax.nn.softmax(jnp.where(mask_CxS, s.astype(jnp.float32), -1e30), axis=-1).astype(v.dtype)
        return jnp.einsum("kts,ksh->kth", p.reshape(groups, g * c, -1), v_KxSxH).reshape(groups, g, c, h)

    def one(row: tuple[Array, ...]) -> Array:
        q_TxNxH, k_TxKxH, v_TxKxH, until_T, position_T = row
        q_KxGxTxH = (q_TxNxH * h**-0.5).reshape(t, groups, n // groups, h).transpose(1, 2, 0, 3)
        k_KxTxH, v_KxTxH = k_TxKxH.transpose(1, 0, 2), v_TxKxH.transpose(1, 0, 2)
        parts = []
        for start in range(0, t, CPU_CHUNK):
            c = slice(start, min(start + CPU_CHUNK, t))
            seen = slice(0, c.stop)
            at = (index[c], position_T[c], position_T[seen])
            parts.append(chunk(q_KxGxTxH[:, :, c], k_KxTxH[:, seen], v_KxTxH[:, seen], until_T[seen], at))
        return jnp.concatenate(parts, axis=2).transpose(2, 0, 1, 3).reshape(t, n, h)

    return jax.lax.map(one, (q, k, v, until, position))


LANES = 128  # the splash kernel wants rows of whole lanes


def _splash_causal(until: Array, scores: Scores, interpret: bool) -> Attention:
    """The splash kernel on rows of trunks: a computed causal mask among tokens of one ``until`` [B, T]: those of a trunk."""
    _, t = until.shape

    def local(q: Array, k: Array, v: Array, until: Array) -> Array:
        mask = splash.MultiHeadMask([splash.CausalMask((_whole(t), _whole(t)))] * q.shape[2])
        kernel = _kernel(mask, scores.cap, interpret)
        ids = _pad_row(until)
        out: Any = jax.vmap(kernel)(*_heads_first(q, k, v), SegmentIds(ids, ids))
        return out.transpose(0, 2, 1, 3)[:, :t]

    return lambda q, k, v: per_device(local, [QUERY, QUERY, QUERY, ("batch",)])(q, k, v, until)


def _splash_branched(rows: Rows, scores: Scores, interpret: bool) -> Attention:
    """The splash kernel on any rows: a mask for each row, cut into blocks of which the empty ones are skipped."""
    t = rows.until.shape[1]

    def prepare(mask: Array) -> SplashAttentionKernel:
        kernel = _kernel(mask[None], scores.cap, interpret)
        infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
        # This flag only names a profiler scope, but as a leaf of the tree it would be traced.
        return SplashAttentionKernel(*(i._replace(is_dynamic_mask=None) for i in infos if i), **kernel.kwargs)

    kernels = jax.vmap(prepare)(_mask(rows, scores.window, _whole(t) - t))

    def local(q: Array, k: Array, v: Array, kernels: SplashAttentionKernel) -> Array:
        out = jax.lax.map(lambda row: row[0](*row[1:]), (kernels, *_heads_first(q, k, v)))
        return out.transpose(0, 2, 1, 3)[:, :t]

    return lambda q, k, v: per_device(local, [QUERY, QUERY, QUERY, ("batch",)])(q, k, v, kernels)


def _kernel(mask: Array | splash.MultiHeadMask, cap: float | None, interpret: bool) -> SplashAttentionKernel:
    t = mask.shape[-1]
    size = next(b for b in (512, 256, LANES) if t % b == 0)
    sizes = splash.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
    )
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=cap, interpret=interpret
    )


def _whole(t: int) -> int:
    return -(-t // LANES) * LANES


def _pad_row(x: Array) -> Array:
    """[B, T, ...] up to whole lanes."""
    return jnp.pad(x, ((0, 0), (0, _whole(x.shape[1]) - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _heads_first(q: Array, k: Array, v: Array) -> list[Array]:
    """Scaled queries, keys and values as [B, heads, T, H], padded to whole lanes."""
    return [_pad_row(x).transpose(0, 2, 1, 3) for x in (q * q.shape[-1] ** -0.5, k, v)]
