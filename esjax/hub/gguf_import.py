"""A GGUF file becomes a Hugging Face folder: weights dequantised to float32, config, tokenizer and chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from esjax.errors import InputError
from esjax.hub.gguf_names import GEMMA_27B_LAYERS, GLOBAL, KINDS, ROPE_FACTORS, unpermute
from esjax.hub.gguf_tokenizer import Metadata, tokenizer_of
from esjax.hub.shards import write_shards

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
    "tensor_data_layout": ("Meta AI original pth",),  # what unpermute undoes
}


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
    readers = [gguf.GGUFReader(part) for part in parts_of(file)]
    meta = Metadata({name: field.contents for name, field in readers[0].fields.items()}, file)
    if (count := meta.get("split.count", 1)) > len(readers) or (len(readers) > 1 and meta.get("split.no", 0)):
        raise InputError(
            f"{file}: part {meta.get('split.no', 0) + 1} of a model split into {count} files; give the first, named "
            f"NAME-00001-of-{count:05d}.gguf, with the others beside it, or join them with `llama-gguf-split --merge`"
        )
    arch = meta["general.architecture"]
    if arch not in KINDS:
        raise InputError(f"{file}: GGUF architecture {arch!r} is not supported; allowed: {', '.join(KINDS)}")
    tensors = {t.name: t for reader in readers for t in reader.tensors}
    if (count := meta.get("split.tensors.count", len(tensors))) != len(tensors):
        raise InputError(f"{file}: {len(tensors)} tensors in its parts, and {count} are said to be; fetch them again")
    vocab = int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else 0
    factors = tensors[ROPE_FACTORS].data if ROPE_FACTORS in tensors else None
    config = config_from(meta, vocab, "output.weight" not in tensors, factors)
    for name in (
        "token_embd.weight",
        "output_norm.weight",
        *(f"blk.{i}.{kind}.weight" for i in range(config["num_hidden_layers"]) for kind in KINDS[arch].per_layer),
    ):
        if name not in tensors:
            raise InputError(f"{file}: the tensor {name} is missing; fetch the file again")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    ends = {config["eos_token_id"], meta.get("tokenizer.ggml.eot_token_id", config["eos_token_id"])}
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": sorted(ends)}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    tokenizer_of(meta).save_pretrained(folder)
    write_shards(folder, _tensors(tensors.values(), config, arch, file), len(tensors))


def parts_of(file: Path) -> list[Path]:
    """The files of a model that is split, by its first one's name; or the file alone. Raises InputError for one missing."""
    match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", file.name)
    if match is None:
        return [file]
    name, number, count = match[1], int(match[2]), int(match[3])
    parts = [file.with_name(f"{name}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1)]
    if number != 1:
        raise InputError(f"{file}: part {number} of {count}; give the first one, {parts[0].name}")
    for part in parts:
        if not part.exists():
            raise InputError(f"{part}: is missing; {file.name} is the first of {count} files, which must lie together")
    return parts


def config_from(meta: Metadata, vocab: int, tied: bool, factors: np.ndarray | None) -> dict[str, Any]:
    """The config.json of a file's metadata; ``factors`` is its tensor of rope factors.

    Raises InputError for a key that changes what is computed and is not known.
    """
    arch = meta["general.architecture"]
    kind, given = KINDS[arch], meta.below(arch)
    for key, value in given.items():
        if key in READ or key in kind.read:
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
    config: dict[str, Any] = {
        "architectures": [kind.name],
        "model_type": kind.model_type,
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": meta[f"{arch}.feed_forward_length"],
        "num_hidden_layers": meta[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": size,
        **(kind.config or {"hidden_act": "silu"}),
        "rms_norm_eps": float(np.float32(meta[f"{arch}.attention.layer_norm_rms_epsilon"])),
        "rope_theta": float(meta.get(f"{arch}.rope.freq_base", kind.theta)),
        "max_position_embeddings": meta[f"{arch}.context_length"],
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "float32",
    }
    if arch == "gemma3":
        scalar = width // heads if config["num_hidden_layers"] == GEMMA_27B_LAYERS else size
        config |= {"sliding_window": meta[f"{arch}.attention.sliding_window"], "query_pre_attn_scalar": scalar}
        if (scaling := meta.get(f"{arch}.rope.scaling.type", "none")) not in ("none", ""):
            config["rope_scaling"] = {"rope_type": scaling, "factor": float(meta[f"{arch}.rope.scaling.factor"])}
    if factors is not None:
        config["rope_scaling"] = _llama3_scaling(meta, factors, config, arch)
    return config


def _llama3_scaling(meta: Metadata, factors: np.ndarray, config: dict[str, Any], arch: str) -> dict[str, Any]:
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


def _tensors(tensors: Iterable[Any], config: dict[str, Any], arch: str, file: Path) -> Iterator[tuple[str, np.ndarray]]:
    per_layer = KINDS[arch].per_layer
    for tensor in tensors:
        if tensor.name == ROPE_FACTORS:
            continue
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except (ValueError, NotImplementedError) as e:
            raise InputError(f"{file}: tensor {tensor.name} cannot be dequantised ({e})") from e
        if arch == "gemma3" and "norm" in tensor.name:
            array = array - 1  # stored as what is multiplied by
        if tensor.name in GLOBAL:
            yield GLOBAL[tensor.name], array
            continue
        _, layer, kind, suffix = (*tensor.name.split("."), "", "", "")[:4]
        if not tensor.name.startswith("blk.") or kind not in per_layer:
            raise InputError(
                f"{file}: the tensor {tensor.name} is not supported; import the Hugging Face folder instead"
            )
        if arch == "llama" and kind in ("attn_q", "attn_k"):
            array = unpermute(array, config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"])
        yield f"model.layers.{layer}.{per_layer[kind]}.{suffix}", array
