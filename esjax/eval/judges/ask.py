"""What judges are asked of systems' replies, and the values that come of it: pairs, rubrics, faults, what was wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.eval.judges.judge import Answer, Judge, Kept, Question, conversation, rendered
from esjax.eval.judges.open import open_judge
from esjax.eval.metrics.judged import DISCREPANCY, FAULTS, LENGTH_CONTROLLED, PAIRS, RUBRICS, UNHELPFUL
from esjax.eval.replies import Reply
from esjax.eval.results import Value, over, reply_values, sampled_values
from esjax.run.progress import say
from esjax.runtime.context import current
from esjax.settings.files import bundled
from esjax.settings.schema import Config

LETTERS, DIGITS, YES_NO, KINDS = ("A", "B", "C"), tuple("012345"), ("Y", "N"), tuple("ABCDEF")
FILES = ("pairwise", *RUBRICS, *FAULTS, "wanted", "offered")
Ask = Callable[[Sequence[Question], str], list[Answer]]
Systems = Mapping[str, Sequence[Reply]]


def prompts_folder(setting: str) -> Path:
    """Where the prompts lie. Raises InputError where one is missing."""
    folder = bundled(setting)
    for name in FILES:
        if not (folder / f"{name}.txt").is_file():
            raise InputError(
                f"eval.judge.prompts={setting}: {name}.txt is missing in it; copy it from bundled:prompts/judge"
            )
    return folder


def judged(
    judge: Judge, asks: Sequence[str], folder: Path, systems: Systems, pairs: Sequence[tuple[str, str]]
) -> list[Value]:
    """Values of all that a judge is asked. Every process must ask; the first alone asks a judge that is elsewhere."""
    kept, lost = Kept(judge), 0

    def ask(questions: Sequence[Question], label: str) -> list[Answer]:
        if judge.alone and not current().processes.writer:
            return [Answer(None)] * len(questions)
        nonlocal lost
        answers = kept.answers(questions, label)
        lost += sum(a.shares is None for a in answers)
        return answers

    made: list[Value] = []
    if "pairwise" in asks:
        made += [v for pair in pairs for v in pairwise(ask, folder, systems, *pair)]
    for name, replies in systems.items():
        if "rubrics" in asks:
            made += rubrics(ask, folder, name, replies)
        if "faults" in asks:
            made += faults(ask, folder, name, replies)
        if "discrepancy" in asks:
            made += discrepancy(ask, folder, name, replies)
    kept.say_cost()
    if lost:
        say(f"  {judge.name}: {lost} answers held no verdict, and are left out")
    return made


def pairwise(ask: Ask, folder: Path, systems: Systems, mine: str, theirs: str) -> list[Value]:
    """Each context's two replies, compared in both orders.

    The margin of a context is the mean of its orders: 1 for a win, 0 for a tie, -1 for a loss.
    """
    a, b = systems[mine], systems[theirs]
    questions = [
        Question(
            rendered(
                folder, "pairwise", conversation=conversation(x.messages), first=one.text or "-", second=two.text or "-"
            ),
            LETTERS,
            (x.seeker, one.text, two.text),
        )
        for x, y in zip(a, b, strict=True)
        for one, two in ((x, y), (y, x))
    ]
    label = f"judge: {mine} with {theirs}"
    # 1: the reply that stood first was preferred, -1: the second
    told = {None: np.nan, 0: 1.0, 1: -1.0, 2: 0.0}
    first = np.asarray([told[x.choice] for x in ask(questions, label)]).reshape(-1, 2)
    for_mine = first * np.asarray([1.0, -1.0])
    known = ~np.isnan(first)
    margin = _mean(for_mine)
    both = known.all(1)
    agree = np.where(both, for_mine[:, 0] == for_mine[:, 1], np.nan)
    name = over(mine, theirs)
    values = {
        "judge_margin": margin,
        "judge_wins": np.where(np.isnan(margin), np.nan, (margin + 1) / 2),
        "judge_first": _mean(first),
        "judge_same": agree,
        "judge_malformed": 1 - known.mean(1),
    }
    assert values.keys() == {m.name for m in PAIRS}
    made = [v for metric, x in values.items() for v in reply_values(name, metric, a, x.astype(float))]
    lengths = np.asarray([len(x.text.split()) - len(y.text.split()) for x, y in zip(a, b, strict=True)], float)
    wins = values["judge_wins"]
    ok = ~np.isnan(wins)
    if ok.any():
        rows = [r for r, k in zip(a, ok, strict=True) if k]
        made += sampled_values(
            name,
            LENGTH_CONTROLLED.name,
            [r.dialogue for r in rows],
            lambda keep: length_controlled(wins[ok][keep], lengths[ok][keep]),
        )
    return made


def _mean(x: np.ndarray) -> np.ndarray:
    """The mean of each row's known numbers; NaN where there is none."""
    count = (~np.isnan(x)).sum(1)
    out: np.ndarray = np.where(count > 0, np.nansum(x, 1) / np.maximum(count, 1), np.nan)
    return out


