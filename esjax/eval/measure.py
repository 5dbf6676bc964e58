"""All metrics of systems' replies to the same contexts, but those that are a system's own likelihoods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from esjax.eval.embed import Embedder
from esjax.eval.identify import bm25_scores, candidates, rank
from esjax.eval.metrics import DROPPED, SIMILARITY, SPECIFICITY, WANTED
from esjax.eval.replies import Reply
from esjax.eval.results import Value, reply_values, text_values
from esjax.eval.specific import specificity
from esjax.eval.wanted import discrepancies
from esjax.evolve.corpora import evenly_spread
from esjax.evolve.experiment import Experiment
from esjax.evolve.filters import Filters
from esjax.hub.fetch import resolve
from esjax.model.lora import Adapter
from esjax.settings.schema import Config


def measure(
    systems: Mapping[str, Sequence[Reply]], c: Config, filters: Filters, model: tuple[Experiment, Adapter] | None
) -> list[Value]:
    """The table's rows; specificity is measured under ``model``, and left out where none is given."""
    others = candidates(next(iter(systems.values())), c.eval.candidates, c.seed)
    values = [v for name, replies in systems.items() for v in text_values(name, replies)]
    values += _identification(systems, others, c)
    for name, replies in systems.items():
        found = [filters.reply_fault(list(r.messages), r.text, r.finish) for r in replies]
        values += reply_values(name, DROPPED.name, replies, np.asarray([float(f is not None) for f in found]))
    if model is not None:
        chosen = set(evenly_spread(c.eval.specificity_contexts, len(others)))
        few = [given[: c.eval.others] if i in chosen else [] for i, given in enumerate(others)]
        for name, each in specificity(*model, systems, few).items():
            values += reply_values(name, SPECIFICITY.name, systems[name], each)
    return values


def embedder(c: Config) -> Embedder:
    """The embedding model that the settings name. Raises InputError."""
    return Embedder(resolve(str(c.eval.embedding), c.eval.embedding_sha256))


def _identification(systems: Mapping[str, Sequence[Reply]], others: Sequence[Sequence[int]], c: Config) -> list[Value]:
    """Whether each reply picks its own context out of others', by words and, where the settings name a model, by meaning; and
    what else that model says."""
    ways: dict[str, Callable[[Sequence[Reply]], np.ndarray]] = {"bm25": bm25_scores}
    out = []
    if c.eval.embedding is not None:
        embed = embedder(c)
        ways["embedding"] = _by_meaning(embed)
        for name, replies in systems.items():
            alike = (embed([r.text for r in replies]) * embed([r.reference for r in replies])).sum(1)
            out += reply_values(name, SIMILARITY.name, replies, alike)
            out += reply_values(name, WANTED.name, replies, discrepancies(embed, replies))
    for by, scores in ways.items():
        for name, replies in systems.items():
            hits, ranks = rank(scores(replies), others)
            out += reply_values(name, f"hit_{by}", replies, hits) + reply_values(name, f"rank_{by}", replies, ranks)
    return out


def _by_meaning(embed: Embedder) -> Callable[[Sequence[Reply]], np.ndarray]:
    contexts: dict[str, np.ndarray] = {}

    def scores(replies: Sequence[Reply]) -> np.ndarray:
        if missing := [r for r in replies if r.context not in contexts]:
            made = embed([r.seeker for r in missing])
            contexts.update({r.context: x for r, x in zip(missing, made, strict=True)})
        out: np.ndarray = embed([r.text for r in replies]) @ np.stack([contexts[r.context] for r in replies]).T
        return out

    return scores
