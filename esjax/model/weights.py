"""Load a backbone: a Hugging Face folder becomes the decoder's arrays, strictly by the key table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax.config import InputError
from esjax.hub.shards import ShardReader
from esjax.model.attention import choose_path
from esjax.model.decoder import Decoder, Execution, Remat
from esjax.model.families import Architecture, ignorable, key_table, read_architecture
from esjax.model.layers import Lora
from esjax.model.lora import Adapter, flatten, merge_kernel, unflatten


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

    def fresh_adapter(self, seed: int) -> Adapter:
        """A new adapter: A random, B zero, so that base + adapter is the base."""

        @jax.jit
        def make() -> Adapter:  # under jit, the base's random draws are dead code and cost nothing
            decoder = Decoder(self.arch, self.lora, self.dtype, nnx.Rngs(params=0, lora=seed))
            return nnx.state(decoder, nnx.LoRAParam)

        return make()


def bind(definition: nnx.GraphDef[Decoder], adapter: Adapter, base: nnx.State) -> Decoder:
    """The callable model of a base and an adapter."""
    return nnx.merge(definition, adapter, base)


def compute_dtype(name: str) -> jnp.dtype:
    """The dtype for ``model.dtype``: auto is float32 on CPU, bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def choose_execution(attention: str, remat: Remat, dtype: jnp.dtype, platform: str | None = None) -> Execution:
    """How to compute on a platform (cpu, gpu or tpu; this machine's when left out). Raises InputError for what it cannot do."""
    platform = platform or jax.default_backend()
    if remat == "offload" and platform == "cpu":
        raise InputError(
            "model.remat=offload needs a device with memory of its own: choose none, dots or full on a CPU"
        )
    how = Execution(choose_path(attention, platform, dtype), remat=remat)
    return how._replace(logits=1 << 24) if platform == "cpu" else how  # large chunks gain nothing on a CPU


def load_backbone(
    folder: Path, lora: Lora | None, dtype: jnp.dtype, attention: str = "auto", remat: Remat = "full"
) -> Backbone:
    """Read a Hugging Face folder, one stacked parameter at a time.

    Raises InputError naming a tensor that is missing, misshaped or not part of the architecture.
    """
    execution = choose_execution(attention, remat, dtype)
    arch = read_architecture(folder)
    reader = ShardReader(folder)
    abstract = nnx.eval_shape(lambda: Decoder(arch, lora, dtype, nnx.Rngs(params=0, lora=0)))
    definition, _, base = nnx.split(abstract, nnx.LoRAParam, ...)  # type: ignore[misc]
    flat = flatten(base)
    used: set[str] = set()
    for weight in key_table(arch):
        like = flat[weight.path]
        stacked = weight.path[0] == "layers"
        shape = like.get_value().shape[1:] if stacked else like.get_value().shape
        keys = [weight.key.format(i) for i in range(arch.layers)] if stacked else [weight.key]
        parts = [_read(reader, key, shape, weight.transpose) for key in keys]
        used.update(keys)
        flat[weight.path] = like.replace(jnp.asarray(np.stack(parts) if stacked else parts[0], dtype))
    extra = sorted(k for k in reader.keys() - used if not ignorable(k, arch))
    if extra:
        raise InputError(f"{folder}: the tensor {extra[0]} ({len(extra)} such) is not part of a {arch.family} model")
    unfilled = [".".join(map(str, p)) for p, v in flat.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]
    if unfilled:
        raise AssertionError(f"parameters without a key: {unfilled}")
    return Backbone(folder, arch, lora, dtype, definition, unflatten(flat), execution)


def _read(reader: ShardReader, key: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
    if not transpose:
        return reader.read(key, shape)
    return reader.read(key, shape[::-1]).T


def merged_tensors(backbone: Backbone, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face tensors of base + adapter, one at a time: W + scale A B in float32, rounded to the base's dtype."""
    base = flatten(backbone.base)
    lora = flatten(adapter)
    for weight in key_table(backbone.arch):
        array = base[weight.path][...]
        if weight.path[0] != "layers":
            yield weight.key, np.asarray(array)
            continue
        a, b = (lora.get((*weight.path[:-1], which)) for which in ("lora_a", "lora_b"))
        adapted = weight.path[-1] == "kernel" and a is not None and b is not None and backbone.lora is not None
        for i in range(backbone.arch.layers):
            layer = np.asarray(array[i])
            if adapted:
                layer = merge_kernel(layer, np.asarray(a[...][i]), np.asarray(b[...][i]), backbone.lora.scale)  # type: ignore[index, union-attr]
            yield weight.key.format(i), layer.T if weight.transpose else layer
