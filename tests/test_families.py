"""Every family, in and out: weights byte for byte, adapters both ways, configs of well-known models.

tests/test_model.py compares the families' logits, packed and with the cache.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import FAMILIES, SMALL, save
from oracles import BARE, Ours, random_adapter, torch_logits, torch_model, worst
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

from esjax.errors import InputError
from esjax.hub.shards import SINGLE, write_shards
from esjax.model.families import architecture, config_of
from esjax.model.linear import Lora
from esjax.model.lora import flatten, load_adapter, lora_from, peft_tensors, read_lora, save_adapter
from esjax.model.weights import load_backbone, merged_tensors, tensor_names
from esjax.sample.generate import Generator
from esjax.settings.schema import LoraSettings, SamplingSettings

GREEDY = SamplingSettings(temperature=0)
FLOAT32 = jnp.dtype("float32")
TOKENS = np.random.default_rng(4).integers(2, SMALL["vocab_size"], 40).tolist()
# One of each family, with as many of its options as one can have.
EACH = (
    "llama-biases",
    "mistral-window",
    "qwen2-yarn",
    "qwen3",
    "smollm3",
    "gemma2",
    "gemma3",
    "phi3-longrope",
    "olmo2",
)


@pytest.fixture(scope="module", params=EACH)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp("family") / request.param)


def exported(folder: Path, out: Path, lora: Lora | None = None, adapter: Any = BARE) -> Path:
    """The folder once more, as an export writes it."""
    backbone = load_backbone(folder, lora, FLOAT32)
    out.mkdir()
    write_shards(out, merged_tensors(backbone, adapter), len(tensor_names(backbone.arch)))
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config_of(backbone.arch, config)))
    return out


def test_import_export_import_gives_equal_bytes(folder: Path, tmp_path: Path) -> None:
    out = exported(folder, tmp_path / "out")
    before, after = load_file(folder / SINGLE), load_file(out / SINGLE)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    first, second = (load_backbone(f, None, FLOAT32) for f in (folder, out))
    assert first.arch == second.arch
    theirs = torch_logits(torch_model(out), TOKENS)
    assert worst(theirs, torch_logits(torch_model(folder), TOKENS)) == 0
    assert worst(Ours(second).sequence(TOKENS, 40), theirs) <= 1e-3


def test_a_dropped_an_extra_and_a_misshaped_key_are_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / SINGLE)
    norms = [key for key in tensors if "norm" in key and ".0." in key]
    kernels = [key for key in tensors if ".1." in key and key.endswith("proj.weight")]
    for key in (norms[0], kernels[0], kernels[-1]):
        changes = {
            "dropped": {k: v for k, v in tensors.items() if k != key},
            "extra": tensors | {f"{key}_more": tensors[key]},
            "misshaped": tensors | {key: np.ascontiguousarray(tensors[key][:-1])},
        }
        for what, changed in changes.items():
            broken = tmp_path / f"{key}-{what}"
            shutil.copytree(folder, broken)
            save_file(changed, broken / SINGLE)
            with pytest.raises(InputError, match=key.replace(".", r"\.")):
                load_backbone(broken, None, FLOAT32)


@pytest.mark.parametrize(
    "folder",
    [name if name in ("mistral-window", "gemma3") else pytest.param(name, marks=pytest.mark.slow) for name in EACH],
    indirect=True,
)
def test_greedy_replies_of_an_export_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    """Base + adapter here, the merged folder there: prompts of several lengths, past every window."""
    arch = load_backbone(folder, None, FLOAT32).arch
    lora = lora_from(LoraSettings(rank=3, alpha=5.0, targets=("all-linear",)), arch)
    backbone = load_backbone(folder, lora, FLOAT32)
    adapter = random_adapter(backbone, 3, 0.2)
    model = torch_model(exported(folder, tmp_path / "merged", lora, adapter))
    prompts = [TOKENS[:5], TOKENS[:31]]

    def greedy(adapter: Any) -> list[list[int]]:
        made = Generator(backbone, 2, end_of_turn=1).generate(adapter, prompts, [0, 1], GREEDY, 24)
        return [m.token_ids for m in made]

    asked = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": 1}
    theirs = [model.generate(torch.tensor([p]), **asked)[0, len(p) :].tolist() for p in prompts]
    assert greedy(adapter) == theirs
    assert greedy(backbone.fresh_adapter(0)) != theirs


def test_an_adapter_of_ours_opens_in_peft_and_merged_in_transformers(folder: Path, tmp_path: Path) -> None:
    arch = load_backbone(folder, None, FLOAT32).arch
    lora = lora_from(LoraSettings(rank=3, alpha=5.0, targets=("all-linear",)), arch)
    assert lora.targets == arch.linears
    backbone = load_backbone(folder, lora, FLOAT32)
    adapter = random_adapter(backbone, 3, 0.2)
    ours = Ours(backbone).sequence(TOKENS, 40, adapter)
    assert worst(ours, Ours(backbone).sequence(TOKENS, 40, backbone.fresh_adapter(0))) > 1e-2
    save_adapter(tmp_path / "peft", peft_tensors(adapter, arch), lora, str(folder))
    model = PeftModel.from_pretrained(torch_model(folder), tmp_path / "peft")
    assert worst(torch_logits(model, TOKENS), ours) <= 1e-3
    shutil.copytree(tmp_path / "peft", tmp_path / "elsewhere")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "elsewhere", dtype="float32").eval()
    assert worst(torch_logits(auto, TOKENS), ours) <= 1e-3
    merged = exported(folder, tmp_path / "merged", lora, adapter)
    assert worst(torch_logits(torch_model(merged), TOKENS), ours) <= 1e-3
    again = load_adapter(tmp_path / "peft", backbone.adapter_shapes)
    assert worst(Ours(backbone).sequence(TOKENS, 40, again), ours) == 0


FUSED = ("phi3-longrope",)
PATTERNS: dict[str, dict[str, Any]] = {
    "rank-stabilised": {"use_rslora": True, "target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*\.(0|1)\.(self_attn\.o_proj|mlp\.down_proj)"},
    "patterns": {
        "target_modules": ["o_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.o_proj": 5, "down_proj": 2},
        "alpha_pattern": {r".*1\.mlp\.down_proj": 7.0},
    },
    "some layers": {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_an_adapter_of_peft_opens_here(folder: Path, options: dict[str, Any], tmp_path: Path) -> None:
    if folder.name not in ("qwen3", "gemma3", "phi3-longrope") and "use_rslora" not in options:
        pytest.skip("patterns do not hang on the family")
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    model: Any = get_peft_model(torch_model(folder), config).eval()
    model.save_pretrained(tmp_path)
    theirs = torch_logits(model, TOKENS)
    lora = read_lora(tmp_path)
    backbone = load_backbone(folder, lora, FLOAT32)
    adapter = load_adapter(tmp_path, backbone.adapter_shapes)
    assert worst(Ours(backbone).sequence(TOKENS, 40, adapter), theirs) <= 1e-3
    half = replace(backbone, lora=lora._replace(scale=lora.scale / 2))
    half = load_backbone(folder, half.lora, FLOAT32)
    assert worst(Ours(half).sequence(TOKENS, 40, adapter), theirs) > 1e-3
    # And back: the same function, of one rank and one scale.
    save_adapter(tmp_path / "back", peft_tensors(adapter, backbone.arch), lora, str(folder))
    back = PeftModel.from_pretrained(torch_model(folder), tmp_path / "back")
    assert worst(torch_logits(back, TOKENS), theirs) <= 1e-3


@pytest.mark.parametrize("init", ["b_zero", "a_zero", "gaussian"])
def test_a_new_adapter_changes_nothing_whatever_its_initialisation(init: Any, tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path / "q")
    plain = Ours(load_backbone(folder, None, FLOAT32)).sequence(TOKENS, 40)
    lora = Lora(("q_proj", "down_proj"), 8, 2.0, init)
    backbone = load_backbone(folder, lora, FLOAT32)
    fresh = backbone.fresh_adapter(0)
    assert worst(Ours(backbone).sequence(TOKENS, 40, fresh), plain) <= 1e-5
    sizes = {path[2]: float(np.std(np.asarray(x[...]))) for path, x in flatten(fresh).items() if path[1] == "q_proj"}
    width = backbone.arch.width
    expected = {"b_zero": (width**-0.5 / 3**0.5, 0.0), "a_zero": (0.0, 1 / 8), "gaussian": (1 / 8, 0.0)}[init]
    assert (sizes["lora_a"], sizes["lora_b"]) == pytest.approx(expected, rel=0.1)


def test_rank_stabilised_scale_is_pefts(tmp_path: Path) -> None:
    plain, stable = (lora_from(LoraSettings(rank=16, alpha=8.0, rslora=r)).scale for r in (False, True))
    assert (plain, stable) == (0.5, 2.0)


def test_targets_are_names_or_regular_expressions() -> None:
    phi, llama = (architecture(KNOWN[name], name) for name in ("Phi-3-mini-4k-instruct", "Llama-3.2-1B"))

    def targets(arch: Any, *given: str) -> tuple[str, ...]:
        return lora_from(LoraSettings(targets=given), arch).targets

    assert targets(phi, "all-linear") == ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    assert targets(llama, r".*self_attn\.[qv]_proj", "down_proj") == ("q_proj", "v_proj", "down_proj")
    with pytest.raises(InputError, match=r"'q_proj' matches no linear layer; allowed: all-linear, qkv_proj"):
        targets(phi, "q_proj")
    with pytest.raises(InputError, match="matches q_proj in 1 of 16 layers"):
        targets(llama, r"model\.layers\.3\.self_attn\.q_proj")
    with pytest.raises(InputError, match="not a regular expression"):
        targets(llama, "(")


# --- configs of well-known models: facts, as their config.json states them -----------------------------------------------


def sizes(kind: str, *numbers: int, theta: float = 1e4, **more: Any) -> dict[str, Any]:
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    positions = {"max_position_embeddings": numbers[6]}
    plain = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": theta}
    common = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
    return {"model_type": kind} | dict(zip(names, numbers, strict=False)) | positions | plain | common | more


LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}
KNOWN: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": sizes(
        *("llama", 128256, 2048, 8192, 16, 32, 8, 131072),
        theta=5e5,
        head_dim=64,
        rope_scaling=LLAMA3_ROPE,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        pretraining_tp=1,
    ),
    "Meta-Llama-3-8B": sizes(
        "llama", 128256, 4096, 14336, 32, 32, 8, 8192, theta=5e5, rope_scaling=None, attention_bias=False
    ),
    "TinyLlama-1.1B": sizes("llama", 32000, 2048, 5632, 22, 32, 4, 2048, rope_scaling=None, pretraining_tp=1),
    "SmolLM2-135M": sizes(
        *("llama", 49152, 576, 1536, 30, 9, 3, 8192),
        theta=1e5,
        tie_word_embeddings=True,
        is_llama_config=True,
        rope_interleaved=False,
        rope_scaling=None,
    ),
    "SmolLM3-3B": sizes(
        *("smollm3", 128256, 2048, 11008, 36, 16, 4, 65536),
        theta=5e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        no_rope_layers=[1, 1, 1, 0] * 9,
        no_rope_layer_interval=4,
        layer_types=["full_attention"] * 36,
        use_sliding_window=False,
        sliding_window=None,
        max_window_layers=28,
        attention_bias=False,
        mlp_bias=False,
        pad_token_id=128004,
    ),
    "Mistral-7B-v0.1": sizes("mistral", 32000, 4096, 14336, 32, 32, 8, 32768, sliding_window=4096),
    "Mistral-7B-v0.3": sizes("mistral", 32768, 4096, 14336, 32, 32, 8, 32768, theta=1e6, sliding_window=None),
    "Qwen2.5-0.5B": sizes(
        *("qwen2", 151936, 896, 4864, 24, 14, 2, 32768),
        theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        use_sliding_window=False,
        sliding_window=32768,
        max_window_layers=24,
        use_mrope=False,
    ),
    "Qwen2.5-7B": sizes(
        *("qwen2", 152064, 3584, 18944, 28, 28, 4, 131072),
        theta=1e6,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        sliding_window=131072,
        max_window_layers=28,
        use_mrope=False,
    ),
    "Qwen3-0.6B": sizes(
        *("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960),
        theta=1e6,
        head_dim=128,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        max_window_layers=28,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "gemma-2-2b": sizes(
        *("gemma2", 256000, 2304, 9216, 26, 8, 4, 8192),
        **GEMMA,
        head_dim=256,
        tie_word_embeddings=True,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        cache_implementation="hybrid",
        attention_bias=False,
        pad_token_id=0,
    ),
    "gemma-3-1b": sizes(
        *("gemma3_text", 262144, 1152, 6912, 26, 4, 1, 32768),
        **GEMMA,
        theta=1e6,
        head_dim=256,
        tie_word_embeddings=True,
        query_pre_attn_scalar=256,
        sliding_window=512,
        sliding_window_pattern=6,
        rope_local_base_freq=10000,
        rope_scaling=None,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        cache_implementation="hybrid",
        attention_bias=False,
        pad_token_id=0,
    ),
    "Phi-3-mini-4k-instruct": sizes(
        *("phi3", 32064, 3072, 8192, 32, 32, 32, 4096),
        original_max_position_embeddings=4096,
        rope_scaling=None,
        sliding_window=2047,
        attention_bias=False,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        pad_token_id=32000,
    ),
    "phi-4": sizes(
        *("phi3", 100352, 5120, 17920, 40, 40, 10, 16384),
        theta=250000,
        original_max_position_embeddings=16384,
        rope_scaling=None,
        sliding_window=None,
        attention_bias=False,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        pad_token_id=100349,
    ),
    "OLMo-2-0425-1B": sizes(
        *("olmo2", 100352, 2048, 8192, 16, 16, 16, 4096),
        theta=5e5,
        rms_norm_eps=1e-6,
        rope_scaling=None,
        attention_bias=False,
        pad_token_id=100277,
    ),
}
# What the decoder must make of them, beside the sizes: windows, how many layers have no rotary positions, and norms.
EXPECTED: dict[str, tuple[set[int | None], int, str]] = {name: ({None}, 0, "") for name in KNOWN} | {
    "SmolLM3-3B": ({None}, 9, ""),
    "Mistral-7B-v0.1": ({4096}, 0, ""),
    "Qwen3-0.6B": ({None}, 0, "head"),
    "gemma-2-2b": ({4096, None}, 0, ""),
    "gemma-3-1b": ({512, None}, 0, "head"),
    "Phi-3-mini-4k-instruct": ({2047}, 0, ""),
    "OLMo-2-0425-1B": ({None}, 0, "whole"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_well_known_model_is_taken(name: str) -> None:
    config = KNOWN[name]
    arch = architecture(config, name)
    windows, without, norm = EXPECTED[name]
    assert set(arch.windows) == windows
    assert sum(arch.kinds[kind].rotary is None for kind in arch.kind_of) == without
    assert arch.qk_norm == norm
    assert (arch.layers, arch.kv_heads) == (config["num_hidden_layers"], config["num_key_value_heads"])
    assert architecture(config_of(arch, config), name) == arch


def test_all_families_are_tried() -> None:
    assert {FAMILIES[name][0] for name in EACH} == {kind for kind, _ in FAMILIES.values()}
    assert {config["model_type"] for config in KNOWN.values()} == {kind for kind, _ in FAMILIES.values()}
