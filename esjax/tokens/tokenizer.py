"""The tokenizer: messages to token ids, ids to text and to bytes. What people wrote never becomes a control token."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Tokenizer

from esjax.corpus.dialogue import Message
from esjax.errors import InputError, within
from esjax.run.progress import say
from esjax.tokens.folder import end_of_turn, load_tokenizer, stop_tokens
from esjax.tokens.taking import Taking
from esjax.tokens.template import TODAY, stable

# Stand-ins in a chat's text, see ChatTokenizer._render; no text that holds a control token may hold characters from here on.
TWIN = 0xF0000  # + n: the n-th control token where the template itself wrote it
HIDDEN = 0x100000  # + c: the character c of a control token's name in what people wrote


class ChatTokenizer:
    """A Hugging Face tokenizer with a chat template and an end-of-turn token (the one that ends the template's answers).

    Only the template writes control tokens: what a message holds is text, whatever characters it has. ``special`` are all
    tokens that the tokenizer flags as special; added tokens that it does not flag are words of its vocabulary.
    """

    def __init__(self, folder: Path, template: str | None = None) -> None:
        """Load from a Hugging Face folder, with its own chat template or the one that settings name.

        Raises InputError when it has no tokenizer, template or end-of-turn token.
        """
        self.hf: Any = load_tokenizer(folder, template)
        self.replaced = template is not None  # its folder does not hold this template
        self.folder = folder
        if getattr(self.hf, "backend_tokenizer", None) is None:
            raise InputError(
                f"{folder}: the tokenizer has no tokenizer.json; convert it with transformers' fast tokenizers"
            )
        with within(str(folder)):
            stable(self.hf.get_chat_template())  # a template that cannot be used is known now
        self.taking = Taking.of(self._written)
        if rules := self.taking.said():
            say(f"the chat template does not take every chat: {'; '.join(rules)}")
        own = [] if self.hf.eos_token_id is None else [int(self.hf.eos_token_id)]
        stops = [*own, *stop_tokens(folder)]
        end = end_of_turn(self.hf, stops)
        if end is None and not stops:
            raise InputError(f"{folder}: the tokenizer has no eos token; set eos_token in tokenizer_config.json")
        self.end_of_turn = stops[0] if end is None else end
        self.stops = tuple(dict.fromkeys([self.end_of_turn, *stops]))  # each of them ends a reply
        self.text = _added_text(self.hf)
        added: dict[int, AddedToken] = self.hf.added_tokens_decoder
        flagged = {i for i, token in added.items() if token.special}
        self.special = frozenset(flagged | {*self.hf.all_special_ids, *self.stops})
        self._control = {added[i].content: added[i] for i in sorted(self.special & set(added))}
        longest_first = sorted(self._control, key=len, reverse=True)
        self._names = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # Where such tokens are looked for in normalised text, a normaliser may turn other text into their names.
        hazy = any(t.normalized for t in self._control.values())
        self._normalizer = self.hf.backend_tokenizer.normalizer if hazy else None

    def prompt(self, messages: list[Message]) -> list[int]:
        """Token ids of a chat that the assistant is about to continue (with the template's generation header).

        Raises InputError where there are none: a model continues something.
        """
        apart = self.holds_control(messages)
        ids = self._ids(self._render(messages, True, apart), apart)
        if not ids:
            roles = ", ".join(m["role"] for m in messages)
            raise InputError(
                f"the chat template makes no token of a chat with the roles {roles}; use a template that writes them, or set "
                "prompts.system"
            )
        return ids

    def reply(self, prompt: list[int], messages: list[Message]) -> list[int]:
        """Token ids of the last message (the assistant's), end-of-turn token included, given its prompt's ids.

        They are those with which the chat's ids go on after the prompt's; where a tokenizer merges the prompt's end with
        the reply's beginning, those of the reply's text alone, which a model that is asked could draw. What the template
        puts after the end-of-turn token is not part of the reply. Raises InputError when the prompt's text does not begin
        that of the whole chat, or the reply does not end its turn: such a template cannot be trained on.
        """
        if len(prompt) < 2:
            raise InputError(
                "the chat template makes a single token of the prompt, and an answer to be trained on or scored needs two before "
                "it; use a template that writes the roles, or set prompts.system"
            )
        apart = self.holds_control(messages)
        asked, whole = self._render(messages[:-1], True, apart), self._render(messages, False, apart)
        if not whole.startswith(asked):
            raise InputError(
                "the chat template does not keep a prompt as a prefix of the answered chat, so answers cannot be trained on; "
                "use a template that only appends"
            )
        ids = self._ids(whole, apart)
        same = ids[: len(prompt)] == prompt
        reply = ids[len(prompt) :] if same else _continuation(whole[len(asked) :], lambda t: self._ids(t, apart))
        if self.end_of_turn not in reply:
            raise InputError(
                f"the chat template does not end an answer with the eos token {self.hf.decode([self.end_of_turn])!r}"
            )
        return reply[: reply.index(self.end_of_turn) + 1]

    def render(self, messages: Sequence[Message], header: bool = False) -> str:
        """A chat's text as the template writes it; ``header``: with what opens the assistant's next message.

        Raises InputError where the template refuses the chat.
        """
        return self._render(list(messages), header, apart=False)

    def ids(self, text: str) -> list[int]:
        """Token ids of a part of a chat's text, in which names of control tokens are those tokens."""
        return self._ids(text, apart=False)

    def records(self, texts: Sequence[str]) -> list[Any]:
        """The tokenizers library's records of such texts (ids, and which characters each stands for), made in parallel."""
        backend = self.hf.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        return list(backend.encode_batch(list(texts), add_special_tokens=False))

    def last_control(self, text: str) -> int:
        """Where the last control token's name begins in a text; -1 where there is none."""
        return max((match.start() for match in self._names.finditer(text)), default=-1)

    @property
    def told_date(self) -> str | None:
        """The date that a template which prints one is told."""
        return f"{TODAY:%Y-%m-%d}" if "strftime_now" in self.hf.get_chat_template() else None

    @cached_property
    def end_text(self) -> str:
        """The name of the end-of-turn token."""
        return str(self.hf.convert_ids_to_tokens(self.end_of_turn))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the tokens of a chat hang on."""
        template = stable(self.hf.get_chat_template())
        parts = (self.hf.backend_tokenizer.to_str(), template, str(sorted(self._control)), str(self.end_of_turn))
        names = json.dumps(self.hf.special_tokens_map, sort_keys=True, default=str)  # a template may write them
        return hashlib.sha256("\0".join((*parts, names, tokenizers.__version__)).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        return list(self.hf(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def continuation(self, text: str) -> list[int]:
        """Token ids of plain text that continues a line, without the space that some tokenizers put before a text."""
        return _continuation(text, self.encode)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        out, pending = "", list[int]()
        for i in [*(i for i in ids if i not in self.special), None]:
            if i is not None and i not in self.text:
                pending.append(i)
                continue
            if pending or i is None:
                out += str(self.hf.decode(pending, clean_up_tokenization_spaces=False))
            pending = []
            out += "" if i is None else self.text[i]
        return out

    def check_rows(self, rows: int) -> None:
        """Raise InputError when the tokenizer has ids for which an embedding of ``rows`` rows has none."""
        last = max(self.hf.get_vocab().values())
        if last >= rows:
            raise InputError(
                f"{self.folder}: the tokenizer has {last + 1} tokens, the embedding {rows} rows; use the tokenizer that belongs "
                "to this model, or make room with transformers' resize_token_embeddings and save the model again"
            )

    def holds_control(self, messages: Sequence[Message]) -> bool:
        """Whether what people wrote holds the name of a control token."""
        texts = [m["content"] for m in messages]
        if self._normalizer is not None:
            texts += [self._normalizer.normalize_str(text) for text in texts]
        return any(map(self._names.search, texts))

    def _render(self, messages: list[Message], header: bool, apart: bool) -> str:
        """A chat's text. ``apart`` tells control tokens from text: those that the template wrote become twins.

        So that they can be told, the template is shown messages in which such tokens' names are written with other
        characters, which are put back afterwards.
        """
        shown = self.taking.fit(messages)
        if apart:
            if any(c >= chr(TWIN) for m in messages for c in m["content"]):
                raise InputError(
                    "a message holds both a control token's name and private-use characters; take out either"
                )
            hidden: list[Message] = [m | {"content": self._names.sub(_hide, m["content"])} for m in messages]
            shown = self.taking.fit(hidden)
        try:
            text = self._written(shown, header)
        except InputError:
            raise
        except Exception as e:  # a template can raise anything
            roles = ", ".join(m["role"] for m in messages)
            what = " ".join(str(e).split()) or type(e).__name__
            raise InputError(f"the model's chat template refuses a chat with the roles {roles}: {what}") from e
        if not apart:
            return text
        order = {name: chr(TWIN + n) for n, name in enumerate(self._control)}
        twins = self._names.sub(lambda match: order[match[0]], text)
        return "".join(chr(ord(c) - HIDDEN) if ord(c) >= HIDDEN else c for c in twins)

    def _written(self, messages: Sequence[Any], header: bool = False) -> str:
        """What the template makes of messages that it takes; it can raise anything."""
        template = stable(self.hf.get_chat_template())
        return str(
            self.hf.apply_chat_template(
                list(messages), chat_template=template, add_generation_prompt=header, tokenize=False
            )
        )

    def _ids(self, text: str, apart: bool) -> list[int]:
        """Token ids of a chat's text, or of a part of it."""
        if not apart:
            return list(self.hf(text, add_special_tokens=False, split_special_tokens=False).input_ids)
        backend, own = self._backend_with_twins
        return [own.get(i, i) for i in backend.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _backend_with_twins(self) -> tuple[Tokenizer, dict[int | None, int]]:
        """The tokenizer, to which control tokens' names are text; it has a twin of each; and whose twin a token is.

        A twin splits the text as the token would, so ids are those that the tokenizer gives the template's own text.
        """
        backend = Tokenizer.from_str(self.hf.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        own: dict[int | None, int] = {}
        for n, (name, token) in enumerate(self._control.items()):
            twin = AddedToken(chr(TWIN + n), lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)
            backend.add_tokens([twin])
            own[backend.token_to_id(chr(TWIN + n))] = self.hf.convert_tokens_to_ids(name)
        return backend, own

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
        out = {i: to_bytes(token) for token, i in vocabulary.items() if i not in self.special}
        return out | {i: text.encode() for i, text in self.text.items() if i in out}


def _added_text(hf: Any) -> dict[int, str]:
    """Added tokens that a byte-level decoder would take for bytes: they stand for their own text."""
    if "ByteLevel" not in str(getattr(getattr(hf, "backend_tokenizer", None), "decoder", None)):
        return {}
    added = {i: token.content for i, token in hf.added_tokens_decoder.items()}
    return {i: text for i, text in added.items() if _byte_level_bytes(text) != text.encode()}


def _hide(name: re.Match[str]) -> str:
    return "".join(chr(HIDDEN + ord(c)) if ord(c) < 0xFFFE else c for c in name[0])


def _continuation(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    for before in (".", "\n", "a", "1"):
        head, whole = encode(before), encode(before + text)
        if whole[: len(head)] == head:
            return whole[len(head) :]
    raise InputError(f"the tokenizer always merges {text!r} with what comes before it")


def _byte_level_bytes(token: str) -> bytes:
    """GPT-2's byte-level BPE (Radford et al. 2019) writes bytes as printable stand-ins."""
    return bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()


PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTE_OF = {chr(b): b for b in PRINTABLE} | {
    chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)
}


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
