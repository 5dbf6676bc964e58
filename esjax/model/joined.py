"""What decoding makes of a block's weights before it begins, where it has a copy of its own: fewer and larger products.

A step of a few lanes is bound by reading weights and by beginning one product after another, so each that is not there helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.layers import Block
from esjax.model.linear import KERNEL_AXES, Linear
from esjax.runtime.mesh import mesh_sizes

TILE = 128  # rows of B beneath W are a multiple of so many: XLA copies a kernel, in every step, that does not end on a tile


def merged(block: Block) -> Block:
    """Kernels with the adapter in them, W + scale A B in float32.

    In bfloat16 that would round away what the adapter changes by less than half a unit in the last place.
    """
    block = nnx.clone(block)
    for linear in block.linears(block.arch.linears):
        if linear.lora_a is not None and linear.lora_b is not None and linear.kind == "plain":
            w, a, b = linear.kernel[...], linear.lora_a[...], linear.lora_b[...]
            moved = jnp.einsum("lri,lro->lio", a, b, preferred_element_type=jnp.float32) * linear.scale
            linear.kernel[...] = (w.astype(jnp.float32) + moved).astype(w.dtype)
            linear.lora_a = linear.lora_b = None
    return block


def turned(block: Block) -> Block:
    """The same, with kernels [out, in] instead of [in, out], but for those that are quantised.

    A CPU's product of few tokens takes a seventh less time with the weights as its left operand, read in their order; with
    hundreds of tokens it still gains some percent.
    """
    block = merged(block)
    for linear in block.linears(block.arch.linears):
        if linear.kind == "plain":
            layers, axis_in, axis_out = linear.kernel.get_metadata()["axes"]
            linear.kernel = nnx.Param(linear.kernel[...].swapaxes(1, 2), axes=(layers, axis_out, axis_in))
            linear.turned = True
    return block


def joined(block: Block) -> Block:
    """Layers that read one input as one layer, as in a fused family, adapters in the dtype that they are computed in.

    On a mesh that splits layers' outputs they stay apart. Where a device has all of a kernel, B lies beneath it:
    x W + u B = [x u] [W; B] is one product.
    """
    sizes, arch = mesh_sizes(), block.arch
    if sizes["tensor"] == 1 and not arch.fused:
        parts = {"qkv_proj": block.linears(arch.qkv), "gate_up_proj": block.linears(arch.gate_up)}
        block = nnx.clone(block)
        for name in (*arch.qkv, *arch.gate_up):
            delattr(block, name)
        for name, linears in parts.items():
            setattr(block, name, _one(name, linears))
        block.arch = replace(arch, fused=True)
    else:
        block = nnx.clone(block)
    for linear in block.linears(block.arch.linears):
        if linear.lora_a is None or linear.lora_b is None:
            continue
        a, b = (x[...].astype(linear.dtype) for x in (linear.lora_a, linear.lora_b))
        below = linear.kind == "plain" and sizes["fsdp"] == sizes["tensor"] == 1
        if below:
            more = -a.shape[1] % TILE
            a, b = (jnp.pad(x, ((0, 0), (0, more), (0, 0))) for x in (a, b))
            kernel_axes = linear.kernel.get_metadata()["axes"]
            linear.kernel = nnx.Param(jnp.concatenate([linear.kernel[...], b], axis=1), axes=kernel_axes)
        a_axes, b_axes = (x.get_metadata()["axes"] for x in (linear.lora_a, linear.lora_b))
        linear.lora_a = nnx.LoRAParam(a, axes=a_axes)
        linear.lora_b = None if below else nnx.LoRAParam(b, axes=b_axes)
        linear.beneath = b.shape[1] if below else 0
    return block


def _one(name: str, linears: Sequence[Linear]) -> Linear:
    """One layer of several that have the same input, the output of one after that of the other."""
    first, axes = linears[0], ("layers", *KERNEL_AXES[name])
    made = nnx.clone(first)
    made.name = name
    for which in ("kernel", "numbers", "scales"):
        if hasattr(first, which):
            every = [getattr(linear, which) for linear in linears]
            setattr(
                made,
                which,
                every[0].replace(jnp.concatenate([x[...] for x in every], axis=-1), axes=_at(every[0], axes)),
            )
    sizes = [_outputs(linear) for linear in linears]
    if any(linear.bias is not None for linear in linears):
        layers = jnp.shape(getattr(first, "kernel" if first.kind == "plain" else "numbers")[...])[0]
        biases = [
            jnp.zeros((layers, size), first.dtype) if linear.bias is None else linear.bias[...]
            for linear, size in zip(linears, sizes, strict=True)
        ]
        made.bias = nnx.data(nnx.Param(jnp.concatenate(biases, axis=-1), axes=(axes[0], axes[2])))
    adapter = _adapters(linears, sizes, axes)
    if adapter is not None:
        made.lora_a, made.lora_b = (nnx.data(x) for x in adapter)  # the first of them may have none
    return made


def _at(variable: nnx.Variable[Array], axes: tuple[str, ...]) -> tuple[str | None, ...]:
    """The axes of a part of a joined layer: those of the layer, but where the part has one that is not split."""
    return tuple(
        new if old is not None else None for old, new in zip(variable.get_metadata()["axes"], axes, strict=True)
    )


def _outputs(linear: Linear) -> int:
    return int(getattr(linear, "kernel" if linear.kind == "plain" else "numbers")[...].shape[-1])


def _adapters(
    linears: Sequence[Linear], sizes: Sequence[int], axes: tuple[str, ...]
) -> tuple[nnx.LoRAParam[Array], nnx.LoRAParam[Array]] | None:
    """A of all that have one, one beneath the other, and B, which is zero where a layer's rows meet another's columns."""
    a, b, before = [], [], 0
    for linear, size in zip(linears, sizes, strict=True):
        if linear.lora_a is not None and linear.lora_b is not None:
            a.append(linear.lora_a[...])
            b.append(jnp.pad(linear.lora_b[...], ((0, 0), (0, 0), (before, sum(sizes) - before - size))))
        before += size
    if not a:
        return None
    join = [jnp.concatenate(x, axis=1) for x in (a, b)]
    return nnx.LoRAParam(join[0], axes=(axes[0], "lora", axes[1])), nnx.LoRAParam(
        join[1], axes=(axes[0], "lora", axes[2])
    )
