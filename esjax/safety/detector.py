"""Signs of crisis in what somebody writes: who may be about to die, or wishes to, or is in danger, told apart from idioms, titles
and what is denied. Lists, one file a language; no list is complete, and what it finds is a reason to look, not a diagnosis.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import re2

from esjax.errors import InputError
from esjax.run.files import sha256
from esjax.settings.files import bundled, read_text

Tier = Literal["acute", "concern"]
TIERS: tuple[Tier, ...] = ("acute", "concern")
MASKED = "\x00"  # stands for what is not looked at; no pattern holds it


class Signal(NamedTuple):
    """A sign of crisis: text[start:end], what it is a sign of ("explicit", "danger", "passive", "coded", "third"), how urgent."""

    tier: Tier
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Language:
    """The expressions of a language file."""

    quick: Any  # RE2's expression, of all signs at once, that finds whatever one of them would find, and a little more
    mask: re.Pattern[str]
    signs: tuple[tuple[Tier, str, re.Pattern[str]], ...]  # tier, kind, expression


class Detector:
    """Finds signs of crisis by the lists of some languages, all of which are looked for in every text."""

    def __init__(self, path: str) -> None:
        """``path``: a file of signs, or a folder of such (*.txt, one a language). Raises InputError naming an expression."""
        place = bundled(path)
        files = sorted(place.glob("*.txt")) if place.is_dir() else [place]
        if not files:
            raise InputError(f"{path}: no file of signs (*.txt) in it")
        self.languages = tuple(_language(str(file), sha256(file) if file.is_file() else "") for file in files)

    @property
    def expressions(self) -> list[str]:
        """All that its findings hang on."""
        return [p.pattern for one in self.languages for p in (one.mask, *(sign for _, _, sign in one.signs))]

    def find(self, text: str) -> tuple[Signal, ...]:
        """The signs in a text, the first of each kind and language, acute ones first."""
        plain, places = _plain(text)
        found = []
        for language in self.languages:
            if not language.quick.search(plain) or not any(sign.search(plain) for _, _, sign in language.signs):
                continue
            seen = language.mask.sub(lambda m: MASKED * len(m[0]), plain)
            for tier, kind, sign in language.signs:
                if match := sign.search(seen):
                    found.append(Signal(tier, kind, places[match.start()], places[match.end() - 1] + 1))
        return tuple(sorted(found, key=lambda s: (TIERS.index(s.tier), s.start)))


def _plain(text: str) -> tuple[str, Sequence[int]]:
    """A text in small letters without accents, its quotes straight and its white space single; and where each letter stood."""
    if text.isascii() and not _ODD.search(text):
        return text.lower(), range(len(text))
    out, places = list[str](), list[int]()
    for i, c in enumerate(text):
        if c.isspace():
            if not out or out[-1] == " ":
                continue
            c = " "
        c = _base(c)
        if unicodedata.category(c) not in ("Mn", "Cf", "Cc"):  # accents written apart, and what cannot be seen
            out.append(c)
            places.append(i)
    return "".join(out), places


def _base(c: str) -> str:
    """A letter, small and without accents; quotes straight."""
    if c in QUOTES or c.isascii():
        return QUOTES.get(c, c.lower())
    return unicodedata.normalize("NFKD", c)[0].lower()[0]


_ODD = re.compile(r"[\x00-\x1f\x7f`]|  |^ ")
QUOTES = dict.fromkeys("’‘ʼ`´", "'") | dict.fromkeys("“”„«»", '"')


@lru_cache(maxsize=16)
def _language(file: str, digest: str) -> Language:
    """``file`` as it is when its hash is ``digest``: an edited one is read anew.

    A file of sections: [words] are names for parts of expressions, [mask] is not looked at, [TIER KIND] are signs. What stands
    before all sections is a sign, too."""
    sections: dict[str, list[str]] = {"words": [], "mask": []}
    lines = sections.setdefault("acute explicit", [])
    for line in read_text(file).split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        if header := re.fullmatch(r"\[(words|mask|(?:acute|concern) \w+)\]", line.strip()):
            lines = sections.setdefault(header[1], [])
        else:
            lines.append(line.strip())
    words = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in sections.pop("words"))}
    mask = _joined(file, sections.pop("mask"), words)
    named = {name: _joined(file, lines, words) for name, lines in sections.items()}
    signs = [(*name.split(), named[name]) for name in sorted(named, key=lambda name: TIERS.index(name.split()[0]))]
    return Language(_quick(file, [sign.pattern for sign in named.values()]), mask, tuple(signs))  # type: ignore[arg-type]


class Section(NamedTuple):
    """The expressions of one section of a file, as one."""

    expression: re.Pattern[str]

    def search(self, text: str) -> re.Match[str] | None:
        """The first place in a text, in small letters without accents, that one of them matches."""
        return self.expression.search(_plain(text)[0])


@lru_cache(maxsize=4)
def sections(path: str) -> dict[str, Section]:
    """A file of expressions by section, [NAME] before each; lines that begin with # are comments. Raises InputError."""
    found: dict[str, list[str]] = {}
    lines = found.setdefault("", [])
    for line in read_text(path).split("\n"):
        if header := re.fullmatch(r"\[(\w+)\]", line.strip()):
            lines = found.setdefault(header[1], [])
        elif line.strip() and not line.startswith("#"):
            lines.append(line.strip())
    return {name: Section(_joined(path, lines, {})) for name, lines in found.items() if lines}


