"""SmolLM3: some layers have no rotary positions (Yang et al. 2025, "Rope to Nope and Back Again")."""

from esjax.model.families.family import Family, biases

SMOLLM3 = Family(
    read=(
        *("use_sliding_window", "sliding_window", "layer_types", "no_rope_layers", "no_rope_layer_interval"),
        *("attention_bias", "mlp_bias"),
    ),
    traits=lambda c: biases(c.attention_bias, c.mlp_bias),
    nope=lambda c: [not rotated for rotated in c.no_rope_layers],
)
