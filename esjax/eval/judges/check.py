"""How far a judge agrees with people: `esjax eval judge-check`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.corpus.sources import check_messages
from esjax.errors import InputError
from esjax.eval.judges.ask import DIGITS, LETTERS
from esjax.eval.judges.judge import Judge, Kept, Question, conversation, rendered
from esjax.eval.metrics.judged import RUBRICS
from esjax.eval.statistics import LEVEL
from esjax.run.jsonl import read_jsonl

PREFERRED: dict[Any, int] = {0: 0, 1: 1, "tie": 2}
# Medians over the components of four frameworks of empathic communication, 200 conversations (Kumar et al. 2025,
# arXiv 2506.10150): weighted kappa of the annotators named with experts.
PUBLISHED = {"experts": 0.58, "crowd workers": 0.33, "large models": 0.60}


class Rating(NamedTuple):
    """What people said: a mark for one reply, or which of two is better."""

    id: str
    messages: Sequence[Message]
    replies: tuple[str, ...]
    rubric: str  # "" for two replies
    said: int  # the mark, or 0: the first, 1: the second, 2: equal


class Agreement(NamedTuple):
    """Of one rubric, or of pairs. ``kappa`` is weighted with squares for marks; its interval is over dialogues."""

    what: str
    rated: int
    kappa: float
    low: float
    high: float
    equal: float  # share of same answers
    same: float  # of pairs: the share with one verdict in both orders; NaN for marks
    malformed: float  # share of answers without a verdict


def read_ratings(file: Path) -> list[Rating]:
    """JSON Lines {"id", "messages", "reply", "rubric", "rating": 0..5} or {"id", "messages", "replies": [A, B],
    "preferred": 0, 1 or "tie"}. Raises InputError naming the line."""
    out = []
    for number, row in enumerate(read_jsonl(file, ("id", "messages")), start=1):
        where = f"{file}, line {number}"
        messages = check_messages(row["messages"], where, last="user")
        pair = row.get("replies")
        if pair is not None:
            said = row.get("preferred")
            good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)
            if not good or isinstance(said, bool | list | dict) or said not in PREFERRED:
                raise InputError(f'{where}: expected "replies": [TEXT, TEXT] and "preferred": 0, 1 or "tie"')
            out.append(Rating(str(row["id"]), messages, tuple(pair), "", PREFERRED[said]))
            continue
        reply, rubric, mark = row.get("reply"), row.get("rubric"), row.get("rating")
        marked = isinstance(mark, int) and not isinstance(mark, bool) and 0 <= mark <= 5
        if not isinstance(reply, str) or rubric not in RUBRICS or not marked:
            raise InputError(
                f'{where}: expected "reply": TEXT, "rubric": one of {", ".join(RUBRICS)}, and "rating": a whole number from '
                "0 to 5"
            )
        out.append(Rating(str(row["id"]), messages, (reply,), rubric, mark))  # type: ignore[arg-type]
    if not out:
        raise InputError(f"{file}: no rating in it")
    return out


def agreement(judge: Judge, folder: Path, ratings: Sequence[Rating], resamples: int, seed: int) -> list[Agreement]:
    """Ask the judge what people were asked, and compare. Raises as ``Judge.ask`` does."""
    kept = Kept(judge)
    made = []
    for rubric in ("", *RUBRICS):
        mine = [r for r in ratings if r.rubric == rubric]
        if not mine:
            continue
        questions = [q for r in mine for q in _questions(folder, r)]
        answers = np.asarray(
            [np.nan if a.choice is None else a.choice for a in kept.answers(questions, f"judge: {rubric or 'pairs'}")]
        ).reshape(len(mine), -1)
        verdict, same, malformed = answers[:, 0], np.nan, float(np.isnan(answers).mean())
        if not rubric:  # in the second question the replies have changed places
            turned = np.where(answers[:, 1] == 2, 2, 1 - answers[:, 1])
            both = ~np.isnan(answers).any(1)
            same = float((answers[both, 0] == turned[both]).mean()) if both.any() else np.nan
            verdict = np.where(both & (answers[:, 0] != turned), 2, verdict)  # undecided is a tie
        ok = ~np.isnan(verdict)
        theirs = np.asarray([r.said for r in mine])[ok]
        units = [r.id.rpartition("/")[0] or r.id for r, k in zip(mine, ok, strict=True) if k]
        size, weight = (3, unweighted) if not rubric else (6, squared)
        table = _tables(verdict[ok].astype(int), theirs, size)
        value, low, high = _interval(table, units, weight(size), resamples, seed)
        equal = float((verdict[ok] == theirs).mean()) if ok.any() else np.nan
        made.append(Agreement(rubric or "pairs", int(ok.sum()), value, low, high, equal, same, malformed))
    kept.say_cost()
    return made


def _questions(folder: Path, r: Rating) -> list[Question]:
    asked = conversation(r.messages)
    seeker = "\n".join(m["content"] for m in r.messages if m["role"] == "user")
    if r.rubric:
        return [
            Question(rendered(folder, r.rubric, conversation=asked, reply=r.replies[0]), DIGITS, (seeker, *r.replies))
        ]
    return [
        Question(rendered(folder, "pairwise", conversation=asked, first=a, second=b), LETTERS, (seeker, a, b))
        for a, b in (r.replies, r.replies[::-1])
    ]


def squared(size: int) -> np.ndarray:
    """Quadratic disagreement of marks [size, size] (Cohen 1968)."""
    i = np.arange(size)
    out: np.ndarray = np.square(i[:, None] - i[None, :], dtype=float)
    return out


def unweighted(size: int) -> np.ndarray:
    """Every disagreement counts the same (Cohen 1960)."""
    return 1.0 - np.eye(size)


def kappa(table: np.ndarray, weights: np.ndarray) -> float:
    """Cohen's weighted kappa of a table [judge's, people's]; NaN where both always say one and the same."""
    n = table.sum()
    expected = np.outer(table.sum(1), table.sum(0)) / max(n, 1)
    chance = float((weights * expected).sum())
    return 1 - float((weights * table).sum()) / chance if n and chance > 0 else np.nan


def _tables(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    out = np.zeros((len(a), size, size))
    out[np.arange(len(a)), a, b] = 1
    return out


def _interval(
    tables: np.ndarray, units: Sequence[str], weights: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Kappa, and its percentile bootstrap interval over whole dialogues."""
    names = list(dict.fromkeys(units))
    summed = np.zeros((len(names), *weights.shape))
    np.add.at(summed, [names.index(u) for u in units], tables)
    value = kappa(summed.sum(0), weights)
    if len(names) < 2:
        return value, np.nan, np.nan
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    drawn = [kappa(np.tensordot(d, summed, 1), weights) for d in draws]
    known = [x for x in drawn if not np.isnan(x)]
    if not known:
        return value, np.nan, np.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def records(made: Sequence[Agreement]) -> list[dict[str, Any]]:
    """As JSON has them: what is not known is null."""
    return [{k: None if isinstance(v, float) and np.isnan(v) else v for k, v in a._asdict().items()} for a in made]
