"""A GGUF file's metadata, and the tokenizer that it describes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from esjax.errors import InputError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # tokenizer.ggml.token_type
PER_TOKEN = ("tokens", "token_type", "scores")
OURS = ("gpt2", "smollm")  # transformers does not know how this one splits text
# What transformers builds from a file's vocabulary: byte-level ones by how they split text, and SentencePiece's.
THEIRS = {
    "gpt2": ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "gpt-2"),
    "llama": ("default",),
}
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


class Metadata:
    """The keys of a file, each read when it is asked for."""

    def __init__(self, fields: Mapping[str, Callable[[], Any]], where: Path) -> None:
        self.fields, self.where = fields, where

    def __getitem__(self, key: str) -> Any:
        if key not in self.fields:
            raise InputError(f"{self.where}: the GGUF key {key} is missing")
        return self.fields[key]()

    def get(self, key: str, default: Any) -> Any:
        return self.fields[key]() if key in self.fields else default

    def below(self, prefix: str) -> dict[str, Any]:
        """The keys that begin with ``prefix.``, without it."""
        return {k.removeprefix(f"{prefix}."): read() for k, read in self.fields.items() if k.startswith(f"{prefix}.")}


def tokenizer_of(meta: Metadata) -> PreTrainedTokenizerFast:
    """The tokenizer with the file's chat template, if it has one. Raises InputError for a kind that is not known."""
    kind, pre = meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre", "default")
    known = [OURS, *((model, name) for model, names in THEIRS.items() for name in names)]
    if (kind, pre) not in known:
        raise InputError(
            f"{meta.where}: its tokenizer (model {kind!r}, pre {pre!r}) is not supported from GGUF; allowed: "
            f"{', '.join(f'{model} with {name}' for model, name in known)}; use the Hugging Face folder of this model instead"
        )
    meta = _without_padding(meta)
    tokens = meta["tokenizer.ggml.tokens"]
    named = {
        f"{ours}_token": tokens[meta[f"tokenizer.ggml.{theirs}_token_id"]]
        for theirs, ours in SPECIAL.items()
        if meta.get(f"tokenizer.ggml.{theirs}_token_id", None) is not None
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_smollm(meta, tokens) if (kind, pre) == OURS else _by_transformers(meta),
        chat_template=meta.get("tokenizer.chat_template", None),
        model_max_length=meta[f"{meta['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _without_padding(meta: Metadata) -> Metadata:
    """Without the unused words with which a list ends where the embedding has more rows than the tokenizer tokens."""
    types = meta.get("tokenizer.ggml.token_type", [])
    size = len(types)
    while size and types[size - 1] == UNUSED:
        size -= 1
    cut = {f"tokenizer.ggml.{name}": meta.get(f"tokenizer.ggml.{name}", None) for name in PER_TOKEN}
    fewer = {k: lambda v=v: v[:size] for k, v in cut.items() if v is not None}
    return Metadata({**meta.fields, **fewer}, meta.where) if size < len(types) else meta


def _smollm(meta: Metadata, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE that takes digits one by one."""
    merges = [tuple(m.split(" ", 1)) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = meta["tokenizer.ggml.token_type"]
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return tokenizer


def _by_transformers(meta: Metadata) -> Tokenizer:
    """As transformers rebuilds it, which knows each family's normaliser, pre-tokenizer and decoder."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import (
            GGUF_TOKENIZER_MAPPING,
            convert_gguf_tokenizer,
        )
    except ImportError as e:
        raise InputError(
            f"{meta.where}: this tokenizer is read by transformers 5.24 and newer; upgrade transformers, or use the Hugging Face "
            "folder of this model"
        ) from e
    known = GGUF_TOKENIZER_MAPPING["tokenizer"]
    found = {ours: value for key, ours in known.items() if (value := meta.get(f"tokenizer.{key}", None)) is not None}
    backend, _ = convert_gguf_tokenizer(meta["general.architecture"], found)
    # Its classes add the special tokens that their families have, also where a file has other ones.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(found["tokens"])]
    return Tokenizer.from_str(json.dumps(state))