def _quick(file: str, expressions: Sequence[str]) -> Any:
    """One expression for RE2, which tries all at once in one pass: whatever one of them finds, it finds, too."""
    options = re2.Options()
    options.max_mem, options.log_errors = 1 << 28, False  # with an eighth of it, English is searched fifty times slower
    loose = "|".join(map(_loose, expressions))
    try:
        return re2.compile(f"(?:^|[^0-9A-Za-z_])(?:{loose})" if loose else "^$", options)
    except re2.error as e:
        raise InputError(
            f"{file}: an expression cannot be searched quickly ({e}); write it without back references"
        ) from e


FOREIGN = r"\x{80}-\x{10ffff}"  # letters or not: which of them are letters would make the search slow
LETTERS = {"w": f"0-9A-Za-z_{FOREIGN}", "d": f"0-9{FOREIGN}"}


def _loose(expression: str) -> str:
    """An expression without its (?!...), (?=...), (?<!...), (?<=...) and \\b, which RE2 does not know or means otherwise."""
    out, depth, within, at = "", 0, False, 0
    while at < len(expression):
        c = expression[at]
        escaped = expression[at + 1] if c == "\\" else ""
        if depth or (not within and re.match(r"\(\?<?[!=]", expression[at:])):
            depth += {"(": 1, ")": -1}.get(c, 0)
        elif escaped in LETTERS:
            out += LETTERS[escaped] if within else f"[{LETTERS[escaped]}]"
        elif escaped != "b":
            out += c + escaped
            within = c == "[" or (within and c != "]")
        at += 1 + len(escaped)
    return out


def _joined(file: str, lines: Sequence[str], words: Mapping[str, str]) -> re.Pattern[str]:
    """One expression for all lines, from the beginning of a word to the end of one; for none, one that never matches."""
    parts = []
    for line in lines:
        expression = re.sub(r"<([a-z]+)>", lambda m: words.get(m[1], m[0]), line)
        expression = re.sub(r"\\.|\(\?P|[^ -@\[-~]", lambda m: m[0] if len(m[0]) > 1 else _base(m[0]), expression)
        _compiled(file, expression)
        parts.append(expression)
    return _compiled(file, rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)" if parts else r"(?!)")


def _compiled(file: str, expression: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of sets that look nested
            return re.compile(expression)
    except (re.error, OverflowError, RecursionError) as e:
        raise InputError(f"{file}: {expression!r:.200} is not a regular expression ({e})") from e
