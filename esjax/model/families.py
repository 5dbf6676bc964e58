"""Model families: Hugging Face configs to ours and back, and one key table for import and export."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esjax.errors import InputError


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's frequency scaling: long wavelengths are stretched by ``factor``, short ones kept, between: blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Architecture:
    """What the decoder needs to know of a backbone; letters as in esjax.rows."""

    family: str  # model_type: llama, mistral or qwen2
    vocab: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_size: int  # H
    hidden: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None
    qkv_bias: bool
    tied_head: bool
    max_positions: int


# Families and what is particular to them.
QKV_BIAS = {"llama": False, "mistral": False, "qwen2": True}

# The keys of config.json that transformers computes with, in these families. Its own config class reads them, so that
# defaults, types and what goes before what (rope_scaling before rope_parameters) are its own. All other keys it ignores.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
READ = (
    *SIZES,
    *"num_key_value_heads head_dim hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings".split(),
    *"attention_bias mlp_bias sliding_window use_sliding_window max_window_layers layer_types".split(),
    *"rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings".split(),
)
UNSET = ("head_dim", "attention_bias", "mlp_bias")  # null means: not given
# Keys that must have one of these values, because nothing else is implemented; of one family alone where it says so.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_causal": (True, None),
    "attention_chunk_size": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
}
ONLY_LLAMA = ("attention_bias", "mlp_bias")
MOST_LAYERS = 1 << 12  # transformers makes a list of them
LARGEST = 1 << 24  # of any size: what is above is a damaged file, and would only fail later and less clearly


def read_architecture(folder: Path) -> Architecture:
    """Read config.json of a Hugging Face folder. Raises InputError naming the key that is not supported."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror}); a Hugging Face folder needs config.json") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return architecture(config, str(file))


