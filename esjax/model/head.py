"""The vocabulary head on target tokens alone: log-probs whose gradient is made in the forward pass, chunk by chunk."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.model.layers import softcap
from esjax.runtime.mesh import constrain


@jax.named_scope("head")
def target_logprobs(
    x: Array, head: Array, token: Array, logits: int, live: Array | None = None, cap: float | None = None
) -> Array:
    """log softmax(x head^T)[token] in float32: x [G, n, D], head [V, D], token int32 [G, n] -> [G, n].

    Neither pass holds more logits than those of one chunk of tokens, and the size of a chunk falls as V grows. Since the
    result is one number a token, its derivative with respect to x is a single row: d = head[token] - softmax(x head^T) head.
    The forward pass makes it while it has the logits, so with a frozen head the backward pass costs nothing; with a
    trained head (it has a gradient of its own) the backward pass makes the logits again, but not their sums.

    Args:
        x: G is the number of devices that the batch is split over; each computes its own n tokens.
        logits: most entries of one chunk's logits on one device (a chunk has at least one token).
        live: bool [G, n]; where given, chunks without a live token are skipped, and there is no gradient.
        cap: logits are kept softly within +-cap, see ``layers.softcap``.
    """
    (groups, n), v = token.shape, head.shape[0]
    count = -(-n // max(1, logits // v))
    size = -(-n // count)

    def split(a: Array) -> Array:
        a = jnp.pad(a, ((0, 0), (0, count * size - n), *[(0, 0)] * (a.ndim - 2)))
        a = a.reshape(groups, count, size, *a.shape[2:]).swapaxes(0, 1)
        return constrain(a.reshape(count, groups * size, *a.shape[3:]), None, "batch", *[None] * (a.ndim - 3))

    head = constrain(head, "vocab", None)
    if live is None:
        out = _logprobs(split(x), head, split(token), cap)
    else:
        nothing = jnp.zeros(groups * size, jnp.float32)
        out = jax.lax.map(
            lambda part: jax.lax.cond(
                jnp.any(part[2]), lambda x, t: _one_chunk(x, t, head, cap).logprobs, lambda *_: nothing, *part[:2]
            ),
            (split(x), split(token), split(live)),
        )
    return out.reshape(count, groups, size).swapaxes(0, 1).reshape(groups, -1)[:, :n]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(x: Array, head: Array, token: Array, cap: float | None) -> Array:
    """The same in chunks [count, size]."""
    return jax.lax.map(lambda part: _one_chunk(part[0], part[1], head, cap).logprobs, (x, token))


class Softmax(NamedTuple):
    """What the head makes of one chunk of tokens."""

    logprobs: Array  # [size], of the targets
    logits: Array  # [size, V], capped
    high: Array  # [size, 1], the greatest logit
    total: Array  # [size, 1], of exp(logits - high)


def _logits(x: Array, head: Array, cap: float | None) -> Array:
    return softcap(jnp.einsum("nd,vd->nv", x, head, preferred_element_type=jnp.float32), cap)


def _one_chunk(x: Array, token: Array, head: Array, cap: float | None) -> Softmax:
    logits = _logits(x, head, cap)
    high = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - high), axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return Softmax((picked - high - jnp.log(total))[:, 0], logits, high, total)


def _slope(logits: Array, cap: float | None) -> Array | float:
    """The derivative of capped logits with respect to plain ones."""
    return 1.0 if cap is None else 1 - jnp.square(logits / cap)


def _forward(x: Any, head: Any, token: Any, cap: float | None) -> tuple[Array, tuple[Any, ...]]:
    def chunk(part: tuple[Array, Array]) -> tuple[Array, Array]:
        made = _one_chunk(*part, head.value, cap)
        if head.perturbed:
            return made.logprobs, (made.high + jnp.log(made.total))[:, 0]
        own = head.value[part[1]].astype(jnp.float32)
        if cap is not None:
            own *= _slope(jnp.take_along_axis(made.logits, part[1][:, None], axis=-1), cap)
        # Not divided by their total before the product: they are then written in the pass that sums them.
        e = (jnp.exp(made.logits - made.high) * _slope(made.logits, cap)).astype(x.value.dtype)
        mean = jnp.einsum("nv,vd->nd", e, head.value, preferred_element_type=jnp.float32) / made.total
        return made.logprobs, (own - mean).astype(x.value.dtype)

    logprobs, kept = jax.lax.map(chunk, (x.value, token.value))
    return logprobs, (kept, x.value, head.value, token.value) if head.perturbed else (kept,)


def _backward(cap: float | None, saved: tuple[Any, ...], g: Array) -> tuple[Any, Any, None]:
    kept, *inputs = saved
    if not inputs:
        return (g[..., None] * kept.astype(jnp.float32)).astype(kept.dtype), None, None
    x, head, token = inputs

    def chunk(total: Array, part: tuple[Array, Array, Array, Array]) -> tuple[Array, Array]:
        x, token, log_total, g = part
        logits = _logits(x, head, cap)
        p = jnp.exp(logits - log_total[:, None])
        d = (jax.nn.one_hot(token, head.shape[0], dtype=jnp.float32) - p) * g[:, None]
        d = (d * _slope(logits, cap)).astype(x.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        return total + product("nv,nd->vd", d, x), product("nv,vd->nd", d, head).astype(x.dtype)

    dhead, dx = jax.lax.scan(chunk, jnp.zeros(head.shape, jnp.float32), (x, token, kept, g))
    return dx, dhead.astype(head.dtype), None


_logprobs.defvjp(_forward, _backward, symbolic_zeros=True)
