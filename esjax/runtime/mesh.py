"""Where arrays live: the mesh's axes, and which logical axis is split over which of them.

The mesh is taken from the context (``with jax.set_mesh(mesh)``); without one everything here is the identity, so one device
needs no mesh. Three axes: ``data`` repeats the weights (and may span slices or hosts), ``fsdp`` shares weights and batch,
``tensor`` shares each layer's heads and hidden units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from esjax.errors import InputError
from esjax.settings.schema import Config, MeshSettings, OptimSettings

AXES = ("data", "fsdp", "tensor")
# Logical axis -> mesh axes. Training splits weights over fsdp along the model's width and gathers them layer by layer;
# decoding leaves them where they lie, and splits the width of its few tokens instead.
RULES: dict[str | None, tuple[str, ...] | str | None] = {
    "batch": ("data", "fsdp"),  # rows: of training, of scoring, of the sampler's keys and values
    "stream": "data",  # tokens whose width is split as the weights' is
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


# --- making a mesh ---------------------------------------------------------------------------------------------------


def mesh_shape(settings: MeshSettings, count: int) -> tuple[int, int, int]:
    """The mesh's shape on ``count`` devices. Raises InputError when they do not come out even."""
    data, fsdp, tensor = settings.data, settings.fsdp, settings.tensor
    asked = f"mesh.data={data}, mesh.fsdp={fsdp}, mesh.tensor={tensor}"
    if fsdp == 0:
        raise InputError("mesh.fsdp=0: give a number of devices, or -1 for all that mesh.data and mesh.tensor leave")
    if fsdp == -1:
        fsdp, left = divmod(count, data * tensor)
        if left or not fsdp:
            raise InputError(f"{asked}: {count} devices cannot be divided so; mesh.data x mesh.tensor must divide them")
    if data * fsdp * tensor > count:
        raise InputError(f"{asked}: that takes {data * fsdp * tensor} devices of {count}; lower one of them")
    return data, fsdp, tensor


