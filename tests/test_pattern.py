"""Patterns: what is drawn matches by Python's ``re``, for every construct; what cannot be followed is named."""

from __future__ import annotations

import re
import time
from typing import Any

import jax
import numpy as np
import pytest

from esjax.errors import InputError
from esjax.sample import decode
from esjax.sample.constrain import START, Counted, Field, Template, compile_template
from esjax.sample.pattern import parse
from esjax.tokens.tokenizer import ChatTokenizer

permitted = jax.jit(decode.permitted)


def compiled(pattern: str, tokenizer: ChatTokenizer, most: int = 60) -> Template:
    return compile_template([Field(pattern, most, min_tokens=0)], tokenizer, len(tokenizer.hf))


def drawn(template: Template, tokenizer: ChatTokenizer, seed: int, bias: str = "") -> str:
    """A random text that the decoding loop's own rule permits; ``bias`` "stop" ends as soon as it may, "go" as late."""
    table: Any = template.automaton
    rng, end = np.random.default_rng(seed), tokenizer.end_of_turn
    state, used, units, out = START, 0, 0, []
    while True:
        now = (np.asarray([x], np.int32) for x in (state, used, units))
        allowed = np.flatnonzero(np.asarray(permitted(table, *now))[0])
        assert len(allowed), "nothing may follow"
        token = int(rng.choice(allowed))
        if end in allowed and (bias == "stop" or (bias == "go" and len(allowed) == 1)):
            token = end
        elif bias == "go":
            token = int(rng.choice(allowed[allowed != end]))
        if token == end:
            return tokenizer.decode(out)
        following = int(table.next[state, token])
        if isinstance(table, Counted):
            units = units + int(table.units[state, token]) if table.stride[following] else 0
        used = used + 1 if table.part[following] == table.part[state] else 1
        state = following
        out.append(token)
        assert len(out) < template.max_tokens


def texts(pattern: str, tokenizer: ChatTokenizer, most: int = 60, count: int = 6) -> list[str]:
    template = compiled(pattern, tokenizer, most)
    return [drawn(template, tokenizer, i, ("", "stop", "go")[i % 3]) for i in range(count)]


FOLLOWED = [
    "^(yes|no)$",
    "^yes$|^no$",
    r"\Ayes\Z",
    "(^a|b)c$",
    "x*",
    "a+?b*?",
    r"\d{3}-\d{4}",
    r"\w+@\w+",
    r"[^\d\W]{4}",
    r"\D\S\W",
    r"[^\s]+",
    "(?P<name>a|b)(?:c)",
    "(?s:.){2}",
    "(?x) a b # c",
    r"[äé一-龥]{2}",
    r"\x41\u00e9\n?",
    "(?:ab?){2,3}|c",
    r"[a-z]{3}x[a-z]{24}",
    "(x+x+)+y",
]


@pytest.mark.parametrize("pattern", FOLLOWED)
def test_texts_match_the_pattern(pattern: str, tokenizer: ChatTokenizer) -> None:
    made = texts(pattern, tokenizer)
    assert [t for t in made if not re.fullmatch(pattern, t)] == []
    assert not re.fullmatch(pattern, made[0] + "\x00\x00\x00") or pattern in ("[^\\s]+",)  # control: not just anything


