"""The decoder's parts: RMSNorm, rotary embedding, one block of linear layers around attention.

Every parameter carries its logical axis names as metadata ``axes``. Below a stack, arrays have a leading ``layers`` axis
and the code here sees one layer's slice of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from esjax.model.dropout import Dropout
from esjax.model.families import Architecture, Kind
from esjax.model.linear import Linear, Lora, project
from esjax.runtime.mesh import constrain


@jax.named_scope("norm")
def rms_norm(x: Array, weight: Array, arch: Architecture) -> Array:
    """Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + arch.norm_eps)
    if arch.norm_plus_one:
        return (x32 * (1 + weight.astype(jnp.float32))).astype(x.dtype)
    return weight * x32.astype(x.dtype)


class Scores(NamedTuple):
    """What is particular to a layer's attention. Static."""

    window: int | None = None  # a token sees those of fewer positions' distance
    cap: float | None = None  # scores are kept softly within +-cap


def softcap(x: Array, cap: float | None) -> Array:
    """x kept softly within +-cap (Gemma 2); None leaves it as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


class Rope(NamedTuple):
    """cos and sin of the rotary angles, float32 [B, T, 1, h / 2]; the first h numbers of a head are turned."""

    cos: Array
    sin: Array


def rope_at(kind: Kind, position: Array) -> Rope | None:
    """Rotary tables (Su et al. 2021) of a layer of this kind for positions [B, T]; None where it has no rotary positions."""
    if kind.rotary is None:
        return None
    angle = position.astype(jnp.float32)[..., None, None] * jnp.asarray(kind.rotary.frequencies, jnp.float32)
    return Rope(jnp.cos(angle) * kind.rotary.factor, jnp.sin(angle) * kind.rotary.factor)


@jax.named_scope("rotate")
def rotate(x: Array, rope: Rope | None) -> Array:
    """Apply the rotary embedding to [B, T, heads, H]; pairs are (i, i + h/2), as in Hugging Face checkpoints."""
    if rope is None:
        return x
    half = rope.cos.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    turned = [a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Placement(NamedTuple):
    """Where a block's weights and what it computes lie on the mesh, and what its adapters read.

    Training gathers a layer's weights over fsdp and leaves the rest to the compiler. Decoding has few tokens and many weights:
    these stay where they are, the tokens' width is split over fsdp as theirs is, and products are summed over devices.
    """

    gather: bool
    one_product: bool = False  # of base and adapter, see ``linear.project``
    dropout: Dropout | None = None  # not static: it has the keys of a batch's rows

    def project(self, x: Array, axis: str, linears: Sequence[Linear]) -> list[Array]:
        """What linear layers make of x [..., in], whose last axis is ``axis``: each [..., out]."""
        x = x if self.gather else constrain(x, "stream", None, axis)
        return project(x, linears, self.gather, self.one_product, self.dropout)

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
    """One decoder layer: grouped-query attention, then a gated MLP, normed where the family norms. Arrays are stacked [L, ...].

    Its linear layers are attributes by their Hugging Face names, see ``Architecture.linears``, and so are its norms.
    """

    o_proj: Linear
    down_proj: Linear
    q_norm: nnx.Param[Array]
    k_norm: nnx.Param[Array]

    def __init__(self, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.arch = arch
        for name in arch.linears:
            setattr(self, name, Linear(name, arch, lora, dtype, rngs))
        for norm in arch.norms:
            setattr(self, norm, nnx.Param(jnp.ones((arch.layers, arch.width), dtype), axes=("layers", "embed")))
        if arch.qk_norm:
            for which, heads in (("q_norm", arch.heads), ("k_norm", arch.kv_heads)):
                size = arch.head_size * (heads if arch.qk_norm == "whole" else 1)
                setattr(self, which, nnx.Param(jnp.ones((arch.layers, size), dtype), axes=("layers", None)))

    def linears(self, names: Sequence[str]) -> list[Linear]:
        return [getattr(self, name) for name in names]

    def norm(self, x: Array, name: str) -> Array:
        """x [B, T, D] after one of ``NORMS``, or as it is where the family has none there."""
        return rms_norm(x, getattr(self, name)[...], self.arch) if name in self.arch.norms else x

    def __call__(
        self,
        x: Array,
        rope: Rope | None,
        attend: Attend,
        place: Placement = TRAINING,
        only: Callable[[Array], Array] | None = None,
    ) -> Array:
        """The residual stream [B, T, D] after this layer; ``attend`` says what a query sees.

        Args:
            only: of any [B, T, n] the tokens that are computed further once keys and values are made; of the last layer the
                other ones are nobody's.
        """
        q, k, v = (keep(y) for y in self.qkv(x, rope, place))
        with jax.named_scope("attend"):
            attended = attend(q, k, v).reshape(*x.shape[:-1], -1)
        if only is not None:
            attended, x = only(attended), only(x)
        (o,) = place.project(keep(attended), "heads", (self.o_proj,))
        x = keep(place.stream(x + self.norm(o, "attn_post_norm")))
        h = self.norm(x, "mlp_norm")
        made = place.project(h, "embed", self.linears(self.arch.gate_up))
        gate, up = (keep(place.own(y, "mlp")) for y in (jnp.split(made[0], 2, axis=-1) if self.arch.fused else made))
        activated = jax.nn.silu(gate) if self.arch.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        (down,) = place.project(activated * up, "mlp", (self.down_proj,))  # their product alone is sent on
        return place.stream(x + self.norm(down, "mlp_post_norm"))

    def qkv(self, x: Array, rope: Rope | None, place: Placement = TRAINING) -> tuple[Array, Array, Array]:
        """Rotated queries [B, T, N, H] and keys [B, T, K, H], and values [B, T, K, H] of x [B, T, D]."""
        arch = self.arch
        made = place.project(self.norm(x, "attn_norm"), "embed", self.linears(arch.qkv))
        if arch.fused:
            ends = (arch.heads * arch.head_size, (arch.heads + arch.kv_heads) * arch.head_size)
            made = jnp.split(made[0], ends, axis=-1)
        if arch.qk_norm == "whole":
            made[:2] = (rms_norm(y, w[...], arch) for y, w in zip(made, (self.q_norm, self.k_norm), strict=False))
        split = (*x.shape[:-1], -1, arch.head_size)
        q, k, v = (
            place.own(y.reshape(split), heads, None)
            for y, heads in zip(made, ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        if arch.qk_norm == "head":
            q, k = rms_norm(q, self.q_norm[...], arch), rms_norm(k, self.k_norm[...], arch)
        q, k = rotate(q, rope), rotate(k, rope)
        # Attention scales by H^-1/2.
        return (q if arch.query_scale is None else q * (arch.query_scale * arch.head_size**0.5)), k, v
