"""Load a backbone: a Hugging Face folder becomes the decoder's arrays, strictly by the key table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax.errors import InputError
from esjax.hub.shards import ShardReader
from esjax.model.attention import choose_decoding, choose_path
from esjax.model.decoder import Decoder, Execution, Remat, forms
from esjax.model.families import Architecture, ignorable, ignored_keys, key_table, read_architecture, read_config
from esjax.model.linear import Lora, linear_sizes
from esjax.model.lora import Adapter, flatten, merge_kernel, unflatten
from esjax.model.quantised import quantise
from esjax.run.progress import say
from esjax.runtime.mesh import constrain, mesh_sizes, read_sharded, shardings_here, to_host
from esjax.settings.schema import ModelSettings


@dataclass(frozen=True)
class Backbone:
    """A frozen base with the places where an adapter goes. M_t is a Backbone plus adapter_t.

    Where all parameters are trained there is no frozen base, and the "adapter" is all of them in float32; ``start`` then holds
    the ones that were read.
    """

    folder: Path
    arch: Architecture
    lora: Lora | None
    dtype: jnp.dtype
    definition: nnx.GraphDef[Decoder]
    base: nnx.State
    execution: Execution
    start: nnx.State | None = None

    def _make_adapter(self, seed: int) -> Adapter:
        # Under jit, the base's random draws are dead code and cost nothing.
        decoder = Decoder(self.arch, self.lora, self.dtype, nnx.Rngs(params=0, lora=seed))
        return nnx.state(decoder, nnx.LoRAParam)

    @property
    def adapter_shapes(self) -> Adapter:
        """The tree of an adapter, with shapes for arrays."""
        if self.start is not None:
            return jax.eval_shape(lambda: as_dtype(self.start, FLOAT32))
        return jax.eval_shape(lambda: self._make_adapter(0))

    def release(self) -> None:
        """Give back the memory of its weights: nothing can be computed with it any more."""
        for array in jax.tree.leaves((self.base, self.start)):
            if isinstance(array, jax.Array):
                array.delete()

    def computed(self, adapter: Adapter) -> Adapter:
        """What scoring and sampling compute with: all parameters in the arithmetic's dtype; an adapter stays as it is."""
        return adapter if self.start is None else cast(Adapter, COMPUTED(adapter, self.dtype))

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers that the model has without an adapter (``parameters``), and those that are trained (``trained``)."""
        plain = replace(self.arch, kernels="plain")
        whole = nnx.eval_shape(lambda: nnx.state(Decoder(plain, None, self.dtype, nnx.Rngs(params=0)), nnx.Param))
        count = {"parameters": whole, "trained": self.adapter_shapes}
        return {name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for name, tree in count.items()}

    @property
    def trained_dtype(self) -> jnp.dtype | None:
        """The dtype of the copy of the trained parameters that a step computes with; None where it needs none."""
        return None if self.start is None or self.dtype == FLOAT32 else self.dtype

    def fresh_adapter(self, seed: int) -> Adapter:
        """A new adapter, with which base + adapter is the base; where all is trained, the parameters that were read."""
        if self.start is not None:
            return cast(Adapter, COMPUTED(self.start, FLOAT32))
        return jax.jit(lambda: self._make_adapter(seed), out_shardings=shardings_here(self.adapter_shapes))()


FLOAT32 = jnp.dtype("float32")


def as_dtype(state: Any, dtype: jnp.dtype) -> Any:
    """A tree of arrays in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), state)


COMPUTED = jax.jit(as_dtype, static_argnums=1)


def bind(definition: nnx.GraphDef[Decoder], adapter: Adapter, base: nnx.State) -> Decoder:
    """The callable model of a base and an adapter."""
    return nnx.merge(definition, adapter, base)


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The dtype for ``model.dtype``: auto is float32 on CPU, bfloat16 elsewhere; this machine's platform if not said."""
    if name == "auto":
        name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(name)


