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
from esjax.model.families import FAMILIES, Architecture, architecture, config_of, read_architecture
from esjax.model.families.family import COMMON
from esjax.model.families.reading import FIXED, WINDOWS
from esjax.model.families.rope import rotary

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
    "pad_token_id": 0,
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


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def base_of(family: str) -> dict[str, Any]:
    """A plain config of a family; Gemma's layers have windows."""
    return BASE | {"model_type": family} | ({"sliding_window": 16} if family.startswith("gemma") else {})


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


def agrees(arch: Architecture, model: Any) -> bool:
    """Whether ours is transformers' model: its sizes, biases, windows and rotary frequencies."""
    attention, theirs, turned = model.model.layers[0].self_attn, model.config, model.model.rotary_emb
    assert (arch.head_size, arch.kv_heads) == (attention.head_dim, theirs.num_key_value_heads)
    norm = model.model.norm
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    assert (arch.layers, arch.width, arch.norm_eps) == (len(model.model.layers), theirs.hidden_size, eps)
    names = {
        name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters() if name.endswith("bias")
    }
    assert set(arch.biased) == names
    for number, (layer, kind) in enumerate(zip(model.model.layers, arch.kind_of, strict=True)):
        found = arch.kinds[kind]
        window = getattr(theirs, "sliding_window", None) if "sliding_window" in FAMILIES[arch.family].read else None
        if "layer_types" in FAMILIES[arch.family].read and theirs.layer_types[number] == "full_attention":
            window = None
        assert found.window == (window if window and window < arch.max_positions else None)
        named = f"{layer.self_attn.layer_type}_inv_freq" if arch.family == "gemma3_text" else "inv_freq"
        if found.rotary is not None and worst(found.rotary.frequencies, getattr(turned, named).numpy()) > 1e-6:
            return False
    return True


def test_what_transformers_ignores_is_ignored_and_the_rest_used_or_refused(family: str, tmp_path: Path) -> None:
    base = base_of(family)
    plain = architecture(base, "plain")
    expected = numbers(torch_of(base, tmp_path))
    assert worst(*expected) <= 1e-4
    read = {*FAMILIES[family].read, *FAMILIES[family].only} - {"hidden_act"}
    read -= {"sliding_window"} if not family.startswith("gemma") else set()
    for change in IGNORED:
        if change.keys() & read or ("partial_rotary_factor" in change and family == "phi3"):
            continue
        if family.startswith("gemma") and "torch_dtype" in change:
            continue  # transformers rounds the scale of embeddings to it
        config = base | change
        arch = read_architecture(written(tmp_path, config))
        got = numbers(torch_of(config, tmp_path))
        assert worst(got, expected) <= 1e-4, change
        assert (arch, agrees(arch, torch_of(config, tmp_path))) == (plain, True), change
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
            own = any(key in said for key in change) or "rope" in said or "factor" in said
            assert own or (model is None and "transformers_does_not_take_it" in said), (change, said)
            continue
        if model is None:  # then only what means the plain model may be taken; transformers stumbles over some of it
            assert (arch == plain and change == FULL) or change.get("head_dim", 0) is None, change
            continue
        assert agrees(arch, model), change
        if arch == plain:
            assert worst(got, expected) <= 1e-4, change
        else:
            changed += 1
            assert "hidden_size" in change or worst(got, expected) > 1e-3, change
    assert changed >= 5
    assert refused >= 10


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_every_key_transformers_reads_is_known(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is derived: a config that writes down what the model asks for, at construction, at once and in steps."""
    config = AutoConfig.from_pretrained(written(tmp_path, base_of(family)))
    asked: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def noting(self: Any, name: str) -> Any:
        asked.add(name)
        return plain(self, name)

    monkeypatch.setattr(type(config), "__getattribute__", noting, raising=False)
    numbers(AutoModelForCausalLM.from_config(config).eval())
    monkeypatch.undo()
    no_effect = (  # on the numbers of a whole chat without padding
        "attention_dropout resid_pdrop embd_pdrop "
        "initializer_range pad_token_id use_cache return_dict name_or_path gradient_checkpointing "
        "output_attentions output_hidden_states is_encoder_decoder is_heterogeneous kv_sharing_modes "
        "decoder generator text_config sub_configs dtype auto_map vision_aspect_ratio vision_feature_layer "
        "vision_feature_select_strategy"
    ).split()
    of_class = {n for n in asked if n.startswith(("_", "base_model")) or callable(getattr(type(config), n, None))}
    assert {"hidden_size", "rope_parameters", "is_causal"} <= asked
    read = {*COMMON, *WINDOWS, *FAMILIES[family].read, *FAMILIES[family].only, *FIXED}
    assert asked - of_class - set(no_effect) <= read


@pytest.mark.parametrize("rope", [PLAIN, SCALED | {"rope_theta": 700.0}], ids=["plain", "llama3"])
def test_an_export_is_read_alike_by_transformers_4_and_5(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    if family == "gemma3_text" or (family == "phi3" and rope is not PLAIN):
        pytest.skip("its rope parameters are of another form; tests/test_families.py exports them")
    for layout in (
        {"rope_parameters": rope},
        {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}},
        {"rope_parameters": PLAIN, "rope_theta": rope["rope_theta"], "rope_scaling": rope},
    ):
        arch = architecture(base_of(family) | layout, "given")
        config = config_of(arch, base_of(family) | {"auto_map": {"AutoConfig": "code.Config"}} | layout)
        assert architecture(config, "exported") == arch
        assert "auto_map" not in config  # its code is not exported
        # transformers 4: LlamaConfig(rope_theta, rope_scaling), the scaling without a theta of its own.
        assert config["rope_theta"] == rope["rope_theta"]
        four = config["rope_scaling"] or {"rope_type": "default"}
        assert four == {k: v for k, v in rope.items() if k != "rope_theta"}
        # transformers 5, by its own class.
        five = AutoConfig.from_pretrained(written(tmp_path, config)).rope_parameters
        assert {k: v for k, v in five.items() if k != "partial_rotary_factor"} == rope


def test_a_config_of_an_unknown_family_or_without_sizes_is_refused() -> None:
    for family in ("gpt2", ["llama"]):
        with pytest.raises(InputError, match="model_type"):
            architecture(BASE | {"model_type": family}, "there")
    with pytest.raises(InputError, match="num_hidden_layers"):
        architecture(BASE | {"model_type": "llama", "num_hidden_layers": 10**9}, "there")
    with pytest.raises(InputError, match="vocab_size is missing"):
        architecture({"model_type": "llama"}, "there")
    plain, _ = rotary(PLAIN | {"rope_theta": 1e4}, 128, 2048, False, "there")
    assert architecture(LlamaConfig().to_dict(), "there").kinds[0].rotary == plain
