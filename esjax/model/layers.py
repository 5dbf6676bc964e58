"""The decoder's parts: linear layers with adapters, RMSNorm, rotary embedding, attention, one block.

Every parameter carries its logical axis names as metadata ``axes``. Below a stack, arrays have a leading ``layers`` axis
and the code here sees one layer's slice of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from esjax.model.dropout import Dropout
from esjax.model.families import Architecture, Kind
from esjax.model.quantised import QTYPES, SCALES, dequantise, scale_rows, stored_rows
from esjax.runtime.mesh import constrain

KERNEL_AXES = {
    "qkv_proj": ("embed", "heads"),
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv_heads"),
    "v_proj": ("embed", "kv_heads"),
    "o_proj": ("heads", "embed"),
    "gate_up_proj": ("embed", "mlp"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
}


def linear_sizes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer."""
    d, q, kv, f = arch.width, arch.heads * arch.head_size, arch.kv_heads * arch.head_size, arch.hidden
    sizes = {
        "qkv_proj": (d, q + 2 * kv),
        "q_proj": (d, q),
        "k_proj": (d, kv),
        "v_proj": (d, kv),
        "o_proj": (q, d),
        "gate_up_proj": (d, 2 * f),
        "gate_proj": (d, f),
        "up_proj": (d, f),
        "down_proj": (f, d),
    }
    return {name: sizes[name] for name in arch.linears}


class Lora(NamedTuple):
    """The adapter's shape: which linear layers, rank R, and the scale alpha / R (PEFT's definition)."""

    targets: tuple[str, ...]
    rank: int
    scale: float
    init: Literal["b_zero", "a_zero", "gaussian"] = "b_zero"
    dropout: float = 0.0  # in SFT, of what it reads


class Linear(nnx.Module):
    """y = x W + b + scale (x A^T) B, stacked over L layers: W [L, in, out], A [L, R, in], B [L, R, out].

    A is drawn uniform in +-1/sqrt(in) and B is zero, as PEFT does (Kaiming uniform with a = sqrt 5); or one of the two is
    normal with a standard deviation of 1/R (PEFT's "gaussian") and the other zero.
    """

    def __init__(self, name: str, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.name, stack = name, arch.layers
        i, o = linear_sizes(arch)[name]
        bias = name in arch.biased
        axes_in, axes_out = KERNEL_AXES[name]
        self.dtype, self.kind, self.size, axes = dtype, arch.kernels, i, ("layers", axes_in, axes_out)
        if arch.kernels == "plain":
            draw = jax.random.normal(rngs.params(), (stack, i, o), jnp.float32) * 0.02
            self.kernel = nnx.Param(draw.astype(dtype), axes=axes)
        else:
            rows, stored = scale_rows(arch.kernels, i), stored_rows(arch.kernels, i)
            self.numbers = nnx.Param(jnp.zeros((stack, stored, o), QTYPES[arch.kernels]), axes=axes)
            self.scales = nnx.Param(jnp.ones((stack, rows, o), SCALES[arch.kernels]), axes=("layers", None, axes_out))
        self.bias = nnx.Param(jnp.zeros((stack, o), dtype), axes=("layers", axes_out)) if bias else None
        self.scale = 0.0 if lora is None else lora.scale
        self.beneath = 0  # rows of B that lie beneath W in the kernel, see ``joined``
        if lora is None or name not in lora.targets:
            self.lora_a = self.lora_b = None
            return
        bound, r = 1 / math.sqrt(i), lora.rank
        a, b = jnp.zeros((stack, r, i), jnp.float32), jnp.zeros((stack, r, o), jnp.float32)
        if lora.init == "b_zero":
            a = jax.random.uniform(rngs.lora(), (stack, i, r), jnp.float32, -bound, bound).swapaxes(1, 2)
        elif lora.init == "gaussian":
            a = jax.random.normal(rngs.lora(), a.shape) / r
        else:
            b = jax.random.normal(rngs.lora(), b.shape) / r
        # The long axis last: the gradient of A is then a product that XLA's CPU backend computes several times faster.
        self.lora_a = nnx.LoRAParam(a, axes=("layers", "lora", axes_in))
        self.lora_b = nnx.LoRAParam(b, axes=("layers", "lora", axes_out))

    def base(self, gather: bool) -> Array:
        """W [in, out], the frozen part."""
        axes = KERNEL_AXES[self.name]
        if self.kind == "plain":
            return _gathered(self.kernel[...], axes, gather)
        numbers = _gathered(self.numbers[...], axes, gather)
        return dequantise(numbers, self.scales[...], self.kind, self.size).astype(self.dtype)


def project(
    x: Array,
    linears: Sequence[Linear],
    gather: bool = True,
    one_product: bool = False,
    dropout: Dropout | None = None,
) -> list[Array]:
    """What several linear layers make of one input [..., in]: each [..., out]. Weights are gathered over fsdp, or stay.

    Their A matrices are joined, so that x is read once for all of them, forward and backward: LoRA's narrow products are
    bound by memory, not by arithmetic. ``one_product`` makes base and adapter in one, see ``_one_product``; ``dropout``
    drops from what the adapters read, for all of them the same.
    """
    # Two-dimensional: XLA's CPU backend computes the narrow gradients of A and B several times slower over two axes.
    flat = x.reshape(-1, x.shape[-1])
    if linears[0].beneath:
        return [_with_b_beneath(flat, linears[0]).reshape(*x.shape[:-1], -1)]
    adapted = {l.name: (l.lora_a[...], l.lora_b[...]) for l in linears if l.lora_a is not None and l.lora_b is not None}
    narrow: dict[str, Array] = {}
    if adapted:
        axes_in = (None, KERNEL_AXES[linears[0].name][0])  # of all: they have one input
        joined = _gathered(jnp.concatenate([a.astype(x.dtype) for a, _ in adapted.values()], axis=0), axes_in, gather)
        place = list(KERNEL_AXES).index(linears[0].name)
        read = flat if dropout is None else dropout(x, place).reshape(flat.shape)
        with jax.named_scope("lora"):
            wide = read @ joined.T * linears[0].scale
        narrow = dict(zip(adapted, jnp.split(wide, len(adapted), axis=1), strict=True))
    out = []
    for linear in linears:
        with jax.named_scope(linear.name):
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


def _with_b_beneath(x: Array, linear: Linear) -> Array:
    """[x u] [W; B] of x [n, in] with u = scale x A^T, and the bias: [n, out]."""
    assert linear.lora_a is not None
    with jax.named_scope("lora"):
        u = x @ linear.lora_a[...].T * linear.scale
    with jax.named_scope(linear.name):
        y = jnp.concatenate([x, u], axis=1) @ linear.kernel[...]
    return y if linear.bias is None else y + linear.bias[...]


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
    one_product: bool = False  # of base and adapter, see ``_one_product``
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

    def __call__(self, x: Array, rope: Rope | None, attend: Attend, place: Placement = TRAINING) -> Array:
        """The residual stream [B, T, D] after this layer; ``attend`` says what a query sees."""
        q, k, v = (keep(y) for y in self.qkv(x, rope, place))
        with jax.named_scope("attend"):
            attended = attend(q, k, v)
        (o,) = place.project(keep(attended.reshape(*x.shape[:-1], -1)), "heads", (self.o_proj,))
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
