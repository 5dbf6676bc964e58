"""Where arrays live: the mesh's axes, and which logical axis is split over which of them.

The mesh is taken from the context (``with jax.set_mesh(mesh)``); without one everything here is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
# Logical axis -> mesh axes. Weights are split over fsdp along the model's width and gathered layer by layer.
RULES: dict[str | None, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "lora": None,
    None: None,
}
T = TypeVar("T")


def make_mesh(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh of data x fsdp x tensor devices, in the order that suits their network."""
    return jax.make_mesh((data, fsdp, tensor), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(RULES[a] for a in axes))


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Where an array with these logical axes lives."""
    return NamedSharding(mesh, spec(axes))


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin an activation's place, so that the compiler gathers weights and not activations."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec(axes))


def batch_groups() -> int:
    """Over how many devices a batch is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]


def per_device(function: Callable[..., Array], arguments: Sequence[Sequence[str | None]]) -> Callable[..., Array]:
    """Run ``function`` on each device's part: what a compiler cannot split, such as a kernel of ours.

    ``arguments`` names the leading logical axes of each argument's arrays; the result lies as the first argument does.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = tuple(spec(axes) for axes in arguments)
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)
