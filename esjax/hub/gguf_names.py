"""What GGUF calls the architectures and tensors that are read and written, and how Hugging Face calls them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

# GGUF tensor names -> Hugging Face names
GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
PER_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
NORMED = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
ROPE_FACTORS = "rope_freqs.weight"


class Kind(NamedTuple):
    """A GGUF architecture: what Hugging Face calls it, its tensors in a layer, and the config beside the sizes."""

    model_type: str
    name: str
    per_layer: dict[str, str]
    config: dict[str, Any]
    read: tuple[str, ...] = ()  # keys of the metadata beside READ
    theta: float = 10000.0  # llama.cpp's own default


KINDS = {
    "llama": Kind("llama", "LlamaForCausalLM", PER_LAYER, {}),
    "qwen2": Kind("qwen2", "Qwen2ForCausalLM", PER_LAYER, {}),
    "qwen3": Kind("qwen3", "Qwen3ForCausalLM", PER_LAYER | NORMED, {}),
    "gemma3": Kind(
        "gemma3_text",
        "Gemma3ForCausalLM",
        PER_LAYER
        | NORMED
        | {
            "ffn_norm": "pre_feedforward_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0},
        ("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor"),
        1000000.0,
    ),
}
# Gemma 3's scores are scaled by a head's size, but in the 27B model of 62 layers, as llama.cpp has it, by the width over heads.
GEMMA_27B_LAYERS = 62


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's llama stores rotary pairs side by side; Hugging Face stores them half a head apart. [out, in] or [out]."""
    size = array.shape[0] // heads
    return array.reshape(heads, size // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def permute(array: np.ndarray, heads: int) -> np.ndarray:
    """The other way round."""
    size = array.shape[0] // heads
    return array.reshape(heads, 2, size // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
