"""config.json: what transformers computes with is implemented or refused, what it ignores is ignored, what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import worst
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from esjax.errors import InputError
from esjax.model.families import FIXED, QKV_BIAS, READ, Architecture, architecture, config_of, read_architecture
from esjax.model.layers import rope_frequencies

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED = LLAMA3 | {"original_max_position_embeddings": 16}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
FULL = {"layer_types": ["full_attention"] * 2}
# What real folders write, and what changes nothing: loads, whatever else happens.
IGNORED: list[dict[str, Any]] = [
    {"_model_name_or_path": "x", "unk_token_id": 0, "use_mrope": False, "auto_map": {"AutoConfig": "code.Config"}},
    {"unsloth_fixed": True, "pretraining_tp": 2, "rope_interleaved": True, "logit_scale": 2.0, "num_labels": 3},
    {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 2.0, "attention_multiplier": 3.0, "use_qk_norm": True},
    {"attention_dropout": 0.5, "is_decoder": True, "chunk_size_feed_forward": 2, "torch_dtype": "float16"},
    {"hidden_act": "swish"},
    {"sliding_window": 128},
    {"is_causal": True, "attention_chunk_size": None, "quantization_config": None},
    {"partial_rotary_factor": 0.5},
    {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
]
# What may change the numbers: the same numbers, or a refusal.
OTHERS: list[dict[str, Any]] = [
    *({"hidden_act": x} for x in ("gelu", "SiLU")),
    {"attention_bias": True},
    {"mlp_bias": True},
    {"is_causal": False},
    {"sliding_window": 4},
    {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 4},
    {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4},
    {"layer_types": ["full_attention"]},
    FULL,
    {"attention_chunk_size": 4},
    *({"rope_theta": x} for x in (5000, "5000", None)),
    {"rope_parameters": PLAIN},
    {"rope_parameters": PLAIN, "rope_theta": 7.0},
    {"rope_parameters": PLAIN, "rope_scaling": SCALED},
    {"rope_parameters": PLAIN, "rope_scaling": LLAMA3, "rope_theta": 700.0, "original_max_position_embeddings": 32},
    *({"rope_parameters": SCALED | x} for x in ({}, {"factor": "8"}, {"factor": None})),
    {"rope_parameters": SCALED, "partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
    *({"rope_scaling": x} for x in ({"factor": 2.0}, [], "llama3")),
    {"rope_parameters": {"full_attention": SCALED}},
    {"per_layer_config": {"0": {"intermediate_size": 24}}},
    *({"num_hidden_layers": x} for x in ("2", None, True, -1, 0)),
    *({"rms_norm_eps": x} for x in ("1e-5", None)),
    *({"head_dim": x} for x in (7, "8")),
    *({"num_key_value_heads": x} for x in (3, 0)),
    {"hidden_size": 34},
    {"hidden_size": 34, "head_dim": None},
    *({"tie_word_embeddings": x} for x in ("false", 1)),
    {"max_position_embeddings": None},
    {"vocab_size": 1.5},
]


@pytest.fixture(scope="module", params=QKV_BIAS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def torch_of(config: dict[str, Any], folder: Path) -> Any:
    """transformers' model of a config.json with the same weights every time; raises what transformers raises."""
    (folder / "config.json").write_text(json.dumps(config))
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    draw = np.random.default_rng(0)
    for name, p in sorted(model.named_parameters()):
        p.data = torch.tensor(draw.normal(size=tuple(p.shape)) * 0.3 + (p.ndim == 1 and "norm" in name)).float()
    return model


