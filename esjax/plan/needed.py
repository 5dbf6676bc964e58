"""What each program's work takes on one device by formula: FLOPs, and bytes to be moved. The compiled one is held against it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from esjax.model.costs import attention_flops, passes_flops, prefill_flops, scoring_flops, weights_read
from esjax.model.families import Architecture
from esjax.model.linear import Lora
from esjax.runtime.mesh import mesh_sizes
from esjax.sample.shapes import Shapes


class Needed(NamedTuple):
    """FLOPs and bytes on one device, shared out evenly."""

    flops: float = 0.0
    bytes: float = 0.0


def held_bytes(tree: Any, widest: int = 8) -> int:
    """Bytes that one device holds of a tree of shapes in their places; with numbers of so many bytes at the ``widest``."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * min(np.dtype(x.dtype).itemsize, widest) for x in leaves)


def multiplied(*states: nnx.State) -> tuple[Any, Any]:
    """Of a model's parts, what tokens are multiplied with: all that layers have, and the head."""
    layers = [state["layers"] for state in states if "layers" in state]
    return layers, next(state[name] for name in ("head", "embed") for state in states if name in state)


def decoding(arch: Architecture, shapes: Shapes, weights: Any, cache: Any, itemsize: int) -> Needed:
    """A step: all weights and the whole cache are read once, and every lane sees all slots of its row and ring.

    Weights are converted to the arithmetic's dtype, numbers of ``itemsize`` bytes, before the loop of steps begins.
    """
    lanes = shapes.rows * shapes.lanes
    flops = 2.0 * weights_read(arch) * lanes + attention_flops(arch, lanes * (shapes.slots + shapes.new))
    return Needed(flops / devices(), held_bytes(weights, itemsize) + held_bytes(cache))


def prefilling(arch: Architecture, shapes: Shapes, layers: Any, itemsize: int) -> Needed:
    """Windows that end their rows: weights are read once, and so is each row."""
    sizes = mesh_sizes()
    windows = shapes.windows * sizes["data"] * sizes["fsdp"]
    seen = windows * shapes.width * (shapes.slots - shapes.width / 2)
    rows = 2.0 * arch.layers * arch.kv_heads * arch.head_size * itemsize * windows * shapes.slots
    flops = prefill_flops(arch, windows * shapes.width, seen)
    return Needed(flops / devices(), held_bytes(layers) + rows / devices())


def scoring(arch: Architecture, size: tuple[int, int], weights: Any) -> Needed:
    """Full rows [B, T], every token a target; weights are gathered over fsdp and read once."""
    rows, length = size
    flops = scoring_flops(arch, rows * length, rows * length, rows * length**2 / 2)
    return Needed(flops / devices(), float(held_bytes(weights) * mesh_sizes()["fsdp"]))


class Step(NamedTuple):
    """The sizes of a training step."""

    rows: int  # B
    length: int  # T
    micro_rows: int  # at once
    lora: Lora | None  # None trains all parameters
    itemsize: int  # bytes of an activation


def training(arch: Architecture, step: Step, weights: Any, trained: Any, state: Any) -> Needed:
    """Full rows, every token a target, nothing recomputed.

    A micro-batch reads the weights forward and backward, and writes and reads the gradient; each layer's input is kept
    for the backward pass; what is trained and its optimiser's state are read and written once.
    """
    tokens = step.rows * step.length
    flops = passes_flops(arch, step.lora, tokens, tokens, tokens * step.length / 2)
    read = 2.0 * held_bytes(weights) * mesh_sizes()["fsdp"] * step.rows / step.micro_rows
    gradient = 2.0 * held_bytes(trained) * step.rows / step.micro_rows
    kept = 2.0 * arch.layers * tokens * arch.width * step.itemsize / devices()
    return Needed(flops / devices(), read + gradient + kept + 2.0 * held_bytes((trained, state)))


def devices() -> int:
    return math.prod(mesh_sizes().values())
