"""Reference metrics against the field's own libraries, called here by themselves, and against values worked out by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu as sacrebleu_corpus_bleu

from esjax.corpus.sources import read
from esjax.eval.metrics import METRICS
from esjax.eval.metrics.claims import made_up
from esjax.eval.metrics.distinct import distinct
from esjax.eval.metrics.generic import generic_share
from esjax.eval.metrics.rouge import longest_common
from esjax.eval.metrics.unhelpful import too_soon, without_empathy
from esjax.eval.replies import Reply
from esjax.eval.results import text_values
from esjax.eval.wanted import KINDS, discrepancies


def value(name: str, replies: Sequence[Reply]) -> float:
    """A metric of all replies, as the table has it."""
    metric = METRICS[name]
    if metric.each is not None:
        return float(metric.each(replies).mean())
    (whole,) = (v.value for v in text_values("m", replies) if v.metric == name and v.without == -1)
    return whole


def reply(text: str, reference: str = "a b", messages: int = 1) -> Reply:
    said = [{"role": ("user", "assistant")[i % 2], "content": f"message {i}"} for i in range(2 * messages - 1)]
    return Reply("d", f"d/{messages}", said, reference, text)


@pytest.fixture(scope="module")
def real(esconv: Path) -> list[Reply]:
    """200 contexts of ESConv, each answered by what the supporter said two turns later: near, and not the same."""
    out = []
    for d in read(f"esconv:{esconv / 'valid.jsonl'}", "sample", 0).dialogues:
        turns = d.supporter_turns()
        for turn, later in itertools.pairwise(turns):
            out.append(
                Reply(d.id, f"{d.id}/{turn}", d.messages(turn), d.turns[turn].text, d.turns[later].text, d.problem)
            )
    return out[:200]


def shuffled(replies: Sequence[Reply]) -> list[Reply]:
    references = [r.reference for r in replies]
    random.Random(0).shuffle(references)
    return [replace(r, reference=x) for r, x in zip(replies, references, strict=True)]


def test_bleu_is_that_of_sacrebleu_and_of_nltk(real: list[Reply]) -> None:
    cut = NLTKWordTokenizer().tokenize
    references = [[cut(r.reference.lower())] for r in real]
    texts = [cut(r.text.lower()) for r in real]
    for order in (1, 2, 3, 4):
        theirs = corpus_bleu(references, texts, (1 / order,) * order, SmoothingFunction().method3)
        assert value(f"bleu_{order}_papers", real) == pytest.approx(100 * theirs, abs=1e-6)
    whole = sacrebleu_corpus_bleu([r.text for r in real], [[r.reference for r in real]])
    assert value("bleu_4", real) == pytest.approx(whole.score, abs=1e-6)
    assert value("bleu_1", real) > value("bleu_2", real) > value("bleu_3", real) > value("bleu_4", real) > 0


@pytest.mark.parametrize("texts", [["the cat"], ["x y z"], ["a"], [""], ["the the cat sat", "on mats"]])
def test_bleu_where_nothing_matches(texts: list[str]) -> None:
    """Smoothing of orders without a match, and corpora without one."""
    replies = [reply(t, "The cat sat on the mat.") for t in texts]
    cut = NLTKWordTokenizer().tokenize
    for order in (1, 2, 3, 4):
        references, made = [[cut(r.reference.lower())] for r in replies], [cut(r.text.lower()) for r in replies]
        theirs = corpus_bleu(references, made, (1 / order,) * order, SmoothingFunction().method3)
        assert value(f"bleu_{order}_papers", replies) == pytest.approx(100 * float(theirs), abs=1e-9)
    whole = sacrebleu_corpus_bleu(texts, [[r.reference for r in replies]])
    assert value("bleu_4", replies) == pytest.approx(whole.score, abs=1e-9)


def test_rouge_is_that_of_rouge_score(real: list[Reply]) -> None:
    scorer = RougeScorer(["rougeL"])
    theirs = [scorer.score(r.reference, r.text)["rougeL"].fmeasure for r in real]
    metric = METRICS["rouge_l"]
    assert metric.each is not None
    assert np.abs(metric.each(real) - theirs).max() <= 1e-6


def slow_lcs(a: Sequence[str], b: Sequence[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_papers_rouge(real: list[Reply]) -> None:
    for r in real[:40]:
        a, b = ([*NLTKWordTokenizer().tokenize(x.lower())] for x in (r.reference, r.text))
        common = slow_lcs(a, b)
        assert longest_common(a, b) == common
        p, q = common / len(b), common / len(a)
        expected = 2.44 * p * q / (q + 1.44 * p) if common else 0.0
        assert value("rouge_l_papers", [r]) == pytest.approx(expected, abs=1e-9)
    assert longest_common([], ["a"]) == longest_common(["a"], []) == 0


def test_shuffled_references_fall(real: list[Reply]) -> None:
    for name in ("bleu_2", "bleu_2_papers", "rouge_l", "rouge_l_papers", "token_f1"):
        assert value(name, shuffled(real)) < 0.95 * value(name, real), name


def test_token_f1_by_hand() -> None:
    assert value("token_f1", [reply("a a b", "a b b c")]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert value("token_f1", [reply("x", "a")]) == 0
    assert value("token_f1", [reply("A b", "a B")]) == 1


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


def test_corpus_and_reply_distinct_differ(real: list[Reply]) -> None:
    """Every reply may be varied in itself, and all may be the same."""
    same = [replace(r, text="How are you today?") for r in real]
    assert value("distinct_1_reply", same) == 1
    assert value("distinct_1", same) == pytest.approx(4 / (4 * len(same)))
    assert value("distinct_1", real) < value("distinct_1_reply", real)


def test_words_and_repeats_by_hand() -> None:
    assert value("words", [reply("one two  three"), reply("")]) == 1.5
    said = [{"role": "assistant", "content": "you can do it now"}, {"role": "user", "content": "no you can not do it"}]
    again = Reply("d", "d/1", said, "", "Yes you can do it now please")  # of 4 sequences 2 were said
    assert value("repeats_turns", [again]) == 0.5
    assert value("repeats_turns", [replace(again, text="no you can not do it")]) == 0  # the seeker's own words


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("I’m so sorry to hear that.", 1.0),
        ("I understand the cows leave on Thursday.", 2 / 7),
        ("Sixty-two cows leave on Thursday.", 0.0),
        ("Unbelievably strong wind", 0.0),  # "be strong" stands in it, but not as words
        ("", 0.0),
    ],
)
def test_stock_phrases(text: str, share: float) -> None:
    assert generic_share(text) == pytest.approx(share)


def test_rules_of_unhelpful_replies() -> None:
    assert too_soon(reply("You should sell the farm.", messages=1))
    assert not too_soon(reply("You should sell the farm.", messages=3))  # by then the seeker has said much
    assert not too_soon(reply("Have you considered selling? What does she say?"))  # asks as well
    assert without_empathy(reply("Banks charge interest."))
    assert not without_empathy(reply("That sounds heavy."))
    plain = [reply("How long has your family milked there, and who helps you with it?")]
    assert value("unhelpful", plain) == 0
    assert value("unhelpful", [reply("I'm sorry to hear that.")]) == value("unhelpful", [reply(" ")]) == 1


# METEOR, made-up things, wanted and offered support


def test_meteor_is_its_formula() -> None:
    """Of n words in one chunk the penalty is half of n^-3; word order and stems count, synonyms do not."""
    meteor = METRICS["meteor"].each
    assert meteor is not None

    def of(text: str, reference: str = "you walked home alone in the rain") -> float:
        return float(meteor([Reply("d", "d/1", [], reference, text)])[0])

    n = 7
    assert of("you walked home alone in the rain") == pytest.approx(1 - 0.5 / n**3)
    assert of("you walking home alone in the rain") == pytest.approx(1 - 0.5 / n**3)  # by its stem
    assert of("you strolled home alone in the rain") < 0.95
    # half of the words, all right: F = 10 P R / (R + 9 P), in one chunk of three
    recall = 3 / n
    assert of("in the rain") == pytest.approx(10 * recall / (recall + 9) * (1 - 0.5 / 27))
    assert of("rain the in alone home walked you") < of("you walked home alone in the rain") - 0.3
    assert of("") == of("cows") == 0.0


def test_meteor_of_real_replies_falls_when_they_are_shuffled(real: list[Reply]) -> None:
    meteor = METRICS["meteor"].each
    assert meteor is not None
    own = [replace(r, text=r.reference) for r in real]
    shuffled = [replace(r, text=s.reference) for r, s in zip(real, [*real[1:], real[0]], strict=True)]
    assert meteor(own).mean() > 0.95 > 0.3 > meteor(shuffled).mean()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Have you told your sister?", ["sister"]),
        ("Have you told your mother?", []),  # she was spoken of
        ("Your feelings matter, and so does your day.", []),
        ("How is your new job, and your old boss?", ["boss"]),  # "jobs" was said
        ("You’re strong. Your garden waits for YOUR roses!", ["garden", "roses"]),
        ("", []),
    ],
)
def test_things_that_nobody_spoke_of(text: str, found: list[str]) -> None:
    said = [
        {"role": "user", "content": "My mother lost three jobs."},
        {"role": "system", "content": "Ask for a sister."},
    ]
    reply = Reply("d", "d/1", said, "", text)
    assert made_up(reply) == found
    each = METRICS["unsupported"].each
    assert each is not None
    assert each([reply]).tolist() == [float(bool(found))]


def test_wanted_and_offered_support() -> None:
    """With an embedding that knows the sentences alone: the same kind is 0, another one nearly 1."""
    sentences = [s for kind in KINDS.values() for side in kind for s in side]

    def embed(texts: Sequence[str]) -> np.ndarray:
        return np.stack([np.eye(len(sentences))[sentences.index(t)] if t else np.zeros(len(sentences)) for t in texts])

    def replies(text: Callable[[str], str]) -> list[Reply]:
        return [
            Reply(
                "d",
                f"d/{k}",
                [{"role": "user", "content": wants[0]}, {"role": "assistant", "content": "x"}],
                "",
                text(k),
            )
            for k, (wants, _) in KINDS.items()
        ]

    others = dict(zip(KINDS, [*list(KINDS)[1:], next(iter(KINDS))], strict=True))
    assert discrepancies(embed, replies(lambda k: KINDS[k][1][1])) == pytest.approx(0, abs=1e-6)
    assert discrepancies(embed, replies(lambda k: KINDS[others[k]][1][0])).min() > 0.99
    assert np.isnan(discrepancies(embed, replies(lambda k: ""))).all()
    assert set(KINDS) == {"listening", "comfort", "exploring", "information", "advice", "company"}