def numbers(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 20 tokens at once, and of the same by ones through the cache."""
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        at_once = model(ids).logits
        step = model(ids[:, :12], use_cache=True)
        parts = [step.logits]
        for i in range(12, 20):
            step = model(ids[:, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    return np.asarray(at_once[0]), np.asarray(torch.cat(parts, 1)[0])


def agrees(arch: Architecture, model: Any, plain: Architecture) -> bool:
    """Whether ours is transformers' model: its frequencies, and in all that is not a size the plain model's computation."""
    attention = model.model.layers[0].self_attn
    theirs = model.config
    heads = (plain.qkv_bias, attention.head_dim, theirs.num_key_value_heads)
    assert (arch.qkv_bias, arch.head_size, arch.kv_heads) == heads
    norm = model.model.norm.variance_epsilon
    assert (arch.layers, arch.width, arch.norm_eps) == (len(model.model.layers), theirs.hidden_size, norm)
    return bool(worst(np.asarray(rope_frequencies(arch)), model.model.rotary_emb.inv_freq.numpy()) <= 1e-6)


def test_what_transformers_ignores_is_ignored_and_the_rest_used_or_refused(family: str, tmp_path: Path) -> None:
    base = BASE | {"model_type": family}
    plain = architecture(base, "plain")
    expected = numbers(torch_of(base, tmp_path))
    assert worst(*expected) <= 1e-4
    for change in IGNORED:
        config = base | change
        arch = read_architecture(written(tmp_path, config))
        got = numbers(torch_of(config, tmp_path))
        assert worst(got, expected) <= 1e-4, change
        assert (arch, agrees(arch, torch_of(config, tmp_path), plain)) == (plain, True), change
    changed = refused = 0
    for change in OTHERS:
        config = base | change
        try:
            model = torch_of(config, tmp_path)
            got = numbers(model)
        except Exception:
            model = None
        try:
            arch = read_architecture(written(tmp_path, config))
        except InputError as e:
            refused += 1
            said = str(e).replace(" ", "_")
            assert str(tmp_path / "config.json") in said
            assert "\n" not in said
            assert any(key in said for key in change) or "rope" in said or "factor" in said, (change, said)
            continue
        if model is None:  # then only what means the plain model may be taken; transformers stumbles over some of it
            assert (arch == plain and change == FULL) or change.get("head_dim", 0) is None, change
            continue
        assert agrees(arch, model, plain), change
        if arch == plain:
            assert worst(got, expected) <= 1e-4, change
        else:
            changed += 1
            assert "hidden_size" in change or worst(got, expected) > 1e-3, change
    assert changed >= 5
    assert refused >= 20


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_key_transformers_reads_is_known(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is derived: a config that writes down what the model asks for, at construction, at once and in steps."""
    config = AutoConfig.from_pretrained(written(tmp_path, BASE | {"model_type": family}))
    asked: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def noting(self: Any, name: str) -> Any:
        asked.add(name)
        return plain(self, name)

    monkeypatch.setattr(type(config), "__getattribute__", noting, raising=False)
    numbers(AutoModelForCausalLM.from_config(config).eval())
    monkeypatch.undo()
    no_effect = (  # on the numbers of a whole chat without padding
        "attention_dropout initializer_range pad_token_id use_cache return_dict name_or_path gradient_checkpointing "
        "output_attentions output_hidden_states is_encoder_decoder is_heterogeneous kv_sharing_modes "
        "decoder generator text_config sub_configs dtype auto_map vision_aspect_ratio vision_feature_layer "
        "vision_feature_select_strategy"
    ).split()
    of_class = {n for n in asked if n.startswith(("_", "base_model")) or callable(getattr(type(config), n, None))}
    assert {"hidden_size", "rope_parameters", "is_causal"} <= asked
    assert asked - of_class - set(no_effect) <= {*READ, *FIXED}


@pytest.mark.parametrize("rope", [PLAIN, SCALED | {"rope_theta": 700.0}], ids=["plain", "llama3"])
def test_an_export_is_read_alike_by_transformers_4_and_5(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    for layout in (
        {"rope_parameters": rope},
        {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}},
        {"rope_parameters": PLAIN, "rope_theta": rope["rope_theta"], "rope_scaling": rope},
    ):
        arch = architecture(BASE | {"model_type": family} | layout, "given")
        config = config_of(arch, BASE | {"model_type": family, "auto_map": {"AutoConfig": "code.Config"}} | layout)
        assert architecture(config, "exported") == arch
        assert "auto_map" not in config  # its code is not exported
        # transformers 4: LlamaConfig(rope_theta, rope_scaling), the scaling without a theta of its own.
        assert config["rope_theta"] == rope["rope_theta"]
        four = config["rope_scaling"] or {"rope_type": "default"}
        assert four == {k: v for k, v in rope.items() if k != "rope_theta"}
        # transformers 5, by its own class.
        five = AutoConfig.from_pretrained(written(tmp_path, config)).rope_parameters
        assert five == rope


def test_a_config_of_an_unknown_family_or_without_sizes_is_refused() -> None:
    for family in ("gpt2", ["llama"]):
        with pytest.raises(InputError, match="model_type"):
            architecture(BASE | {"model_type": family}, "there")
    with pytest.raises(InputError, match="num_hidden_layers"):
        architecture(BASE | {"model_type": "llama", "num_hidden_layers": 10**9}, "there")
    with pytest.raises(InputError, match="vocab_size is missing"):
        architecture({"model_type": "llama"}, "there")
    assert architecture(LlamaConfig().to_dict(), "there").rope_theta == 10000.0
