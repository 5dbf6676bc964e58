"""A family: what of a config.json it computes with, and how that becomes an architecture. Each has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

# What every family's config class has and we compute with, or what changes nothing that is computed here.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMON = (
    *SIZES,
    *"num_key_value_heads head_dim rms_norm_eps max_position_embeddings tie_word_embeddings".split(),
    *"rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings".split(),
)
NOT_COMPUTED = frozenset(
    "initializer_range use_cache pad_token_id bos_token_id eos_token_id pretraining_tp attention_dropout resid_pdrop embd_pdrop "
    "transformers_version architectures dtype torch_dtype model_type return_dict output_hidden_states output_attentions "
    "is_encoder_decoder is_decoder id2label label2id problem_type chunk_size_feed_forward tokenizer_class auto_map "
    "_name_or_path name_or_path".split()
)
SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Family:
    """One ``model_type``.

    ``traits`` gives the fields of an ``Architecture`` in which the family differs from Llama, from transformers' config.
    """

    read: tuple[str, ...] = ()  # keys of config.json that it computes with, beside COMMON
    only: Mapping[str, tuple[Any, ...]] = field(  # keys that must have one of these values: nothing else is implemented
        default_factory=lambda: MappingProxyType({"hidden_act": SILU})
    )
    traits: Callable[[Any], dict[str, Any]] = lambda config: {}
    norm_keys: Mapping[str, str] = field(  # our names of a layer's norms -> Hugging Face's
        default_factory=lambda: MappingProxyType(
            {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        )
    )
    partial_rotary: bool = False
    nope: Callable[[Any], list[bool]] | None = None  # of each layer, whether it has no rotary positions


def biases(attention: Any, mlp: Any = False) -> dict[str, Any]:
    """The trait of biases on all linear layers of attention, and on all of the MLP."""
    linears = ("q_proj", "k_proj", "v_proj", "o_proj") if attention else ()
    return {"biased": (*linears, *(("gate_proj", "up_proj", "down_proj") if mlp else ()))}
