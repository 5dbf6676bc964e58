"""Where arrays live: the mesh's axes, and which logical axis is split over which of them.

The mesh is taken from the context (``with jax.set_mesh(mesh)``); without one everything here is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from flax import nnx
from jax import Array
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esjax.config import InputError

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


def topology_devices(name: str) -> list[Any]:
    """The TPUs of a topology such as v5e:4x4, without one at hand: programs can be compiled for them, not run.

    Raises InputError for an unknown topology.
    """
    # Nothing is run, so no TPU has to be asked for or kept from others.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as e:  # every kind, from a missing libtpu to a name it does not know
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"topology {name}: {reason}; give one like v5e:4x4, and install esjax's tpu extra") from e


def topology_mesh(name: str, tensor: int) -> Mesh:
    """A mesh of a topology's TPUs: all devices that ``tensor`` leaves go to fsdp.

    Raises InputError for an unknown topology or an indivisible number.
    """
    devices = topology_devices(name)
    if len(devices) % tensor:
        raise InputError(f"topology {name} has {len(devices)} devices, which {tensor} does not divide")
    return make_mesh(devices, 1, len(devices) // tensor, tensor)


def placed(tree: T, mesh: Mesh) -> T:
    """Shapes of a tree with where each array lives: parameters by their axes, everything else everywhere."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_value()
            axes = leaf.get_metadata()["axes"]
            return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(mesh, axes)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, ()))

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def placed_batch(tree: T, mesh: Mesh) -> T:
    """Shapes of a batch whose arrays [B, ...] are split over the devices by their first axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, ("batch",))), tree)


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