def length_controlled(wins: np.ndarray, lengths: np.ndarray) -> float:
    """The share of wins that would be left between replies of one length.

    As length-controlled AlpacaEval (Dubois et al. 2024) has it: a logistic regression of wins [n] (0 to 1) on tanh of the
    standardised difference in words [n], read at a difference of 0; a weak ridge keeps it finite where all win.
    """
    spread = lengths.std()
    x = np.stack([np.ones_like(lengths), np.tanh(lengths / spread) if spread > 0 else np.zeros_like(lengths)], 1)
    w, ridge = np.zeros(2), 1e-2
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + ridge * np.eye(2), x.T @ (wins - p) - ridge * w)
        w = w + step
        if np.abs(step).max() < 1e-10:
            break
    return float(1 / (1 + np.exp(-w[0])))


def _about(folder: Path, file: str, choices: tuple[str, ...], replies: Sequence[Reply]) -> list[Question]:
    return [_question(folder, file, choices, list(r.messages), r.text) for r in replies]


def rubrics(ask: Ask, folder: Path, name: str, replies: Sequence[Reply]) -> list[Value]:
    """The mean mark, 0 to 5, that a judge finds likely."""
    made = []
    for rubric in RUBRICS:
        answers = ask(_about(folder, rubric, DIGITS, replies), f"judge: {name}, {rubric}")
        marks = [np.nan if x.shares is None else float(np.dot(x.shares, range(6))) for x in answers]
        made += reply_values(name, f"judge_{rubric}", replies, np.asarray(marks))
    return made


def faults(ask: Ask, folder: Path, name: str, replies: Sequence[Reply]) -> list[Value]:
    """Which of the five kinds of unhelpful reply a judge finds, and whether any."""
    found = []
    for fault in FAULTS:
        answers = ask(_about(folder, fault, YES_NO, replies), f"judge: {name}, {fault}")
        found.append([np.nan if x.choice is None else float(x.choice == 0) for x in answers])
    table = np.asarray(found)
    made = [
        v for fault, row in zip(FAULTS, table, strict=True) for v in reply_values(name, f"judge_{fault}", replies, row)
    ]
    return made + reply_values(name, UNHELPFUL.name, replies, np.where(np.isnan(table).any(0), np.nan, table.max(0)))


def discrepancy(ask: Ask, folder: Path, name: str, replies: Sequence[Reply]) -> list[Value]:
    """Ours: half the sum of absolute differences between which support is wanted and which is offered, 0 to 1."""
    wanted = [
        Question(rendered(folder, "wanted", conversation=conversation(r.messages)), KINDS, (r.seeker,)) for r in replies
    ]
    sides = [
        ask(wanted, "judge: what is wanted"),
        ask(_about(folder, "offered", KINDS, replies), f"judge: {name}, what is offered"),
    ]
    each = [
        np.nan if w.shares is None or o.shares is None else float(np.abs(np.subtract(w.shares, o.shares)).sum() / 2)
        for w, o in zip(*sides, strict=True)
    ]
    return reply_values(name, DISCREPANCY.name, replies, np.asarray(each))


MARKS = ("helpfulness", "personalisation")  # whose mean is a reply's mark in a round of the method


def rater(c: Config) -> Callable[[Sequence[tuple[list[Message], str]]], np.ndarray] | None:
    """Who marks replies in the rounds of the method, 0 to 5, NaN where there was no verdict; None where nobody is asked.

    The judge is opened when it is first asked. Raises InputError, then, where there is none.
    """
    if not (c.dpo.pair_weights == "judge" or (c.evolve.compares and c.evolve.measure == "judge")):
        return None
    folder, judges = prompts_folder(c.eval.judge.prompts), list[Judge]()

    def rate(replies: Sequence[tuple[list[Message], str]]) -> np.ndarray:
        judges[:] = judges or [open_judge(c.eval.judge)]
        if judges[0].alone and not current().processes.writer:
            return np.full(len(replies), np.nan)  # the first process writes what it is told, and all read that
        kept, marks = Kept(judges[0]), []
        for rubric in MARKS:
            questions = [_question(folder, rubric, DIGITS, chat, text) for chat, text in replies]
            shares = [x.shares for x in kept.answers(questions, f"judge: {rubric}")]
            marks.append([np.nan if s is None else float(np.dot(s, range(6))) for s in shares])
        kept.say_cost()
        made: np.ndarray = np.mean(marks, axis=0)
        return made

    return rate


def _question(folder: Path, file: str, choices: tuple[str, ...], chat: list[Message], reply: str) -> Question:
    seeker = " ".join(m["content"] for m in chat if m["role"] == "user")
    return Question(
        rendered(folder, file, conversation=conversation(chat), reply=reply or "-"), choices, (seeker, reply)
    )
