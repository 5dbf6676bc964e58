"""Qwen2 and Qwen2.5 (biases on queries, keys and values), and Qwen3's dense models (normed queries and keys)."""

from esjax.model.families.family import Family, biases

WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
QWEN2 = Family(read=WINDOWS, traits=lambda c: {"biased": ("q_proj", "k_proj", "v_proj")})
QWEN3 = Family(read=(*WINDOWS, "attention_bias"), traits=lambda c: {"qk_norm": "head", **biases(c.attention_bias)})
