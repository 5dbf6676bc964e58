"""Multiple choice by log-likelihood: which of a few given answers a model finds likeliest, without a judge.

Files in EmoBench's format (Sabour et al. 2024, arXiv 2402.12071): EA.jsonl has one question an item, EU.jsonl two, an emotion
and its cause. What is measured here is ours: the likelihood of an answer's text, where EmoBench asks for a letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.errors import InputError, within
from esjax.eval.statistics import wilson
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.rows import Rows, trunk_with_replies
from esjax.run.jsonl import read_jsonl
from esjax.run.progress import progress
from esjax.runtime.mesh import rows_at_once
from esjax.sample.score import Scorer


class Likelihoods(NamedTuple):
    """Of each choice: the log-prob, summed over its tokens and its end of turn, and how many tokens these are."""

    sums: np.ndarray  # float64 [choices]
    tokens: np.ndarray  # int [choices]
    read: int  # tokens of the question and all choices


def choice_likelihoods(
    experiment: Experiment,
    adapter: Adapter,
    questions: Sequence[tuple[list[Message], Sequence[str]]],
    done: Callable[[int, Likelihoods], object],
) -> None:
    """Tell ``done`` each question's number and how likely its choices are as the whole answer, all of them on one trunk.

    Raises InputError for a question that does not fit the model.
    """
    tokenizer, most = experiment.tokenizer, experiment.backbone.arch.max_positions
    rows: list[Rows] = []
    for messages, choices in questions:
        stem = tokenizer.prompt(messages)
        answers = [tokenizer.reply(stem, [*messages, {"role": "assistant", "content": c}]) for c in choices]
        if (need := len(stem) + max(map(len, answers))) > most:
            raise InputError(
                f"a question and its answer take {need} tokens, and the model has {most} positions: it begins "
                f"{messages[-1]['content'][:60]!r}; take a model with more, or leave it out"
            )
        rows.append(trunk_with_replies(stem, [(len(stem), tokens) for tokens in answers]))
    scorer = Scorer(experiment.backbone, max(len(r.tokens) for r in rows), rows_at_once("dpo", experiment.config.dpo))

    def scored(i: int, branches: list[np.ndarray]) -> None:
        sums = np.asarray([x.sum(dtype=np.float64) for x in branches])
        done(i, Likelihoods(sums, np.asarray([len(x) for x in branches]), len(rows[i].tokens)))

    scorer.score(adapter, rows, scored)


class Item(NamedTuple):
    """A question with its choices, of which one is right."""

    id: str
    task: str  # EA, EU emotion, EU cause
    category: str
    question: str
    choices: tuple[str, ...]
    right: int


def read_items(file: Path) -> list[Item]:
    """Items of a file in EmoBench's format. Raises InputError naming the line."""
    out: list[Item] = []
    for number, row in enumerate(read_jsonl(file), start=1):
        with within(f"{file}, line {number}"):
            if "emotion_choices" in row:
                asked = "{scenario}\n\nWhich emotion does {subject} feel at the end?"
                out.append(_item(row, "EU emotion", "coarse_category", asked, "emotion_choices", "emotion_label"))
                asked = "{scenario}\n\nWhy does {subject} feel this way at the end?"
                out.append(_item(row, "EU cause", "coarse_category", asked, "cause_choices", "cause_label"))
            else:
                kind = str(row.get("question type", "Action")).lower()
                asked = f"{{scenario}}\n\nWhat is the most effective {kind} for {{subject}}?"
                out.append(_item(row, "EA", "category", asked, "choices", "label"))
    if not out:
        raise InputError(f"{file}: no item in it")
    return out


def _item(row: Mapping[str, Any], task: str, category: str, asked: str, choices: str, label: str) -> Item:
    for key in ("scenario", "subject", label):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise InputError(
                f"{key!r} is missing; expected EmoBench's fields: qid, scenario, subject, {choices}, {label}"
            )
    given = row.get(choices)
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(c, str) and c.strip() for c in given):
        raise InputError(f"{choices!r} is no list of two or more texts")
    if given.count(row[label]) != 1:
        raise InputError(
            f"{label!r} is {row[label]!r:.60}, which is {given.count(row[label])} of the {choices}, not one"
        )
    question = asked.format(scenario=row["scenario"].strip(), subject=row["subject"].strip())
    return Item(
        str(row.get("qid", "")), task, str(row.get(category, "")), question, tuple(given), given.index(row[label])
    )


class Accuracy(NamedTuple):
    """Of a task, or of one of its categories: the share of right answers, the likeliest by sum and by mean log-prob."""

    task: str
    category: str  # "" for all
    items: int
    by_sum: float
    by_mean: float
    low: float  # Wilson's interval of by_mean
    high: float
    chance: float


def accuracies(experiment: Experiment, adapter: Adapter, items: Sequence[Item]) -> list[Accuracy]:
    """Ask a model everything. EU's items are also right "together" where emotion and cause are, as EmoBench counts them."""
    chats = [experiment.encoder.with_system([{"role": "user", "content": item.question}]) for item in items]
    right = np.zeros((len(items), 2), bool)
    with progress("multiple choice", len(items)) as advance:

        def done(i: int, found: Likelihoods) -> None:
            picked = found.sums.argmax(), (found.sums / found.tokens).argmax()
            right[i] = [p == items[i].right for p in picked]
            advance(1)

        choice_likelihoods(experiment, adapter, [(c, i.choices) for c, i in zip(chats, items, strict=True)], done)
    chance = np.asarray([1 / len(item.choices) for item in items])
    groups: dict[tuple[str, str], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((item.task, ""), []).append(i)
        groups.setdefault((item.task, item.category), []).append(i)
    made = [_accuracy(*key, right[which], chance[which]) for key, which in sorted(groups.items())]
    emotion, cause = (groups.get((f"EU {part}", ""), []) for part in ("emotion", "cause"))
    if emotion:
        made.append(_accuracy("EU together", "", right[emotion] & right[cause], chance[emotion] * chance[cause]))
    return made


def _accuracy(task: str, category: str, right: np.ndarray, chance: np.ndarray) -> Accuracy:
    by_sum, by_mean = right.mean(0)
    low, high = wilson(int(right[:, 1].sum()), len(right))
    return Accuracy(task, category, len(right), float(by_sum), float(by_mean), low, high, float(chance.mean()))
