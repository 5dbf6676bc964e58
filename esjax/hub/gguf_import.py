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
CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class _Metadata:
    def __init__(self, reader: gguf.GGUFReader, where: Path) -> None:
        self.reader, self.where = reader, where

    def __getitem__(self, key: str) -> Any:
        field = self.reader.get_field(key)
        if field is None:
            raise InputError(f"{self.where}: the GGUF key {key} is missing")
        return field.contents()

    def __contains__(self, key: str) -> bool:
        return self.reader.get_field(key) is not None


def convert(file: Path, folder: Path) -> None:
    """Write ``file`` as a Hugging Face folder. Raises InputError naming what is not supported or damaged."""
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise InputError(f"{file}: not a readable GGUF file ({e}); fetch it again") from e
    meta = _Metadata(reader, file)
    arch = meta["general.architecture"]
    if arch not in ("llama", "qwen2"):
        raise InputError(f"{file}: GGUF architecture {arch!r} is not supported; allowed: llama, qwen2")
    folder.mkdir(parents=True)
    config = _config(meta, arch, tied="output.weight" not in {t.name for t in reader.tensors})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    _tokenizer(meta).save_pretrained(folder)
    write_shards(folder, _tensors(reader, config, arch, file))


def _config(meta: _Metadata, arch: str, tied: bool) -> dict[str, Any]:
    heads, width = meta[f"{arch}.attention.head_count"], meta[f"{arch}.embedding_length"]
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    return {
        "architectures": [names[arch]],
        "model_type": arch,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": width,
        "intermediate_size": meta[f"{arch}.feed_forward_length"],
        "num_hidden_layers": meta[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta[f"{arch}.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": float(np.float32(meta[f"{arch}.attention.layer_norm_rms_epsilon"])),
        "rope_theta": float(meta[f"{arch}.rope.freq_base"]),
        "max_position_embeddings": meta[f"{arch}.context_length"],
        "tie_word_embeddings": tied,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }


def _tensors(
    reader: gguf.GGUFReader, config: dict[str, Any], arch: str, file: Path
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in reader.tensors:
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
        if f"tokenizer.ggml.{theirs}_token_id" in meta
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
