"""The decoder's parts: linear layers with adapters, RMSNorm, rotary embedding, attention, one block.

Every parameter carries its logical axis names as metadata ``axes``. Below a stack, arrays have a leading ``layers`` axis
and the code here sees one layer's slice of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from esjax.model.families import LINEARS, Architecture
from esjax.runtime.mesh import constrain

KERNEL_AXES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


def linear_sizes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer."""
    d, q, kv, f = arch.width, arch.heads * arch.head_size, arch.kv_heads * arch.head_size, arch.hidden
    return {
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }


class Lora(NamedTuple):
    """The adapter's shape: which linear layers, rank R, and the scale alpha / R (PEFT's definition)."""

    targets: tuple[str, ...]
    rank: int
    scale: float


class Linear(nnx.Module):
    """y = x W + b + scale (x A^T) B, stacked over L layers: W [L, in, out], A [L, R, in], B [L, R, out].

    A is drawn uniform in +-1/sqrt(in) and B is zero, as PEFT does (Kaiming uniform with a = sqrt 5).
    """

    def __init__(self, name: str, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.name, stack = name, arch.layers
        i, o = linear_sizes(arch)[name]
        bias = arch.qkv_bias and name in ("q_proj", "k_proj", "v_proj")
        axes_in, axes_out = KERNEL_AXES[name]
        draw = jax.random.normal(rngs.params(), (stack, i, o), jnp.float32) * 0.02
        self.kernel = nnx.Param(draw.astype(dtype), axes=("layers", axes_in, axes_out))
        self.bias = nnx.Param(jnp.zeros((stack, o), dtype), axes=("layers", axes_out)) if bias else None
        self.scale = 0.0 if lora is None else lora.scale
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            return
        bound = 1 / math.sqrt(i)
        a = jax.random.uniform(rngs.lora(), (stack, i, lora.rank), jnp.float32, -bound, bound).swapaxes(1, 2)
        # The long axis last: the gradient of A is then a product that XLA's CPU backend computes several times faster.
        self.lora_a = nnx.LoRAParam(a, axes=("layers", "lora", axes_in))
        self.lora_b = nnx.LoRAParam(jnp.zeros((stack, lora.rank, o), jnp.float32), axes=("layers", "lora", axes_out))

    def base(self, gather: bool) -> Array:
        """W [in, out], the frozen part."""
        return _gathered(self.kernel[...], KERNEL_AXES[self.name], gather)


def project(x: Array, linears: Sequence[Linear], gather: bool = True, one_product: bool = False) -> list[Array]:
    """What several linear layers make of one input [..., in]: each [..., out]. Weights are gathered over fsdp, or stay.

    Their A matrices are joined, so that x is read once for all of them, forward and backward: LoRA's narrow products are
    bound by memory, not by arithmetic. ``one_product`` makes base and adapter in one, see ``_one_product``.
    """
    # Two-dimensional: XLA's CPU backend computes the narrow gradients of A and B several times slower over two axes.
    flat = x.reshape(-1, x.shape[-1])
    adapted = {l.name: (l.lora_a[...], l.lora_b[...]) for l in linears if l.lora_a is not None and l.lora_b is not None}
    narrow: dict[str, Array] = {}
    if adapted:
        axes_in = (None, KERNEL_AXES[linears[0].name][0])  # of all: they have one input
        joined = _gathered(jnp.concatenate([a.astype(x.dtype) for a, _ in adapted.values()], axis=0), axes_in, gather)
        wide = flat @ joined.T * linears[0].scale
        narrow = dict(zip(adapted, jnp.split(wide, len(adapted), axis=1), strict=True))
    out = []
    for linear in linears:
        kernel = linear.base(gather)
        if linear.name not in adapted:
            y = flat @ kernel
        else:
            b = adapted[linear.name][1]
            b = _gathered(b.astype(x.dtype), (None, KERNEL_AXES[linear.name][1]), gather)
            if one_product:
                rank, before = len(b), list(adapted).index(linear.name)
                y = _one_product(
                    flat, wide, kernel, jnp.pad(b, ((rank * before, wide.shape[1] - rank * (before + 1)), (0, 0)))
                )
            else:
                y = flat @ kernel + narrow[linear.name] @ b
        out.append((y if linear.bias is None else y + linear.bias[...]).reshape(*x.shape[:-1], -1))
    return out


@jax.custom_vjp
def _one_product(x: Array, u: Array, w: Array, b: Array) -> Array:
    """x W + u B = [x u] [W; B]: x [n, in], u [n, r], W [in, out] frozen, B [r, out] -> [n, out].

    On a GPU a sum of two products is written twice and read twice, which takes longer than u B itself; one product of rows
    longer by r costs the copies of x and W that they are joined in. The gradients of x and u come from one product too.
    """
    return jnp.concatenate([x, u], axis=1) @ jnp.concatenate([w, b], axis=0)


def _one_product_forward(x: Array, u: Array, w: Array, b: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _one_product(x, u, w, b), (u, w, b)


def _one_product_backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None, Array]:
    u, w, b = saved
    both = g @ jnp.concatenate([w, b], axis=0).T
    return both[:, : len(w)], both[:, len(w) :], None, u.T @ g


_one_product.defvjp(_one_product_forward, _one_product_backward)


def _gathered(weight: Array, axes: tuple[str | None, ...], gather: bool) -> Array:
    """What is split over fsdp, gathered one layer at a time; what is split over tensor stays so. Or all as it is."""
    return constrain(weight, *(None if axis == "embed" else axis for axis in axes)) if gather else weight


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight * x32.astype(x.dtype)


class Rope(NamedTuple):
    """cos and sin of the rotary angles, float32 [B, T, 1, H / 2]."""

    cos: Array
    sin: Array


def rope_frequencies(arch: Architecture) -> Array:
    """Inverse frequencies [H / 2] of the rotary embedding (Su et al. 2021), with Llama 3.1's scaling where configured."""
    inv = 1.0 / arch.rope_theta ** (jnp.arange(0, arch.head_size, 2, dtype=jnp.float32) / arch.head_size)
    s = arch.rope_scaling
    if s is None:
        return inv
    turns = s.original_max_positions * inv / (2 * math.pi)  # rotations within the original window
    blend = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return inv * (blend + (1 - blend) / s.factor)


def rope_at(arch: Architecture, position: Array) -> Rope:
    """Rotary tables for positions [B, T]."""
    angle = position.astype(jnp.float32)[..., None, None] * rope_frequencies(arch)
    return Rope(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Array, rope: Rope) -> Array:
    """Apply the rotary embedding to [B, T, heads, H]; pairs are (h, h + H/2), as in Hugging Face checkpoints."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin], axis=-1).astype(x.dtype)


class Placement(NamedTuple):
    """Where a block's weights and what it computes lie on the mesh. Static.

    Training gathers a layer's weights over fsdp and leaves the rest to the compiler. Decoding has few tokens and many weights:
    these stay where they are, the tokens' width is split over fsdp as theirs is, and products are summed over devices.
    """

    gather: bool
    one_product: bool = False  # of base and adapter, see ``_one_product``

    def project(self, x: Array, axis: str, linears: Sequence[Linear]) -> list[Array]:
        """What linear layers make of x [..., in], whose last axis is ``axis``: each [..., out]."""
        return project(x if self.gather else constrain(x, "stream", None, axis), linears, self.gather, self.one_product)

    def stream(self, x: Array) -> Array:
        """The residual stream [B, T, D]."""
        return x if self.gather else constrain(x, "stream", None, "embed")

    def own(self, y: Array, *axes: str | None) -> Array:
        """Each device's rows of a product [B, T, ...] that is summed over devices.

        Two steps: asked for its rows at once, the compiler may split the product by rows to overlap it with sending, and
        reads the weights as often as there are devices. That suits many tokens; decoding is bound by the weights.
        """
        if self.gather:
            return y
        return constrain(constrain(y, "stream", None, *axes), "batch", None, *axes)


KEPT = "product"


def keep(x: Array) -> Array:
    """Mark what rematerialisation "dots" keeps: what takes a product to make, and nothing that is cheap to make from it."""
    return checkpoint_name(x, KEPT)


TRAINING, DECODING = Placement(gather=True), Placement(gather=False)
Attend = Callable[[Array, Array, Array], Array]  # q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H]


class Block(nnx.Module):
    """One pre-norm decoder layer: grouped-query attention, then a gated MLP. Arrays are stacked [L, ...]."""

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear

    def __init__(self, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.arch = arch
        for name in LINEARS:
            setattr(self, name, Linear(name, arch, lora, dtype, rngs))
        norms = (nnx.Param(jnp.ones((arch.layers, arch.width), dtype), axes=("layers", "embed")) for _ in range(2))
        self.attn_norm, self.mlp_norm = norms

    def __call__(self, x: Array, rope: Rope, attend: Attend, place: Placement = TRAINING) -> Array:
        """The residual stream [B, T, D] after this layer; ``attend`` says what a query sees."""
        attended = attend(*(keep(y) for y in self.qkv(x, rope, place)))
        (o,) = place.project(keep(attended.reshape(*x.shape[:-1], -1)), "heads", (self.o_proj,))
        x = keep(place.stream(x + o))
        h = rms_norm(x, self.mlp_norm[...], self.arch.norm_eps)
        gate, up = (keep(place.own(y, "mlp")) for y in place.project(h, "embed", (self.gate_proj, self.up_proj)))
        (down,) = place.project(jax.nn.silu(gate) * up, "mlp", (self.down_proj,))  # their product alone is sent on
        return place.stream(x + down)

    def qkv(self, x: Array, rope: Rope, place: Placement = TRAINING) -> tuple[Array, Array, Array]:
        """Rotated queries [B, T, N, H] and keys [B, T, K, H], and values [B, T, K, H] of x [B, T, D]."""
        h = rms_norm(x, self.attn_norm[...], self.arch.norm_eps)
        split = (*x.shape[:-1], -1, self.arch.head_size)
        made = place.project(h, "embed", (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (
            place.own(y.reshape(split), heads, None)
            for y, heads in zip(made, ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        return rotate(q, rope), rotate(k, rope), v
