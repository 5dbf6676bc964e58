"""A model in GGUF's words: the keys of its architecture, and its tensors by GGUF's names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.errors import InputError
from esjax.hub.gguf_import import config_from
from esjax.hub.gguf_names import GLOBAL, KINDS, ROPE_FACTORS, permute
from esjax.hub.gguf_tokenizer import Metadata
from esjax.model.families import Architecture, architecture, config_of, key_table, read_config
from esjax.model.linear import linear_sizes
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone, merged_tensors

NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


class Described(NamedTuple):
    """What a GGUF file says of an architecture: its keys, and the tensor of rope factors where it needs one."""

    keys: dict[str, Any]
    factors: np.ndarray | None  # float32 [head_size / 2]


def describe(arch: Architecture, folder: Path, end_of_turn: int, where: Path) -> Described:
    """The keys of an architecture whose config.json lies in ``folder``, for the file ``where``.

    Raises InputError naming what GGUF has no word for: what is read back from the keys must be the same architecture.
    """
    if arch.family not in NAMES:
        raise InputError(f"{where}: a {arch.family} model is not written as GGUF; allowed: {', '.join(NAMES)}")
    config, name = config_of(arch, read_config(folder)), NAMES[arch.family]
    scaling = config.get("rope_scaling") or {}
    below: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": arch.width,
        "feed_forward_length": arch.hidden,
        "block_count": arch.layers,
        "vocab_size": arch.vocab,
        "attention.head_count": arch.heads,
        "attention.head_count_kv": arch.kv_heads,
        "attention.key_length": arch.head_size,
        "attention.value_length": arch.head_size,
        "attention.layer_norm_rms_epsilon": float(arch.norm_eps),
        "rope.dimension_count": arch.head_size,
        "rope.freq_base": float(config["rope_theta"]),
    }
    if name == "gemma3":
        below["attention.sliding_window"] = config["sliding_window"]
        if scaling:
            below |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": float(scaling["factor"])}
    factors, (rotary, *_) = None, [kind.rotary for kind in arch.kinds]
    if scaling.get("rope_type") == "llama3" and rotary is not None:
        plain = config["rope_theta"] ** -(np.arange(0, arch.head_size, 2) / arch.head_size)
        factors = (plain / np.asarray(rotary.frequencies)).astype(np.float32)
        below["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    keys = {"general.architecture": name} | {f"{name}.{key}": value for key, value in below.items()}
    _check(arch, Described(keys, factors), scaling, end_of_turn, where)
    return Described(keys, factors)


def _check(arch: Architecture, said: Described, scaling: dict[str, Any], end_of_turn: int, where: Path) -> None:
    values = said.keys | {"tokenizer.ggml.eos_token_id": end_of_turn}
    meta = Metadata({key: lambda value=value: value for key, value in values.items()}, where)  # type: ignore[misc]
    read = architecture(config_from(meta, arch.vocab, arch.tied_head, said.factors), str(where))

    def same(field: str) -> bool:
        mine, theirs = getattr(arch, field), getattr(read, field)
        if field != "kinds":
            return bool(mine == theirs) or (field == "norm_eps" and bool(np.isclose(mine, theirs, rtol=1e-5)))
        return len(mine) == len(theirs) and all(_close(a, b) for a, b in zip(mine, theirs, strict=True))

    unsaid = [f.name for f in fields(arch) if f.name not in ("family", "kernels") and not same(f.name)]
    if unsaid:
        words = {"kinds": f"windows, layer types and rope scaling ({scaling.get('rope_type', 'default')})"}
        raise InputError(
            f"{where}: GGUF's {said.keys['general.architecture']} has no word for this {arch.family} model's "
            f"{', '.join(words.get(name, name) for name in unsaid)}; give --format merged"
        )


def _close(mine: Any, theirs: Any) -> bool:
    if mine.window != theirs.window or (mine.rotary is None) != (theirs.rotary is None):
        return False
    a, b = mine.rotary, theirs.rotary
    return a is None or (a.factor == b.factor and np.allclose(a.frequencies, b.frequencies, rtol=1e-5, atol=0))


def gguf_shapes(arch: Architecture, said: Described) -> dict[str, tuple[int, ...]]:
    """The tensors' names and shapes, in the order in which ``gguf_tensors`` makes them."""
    sizes = linear_sizes(arch)
    globals_ = {"embed": (arch.vocab, arch.width), "head": (arch.vocab, arch.width), "norm": (arch.width,)}
    out: dict[str, tuple[int, ...]] = {} if said.factors is None else {ROPE_FACTORS: said.factors.shape}
    for weight in key_table(arch):
        layered = weight.path[0] == "layers"
        if not layered:
            shape: tuple[int, ...] = globals_[weight.path[0]]
        elif weight.path[-1] == "kernel":
            shape = sizes[weight.path[1]][::-1]
        elif weight.path[-1] == "bias":
            shape = sizes[weight.path[1]][1:]
        else:
            shape = (arch.head_size if weight.path[1] in ("q_norm", "k_norm") else arch.width,)
        for i in range(arch.layers) if layered else (0,):
            out[_name(weight.key.format(i), said)] = shape
    return out


def gguf_tensors(backbone: Backbone, adapter: Adapter, said: Described) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of base + adapter as llama.cpp has them, one at a time, in float32."""
    arch, name = backbone.arch, said.keys["general.architecture"]
    if said.factors is not None:
        yield ROPE_FACTORS, said.factors
    for key, array in merged_tensors(backbone, adapter):
        array = array.astype(np.float32)
        if name == "gemma3" and "norm" in key:
            array = array + 1  # stored as what is multiplied by
        if name == "llama" and ".q_proj." in key:
            array = permute(array, arch.heads)
        if name == "llama" and ".k_proj." in key:
            array = permute(array, arch.kv_heads)
        yield _name(key, said), array


def _name(key: str, said: Described) -> str:
    """GGUF's name of a Hugging Face tensor."""
    theirs = {hf: name for name, hf in GLOBAL.items()}
    if key in theirs:
        return theirs[key]
    _, _, layer, *module, suffix = key.split(".")
    per_layer = {hf: name for name, hf in KINDS[said.keys["general.architecture"]].per_layer.items()}
    return f"blk.{layer}.{per_layer['.'.join(module)]}.{suffix}"