def architecture(config: dict[str, Any], where: str) -> Architecture:
    """Our view of a Hugging Face config. Raises InputError naming the key that is not supported."""

    def refuse(key: str, allowed: str) -> InputError:
        return InputError(f"{where}: {key}={config.get(key)!r} is not supported; allowed: {allowed}")

    family = config.get("model_type")
    if not isinstance(family, str) or family not in QKV_BIAS:
        raise refuse("model_type", ", ".join(QKV_BIAS))
    for key in SIZES:
        if key not in config:
            raise InputError(f"{where}: the key {key} is missing")
    for key in FIXED.keys() & config.keys():
        ignored = family != "llama" and key in ONLY_LLAMA
        if not ignored and config[key] not in FIXED[key] and not (config[key] is None and key in UNSET):
            raise refuse(key, repr(FIXED[key][0]))
    layers = config["num_hidden_layers"]
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise refuse("num_hidden_layers", f"whole numbers from 1 to {MOST_LAYERS}")
    read = _as_transformers(family, config, where)
    sizes = {key: getattr(read, key) for key in (*SIZES, "num_key_value_heads", "max_position_embeddings")}
    # Mistral's and Qwen2's code rounds down where the heads do not divide the width.
    sizes["head_dim"] = getattr(read, "head_dim", None) or read.hidden_size // max(1, read.num_attention_heads)
    for key, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size <= LARGEST:
            raise InputError(f"{where}: {key}={size!r} is not supported; allowed: whole numbers from 1 to {LARGEST}")
    heads, kv_heads = read.num_attention_heads, read.num_key_value_heads
    if heads % kv_heads:
        raise InputError(f"{where}: num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    if sizes["head_dim"] % 2:
        raise InputError(f"{where}: head_dim={sizes['head_dim']} is odd; the rotary embedding needs an even one")
    positions, window = read.max_position_embeddings, getattr(read, "sliding_window", None)
    kinds = getattr(read, "layer_types", None)
    slides = any(kind != "full_attention" for kind in kinds) if kinds else window is not None
    if slides and not (isinstance(window, int) and window >= positions):  # a window of all positions is no window
        found = f"layer_types={kinds}" if config.get("layer_types") else f"sliding_window={window}"
        raise InputError(
            f"{where}: {found} is not supported; allowed: full attention (sliding_window null, or at least "
            f"max_position_embeddings={positions})"
        )
    return Architecture(
        family=family,
        vocab=read.vocab_size,
        width=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=sizes["head_dim"],
        hidden=read.intermediate_size,
        norm_eps=_positive(read.rms_norm_eps, "rms_norm_eps", where),
        rope_theta=_positive(read.rope_parameters.get("rope_theta"), "rope_theta", where),
        rope_scaling=_rope_scaling(read.rope_parameters, where),
        qkv_bias=QKV_BIAS[family],
        tied_head=read.tie_word_embeddings,
        max_positions=positions,
    )


def _as_transformers(family: str, config: dict[str, Any], where: str) -> Any:
    """The config object that transformers makes of the keys that matter. Raises InputError for what it refuses."""
    from transformers import CONFIG_MAPPING  # here, because it takes seconds

    given = {k: v for k, v in config.items() if k in READ and not (v is None and k in UNSET)}
    try:
        read = CONFIG_MAPPING[family](**copy.deepcopy(given))
        read.standardize_rope_params()  # as the model does once more, which then sees original_max_position_embeddings
        return read
    except Exception as e:  # of many kinds
        raise InputError(f"{where}: transformers does not take it ({' '.join(str(e).split())[:200]})") from e


def _positive(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{where}: {key}={value!r} is not supported; allowed: numbers above 0")
    return float(value)


def _rope_scaling(rope: dict[str, Any], where: str) -> Llama3Rope | None:
    kind = rope.get("rope_type")
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{where}: rope type {kind!r} is not supported; allowed: default, llama3")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise InputError(
            f"{where}: partial_rotary_factor={rope['partial_rotary_factor']!r} is not supported; allowed: 1"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, original = (_positive(rope[n], n, where) for n in names)
    if low >= high:
        raise InputError(f"{where}: low_freq_factor={low} must be below high_freq_factor={high}")
    return Llama3Rope(factor, low, high, int(original))


def config_of(arch: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` (a config.json) with what this architecture computes with, as transformers 4 and 5 both read it."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if s := arch.rope_scaling:
        rope = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        rope |= {"high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_positions}
    return {k: v for k, v in config.items() if k not in ("torch_dtype", "auto_map")} | {
        "tie_word_embeddings": arch.tied_head,
        "rope_theta": arch.rope_theta,  # transformers 4 reads these two, 5 the third; they say the same
        "rope_scaling": rope if arch.rope_scaling else None,
        "rope_parameters": rope | {"rope_theta": arch.rope_theta},
    }


@dataclass(frozen=True)
class Weight:
    """One tensor: where it lies in our module tree and what Hugging Face calls it.

    ``path`` leads to a parameter; below ``layers`` parameters are stacked [L, ...] and ``{}`` in ``key`` is the layer.
    ``transpose``: Hugging Face stores linear layers as [out, in], we store [in, out].
    """

    path: tuple[str, ...]
    key: str
    transpose: bool = False


def key_table(arch: Architecture) -> Iterator[Weight]:
    """Every tensor of a checkpoint of this architecture; nothing else may be in it."""
    yield Weight(("embed",), "model.embed_tokens.weight")
    for name in LINEARS:
        prefix = f"model.layers.{{}}.{module_name(name)}"
        yield Weight(("layers", name, "kernel"), f"{prefix}.weight", transpose=True)
        if arch.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
            yield Weight(("layers", name, "bias"), f"{prefix}.bias")
    yield Weight(("layers", "attn_norm"), "model.layers.{}.input_layernorm.weight")
    yield Weight(("layers", "mlp_norm"), "model.layers.{}.post_attention_layernorm.weight")
    yield Weight(("norm",), "model.norm.weight")
    if not arch.tied_head:
        yield Weight(("head",), "lm_head.weight")


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_name(linear: str) -> str:
    """A linear layer's name inside a Hugging Face decoder layer."""
    return f"{'self_attn' if linear in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{linear}"


def ignorable(key: str, arch: Architecture) -> bool:
    """Tensors some checkpoints carry although they repeat others: rotary tables, and the head where it is tied."""
    return key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and arch.tied_head)
