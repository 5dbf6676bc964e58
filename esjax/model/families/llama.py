"""Llama 1 to 3.2, SmolLM2, TinyLlama."""

from esjax.model.families.family import SILU, Family, biases

LLAMA = Family(
    read=("attention_bias", "mlp_bias"),
    only={"hidden_act": SILU},
    traits=lambda c: biases(c.attention_bias, c.mlp_bias),
)
