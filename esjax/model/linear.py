"""Linear layers with adapters: their weights, and what several of them make of one input.

Every parameter carries its logical axis names as metadata ``axes``, with a leading ``layers`` axis below a stack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.dropout import Dropout
from esjax.model.families import Architecture
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
        self.turned = False  # the kernel is [out, in], see ``joined.turned``
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
    bound by memory, not by arithmetic. ``one_product`` makes base and adapter in one, see ``_one_product``, where a layer's
    input is not wider than its output; ``dropout`` drops from what the adapters read, for all of them the same.
    """
    # Two-dimensional: XLA's CPU backend computes the narrow gradients of A and B several times slower over two axes.
    flat = x.reshape(-1, x.shape[-1])
    if linears[0].beneath:
        return [_with_b_beneath(flat, linears[0]).reshape(*x.shape[:-1], -1)]
    if linears[0].turned:
        return [y.reshape(*x.shape[:-1], -1) for y in _turned(flat, linears)]
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
                if one_product and kernel.shape[1] >= kernel.shape[0]:
                    rank, before = len(b), list(adapted).index(linear.name)
                    y = _one_product(
                        flat, wide, kernel, jnp.pad(b, ((rank * before, wide.shape[1] - rank * (before + 1)), (0, 0)))
                    )
                else:
                    y = flat @ kernel + narrow[linear.name] @ b
            out.append((y if linear.bias is None else y + linear.bias[...]).reshape(*x.shape[:-1], -1))
    return out


def _turned(x: Array, linears: Sequence[Linear]) -> list[Array]:
    """x W of x [n, in] as (W^T x^T)^T, with kernels that are [out, in]: each [n, out].

    The barriers keep the compiler from turning the product back.
    """
    columns = jax.lax.optimization_barrier(x.T)
    out = []
    for linear in linears:
        with jax.named_scope(linear.name):
            y = jax.lax.optimization_barrier(linear.kernel[...] @ columns).T
            out.append(y if linear.bias is None else y + linear.bias[...])
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

    On a GPU a sum of two products is written twice and read once, which takes longer than u B itself; one product of rows
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
