"""Small random models of every family, made by transformers with their real options on and odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from esjax.model.families import Architecture, architecture

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # short, so that the sequences of the tests feel it
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
DEEP = {"num_hidden_layers": 4}
# Short windows, so that they cut; an odd number of layers' kinds, in the order that the real models have.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama31": (
        "llama",
        {"head_dim": 16, "rope_parameters": SCALING | {"rope_theta": 1e4}, "tie_word_embeddings": True},
    ),
    "llama-biases": ("llama", {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "llama-dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}}),
    "mistral": ("mistral", {"head_dim": 16, "sliding_window": None, "rope_parameters": PLAIN}),
    "mistral-window": ("mistral", {"head_dim": 16, "sliding_window": 11, "rope_parameters": PLAIN}),
    "qwen2": ("qwen2", {"rope_parameters": PLAIN | {"rope_theta": 1e6}, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN | {"rope_theta": 1e4}}),
    "qwen2-window": (
        "qwen2",
        DEEP | {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 2, "rope_parameters": PLAIN},
    ),
    "qwen3": ("qwen3", {"head_dim": 20, "rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 12, "attention_bias": True, "rope_parameters": YARN | {"rope_theta": 1e4}}),
    "smollm3": ("smollm3", DEEP | {"no_rope_layer_interval": 3, "rope_parameters": PLAIN}),
    "gemma2": (
        "gemma2",
        DEEP
        | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9, "rope_parameters": PLAIN}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 5, "sliding_window_pattern": 3, "head_dim": 16, "query_pre_attn_scalar": 20}
        | {"sliding_window": 9, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0},
    ),
    "phi3": ("phi3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
    "phi3-window": ("phi3", {"sliding_window": 10, "rope_parameters": PLAIN}),
    "phi3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 128}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}
            | {"short_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], "long_factor": [2.0] * 6}
        },
    ),
    "olmo2": ("olmo2", {"rope_parameters": PLAIN, "attention_bias": True}),
}
TYPES = tuple(dict.fromkeys(kind for kind, _ in FAMILIES.values()))


def llama(*sizes: int, tied: bool = False, positions: int = 4096) -> Architecture:
    """A plain Llama of these sizes: V, D, L, N, K, H, F."""
    names = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
    )
    config = dict(zip(names.split(), sizes, strict=True)) | {"rms_norm_eps": 1e-5, "rope_theta": 1e4}
    more = {"model_type": "llama", "tie_word_embeddings": tied, "max_position_embeddings": positions}
    return architecture(config | more, "here")


def make(name: str) -> Any:
    """transformers' model of a family, in float32, with weights that are random all over: norms and biases, too."""
    kind, options = FAMILIES[name]
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SMALL | options)).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():  # the defaults of norms and biases, 0 and 1, would hide a wrong import
            base = 1.0 if p.ndim == 1 and "norm" in key and not kind.startswith("gemma") else 0.0
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim == 1 or not kind.startswith("gemma") else 0.15) + base)
    return model


def save(name: str, folder: Path, **options: Any) -> Path:
    """Such a model as a Hugging Face folder."""
    make(name).save_pretrained(folder, **options)
    return folder
