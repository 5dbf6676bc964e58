"""The tokenizer and its chat template: messages to token ids, ids to text and to bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from esjax.corpus.dialogue import Message
from esjax.errors import InputError


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template and an end-of-turn token (its eos token)."""

    def __init__(self, folder: Path) -> None:
        """Load from a Hugging Face folder. Raises InputError when it has no tokenizer, template or eos token."""
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as e:
            raise InputError(f"{folder}: no usable tokenizer ({' '.join(str(e).split())[:200]})") from e
        if not self.hf.chat_template:
            raise InputError(f"{folder}: the tokenizer has no chat template; put chat_template.jinja into the folder")
        if self.hf.eos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no eos token; set eos_token in tokenizer_config.json")
        self.end_of_turn = int(self.hf.eos_token_id)
        self.special = frozenset(self.hf.all_special_ids)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat that the assistant is about to continue (with the template's generation header).

        Raises InputError where there are none: a model continues something.
        """
        ids = self._template(messages, header=True)
        if not ids:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(
                f"the chat template makes no token of a chat with the roles {roles}; use a template that writes them, or set "
                "prompts.system"
            )
        return ids

    def reply(self, prompt: list[int], messages: list[Message]) -> list[int]:
        """Token ids of the last message (the assistant's), end-of-turn token included, given its prompt's ids.

        What the template puts after the end-of-turn token is not part of the reply. Raises InputError when the prompt is
        not a prefix of the whole chat, or the reply does not end its turn: such a template cannot be trained on.
        """
        if len(prompt) < 2:
            raise InputError(
                "the chat template makes a single token of the prompt, and an answer to be trained on or scored needs two before "
                "it; use a template that writes the roles, or set prompts.system"
            )
        whole = self._template(messages, header=False)
        if whole[: len(prompt)] != prompt:
            raise InputError(
                "the chat template does not keep a prompt as a prefix of the answered chat, so answers cannot be trained on; "
                "use a template that only appends"
            )
        reply = whole[len(prompt) :]
        if self.end_of_turn not in reply:
            raise InputError(f"the chat template does not end an answer with the eos token {self.hf.eos_token!r}")
        return reply[: reply.index(self.end_of_turn) + 1]

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return list(self.hf(text, add_special_tokens=False).input_ids)

    def continuation(self, text: str) -> list[int]:
        """Token ids of plain text that continues a line, without the space that some tokenizers put before a text."""
        for before in (".", "\n", "a", "1"):
            head, whole = self.encode(before), self.encode(before + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
        raise InputError(f"the tokenizer always merges {text!r} with what comes before it")

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.hf.decode([i for i in ids if i not in self.special], clean_up_tokenization_spaces=False))

    def _template(self, messages: list[Message], header: bool) -> list[int]:
        try:
            ids = self.hf.apply_chat_template(messages, add_generation_prompt=header, tokenize=True, return_dict=True)
        except TemplateError as e:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(f"the model's chat template refuses a chat with the roles {roles}: {e}") from e
        return list(ids["input_ids"])

    def token_bytes(self) -> dict[int, bytes]:
        """The bytes that each ordinary (not special) token stands for, for constrained decoding.

        Byte-level BPE and SentencePiece-style vocabularies with byte fallback are known; others raise InputError.
        """
        vocabulary: dict[str, int] = self.hf.get_vocab()
        kind = str(self.hf.backend_tokenizer.decoder)
        if "ByteLevel" in kind:
            to_bytes: Callable[[str], bytes] = _byte_level_bytes
        elif "ByteFallback" in kind:
            to_bytes = _sentencepiece_bytes
        else:
            raise InputError(f"constrained decoding does not know this tokenizer's decoder: {kind[:80]}")
        return {i: to_bytes(token) for token, i in vocabulary.items() if i not in self.special}


def _byte_level_bytes(token: str) -> bytes:
    """GPT-2's byte-level BPE (Radford et al. 2019) writes bytes as printable stand-ins."""
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()


PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
