"""Distinct-n and mean words against values worked out by hand."""

from __future__ import annotations

import pytest

from esjax.eval.metrics import distinct, mean_words


@pytest.mark.parametrize(
    ("texts", "n", "different", "all_"),
    [
        (["a b c"], 1, 3, 3),
        (["a a a a"], 1, 1, 4),
        (["I am here. I am."], 1, 4, 5),  # i am here. | am. is another word than am
        (["a b a b"], 2, 2, 3),  # ab ba | ab
        (["a b", "a b", "b a"], 2, 2, 3),  # ab, ba | ab; no n-gram spans two texts
        (["A b", "a B"], 1, 2, 4),  # case does not count
        (["a  b\n c"], 2, 2, 2),  # any white space parts words
        (["one", "a b c", ""], 3, 1, 1),  # texts shorter than n have none
    ],
)
def test_distinct(texts: list[str], n: int, different: int, all_: int) -> None:
    assert distinct(texts, n) == pytest.approx(different / all_, abs=1e-12)


def test_distinct_of_nothing_is_zero() -> None:
    assert distinct([], 1) == 0.0
    assert distinct(["", "a"], 2) == 0.0
    assert distinct(["", "a b"], 2) == 1.0


def test_mean_words() -> None:
    assert mean_words(["one two three", "", "four\nfive  six seven"]) == pytest.approx(7 / 3, abs=1e-12)
    assert mean_words(["one two three", "four"]) == 2.0
    assert mean_words(["one two three", "four five"]) != 2.0