# Entries of one chunk's logits. Each chunk reads the head, and the sum of its gradients where it is trained: larger ones save
# traffic where there is memory for them. On a CPU they gain nothing.
LOGITS = {"cpu": 1 << 24, "gpu": 1 << 28, "tpu": 1 << 26}


class Choice(NamedTuple):
    """What the settings' ``model`` section says of how to compute."""

    attention: str = "auto"
    decoding: str = "auto"  # attention of a decoding step
    remat: Remat = "full"
    weights: str = "auto"
    kernels: Literal["plain", "int8", "nf4"] = "plain"

    @classmethod
    def of(cls, settings: ModelSettings) -> Choice:
        """What the settings say."""
        s = settings
        return cls(s.attention, s.decoding_attention, s.remat, s.decoding_weights, s.base)


def choose_execution(
    choice: Choice, dtype: jnp.dtype, arch: Architecture | None = None, platform: str | None = None
) -> Execution:
    """How to compute on a platform (cpu, gpu or tpu; this machine's when left out), and a model there where one is given.

    Raises InputError for what it cannot do.
    """
    platform, remat, weights = platform or jax.default_backend(), choice.remat, choice.weights
    if weights == "auto":
        weights = "shared" if platform == "tpu" else "apart"
    if remat == "offload" and platform == "cpu":
        raise InputError(
            "model.remat=offload needs a device with memory of its own: choose auto, none, dots or full on a CPU"
        )
    path, decoding = (
        choose_path(choice.attention, platform, dtype, arch),
        choose_decoding(choice.decoding, platform, arch),
    )
    execution = Execution(path, remat=remat, weights=weights, decoding=decoding)  # type: ignore[arg-type]
    if remat != "auto":
        (execution,) = forms(execution, platform)
    return execution._replace(logits=LOGITS[platform])


def load_backbone(
    folder: Path,
    trained: Lora | Literal["all"] | None,
    dtype: jnp.dtype,
    how: Choice = Choice(),  # noqa: B008  immutable
) -> Backbone:
    """Read a Hugging Face folder, one stacked parameter at a time, each host what its devices hold.

    ``trained`` says what is to be trained: an adapter of this shape, all parameters, or nothing.

    Raises InputError naming a tensor that is missing, misshaped or not part of the architecture, or a size that the mesh
    does not divide.
    """
    arch = replace(read_architecture(folder), kernels=how.kernels)
    if keys := ignored_keys(read_config(folder)):
        say(f"{folder / 'config.json'}: ignored, as transformers does in a {arch.family} model: {', '.join(keys)}")
    execution = choose_execution(how, dtype, arch)
    check_divisible(arch)
    reader = ShardReader(folder)
    arch = _as_stored(reader, arch)
    lora = None if trained == "all" else trained
    abstract = nnx.eval_shape(lambda: Decoder(arch, lora, dtype, nnx.Rngs(params=0, lora=0)))
    definition, _, base = nnx.split(abstract, nnx.LoRAParam, ...)  # type: ignore[misc]
    read = read_weights(reader, arch, base, dtype)
    if trained == "all":
        return Backbone(folder, arch, None, dtype, definition, nnx.State({}), execution, read)
    return Backbone(folder, arch, lora, dtype, definition, read, execution)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(jnp.zeros(shape, dtype), *axes)


@partial(jax.jit, static_argnums=1)
def _turned(layer: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(
        layer.T, *axes
    )  # a program of its own: as part of the next one, XLA's CPU backend is 5 times slower


@partial(jax.jit, static_argnums=3, donate_argnums=0)
def _with_layer(stack: jax.Array, layer: jax.Array, i: int, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0), *axes)


