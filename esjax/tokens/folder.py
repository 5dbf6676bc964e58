"""What a Hugging Face folder says about its tokenizer: the tokenizer itself, its chat template, and what ends a turn."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from esjax.errors import InputError
from esjax.settings.files import bundled, read_whole

# Chat templates that settings can name, and the tokens that they write around messages.
TEMPLATES = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "alpaca": (),
}


def load_tokenizer(folder: Path, template: str | None = None) -> Any:
    """transformers' tokenizer of a folder, with the chat ``template`` that is named (of TEMPLATES, or a file), or its own.

    Raises InputError when it has none, or no chat template; runs no code of it.
    """
    try:
        hf: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise InputError(f"{folder}: no usable tokenizer ({' '.join(str(e).split())[:200]})") from e
    if template is not None:
        hf.chat_template = _named(template, hf, folder)
    if not hf.chat_template:
        raise InputError(
            f"{folder}: the tokenizer has no chat template; name one (model.chat_template={', '.join(TEMPLATES)} or a .jinja "
            "file), or put chat_template.jinja into the folder"
        )
    if isinstance(hf.chat_template, dict) and "default" not in hf.chat_template:
        raise InputError(
            f"{folder}: its chat templates are named {', '.join(hf.chat_template)}, and none of them default; put the one to "
            "use into the folder as chat_template.jinja"
        )
    return hf


def _named(template: str, hf: Any, folder: Path) -> str:
    """The text of a template that settings name. Raises InputError where the tokenizer lacks the tokens that it writes."""
    if template not in TEMPLATES:
        if not template.endswith(".jinja"):
            raise InputError(
                f"model.chat_template={template}: give {', '.join(TEMPLATES)}, or a file whose name ends with .jinja"
            )
        return read_whole(bundled(template), "a chat template")
    known = hf.get_vocab()
    lacking = [token for token in TEMPLATES[template] if token not in known]
    if template == "alpaca" and hf.eos_token is None:
        lacking = ["an eos token"]
    if lacking:
        fit = [name for name, tokens in TEMPLATES.items() if all(token in known for token in tokens)]
        raise InputError(
            f"{folder}: model.chat_template={template} writes {', '.join(lacking)}, which this tokenizer does not have; "
            f"allowed: {', '.join(fit)}, or a .jinja file"
        )
    text = (files("esjax.tokens") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    starts = hf.bos_token_id is not None and list(hf("a").input_ids)[:1] == [hf.bos_token_id]
    return "{{ bos_token }}" * starts + text


def stop_tokens(folder: Path) -> list[int]:
    """Ids that end a reply beside the tokenizer's own, as transformers has it: generation_config.json's, else config.json's.

    Raises InputError naming the file.
    """
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if not file.exists():
            continue
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as e:
            raise InputError(f"{file}: not a JSON object ({' '.join(str(e).split())[:160]})") from e
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
            raise InputError(f"{file}: eos_token_id={ids!r:.160} is not a token id or a list of them")
        return ids
    return []


def end_of_turn(hf: Any, stops: list[int]) -> int | None:
    """The token with which the chat template ends an answer: behind it the first that ends a reply, else the first control token.

    None where there is no such token, or the template refuses the chat that is tried.
    """
    answer = "zxqv"  # of which no template is likely to speak
    try:
        text = hf.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], tokenize=False
        )
        _, found, tail = str(text).rpartition(answer)
    except Exception:  # said where a real chat is refused
        return None
    ids = hf(tail, add_special_tokens=False).input_ids if found else []
    control = {i for i, token in hf.added_tokens_decoder.items() if token.special}
    return next((i for kind in ({*stops}, control) for i in ids if i in kind), None)
