"""Load a backbone: a Hugging Face folder becomes the decoder's arrays, strictly by the key table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax.errors import InputError
from esjax.hub.shards import ShardReader
from esjax.model.attention import choose_path
from esjax.model.decoder import Decoder, Execution, Remat
from esjax.model.families import Architecture, ignorable, key_table, read_architecture
from esjax.model.layers import Lora
from esjax.model.lora import Adapter, flatten, merge_kernel, unflatten
from esjax.run.progress import say
from esjax.runtime.mesh import mesh_sizes, read_sharded, shardings_here, to_host


@dataclass(frozen=True)
class Backbone:
    """A frozen base with the places where an adapter goes. M_t is a Backbone plus adapter_t."""

    folder: Path
    arch: Architecture
    lora: Lora | None
    dtype: jnp.dtype
    definition: nnx.GraphDef[Decoder]
    base: nnx.State
    execution: Execution

    def _make_adapter(self, seed: int) -> Adapter:
        # Under jit, the base's random draws are dead code and cost nothing.
        decoder = Decoder(self.arch, self.lora, self.dtype, nnx.Rngs(params=0, lora=seed))
        return nnx.state(decoder, nnx.LoRAParam)

    @property
    def adapter_shapes(self) -> Adapter:
        """The tree of an adapter, with shapes for arrays."""
        return jax.eval_shape(lambda: self._make_adapter(0))

    def fresh_adapter(self, seed: int) -> Adapter:
        """A new adapter: A random, B zero, so that base + adapter is the base."""
        return jax.jit(lambda: self._make_adapter(seed), out_shardings=shardings_here(self.adapter_shapes))()


def bind(definition: nnx.GraphDef[Decoder], adapter: Adapter, base: nnx.State) -> Decoder:
    """The callable model of a base and an adapter."""
    return nnx.merge(definition, adapter, base)


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The dtype for ``model.dtype``: auto is float32 on CPU, bfloat16 elsewhere; this machine's platform if not said."""
    if name == "auto":
        name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def choose_execution(
    attention: str, remat: Remat, dtype: jnp.dtype, platform: str | None = None, weights: str = "auto"
) -> Execution:
    """How to compute on a platform (cpu, gpu or tpu; this machine's when left out). Raises InputError for what it cannot do."""
    platform = platform or jax.default_backend()
    if weights == "auto":
        weights = "shared" if platform == "tpu" else "apart"
    if remat == "offload" and platform == "cpu":
        raise InputError(
            "model.remat=offload needs a device with memory of its own: choose none, dots or full on a CPU"
        )
    execution = Execution(choose_path(attention, platform, dtype), remat=remat, weights=weights)  # type: ignore[arg-type]
    if platform == "gpu" and remat in (
        "none",
        "dots",
    ):  # what is kept need not be copied into arrays of all layers, and back
        execution = execution._replace(unroll=True)  # where little is to be kept, only a loop sees to it
    return execution._replace(logits=1 << 24) if platform == "cpu" else execution  # large chunks gain nothing on a CPU