def read_weights(reader: ShardReader, arch: Architecture, shapes: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The parameters of ``shapes`` in a dtype, each host what its devices hold. Raises InputError naming a tensor."""
    folder = reader.folder
    flat = flatten(shapes)
    used: set[str] = set()
    for weight in key_table(arch):
        few_bits = arch.kernels != "plain" and weight.path[-1] == "kernel"
        numbers, scales = ((*weight.path[:-1], name) for name in ("numbers", "scales"))
        like = flat[numbers if few_bits else weight.path]
        stacked = weight.path[0] == "layers"
        whole = (arch.layers, *linear_sizes(arch)[weight.path[1]]) if few_bits else like.get_value().shape
        shape = whole[1:] if stacked else whole
        keys = [weight.key.format(i) for i in range(arch.layers)] if stacked else [weight.key]
        for key in keys:
            reader.check(key, shape[::-1] if weight.transpose else shape)
        used.update(keys)
        axes = tuple(like.get_metadata()["axes"])

        def read(part: tuple[slice, ...], key: str) -> np.ndarray:
            return reader.read(key, part).astype(dtype)

        if stacked:  # layer by layer, so that a host holds one of them; turned by the device, which is faster at it
            made = _zeros(whole, dtype, axes)
            own_shape, own_axes = (shape[::-1], axes[:0:-1]) if weight.transpose else (shape, axes[1:])
            for i, key in enumerate(keys):
                layer = read_sharded(own_shape, partial(read, key=key), *own_axes)
                made = _with_layer(made, _turned(layer, axes[1:]) if weight.transpose else layer, i, axes)
        else:
            made = read_sharded(shape, partial(read, key=weight.key), *axes)
        if arch.kernels != "plain" and few_bits:
            small, scale = quantise(made, arch.kernels)
            flat[numbers], flat[scales] = like.replace(small), flat[scales].replace(scale)
        else:
            flat[weight.path] = like.replace(made)
    extra = sorted(k for k in reader.keys() - used if not ignorable(k, arch))
    if extra:
        raise InputError(f"{folder}: the tensor {extra[0]} ({len(extra)} such) is not part of a {arch.family} model")
    unfilled = [".".join(map(str, p)) for p, v in flat.items() if isinstance(v.get_value(), jax.ShapeDtypeStruct)]
    if unfilled:
        raise AssertionError(f"parameters without a key: {unfilled}")
    return unflatten(flat)


def tensor_names(arch: Architecture) -> list[str]:
    """All tensors of a Hugging Face folder, by name."""
    return [w.key.format(i) for w in key_table(arch) for i in range(arch.layers if "{}" in w.key else 1)]


def _as_stored(reader: ShardReader, arch: Architecture) -> Architecture:
    """The architecture that these tensors have: a head of its own is used whatever config.json says, as in transformers.

    Names are brought to the key table's first. Raises InputError where there are fewer tensors than layers.
    """
    if arch.layers > len(reader.keys()):
        raise InputError(f"{reader.folder}: {arch.layers} layers, but only {len(reader.keys())} tensors")
    reader.rename(set(tensor_names(replace(arch, tied_head=False))))
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
    shape, pairs = mesh_sizes(), 2 if arch.kernels == "nf4" else 1  # of nf4 two numbers of the input share a byte
    tensor = {"key/value heads": arch.kv_heads, "hidden units": arch.hidden // pairs, "words": arch.vocab}
    if arch.fused:
        tensor["joined heads"] = arch.heads + 2 * arch.kv_heads
    fsdp = {"width": arch.width} if pairs == 1 else {"pairs of the width": arch.width // pairs}
    for setting, over, sizes in (("tensor", shape["tensor"], tensor), ("fsdp", shape["fsdp"], fsdp)):
        for what, size in sizes.items():
            if size % over:
                raise InputError(
                    f"mesh.{setting}={over} does not divide the model's {size} {what}: choose a divisor of "
                    f"{math.gcd(*sizes.values())}"
                )


def merged_tensors(backbone: Backbone, adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face tensors of base + adapter, one at a time: W + scale A B in float32, rounded to the base's dtype."""
    if backbone.arch.kernels != "plain":
        raise AssertionError("an adapter is merged into the original weights, not into few bits")
    whole = backbone.start is not None
    base, lora = flatten(adapter if whole else backbone.base), {} if whole else flatten(adapter)
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
