"""OLMo 2: norms after attention and the MLP, none before; queries and keys are normed over all heads."""

from esjax.model.families.family import Family, biases

NORM_KEYS = {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
OLMO2 = Family(
    read=("attention_bias",),
    traits=lambda c: {"norms": tuple(NORM_KEYS), "qk_norm": "whole", **biases(c.attention_bias)},
    norm_keys=NORM_KEYS,
)
