"""Reflections (u, s): the constrained three-line form, its parser, and the two prompts around it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import meta

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.sample.constrain import Field, Template, compile_template
from esjax.settings.files import read_text
from esjax.settings.schema import Config
from esjax.tokens.tokenizer import ChatTokenizer

# name in the files -> label and opening words of its line. The opening is given, so that a small model describes the seeker
# instead of repeating the request.
FIELDS = {
    "profile": ("Profile:", "They are"),
    "emotional_state": ("Emotional state:", "They feel"),
    "situation": ("Situation:", "They"),
}
REST = r" [a-z][^\n]*[^\s.!?][.!?]"  # what follows the opening: one line, which ends a sentence, once


def form(tokenizer: ChatTokenizer, field_tokens: int, vocab: int) -> Template:
    """The constraint under which reflections are sampled."""
    parts: list[str | Field] = []
    for i, (label, opening) in enumerate(FIELDS.values()):
        parts += [("\n" if i else "") + f"{label} {opening}", Field(REST, field_tokens)]
    return compile_template(parts, tokenizer, vocab)


def parse(text: str) -> dict[str, str]:
    """The fields of a reflection. Raises ValueError when the text is not of the form, which the constraint rules out."""
    lines = [rf"{label} (?P<{name}>{opening}{REST})" for name, (label, opening) in FIELDS.items()]
    match = re.fullmatch("\n".join(lines), text)
    if match is None:
        raise ValueError(f"not a reflection: {text!r}")
    return match.groupdict()


# Words after which a sentence goes on: one that is cut does not end with them.
OPEN_WORDS = frozenset(
    "a an the this that these those my your his her its our their and or but nor so because although while if when where which "
    "who whose what how than as of to in on at by for from with without about into over after before between through not very "
    "too also be is are was were been being am has have had do does did will would can could may might must should they he she "
    "it we i you feel feels like just".split()
)


def cut_fields(token_ids: Sequence[int], tokenizer: ChatTokenizer, field_tokens: int) -> list[bool]:
    """Which fields of a drawn reflection reached their token limit, and so were closed wherever they were."""
    literals = [len(tokenizer.continuation(f"\n{label} {opening}")) for label, opening in [*FIELDS.values()][1:]]
    ends = [i for i, token in enumerate(token_ids) if "\n" in tokenizer.decode([token])]
    starts = [0, *(end + literal for end, literal in zip(ends, literals, strict=True))]
    last = len(token_ids) - (1 if token_ids and token_ids[-1] in tokenizer.stops else 0)
    return [stop - start >= field_tokens for start, stop in zip(starts, [*ends, last], strict=True)]


def whole_words(text: str) -> str:
    """A text that was closed within a sentence, up to its last word that is surely whole and can end one.

    Whether the last word was finished cannot be known, so it goes; a text that has no other stays as it is.
    """
    kept = text.rstrip(".!?").split(" ")[:-1]
    while kept and (not kept[-1].strip(PUNCTUATION) or kept[-1].strip(PUNCTUATION).lower() in OPEN_WORDS):
        kept.pop()
    return " ".join(kept).rstrip(PUNCTUATION) + "." if len(kept) > 2 else text


PUNCTUATION = " ,;:-–—(\"'“‘"


@dataclass(frozen=True)
class Instructions:
    """The principles I and the two templates.

    The principles stand in the system message, and a request is appended to the seeker's last message. So all the
    reflections and refinements of a dialogue's turns begin with the same tokens, up to the end of what the seeker wrote
    there, and share one trunk.
    """

    principles: str
    reflect: jinja2.Template
    refine: jinja2.Template
    show_draft: bool = True

    @classmethod
    def load(cls, config: Config) -> Instructions:
        """Read the files of ``config.prompts``. Raises InputError naming a file with a broken template."""
        e = config.evolve
        given = (*(("draft",) if e.show_draft else ()), *(FIELDS if e.reflects else ()))
        return cls(
            read_text(config.prompts.principles),
            _template(config.prompts.reflect, (), ()),
            _template(config.prompts.refine, ("draft", *FIELDS), given),
            e.show_draft,
        )

    def reflection_prompt(self, context: list[Message]) -> list[Message]:
        """(I, C_n)."""
        return self._ask(context, self.reflect.render())

    def refinement_prompt(self, context: list[Message], reflection: dict[str, str] | None, draft: str) -> list[Message]:
        """(I, C_n, u, s, y), without a reflection where none is made and without the draft where it is not shown."""
        shown = {"draft": draft} if self.show_draft else {}
        return self._ask(context, self.refine.render(**shown, **(reflection or {})))

    def informed(self, context: list[Message], reflection: dict[str, str]) -> list[Message]:
        """(I, C_n, u, s), without a request: what is known of the person stands behind the last message."""
        return self._ask(context, "\n".join(f"{FIELDS[name][0]} {text}" for name, text in reflection.items()))

    def _ask(self, context: list[Message], request: str) -> list[Message]:
        head, rest = (context[:1], context[1:]) if context[0]["role"] == "system" else ([], context)
        system = "\n\n".join(text for text in (*(m["content"] for m in head), self.principles) if text)
        last = rest[-1]
        asked: Message = {"role": last["role"], "content": f"{last['content']}\n\n{request}"}
        before: list[Message] = [{"role": "system", "content": system}] if system else []
        return [*before, *rest[:-1], asked]


def _template(path: str, names: tuple[str, ...], given: tuple[str, ...]) -> jinja2.Template:
    """A template that may name these variables, of which some are ``given``: the others it may print where they are defined."""
    try:
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        text = read_text(path)
        unknown = meta.find_undeclared_variables(environment.parse(text)) - set(names)
        if unknown:
            raise jinja2.UndefinedError(f"{min(unknown)!r} is undefined")
        template = environment.from_string(text)
        template.render(**dict.fromkeys(given, ""))
    except InputError:
        raise
    except Exception as e:  # a template can raise anything
        absent = [name for name in names if name not in given]
        remedy = (
            f"; evolve.reflect and evolve.show_draft leave out {', '.join(absent)}, which must stand in "
            f"{{% if {absent[0]} is defined %}} ... {{% endif %}}"
            if absent
            else ""
        )
        raise InputError(
            f"{path}: broken template ({e}); the variables are: {', '.join(given) or 'none'}{remedy}"
        ) from e
    return template
