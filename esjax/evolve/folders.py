"""A whole model as a Hugging Face folder: weights, config, and what belongs to its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from esjax.hub.shards import write_shards
from esjax.model.families import config_of
from esjax.model.lora import Adapter
from esjax.model.weights import FLOAT32, Backbone, merged_tensors, tensor_names
from esjax.run.files import replacing
from esjax.runtime.context import current
from esjax.tokens.tokenizer import ChatTokenizer

# What belongs to a tokenizer, beside the files that its own class names.
COPIED = (
    *("tokenizer*", "chat_template*", "additional_chat_templates/*.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json", "generation_config.json"),
)


def write_trained(folder: Path, backbone: Backbone, trained: Adapter, tokenizer: ChatTokenizer) -> None:
    """Write all trained parameters, in float32, as a new folder by atomic rename. Every process must ask; the first writes."""
    if current().processes.writer:
        with replacing(folder) as made:
            write_model(made, backbone, trained, FLOAT32)
            copy_tokenizer(backbone.folder, made, tokenizer)
    else:
        for _ in merged_tensors(backbone, trained):  # each tensor is gathered from all hosts
            pass


def write_model(folder: Path, backbone: Backbone, adapter: Adapter, dtype: jnp.dtype, max_bytes: int = 4 << 30) -> None:
    """Base + adapter, merged, in a dtype, and its config.json, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = ((key, x.astype(dtype)) for key, x in merged_tensors(backbone, adapter))
    write_shards(folder, tensors, len(tensor_names(backbone.arch)), max_bytes)
    config = config_of(backbone.arch, json.loads((backbone.folder / "config.json").read_text(encoding="utf-8")))
    config |= {"dtype": dtype.name, "torch_dtype": dtype.name}  # transformers 5 and 4
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, to: Path, tokenizer: ChatTokenizer) -> None:
    """Copy what belongs to the tokenizer: its files, all templates, and what ends a turn."""
    for pattern in {*COPIED, *tokenizer.hf.vocab_files_names.values()}:
        for file in source.glob(pattern):
            place = to / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copy(file, place)
    if tokenizer.replaced:  # the template is the settings', and so is what ends a turn
        (to / "chat_template.jinja").write_text(tokenizer.hf.chat_template, encoding="utf-8")
        file, facts = to / "generation_config.json", dict[str, Any]()
        if file.exists():
            facts = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps(facts | {"eos_token_id": list(tokenizer.stops)}) + "\n", encoding="utf-8")
