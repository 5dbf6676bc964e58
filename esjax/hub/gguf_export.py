"""Write a GGUF file: its keys, what it says of a tokenizer, and its tensors, one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np

from esjax.errors import InputError
from esjax.hub.gguf_tokenizer import CONTROL, OURS, THEIRS, UNUSED, USER_DEFINED, Metadata, tokenizer_of

Stored = Literal["F32", "F16", "BF16", "Q8_0"]
NORMAL, UNKNOWN, BYTE = 1, 2, 6  # tokenizer.ggml.token_type
# Texts on which a tokenizer that is rebuilt from the file must agree: runs of digits and of spaces, contractions in both cases,
# line ends, scripts, emoji, code. No combining characters: llama.cpp normalises nothing, whatever the tokenizer does.
PROBES = (
    "I'm sorry, but she's said we'll see; THEY'RE tired, YOU'VE slept. don't 'Tis",
    "1 12 123 1234 12345 123456789 3.14 1,000,000 a1b22c333",
    " one  two   three    four\n\n\nfive \n six\t\tseven  \r\n eight \n\n  ",
    "It's hard.\n\nIs it?\n\n\nYes!\r\n(Well;\n...)\n\n",
    "Grüße aus Köln, ça va? Привет, мир. 你好,世界。 こんにちは 안녕하세요 مرحبا 😀👍🏽",
    'if (x == 1) { return "a/b"; } // --- *** ... !? <tag> [PAD] _under_ camelCase HTTPServer',
)


def tokenizer_keys(hf: Any, end_of_turn: int, rows: int, keys: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The keys of a tokenizer, for an embedding of ``rows`` rows, beside the other ``keys`` of the file ``where``.

    Raises InputError where the tokenizer that is rebuilt from them would split text in another way.
    """
    model = json.loads(hf.backend_tokenizer.to_str())["model"]
    sentencepiece = bool(model.get("byte_fallback"))
    if model["type"] != "BPE" or not (sentencepiece or "ByteLevel" in str(hf.backend_tokenizer.decoder)):
        raise InputError(
            f"{where}: a GGUF file cannot hold this tokenizer ({model['type']}); allowed: byte-level BPE, and SentencePiece's BPE"
        )
    named: dict[int, str] = {i: token for token, i in hf.get_vocab().items()}
    tokens = [named.get(i, f"[PAD{i}]") for i in range(rows)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    said = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": _types(hf, named, rows, sentencepiece),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end_of_turn if hf.eos_token_id is None else hf.eos_token_id,
        "tokenizer.ggml.eot_token_id": end_of_turn,
    }
    for name, i in (("bos", hf.bos_token_id), ("unknown", hf.unk_token_id), ("padding", hf.pad_token_id)):
        said |= {} if i is None else {f"tokenizer.ggml.{name}_token_id": i}
    ids = list(hf("a").input_ids)  # as its own code adds special tokens to a text
    said["tokenizer.ggml.add_bos_token"] = hf.bos_token_id is not None and ids[:1] == [hf.bos_token_id]
    said["tokenizer.ggml.add_eos_token"] = hf.eos_token_id is not None and ids[-1:] == [hf.eos_token_id]
    if sentencepiece:
        # A pair is merged the sooner, the higher the score of what it becomes.
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            ranks.setdefault(merge.replace(" ", ""), rank)
        said["tokenizer.ggml.scores"] = [-float(ranks.get(token, 0)) for token in tokens]
        first = hf.backend_tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        said["tokenizer.ggml.add_space_prefix"] = first[:1] != ["a"]
    said |= _templates(hf.chat_template)
    # Without a word of several digits Llama 3's is the same as Qwen 2's, which such models are said to have.
    splits = sorted(THEIRS["gpt2"], key=lambda pre: pre != "qwen2")
    known = [("llama", "default")] if sentencepiece else [OURS, *(("gpt2", pre) for pre in splits)]
    for kind, pre in known:
        both = {**said, "tokenizer.ggml.model": kind, "tokenizer.ggml.pre": pre}
        made = tokenizer_of(Metadata({k: _constant(v) for k, v in {**keys, **both}.items()}, where))
        if _alike(hf, made):
            return both
    raise InputError(
        f"{where}: a GGUF file cannot hold this tokenizer: none of {', '.join(pre for _, pre in known)} splits text as it does; "
        "give --format merged"
    )


def write_gguf(
    file: Path,
    keys: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    stored: Stored,
) -> list[str]:
    """Write tensors in the order of ``shapes``: matrices as ``stored``, vectors in float32.

    Returns the names of the matrices that are kept in float16 because their rows cannot be cut into Q8_0's blocks of 32.
    Raises InputError where a number is too large for the type.
    """
    writer = gguf.GGUFWriter(file, keys["general.architecture"])
    kinds = {name: _kind(shape, stored) for name, shape in shapes.items()}
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        nbytes = int(np.prod(shape)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in tensors:
        with np.errstate(over="ignore"):
            made = gguf.quantize(np.ascontiguousarray(array, np.float32), kinds[name])
        if kinds[name] == gguf.GGMLQuantizationType.F16 and not np.isfinite(made).all():
            raise InputError(f"{file}: {name} has numbers above 65504, float16's largest; give --dtype bfloat16")
        writer.write_tensor_data(made)
    writer.close()
    return [name for name, kind in kinds.items() if len(shapes[name]) > 1 and kind.name != stored]


def _kind(shape: tuple[int, ...], stored: Stored) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32  # llama.cpp wants norms and biases so
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[stored]]
    return gguf.GGMLQuantizationType["F16" if shape[-1] % block else stored]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _types(hf: Any, named: Mapping[int, str], rows: int, sentencepiece: bool) -> list[int]:
    added = {i: CONTROL if token.special else USER_DEFINED for i, token in hf.added_tokens_decoder.items()}

    def of(i: int) -> int:
        if i not in named:
            return UNUSED
        if sentencepiece and i == hf.unk_token_id:
            return UNKNOWN
        if sentencepiece and named[i].startswith("<0x") and len(named[i]) == 6:
            return BYTE
        return added.get(i, NORMAL)

    return [of(i) for i in range(rows)]


def _templates(templates: str | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    more = sorted(name for name in templates if name != "default")
    own = {f"tokenizer.chat_template.{name}": templates[name] for name in more}
    return {"tokenizer.chat_template": templates["default"], "tokenizer.chat_templates": more} | own


def _alike(hf: Any, made: Any) -> bool:
    names: Sequence[str] = [token.content for token in hf.added_tokens_decoder.values()]

    def ids(tokenizer: Any, text: str) -> list[int]:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    same = hf.get_vocab() == made.get_vocab()
    return same and all(ids(hf, text) == ids(made, text) for text in (*PROBES, *names))


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value
