"""The decoder: embedding, scanned layers, final norm; with and without a key/value cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.families import Architecture
from esjax.model.layers import Block, Lora, attend, attend_cached, rms_norm, rope_at
from esjax.rows import Rows, visible


class Cache(NamedTuple):
    """Keys and values of all layers for S slots."""

    k: Array  # [L, B, K, H, S], transposed for decoding
    v: Array  # [L, B, K, S, H]


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters: embed [V, D], layers (stacked), norm [D], head [V, D] unless tied."""

    def __init__(self, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.arch = arch
        draw = jax.random.normal(rngs.params(), (arch.vocab, arch.width), jnp.float32) * 0.02
        self.embed = nnx.Param(draw.astype(dtype), axes=("vocab", "embed"))
        self.layers = Block(arch, lora, dtype, rngs)
        self.norm = nnx.Param(jnp.ones((arch.width,), dtype), axes=("embed",))
        if not arch.tied_head:
            draw = jax.random.normal(rngs.params(), (arch.vocab, arch.width), jnp.float32) * 0.02
            self.head = nnx.Param(draw.astype(dtype), axes=("vocab", "embed"))

    def __call__(self, rows: Rows, remat: bool = False) -> Array:
        """Final hidden states [B, T, D] of rows [B, T]."""
        return self._run(rows, remat, keep_cache=False)[0]

    def prefill(self, rows: Rows, slots: int) -> tuple[Array, Cache]:
        """Hidden states [B, T, D], and the cache of the T tokens in the first of ``slots`` slots."""
        x, kv = self._run(rows, remat=False, keep_cache=True)
        k_LxBxTxKxH, v_LxBxTxKxH = kv
        room = slots - rows.tokens.shape[1]
        k = jnp.pad(k_LxBxTxKxH.transpose(0, 1, 3, 4, 2), ((0, 0), (0, 0), (0, 0), (0, 0), (0, room)))
        v = jnp.pad(v_LxBxTxKxH.transpose(0, 1, 3, 2, 4), ((0, 0), (0, 0), (0, 0), (0, room), (0, 0)))
        return x, Cache(k, v)

    def _run(self, rows: Rows, remat: bool, keep_cache: bool) -> tuple[Array, Any]:
        mask = visible(rows)
        rope = rope_at(self.arch, rows.position)
        definition, stacked = nnx.split(self.layers)

        def layer(x: Array, state: nnx.State) -> tuple[Array, tuple[Array, Array] | None]:
            block = nnx.merge(definition, state)
            q, k, v = block.qkv(x, rope)
            return block.rest(x, attend(q, k, v, mask)), ((k, v) if keep_cache else None)

        body = jax.checkpoint(layer) if remat else layer
        x, kv = jax.lax.scan(body, self.embed[...][rows.tokens], stacked)
        return rms_norm(x, self.norm[...], self.arch.norm_eps), kv

    def step(self, token: Array, position: Array, cache: Cache, slot: Array, mask: Array) -> tuple[Array, Cache]:
        """Decode one token a row: tokens and positions [B], written to cache ``slot``, seeing the slots in mask [B, S].

        Returns hidden states [B, D] and the cache.
        """
        rope = rope_at(self.arch, position[:, None])
        definition, stacked = nnx.split(self.layers)
        zero = jnp.zeros((), slot.dtype)

        def layer(carry: tuple[Array, Cache], xs: tuple[Array, nnx.State]) -> tuple[tuple[Array, Cache], None]:
            x, (k, v) = carry
            index, state = xs
            block = nnx.merge(definition, state)
            q, k_new, v_new = block.qkv(x[:, None], rope)
            k = jax.lax.dynamic_update_slice(
                k, k_new[:, 0, :, :, None][None].astype(k.dtype), (index, zero, zero, zero, slot)
            )
            v = jax.lax.dynamic_update_slice(
                v, v_new[:, 0, :, None][None].astype(v.dtype), (index, zero, zero, slot, zero)
            )
            attended = attend_cached(q[:, 0], k[index], v[index], mask)
            return (block.rest(x, attended), Cache(k, v)), None

        layers = jnp.arange(self.arch.layers, dtype=slot.dtype)
        (x, cache), _ = jax.lax.scan(layer, (self.embed[...][token], cache), (layers, stacked))
        return rms_norm(x, self.norm[...], self.arch.norm_eps), cache

    def logits(self, x: Array) -> Array:
        """Vocabulary head: [..., D] -> float32 [..., V]."""
        head = self.embed if self.arch.tied_head else self.head
        return jnp.einsum("...d,vd->...v", x, head[...], preferred_element_type=jnp.float32)


def token_logprobs(model: Decoder, rows: Rows, targets: int, remat: bool = False, chunk: int = 512) -> Array:
    """Log-probability of each target token, float32 [B, T]: entry i is for token i + 1; 0 where weight is 0.

    The one primitive of SFT, DPO and scoring. The head runs only where weight != 0, ``chunk`` targets at a time and
    recomputed in the backward pass, so that [B, T, V] logits never exist.

    Args:
        rows: [B, T].
        targets: at least the number of nonzero weights; static, so that shapes are.
    """
    hidden = model(rows, remat)
    b, t, d = hidden.shape
    targets = -(-min(targets, b * t) // chunk) * chunk if targets > chunk else targets
    wanted = rows.weight.reshape(-1) != 0
    (index,) = jnp.nonzero(wanted, size=targets, fill_value=b * t - 1)  # the last token of a row is never a target
    following = jnp.roll(rows.tokens, -1, axis=1).reshape(-1)[index]

    @jax.checkpoint
    def head(x: Array, token: Array) -> Array:
        logits = model.logits(x)
        picked = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    x = hidden.reshape(-1, d)[index]
    if targets > chunk:
        parts = jax.lax.map(lambda p: head(*p), (x.reshape(-1, chunk, d), following.reshape(-1, chunk)))
        logprobs = parts.reshape(-1)
    else:
        logprobs = head(x, following)
    flat = jnp.zeros(b * t, jnp.float32).at[index].add(jnp.where(wanted[index], logprobs, 0.0))
    return flat.reshape(b, t)
