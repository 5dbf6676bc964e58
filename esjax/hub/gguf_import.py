"""A GGUF file becomes a Hugging Face folder: weights dequantised to float32, config, tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esjax.errors import InputError
from esjax.hub.shards import write_shards

# GGUF tensor names of the llama and qwen2 architectures -> Hugging Face names
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
ROPE_FACTORS = "rope_freqs.weight"
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


# Keys below the architecture's name that are read, and others with the values that change nothing. A key that is in
# neither is a number that llama.cpp computes with and this architecture does not.
READ = frozenset(
    "embedding_length feed_forward_length block_count attention.head_count attention.head_count_kv attention.key_length "
    "attention.value_length attention.layer_norm_rms_epsilon rope.freq_base rope.dimension_count context_length vocab_size "
    "rope.scaling.original_context_length".split()
)
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none", ""),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.finetuned": (True, False),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "use_parallel_residual": (False,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # what _unpermute undoes
}


class _Metadata:
    def __init__(self, reader: gguf.GGUFReader, where: Path) -> None:
        self.reader, self.where = reader, where

    def __getitem__(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise InputError(f"{self.where}: the GGUF key {key} is missing")
        return field.contents()

    def get(self, key: str, default: Any) -> Any:
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def below(self, prefix: str) -> dict[str, Any]:
        """The keys that begin with ``prefix.``, without it."""
        names = [k for k in self.reader.fields if k.startswith(f"{prefix}.")]
        return {k.removeprefix(f"{prefix}."): self[k] for k in names}


def convert(file: Path, folder: Path) -> None:
    """Write ``file`` as a Hugging Face folder. Raises InputError naming what is not supported or damaged."""
    try:
        _convert(file, folder)
    except (OSError, MemoryError):
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, UnicodeError) as e:
        # The gguf package believes what a header says: damage shows itself anywhere.
        raise InputError(f"{file}: not a readable GGUF file ({type(e).__name__}: {e!s:.160}); fetch it again") from e


def _convert(file: Path, folder: Path) -> None:
    reader = gguf.GGUFReader(file)
    meta = _Metadata(reader, file)
    if meta.get("split.count", 1) > 1:
        raise InputError(
            f"{file}: part {meta.get('split.no', 0) + 1} of a model split into {meta['split.count']} files; join them with "
            "`llama-gguf-split --merge` and give the one file"
        )
    arch = meta["general.architecture"]
    if arch not in ("llama", "qwen2"):
        raise InputError(f"{file}: GGUF architecture {arch!r} is not supported; allowed: llama, qwen2")
    tensors = {t.name: t for t in reader.tensors}
    config = _config(meta, arch, tensors)
    for name in (
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{i}.{kind}.weight" for i in range(config["num_hidden_layers"]) for kind in PER_LAYER),
    ):
        if name not in tensors:
            raise InputError(f"{file}: the tensor {name} is missing; fetch the file again")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    ends = {config["eos_token_id"], meta.get("tokenizer.ggml.eot_token_id", config["eos_token_id"])}
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": sorted(ends)}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    _tokenizer(meta).save_pretrained(folder)
    write_shards(folder, _tensors(reader, config, arch, file))


def _config(meta: _Metadata, arch: str, tensors: dict[str, Any]) -> dict[str, Any]:
    given = meta.below(arch)
    for key, value in given.items():
        if key in READ:
            continue
        allowed = NEUTRAL.get(key, ())
        if value not in allowed:
            raise InputError(
                f"{meta.where}: {arch}.{key}={value!r:.80} is not supported; allowed: "
                f"{' or '.join(map(repr, allowed)) or 'a file without it'}"
            )
    heads, width = meta[f"{arch}.attention.head_count"], meta[f"{arch}.embedding_length"]
    size = given.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if given.get(key, size) != size:
            raise InputError(
                f"{meta.where}: {arch}.{key}={given[key]!r} is not supported; allowed: {size}, a head's size"
            )
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    config: dict[str, Any] = {
        "architectures": [names[arch]],
        "model_type": arch,
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 0,
        "hidden_size": width,
        "intermediate_size": meta[f"{arch}.feed_forward_length"],
        "num_hidden_layers": meta[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": size,
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(meta[f"{arch}.attention.layer_norm_rms_epsilon"])),
        "rope_theta": float(meta.get(f"{arch}.rope.freq_base", 10000.0)),  # llama.cpp's own default
        "max_position_embeddings": meta[f"{arch}.context_length"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    if ROPE_FACTORS in tensors:
        config["rope_scaling"] = _llama3_scaling(meta, tensors[ROPE_FACTORS].data, config, arch)
    return config


def _llama3_scaling(meta: _Metadata, factors: np.ndarray, config: dict[str, Any], arch: str) -> dict[str, Any]:
    """Llama 3.1's rope scaling, which GGUF stores as what each frequency is divided by, float32 [head_dim / 2].

    Its four numbers are not stored: those of all published models are tried. Raises InputError where they do not fit.
    """
    size = config["head_dim"]
    inv = config["rope_theta"] ** -(np.arange(0, size, 2) / size)
    for original in {8192, int(meta.get(f"{arch}.rope.scaling.original_context_length", 8192))}:
        factor, low, high = float(np.max(factors)), 1.0, 4.0
        blend = np.clip((original * inv / (2 * np.pi) - low) / (high - low), 0, 1)
        if factors.shape == inv.shape and np.allclose(factors, 1 / (blend + (1 - blend) / factor), rtol=1e-4):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            return {"rope_type": "llama3"} | dict(zip(names, (factor, low, high, original), strict=True))
    raise InputError(
        f"{meta.where}: the tensor {ROPE_FACTORS} is not Llama 3.1's rope scaling; import the Hugging Face folder instead"
    )


def _tensors(
    reader: gguf.GGUFReader, config: dict[str, Any], arch: str, file: Path
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except (ValueError, NotImplementedError) as e:
            raise InputError(f"{file}: tensor {tensor.name} cannot be dequantised ({e})") from e
        if tensor.name in GLOBAL:
            yield GLOBAL[tensor.name], array
            continue
        _, layer, kind, suffix = (*tensor.name.split("."), "", "", "")[:4]
        if not tensor.name.startswith("blk.") or kind not in PER_LAYER:
            raise InputError(
                f"{file}: the tensor {tensor.name} is not supported; import the Hugging Face folder instead"
            )
        if arch == "llama" and kind in ("attn_q", "attn_k"):
            array = _unpermute(array, config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
        yield f"model.layers.{layer}.{PER_LAYER[kind]}.{suffix}", array


def _unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's llama stores rotary pairs side by side; Hugging Face stores them half a head apart. [out, in] or [out]."""
    size = array.shape[0] // heads
    return array.reshape(heads, size // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _tokenizer(meta: _Metadata) -> PreTrainedTokenizerFast:
    kind, pre = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"]
    if (kind, pre) != ("gpt2", "smollm"):
        raise InputError(
            f"{meta.where}: its tokenizer (model {kind!r}, pre {pre!r}) is not supported from GGUF; allowed: gpt2 with smollm; "
            "use the Hugging Face folder of this model instead"
        )
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    named = {
        f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
        for theirs, ours in names.items()
        if meta.get(f"tokenizer.ggml.{theirs}_token_id", None) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
