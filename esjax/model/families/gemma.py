"""Gemma 2, and Gemma 3's text models: norms before and after, scaled embeddings, soft caps, local and global layers."""

from typing import Any

from esjax.model.families.family import GELU, Family, biases

NORM_KEYS = {
    "attn_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
READ = (
    *("sliding_window", "layer_types", "query_pre_attn_scalar", "attention_bias"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)


def _traits(config: Any) -> dict[str, Any]:
    return {
        "norms": tuple(NORM_KEYS),
        "norm_plus_one": True,
        "activation": "gelu_tanh",
        "embedding_scale": config.hidden_size**0.5,
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "logits_cap": config.final_logit_softcapping,
        **biases(config.attention_bias),
    }


GEMMA2 = Family(
    read=READ,
    only={"hidden_activation": GELU, "use_bidirectional_attention": (None, False)},
    traits=lambda c: {**_traits(c), "attention_cap": c.attn_logit_softcapping},
    norm_keys=NORM_KEYS,
)
GEMMA3 = Family(
    read=(*READ, "rope_local_base_freq", "sliding_window_pattern"),
    # transformers keeps attn_logit_softcapping and computes nothing with it
    only={
        "hidden_activation": GELU,
        "use_bidirectional_attention": (None, False),
        "attn_logit_softcapping": (None,),
    },
    traits=lambda c: {**_traits(c), "qk_norm": "head"},
    norm_keys=NORM_KEYS,
)
