"""A Hugging Face config.json to our architecture, and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.model.families.architecture import Architecture, Kind
from esjax.model.families.family import COMMON, NOT_COMPUTED, SIZES, Family
from esjax.model.families.gemma import GEMMA2, GEMMA3
from esjax.model.families.llama import LLAMA
from esjax.model.families.mistral import MISTRAL
from esjax.model.families.olmo2 import OLMO2
from esjax.model.families.phi3 import PHI3
from esjax.model.families.qwen import QWEN2, QWEN3
from esjax.model.families.rope import positive, rotary
from esjax.model.families.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {  # by model_type
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
}

# transformers' own config class reads the keys that a family computes with, so that defaults, types and what goes before what
# (rope_scaling before rope_parameters) are its own. All other keys it ignores.
WINDOWS = ("sliding_window", "layer_types")  # in any family, see _kinds
UNSET = ("head_dim", "attention_bias", "mlp_bias")  # null means: not given
# Keys that must have one of these values in any family, because nothing else is implemented.
FIXED: dict[str, tuple[Any, ...]] = {
    "is_causal": (True, None),
    "attention_chunk_size": (None,),
    "per_layer_config": (None, {}),
    "quantization_config": (None,),
}
MOST_LAYERS = 1 << 12  # transformers makes a list of them
LARGEST = 1 << 24  # of any size: what is above is a damaged file, and would only fail later and less clearly


def read_architecture(folder: Path) -> Architecture:
    """Read config.json of a Hugging Face folder. Raises InputError naming the key that is not supported."""
    return architecture(read_config(folder), str(folder / "config.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """The JSON object in a folder's config.json. Raises InputError where there is none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror}); a Hugging Face folder needs config.json") from e
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return config


def ignored_keys(config: dict[str, Any]) -> list[str]:
    """Keys of a config.json with which transformers computes nothing in this family, and so neither do we."""
    family = FAMILIES[config["model_type"]]
    known = {*COMMON, *WINDOWS, *family.read, *family.only, *FIXED, *NOT_COMPUTED}
    return sorted(config.keys() - known)


def architecture(config: dict[str, Any], where: str) -> Architecture:
    """Our view of a Hugging Face config. Raises InputError naming the key that is not supported."""

    def refuse(key: str, allowed: str) -> InputError:
        return InputError(f"{where}: {key}={config.get(key)!r} is not supported; allowed: {allowed}")

    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise refuse("model_type", ", ".join(FAMILIES))
    family = FAMILIES[name]
    for key in SIZES:
        if key not in config:
            raise InputError(f"{where}: the key {key} is missing")
    for key, allowed in {**FIXED, **family.only}.items():
        if key in config and config[key] not in allowed:
            raise refuse(key, " or ".join(repr(value) for value in allowed if value is not None) or "null")
    layers = config["num_hidden_layers"]
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise refuse("num_hidden_layers", f"whole numbers from 1 to {MOST_LAYERS}")
    rotated = config.get("no_rope_layers")
    if (
        "no_rope_layers" in family.read
        and isinstance(rotated, list)
        and isinstance(layers, int)
        and len(rotated) < layers
    ):
        raise InputError(f"{where}: no_rope_layers names {len(rotated)} layers, and there are {layers}")
    read = _as_transformers(name, config, where)
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
    for key in ("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"):
        if key in family.read and getattr(read, key) is not None:
            positive(getattr(read, key), key, where)
    of_layers, positions = _kinds(read, family, sizes["head_dim"], where)
    kinds = tuple(dict.fromkeys(of_layers))
    return Architecture(
        family=name,
        vocab=read.vocab_size,
        width=read.hidden_size,
        layers=read.num_hidden_layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=sizes["head_dim"],
        hidden=read.intermediate_size,
        norm_eps=positive(read.rms_norm_eps, "rms_norm_eps", where),
        tied_head=read.tie_word_embeddings,
        max_positions=positions,
        kinds=kinds,
        kind_of=tuple(map(kinds.index, of_layers)),
        **family.traits(read),
    )


def _kinds(read: Any, family: Family, head_size: int, where: str) -> tuple[list[Kind], int]:
    """What each layer is like, and how many positions there are. Raises InputError."""
    layers, positions = read.num_hidden_layers, read.max_position_embeddings
    window, types = getattr(read, "sliding_window", None), getattr(read, "layer_types", None)
    allowed = ["full_attention", "sliding_attention"]
    if "layer_types" not in family.read:  # all layers are alike; but transformers' cache reads both keys in any family
        slides = window is not None and "sliding_window" in family.read
        allowed = [allowed[slides]]
        if "sliding_window" not in family.read and types is None and isinstance(window, int) and window < positions:
            raise InputError(f"{where}: sliding_window={window} is not supported; allowed: null")
    types = allowed[:1] * layers if types is None else types
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {*allowed}:
        raise InputError(
            f"{where}: layer_types={types!r:.160} is not supported; allowed: for each of {layers} layers {' or '.join(allowed)}"
        )
    slides = "sliding_attention" in types
    if slides and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise InputError(f"{where}: sliding_window={window!r} is not supported; allowed: whole numbers from 1")
    ropes, nested = read.rope_parameters, family is GEMMA3
    turned, fewest = {}, positions
    for kind in dict.fromkeys(types):
        rope = ropes.get(kind) if nested else ropes
        if not isinstance(rope, dict):
            raise InputError(f"{where}: rope_parameters={ropes!r:.160} says nothing of {kind}")
        turned[kind], most = rotary(rope, head_size, positions, family.partial_rotary, where)
        fewest = min(fewest, most)
    without = family.nope(read) if family.nope else [False] * layers
    out = []
    for kind, bare in zip(types, without, strict=False):
        # A window of all positions is no window.
        reach = window if kind == "sliding_attention" and window is not None and window < fewest else None
        out.append(Kind(reach, None if bare else turned[kind]))
    return out, fewest


def _as_transformers(name: str, config: dict[str, Any], where: str) -> Any:
    """The config object that transformers makes of the keys that matter. Raises InputError for what it refuses."""
    from transformers import CONFIG_MAPPING  # here, because it takes seconds

    wanted = {*COMMON, *WINDOWS, *FAMILIES[name].read, *FAMILIES[name].only}
    given = {k: v for k, v in config.items() if k in wanted and not (v is None and k in UNSET)}
    try:
        read = CONFIG_MAPPING[name](**copy.deepcopy(given))
        read.standardize_rope_params()  # as the model does once more, which then sees original_max_position_embeddings
        return read
    except Exception as e:  # of many kinds
        what = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise InputError(f"{where}: transformers does not take it ({what}); take the model's own config.json") from e


def config_of(arch: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` (a config.json) with what this architecture computes with, as transformers 4 and 5 both read it."""
    rope: dict[str, Any] = copy.deepcopy(_as_transformers(arch.family, config, "config.json").rope_parameters)
    out = {k: v for k, v in config.items() if k not in ("torch_dtype", "auto_map")}
    out |= {"tie_word_embeddings": arch.tied_head, "rope_parameters": rope}
    if "full_attention" in rope:  # Gemma 3: one for each kind of layer
        full, local = rope["full_attention"], rope["sliding_attention"]
        return out | {"rope_theta": full["rope_theta"], "rope_local_base_freq": local["rope_theta"]} | _scaling(full)
    if rope.get("partial_rotary_factor") is not None:
        out["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return out | {"rope_theta": rope["rope_theta"]} | _scaling(rope)  # transformers 4 reads these, 5 rope_parameters


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters as transformers 4 has them."""
    without = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return {"rope_scaling": None if rope["rope_type"] == "default" else without}