def load_backbone(
    folder: Path,
    lora: Lora | None,
    dtype: jnp.dtype,
    attention: str = "auto",
    remat: Remat = "full",
    weights: str = "auto",
) -> Backbone:
    """Read a Hugging Face folder, one stacked parameter at a time, each host what its devices hold.

    Raises InputError naming a tensor that is missing, misshaped or not part of the architecture, or a size that the mesh
    does not divide.
    """
    execution = choose_execution(attention, remat, dtype, weights=weights)
    arch = read_architecture(folder)
    check_divisible(arch)
    reader = ShardReader(folder)
    arch = _as_stored(reader, arch)
    abstract = nnx.eval_shape(lambda: Decoder(arch, lora, dtype, nnx.Rngs(params=0, lora=0)))
    definition, _, base = nnx.split(abstract, nnx.LoRAParam, ...)  # type: ignore[misc]
    flat = flatten(base)
    used: set[str] = set()
    for weight in key_table(arch):
        like = flat[weight.path]
        stacked = weight.path[0] == "layers"
        shape = like.get_value().shape[1:] if stacked else like.get_value().shape
        keys = [weight.key.format(i) for i in range(arch.layers)] if stacked else [weight.key]
        for key in keys:
            reader.check(key, shape[::-1] if weight.transpose else shape)
        used.update(keys)

        def read(part: tuple[slice, ...], keys: list[str] = keys, turn: bool = weight.transpose) -> np.ndarray:
            within = part[1:] if len(keys) > 1 or stacked else part  # noqa: B023  called within this turn of the loop
            parts = [
                reader.read(k, within[::-1]).T if turn else reader.read(k, within)
                for k in (keys[part[0]] if stacked else keys)  # noqa: B023
            ]
            return np.stack(parts).astype(dtype) if stacked else parts[0].astype(dtype)  # noqa: B023

        flat[weight.path] = like.replace(read_sharded(like.get_value().shape, read, *like.get_metadata()["axes"]))
    extra = sorted(k for k in reader.keys() - used if not ignorable(k, arch))
    if extra:
        raise InputError(f"{folder}: the tensor {extra[0]} ({len(extra)} such) is not part of a {arch.family} model")
    unfilled = [".".join(map(str, p)) for p, v in flat.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]
    if unfilled:
        raise AssertionError(f"parameters without a key: {unfilled}")
    return Backbone(folder, arch, lora, dtype, definition, unflatten(flat), execution)


def _as_stored(reader: ShardReader, arch: Architecture) -> Architecture:
    """The architecture that these tensors have: a head of its own is used whatever config.json says, as in transformers.

    Names are brought to the key table's first. Raises InputError where there are fewer tensors than layers.
    """
    if arch.layers > len(reader.keys()):
        raise InputError(f"{reader.folder}: {arch.layers} layers, but only {len(reader.keys())} tensors")
    names = [w.key for w in key_table(replace(arch, tied_head=False))]
    reader.rename({name.format(i) for name in names for i in range(arch.layers if "{}" in name else 1)})
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    stored = reader.keys()
    if not arch.tied_head or head not in stored:
        return arch
    if embed not in stored:
        reader.files[embed] = reader.files.pop(head)  # the one stands for both
        return arch
    for key in (embed, head):
        reader.check(key, (arch.vocab, arch.width))
    if reader.same(embed, head):
        return arch
    say(
        f"{reader.folder}: lm_head.weight differs from the embedding, so it is used, although tie_word_embeddings is set"
    )
    return replace(arch, tied_head=False)


def check_divisible(arch: Architecture) -> None:
    """Raise InputError where the present mesh does not divide the model's sizes."""
    shape = mesh_sizes()
    for setting, over, sizes in (
        (
            "tensor",
            shape["tensor"],
            {"key/value heads": arch.kv_heads, "hidden units": arch.hidden, "words": arch.vocab},
        ),
        ("fsdp", shape["fsdp"], {"width": arch.width}),
    ):
        for what, size in sizes.items():
            if size % over:
                raise InputError(
                    f"mesh.{setting}={over} does not divide the model's {size} {what}: choose a divisor of "
                    f"{math.gcd(*sizes.values())}"
                )


def merged_tensors(backbone: Backbone, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face tensors of base + adapter, one at a time: W + scale A B in float32, rounded to the base's dtype."""
    base = flatten(backbone.base)
    lora = flatten(adapter)
    for weight in key_table(backbone.arch):
        array = base[weight.path][...]
        if weight.path[0] != "layers":
            yield weight.key, to_host(array)
            continue
        a, b = (lora.get((*weight.path[:-1], which)) for which in ("lora_a", "lora_b"))
        adapted = weight.path[-1] == "kernel" and a is not None and b is not None and backbone.lora is not None
        for i in range(backbone.arch.layers):
            layer = to_host(array[i])
            if adapted:
                layer = merge_kernel(layer, to_host(a[...][i]), to_host(b[...][i]), backbone.lora.scale)  # type: ignore[index, union-attr]
            yield weight.key.format(i), layer.T if weight.transpose else layer
