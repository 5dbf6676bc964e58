"""How the metrics cut texts into words."""

from __future__ import annotations

from functools import cache

from esjax.corpus.text import spaced

SPACED = "lower case, split at white space; where a script has none, by character"
TREEBANK = "lower case, nltk's Treebank word tokens"


def spaced_words(text: str) -> list[str]:
    return spaced(text.lower())


def spaced_grams(text: str, n: int) -> list[tuple[str, ...]]:
    """A text's sequences of ``n`` such words."""
    words = spaced_words(text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@cache
def treebank_words(text: str) -> tuple[str, ...]:
    """As the papers on emotional-support conversations cut texts."""
    from nltk.tokenize import NLTKWordTokenizer

    return tuple(NLTKWordTokenizer().tokenize(text.lower()))


STEM = 4


def same_word(a: str, b: str) -> bool:
    """Whether two lower-case words are forms of one, roughly: they begin with the same four letters, or the shorter, of three,
    begins the longer."""
    size = min(len(a), len(b), STEM)
    return size >= STEM - 1 and a[:size] == b[:size]