def test_classes_are_ascii(tokenizer: ChatTokenizer) -> None:
    r"""\d draws no digit of another script, and what leaves digits out leaves all of them out."""
    for pattern, ascii_only in ((r"\d+", "[0-9]+"), (r"\w+", "[A-Za-z0-9_]+"), (r"(?:a\s)+", "(?:a[ \t\n\r\f\v])+")):
        assert all(re.fullmatch(ascii_only, t) for t in texts(pattern, tokenizer, 30))
    ranges: Any = parse(r"[^\d]")
    assert not any(a <= ord("٣") <= b for a, b in ranges.ranges)
    assert any(a <= ord("a") <= b for a, b in ranges.ranges)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?=a)b", "look-around at position 0"),
        ("ab(?<!c)d", "look-around at position 2"),
        (r"a\bc", "word boundary at position 1"),
        (r"a\Bc", "word boundary at position 1"),
        (r"[\b](a)\1", "back reference at position 7"),
        ("(?P<n>a)(?P=n)", "back reference at position 8"),
        ("(a)?(?(1)b|c)", "conditional group at position 4"),
        ("a*+b", "possessive repetition at position 1"),
        ("(?>a|b)c", "atomic group at position 0"),
        ("(?i)abc", "flag i .* at position 0"),
        ("a(?i:b)", "flag i .* at position 1"),
        ("a^b", "not at the beginning at position 1"),
        ("a$b", "not at the end at position 1"),
        ("(a$)*", "not at the end at position 2"),
        ("", "empty text only"),
        ("x{0}|", "empty text only"),
        (r"[^\s\S]", "matches no text"),
        (r"\ud800", "matches no text"),
        ("(", "not a regular expression .*position 0"),
        ("a{99999999999}", "repeats too often"),
        ("(?:[ab]*)a[ab]{24}", "too many states; lower the bounds of its repetition \\{24}"),
        (".*x.{500}", "too many states; lower the bounds of its repetition \\{500}"),
    ],
)
def test_what_cannot_be_followed_is_named(pattern: str, message: str, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError, match=message) as e:
        compiled(pattern, tokenizer)
    assert "\n" not in str(e.value)
    assert "automaton" not in str(e.value)


LONG = [
    (r"[^\n]{1,500}", 1, 500, 400),
    (r"[^\n]{100,120}", 100, 120, 110),
    (r".{1,2000}", 1, 2000, 60),
    (r"[a-z]{300,}", 300, 10**6, 400),
    (r'"(?:[^"\\]|\\["n]){290,5000}"', 292, 10**6, 400),
    ("(?:ab|cd){200}", 400, 400, 500),
    ("[a-z]{1,400};[a-f ]{0,300}", 2, 701, 100),
    (r"(?:[a-c]{1,300}\n){1,3}", 2, 903, 100),
    ("b|c{290}", 1, 290, 300),
]


@pytest.mark.parametrize(("pattern", "fewest", "most", "tokens"), LONG, ids=[x[0] for x in LONG])
def test_long_repetitions_count(pattern: str, fewest: int, most: int, tokens: int, tokenizer: ChatTokenizer) -> None:
    """Exactly, from the fewest characters to the most, in few states."""
    template = compiled(pattern, tokenizer, tokens)
    assert isinstance(template.automaton, Counted)
    assert len(template.automaton.part) <= 96
    made = [drawn(template, tokenizer, i, ("", "stop", "go")[i % 3]) for i in range(6)]
    assert [t for t in made if not re.fullmatch(pattern, t)] == []
    assert all(fewest <= len(t) <= most for t in made)
    if most < tokens:
        assert max(map(len, made)) == most  # who does not stop fills it


def test_counting_is_what_keeps_the_bounds(tokenizer: ChatTokenizer) -> None:
    """Control: the same table without its limits exceeds them."""
    template = compiled("[^\n]{1,300}", tokenizer, 400)
    table: Any = template.automaton
    loose = template._replace(automaton=table._replace(limit=np.full_like(table.limit, 1 << 30)))
    assert len(drawn(loose, tokenizer, 0, "go")) > 300
    assert len(drawn(template, tokenizer, 0, "go")) == 300


def test_a_budget_that_cannot_hold_the_fewest_is_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError, match="too small: its shortest text takes") as e:
        compiled("[a-z]{2000,3000}", tokenizer, 60)
    enough = int(str(e.value).rsplit(maxsplit=1)[-1])
    made = drawn(compiled("[a-z]{2000,3000}", tokenizer, enough), tokenizer, 0)
    assert 2000 <= len(made) <= 3000


def test_a_pattern_that_is_too_large_is_refused_at_once(tokenizer: ChatTokenizer) -> None:
    began = time.process_time()  # not of the clock: the machine may be busy
    for pattern in ("(a{1,1000}){1,1000}", "((a{1,100}b){1,100}c){1,100}x", r"(\w+ ?){1,2000}"):
        with pytest.raises(InputError, match="lower the bounds of its repetition"):
            compiled(pattern, tokenizer)
    assert time.process_time() - began < 120
