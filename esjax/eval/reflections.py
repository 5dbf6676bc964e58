"""Whether what a model infers of a seeker is true of this one: its reflections, told apart as replies are, and gold labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from esjax.corpus.text import words
from esjax.eval.identify import bm25_scores, rank
from esjax.eval.metrics.reflected import EMOTION, FOUND, RANK
from esjax.eval.metrics.words import same_word
from esjax.eval.replies import Reply
from esjax.eval.results import Value, reply_values
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.run.journal import gather
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion


def reflect(experiment: Experiment, adapter: Adapter, file: Path, name: str) -> None:
    """Write a model's reflection on each context that it answers; rows gather, so that a killed command goes on."""
    asked, seed = experiment.corpora.asked, experiment.config.seed

    def work(missing: list[int], add: Callable[..., None]) -> None:
        requests = [
            experiment.reflection_request(
                i, asked[i].messages, row_seed(seed, "eval/reflection", asked[i].id), asked[i].id
            )
            for i in missing
        ]

        def done(request: Request, made: Completion) -> tuple[()]:
            fields = experiment.reflection(made.token_ids)
            add(request.key, {"id": asked[request.key].id, "reflection": fields}, len(made.token_ids))
            return ()

        generator = experiment.generator
        generator.work(adapter, generator.grouped(requests), done, experiment.form.automaton)

    gather(file, len(asked), f"{name} reflections", work)


def reflection_values(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    replies: Sequence[Reply],
    others: Sequence[Sequence[int]],
    emotions: Mapping[str, str],
) -> list[Value]:
    """Rows of the table: whether a reflection finds its own seeker's words among other people's, and names the gold emotion.

    ``replies`` are any system's to the same contexts, ``emotions`` the gold labels by dialogue (NaN, so no row, without one).
    """
    told = [replace(r, text=" ".join(row["reflection"].values())) for r, row in zip(replies, rows, strict=True)]
    hits, ranks = rank(bm25_scores(told), others)
    named = [
        float(names(row["reflection"]["emotional_state"], label)) if (label := emotions.get(r.dialogue, "")) else np.nan
        for r, row in zip(replies, rows, strict=True)
    ]
    each = ((FOUND, hits), (RANK, ranks), (EMOTION, np.asarray(named)))
    return [v for metric, values in each for v in reply_values(name, metric.name, replies, values)]


def names(text: str, label: str) -> bool:
    """Whether a text holds a word of a label, in some form."""
    return any(same_word(a, b) for a in words(text) for b in words(label))