def make_mesh(devices: Sequence[Any], shape: tuple[int, int, int]) -> Mesh:
    """A mesh of data x fsdp x tensor of these devices, in the order that suits their network.

    Slices (of TPUs) or hosts (of anything else), between which the network is slow, are spanned by ``data`` where it is a
    multiple of their number, else by ``fsdp``. Raises InputError where only ``tensor`` could span slices, or where devices of
    other processes would stay idle.
    """
    by_slice = getattr(devices[0], "slice_index", None) is not None
    far = {d.slice_index if by_slice else d.process_index for d in devices}
    need = math.prod(shape)
    if len({d.process_index for d in devices}) > 1 and need != len(devices):
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
        raise InputError(
            f"{sizes}: a mesh of {need} devices leaves {len(devices) - need} idle on other hosts: set mesh.fsdp=-1"
        )
    if len(far) == 1:
        made = mesh_utils.create_device_mesh(shape, devices[:need], allow_split_physical_axes=True)
        return _mesh(made)
    data, fsdp, tensor = shape
    n = len(far)
    if data % n == 0:
        near, across = (data // n, fsdp, tensor), (n, 1, 1)
    elif fsdp % n == 0:
        near, across = (data, fsdp // n, tensor), (1, n, 1)
    elif by_slice:
        raise InputError(f"mesh {shape} over {n} slices: mesh.data (or mesh.fsdp) must be a multiple of {n}")
    else:
        return _mesh(np.asarray(devices).reshape(shape))
    made = mesh_utils.create_hybrid_device_mesh(
        near, across, devices, process_is_granule=not by_slice, allow_split_physical_axes=True
    )
    return _mesh(made)


def _mesh(devices: np.ndarray) -> Mesh:
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use_mesh(settings: MeshSettings) -> AbstractContextManager[Any]:
    """The mesh of this run's devices as the context; one device needs none. Raises InputError."""
    shape = mesh_shape(settings, jax.device_count())
    mesh = make_mesh(jax.devices(), shape)  # refuses what leaves other processes idle
    return nullcontext() if math.prod(shape) == 1 else jax.set_mesh(mesh)


# --- where an array lives --------------------------------------------------------------------------------------------


def spec(axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array with these logical axes. Raises ValueError where two of them want the same devices."""
    wanted = [RULES[a] for a in axes]
    flat = [m for w in wanted for m in ((w,) if isinstance(w, str) else w or ())]
    if len(set(flat)) < len(flat):
        raise ValueError(f"logical axes {tuple(axes)} collide: two of them are split over the same mesh axis ({flat})")
    return PartitionSpec(*wanted)


def sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    """Where an array with these logical axes lives."""
    return NamedSharding(mesh, spec(axes))


def _context() -> Mesh | None:
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def sharding_here(*axes: str | None) -> NamedSharding | None:
    """Where an array with these logical axes lives on the present mesh; None on one device."""
    mesh = _context()
    return None if mesh is None else sharding(mesh, axes)


def shardings_here(tree: T) -> T | None:
    """The same for all arrays of a tree: parameters by their axes, everything else everywhere. None on one device."""
    mesh = _context()
    return None if mesh is None else jax.tree.map(lambda x: x.sharding, with_shardings(tree, mesh))


def with_shardings(tree: T, mesh: Mesh) -> T:
    """Shapes of a tree with where each array lives: parameters by their axes, everything else everywhere."""

    def place(leaf: Any) -> Any:
        if isinstance(leaf, nnx.Variable):
            value = leaf.get_value()
            if not hasattr(value, "shape"):  # optimisers leave out what they keep nothing of
                return leaf
            axes = leaf.get_metadata()["axes"]
            if value.ndim != len(axes):  # a moment that is kept by rows and columns is small
                axes = ()
            return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(mesh, axes)))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, ()))

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def with_batch_shardings(tree: T, mesh: Mesh) -> T:
    """Shapes of a batch whose arrays [B, ...] are split over the devices by their first axis."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(mesh, ("batch",))), tree)


def read_sharded(shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], np.ndarray], *axes: str | None) -> Array:
    """An array of which each host reads only what its devices hold: ``read`` is given a part's slices."""
    where = sharding_here(*axes)
    if where is None:
        return jnp.asarray(read((slice(None),) * len(shape)))
    known: dict[str, np.ndarray] = {}  # devices that repeat a part ask for it one after the other

    def once(part: Any) -> np.ndarray:
        if str(part) not in known:
            known.clear()
            known[str(part)] = read(tuple(part))
        return known[str(part)]

    return jax.make_array_from_callback(shape, where, once)


def shard_batch(tree: T) -> T:
    """A host's batch [B, ...], split over the devices by rows; every host passes the whole of it."""
    if _context() is None:
        return tree
    return jax.tree.map(lambda x: read_sharded(x.shape, lambda part: x[part], "batch", *[None] * (x.ndim - 1)), tree)


def build_batch(count: int, build: Callable[[range], T]) -> T:
    """A batch [B, ...] of ``count`` rows of which each host builds only those that its devices hold: ``build`` is told which."""
    mesh = _context()
    if mesh is None:
        return build(range(count))
    known: dict[str, tuple[list[np.ndarray], Any]] = {}

    def built(part: slice) -> tuple[list[np.ndarray], Any]:
        if str(part) not in known:
            known[str(part)] = jax.tree.flatten(build(range(count)[part]))
        return known[str(part)]

    def whole(n: int, x: np.ndarray) -> Array:
        where = sharding(mesh, ("batch", *[None] * (x.ndim - 1)))
        return jax.make_array_from_callback((count, *x.shape[1:]), where, lambda part: built(part[0])[0][n])  # type: ignore[index]

    places = sharding(mesh, ("batch",)).addressable_devices_indices_map((count,))
    leaves, tree = built(next(place[0] for place in places.values() if place))
    return cast(T, jax.tree.unflatten(tree, [whole(n, x) for n, x in enumerate(leaves)]))


def replicate(tree: T) -> T:
    """Small arrays that every host has, on all devices."""
    return jax.tree.map(lambda x: read_sharded(x.shape, np.asarray(x).__getitem__, *[None] * x.ndim), tree)


def to_host(x: Any) -> np.ndarray:
    """A whole array in every host's memory."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        x = jax.jit(lambda a: a, out_shardings=sharding_here(*[None] * x.ndim))(x)
    return np.asarray(x)


# --- inside programs -------------------------------------------------------------------------------------------------


def constrain(x: Array, *axes: str | None) -> Array:
    """Pin an activation's place, so that the compiler gathers weights and not activations, or the reverse."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.lax.with_sharding_constraint(x, spec(axes))


def replicated(tree: T) -> T:
    """Pin small arrays to all devices, so that every host can read them."""
    return jax.tree.map(lambda x: constrain(x, *[None] * jnp.ndim(x)), tree)


def mesh_sizes() -> dict[str, int]:
    """The present mesh's shape, by axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict.fromkeys(AXES, 1) if mesh.empty else dict(mesh.shape)


def batch_groups() -> int:
    """Over how many devices a batch is split."""
    sizes = mesh_sizes()
    return sizes["data"] * sizes["fsdp"]


def check_split(setting: str, count: int) -> None:
    """Raise InputError unless the devices that share the batch divide so many rows or replies."""
    groups = batch_groups()
    if count % groups:
        raise InputError(
            f"{setting}={count} cannot be split over mesh.data x mesh.fsdp = {groups} devices: choose a multiple of {groups}, or "
            "a smaller mesh"
        )


def rows_at_once(name: str, s: OptimSettings) -> int:
    """How many rows a phase computes at once: its micro_rows, or one a device where a step has fewer rows than there are devices.

    The rows beyond the step's are empty: they change no number, and their devices wait. Raises InputError, see check_split.
    """
    if s.micro_rows % batch_groups() and s.batch_rows < batch_groups():
        return batch_groups()
    check_split(f"{name}.micro_rows", s.micro_rows)
    return s.micro_rows


def check_batches(config: Config) -> None:
    """Raise InputError unless the present mesh divides what each phase of a run computes at once."""
    rows_at_once("sft", config.sft)
    rows_at_once("dpo", config.dpo)
    check_split("evolve.batch", config.evolve.batch)


def per_device(
    function: Callable[..., T],
    arguments: Sequence[Sequence[str | None]],
    results: Any = None,
) -> Callable[..., T]:
    """Run ``function`` on each device's part: what a compiler cannot split, such as a kernel, or must not.

    ``arguments`` names the leading logical axes of each argument's arrays, ``results`` those of the results (a tuple of
    several's); left out, the result lies as the first argument does.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return function
    specs = tuple(spec(axes) for axes in arguments)
    out = specs[0] if results is None else tuple(spec(axes) for axes in results)
    return jax.shard_map(function, in_specs=specs, out_specs=out, check_vma=False)
