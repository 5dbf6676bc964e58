"""Model families: Hugging Face configs to ours and back, and one key table for import and export."""

from __future__ import annotations

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

# Keys of config.json that say nothing about the computation here.
NEUTRAL = frozenset(
    "architectures model_type torch_dtype dtype transformers_version bos_token_id eos_token_id pad_token_id "
    "initializer_range use_cache _name_or_path attention_dropout max_window_layers is_llama_config "
    "transformers.js_config chunk_size_feed_forward output_attentions output_hidden_states return_dict id2label label2id "
    "problem_type is_encoder_decoder task_specific_params _attn_implementation_autoset".split()
)
# Keys that must have one of these values, because nothing else is implemented.
FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
}
USED = frozenset(
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size rms_norm_eps "
    "rope_theta rope_scaling rope_parameters tie_word_embeddings max_position_embeddings sliding_window layer_types".split()
)


def read_architecture(folder: Path) -> Architecture:
    """Read config.json of a Hugging Face folder. Raises InputError naming the key that is not supported."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror}); a Hugging Face folder needs config.json") from e
    except ValueError as e:
        raise InputError(f"{file}: not JSON ({e})") from e
    if not isinstance(config, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(config).__name__}")
    return architecture(config, str(file))


def architecture(config: dict[str, Any], where: str) -> Architecture:
    """Our view of a Hugging Face config. Raises InputError naming the key that is not supported."""

    def refuse(key: str, allowed: str) -> InputError:
        return InputError(f"{where}: {key}={config.get(key)!r} is not supported; allowed: {allowed}")

    family = config.get("model_type")
    if family not in QKV_BIAS:
        raise refuse("model_type", ", ".join(QKV_BIAS))
    for key in config:
        if key in FIXED:
            if config[key] not in FIXED[key]:
                raise refuse(key, repr(FIXED[key][0]))
        elif key not in NEUTRAL and key not in USED:
            raise InputError(
                f"{where}: the option {key}={config[key]!r} is not known to esjax; remove it if it has no effect"
            )
    for key in (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
    ):
        if key not in config:
            raise InputError(f"{where}: the key {key} is missing")
    # Qwen2 writes sliding_window even where use_sliding_window switches it off.
    if config.get("sliding_window") is not None and not (family == "qwen2" and not config.get("use_sliding_window")):
        raise refuse("sliding_window", "null (full attention)")
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise refuse("layer_types", "full_attention everywhere")
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise InputError(f"{where}: rope_theta is missing")
    heads = config["num_attention_heads"]
    return Architecture(
        family=family,
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        hidden=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_theta=float(theta),
        rope_scaling=_rope_scaling(rope, where),
        qkv_bias=QKV_BIAS[family],
        tied_head=bool(config.get("tie_word_embeddings", False)),
        max_positions=config.get("max_position_embeddings", 2048),
    )


def _rope_scaling(rope: dict[str, Any], where: str) -> Llama3Rope | None:
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{where}: rope type {kind!r} is not supported; allowed: default, llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [n for n in names if n not in rope]
    if missing:
        raise InputError(f"{where}: rope type llama3 needs {', '.join(missing)}")
    return Llama3Rope(*(rope[n] for n in names))


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
