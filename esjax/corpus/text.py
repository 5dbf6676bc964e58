"""What a text holds: whether anything can be seen in it, its words in any script, and its plain form for patterns."""

from __future__ import annotations

import unicodedata

import regex

# Scripts that put no spaces between words: each of their characters, with its marks, counts as a word.
UNSPACED = (
    r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\p{Tai_Le}"
    r"\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}]"
)
ONE = rf"(?:(?={UNSPACED})[\p{{L}}\p{{N}}]\p{{M}}*)"
WORD = regex.compile(rf"{ONE}|(?:(?!{UNSPACED})[\p{{L}}\p{{N}}_']\p{{M}}*)+")
SPACED = regex.compile(rf"{ONE}(?:(?!{UNSPACED})[^\s\p{{L}}\p{{N}}])*|(?:(?!{ONE})\S)+")
UNSEEN = regex.compile(r"[\s\p{Cc}\p{Cf}\p{Zs}\p{Default_Ignorable_Code_Point}\u2800]*")
BLANKS = regex.compile(r"[\p{Cc}\u2800\u3164\uffa0\u115f\u1160_*]")  # shown as nothing, or as emphasis
IGNORED = regex.compile(r"[\p{Cf}\p{Default_Ignorable_Code_Point}]")
APOSTROPHES = regex.compile(r"[\u2018\u2019\u201b\u02b9\u02bb\u02bc\u055a\uff07\u00b4`\u2032]")


def is_empty(text: str) -> bool:
    """Whether nothing can be seen: white space, control and zero-width characters, blank letters of Hangul and Braille."""
    return UNSEEN.fullmatch(text) is not None


def has_halves(text: str) -> bool:
    """Whether half a character (a lone surrogate) stands in a text, which is no text then."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return list(WORD.findall(APOSTROPHES.sub("'", text.lower())))


def spaced(text: str) -> list[str]:
    """What stands between white space, punctuation included; of scripts without spaces, the characters."""
    return list(SPACED.findall(text))


def plain(text: str) -> str:
    """A text as patterns expect it: one form of each character, apostrophe and hyphen, single spaces, nothing invisible."""
    text = IGNORED.sub("", unicodedata.normalize("NFKC", BLANKS.sub(" ", text)))
    return " ".join(regex.sub(r"\p{Pd}", "-", APOSTROPHES.sub("'", text)).split())
