"""Reflections that reach their limit end at a whole word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esjax.evolve.experiment import Experiment
from esjax.evolve.reflect import FIELDS, OPEN_WORDS, cut_fields, parse, whole_words
from esjax.settings.files import load
from esjax.tokens.tokenizer import ChatTokenizer


@pytest.mark.parametrize(
    ("cut", "whole"),
    [
        ("They feel sad and.", "They feel sad."),
        ("They feel aban.", "They feel aban."),  # there is nothing else that it says
        ("They feel alone since the move, and aban.", "They feel alone since the move."),
        ("They lost their job and do not know how to.", "They lost their job and do not know."),
        ("They are tired of the .", "They are tired."),
        ("They are proud, steady, and careful with wor.", "They are proud, steady, and careful."),
        ("They said “I can.", "They said “I can."),
        ("They 很难过而且不知道怎么办.", "They 很难过而且不知道怎么办."),
    ],
)
def test_whole_words(cut: str, whole: str) -> None:
    assert whole_words(cut) == whole


@given(st.lists(st.sampled_from(["sad", "and", "of", "the", "alone", "tired,", "-", "at"]), min_size=1, max_size=12))
def test_what_is_left_can_end_a_sentence(words: list[str]) -> None:
    text = " ".join(["They", "feel", *words]) + "."
    made = whole_words(text)
    assert made.endswith(".")
    if made != text:
        *_, last = made[:-1].split(" ")
        assert last.lower() not in OPEN_WORDS
        assert last[-1].isalpha()
        assert text.startswith(made[:-1])


def test_which_fields_were_cut(tokenizer: ChatTokenizer) -> None:
    """Of reflections put together by hand: a field counts as cut where it has as many tokens as it may."""
    parts = [" calm.", " sad and alone since they moved to another town.", " lost it."]
    ids: list[int] = []
    for (label, opening), rest in zip(FIELDS.values(), parts, strict=True):
        ids += tokenizer.continuation(f"\n{label} {opening}") if ids else []
        ids += tokenizer.continuation(rest)
    counts = [len(tokenizer.continuation(p)) for p in parts]
    assert counts[1] > max(counts[0], counts[2])
    for end in ([], [tokenizer.end_of_turn]):
        assert cut_fields([*ids, *end], tokenizer, counts[1]) == [False, True, False]
        assert cut_fields([*ids, *end], tokenizer, counts[1] + 1) == [False] * 3
        assert cut_fields([*ids, *end], tokenizer, 1) == [True] * 3


def test_a_drawn_reflection_ends_with_whole_words(tiny_run: Path, tiny_folder: Path) -> None:
    """The tiny model never ends a sentence by itself, so every field is cut; what it drew stays the beginning."""
    experiment = Experiment.open(load(str(tiny_run / "config.yaml")))
    adapter = experiment.backbone.fresh_adapter(0)
    requests = [
        experiment.reflection_request(i, [{"role": "user", "content": f"I lost my job, and {i}."}], i, str(i))
        for i in range(4)
    ]
    made: list[list[int]] = []
    experiment.generator.work(
        adapter, [requests], lambda r, c: made.append(c.token_ids) or (), experiment.form.automaton
    )
    assert len(made) == 4
    for ids in made:
        drawn = parse(experiment.tokenizer.decode([*experiment.form.opening, *ids]))
        fields = experiment.reflection(ids)
        cut = cut_fields(ids, experiment.tokenizer, experiment.config.evolve.reflection.field_tokens)
        assert any(cut)
        for name, was_cut in zip(fields, cut, strict=True):
            assert fields[name] == (whole_words(drawn[name]) if was_cut else drawn[name])
