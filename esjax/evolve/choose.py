"""Which of a context's replies become its pair: candidates from a round's files, what they are measured by, and the choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.evolve.experiment import Experiment
from esjax.evolve.filters import Filters
from esjax.evolve.likelihood import Target, mean_logprobs, reply_ids, specificity
from esjax.evolve.pairs import Context
from esjax.model.lora import Adapter
from esjax.settings.schema import Config

Row = dict[str, Any]
# Replies in their contexts -> marks, NaN where there is none.
Rate = Callable[[Sequence[tuple[list[Message], str]]], np.ndarray]
SPECIFICITY, LIKELIHOOD, JUDGE = "specificity", "likelihood", "judge"


class Side(NamedTuple):
    """Replies of one kind to one context: what may be chosen, or rejected."""

    kind: str  # refinement, gold, draft or first
    replies: list[Row]  # with text and finish_reason; no seed where nobody drew it


class Candidates(NamedTuple):
    """What a context's pair is chosen from."""

    context: Context
    chosen: Side
    rejected: Side
    reflection: Row | None

    @property
    def replies(self) -> list[Row]:
        """All of them, those that may be chosen first."""
        return [*self.chosen.replies, *self.rejected.replies]


def candidates(config: Config, chosen: Sequence[Context], files: Mapping[str, Sequence[Row]]) -> Iterator[Candidates]:
    """A round's candidates, context by context, from the rows of its files: drafts, reflections, refinements, first."""
    e = config.evolve
    kind, drafted = ("refinement" if e.refines else "gold"), ("first" if "first" in files else "drafts")
    for i, context in enumerate(chosen):
        gold = {"text": context.reference, "finish_reason": "stop"}
        better = Side(kind, _rows(files["refinements"], i, len(chosen)) if e.refines else [gold | {"id": context.id}])
        worse = Side(drafted.removesuffix("s"), _rows(files[drafted], i, len(chosen)))
        reflection = files["reflections"][i] if "reflections" in files else None
        for row in (*better.replies, *worse.replies, *([reflection] if reflection else [])):
            if row["id"] != context.id:
                raise AssertionError(f"rows out of step: {row['id']} instead of {context.id}")
        yield Candidates(context, better, worse, reflection)


def _rows(rows: Sequence[Row], i: int, contexts: int) -> list[Row]:
    each = len(rows) // contexts
    return list(rows[i * each : (i + 1) * each])


def measures(config: Config) -> list[str]:
    """What candidates are measured by, under these settings."""
    e = config.evolve
    names = [e.measure] if e.compares else []
    return list(dict.fromkeys([*names, *([SPECIFICITY] if config.filters.more_specific else [])]))


def measure(experiment: Experiment, adapter: Adapter, all_: Sequence[Candidates], rate: Rate | None) -> list[Row]:
    """For each context a row with its id and, by measure, the values of its candidates' replies; null where there is none."""
    encoder = experiment.encoder
    chats = [encoder.with_system(c.context.messages) for c in all_]
    prompts = [experiment.tokenizer.prompt(chat) for chat in chats]
    texts = [[r["text"] for r in c.replies] for c in all_]
    replies = [
        [reply_ids(experiment, prompt, chat, text) for text in mine]
        for prompt, chat, mine in zip(prompts, chats, texts, strict=True)
    ]
    out: list[Row] = [{"id": c.context.id} for c in all_]
    for name in measures(experiment.config):
        if name == SPECIFICITY:
            others = other_people([c.context.id for c in all_], experiment.config.eval.others, experiment.config.seed)
            values = specificity(experiment, adapter, prompts, replies, others)
        elif name == LIKELIHOOD:
            values = _likelihoods(experiment, adapter, prompts, replies)
        else:
            if rate is None:
                raise AssertionError("nobody was opened who judges")
            asked = [(c.context.messages, text) for c, mine in zip(all_, texts, strict=True) for text in mine]
            values = np.split(rate(asked), np.cumsum([len(mine) for mine in texts])[:-1])
        for row, mine in zip(out, values, strict=True):
            row[name] = [None if np.isnan(x) else round(float(x), 6) for x in mine]
    return out


def _likelihoods(
    experiment: Experiment, adapter: Adapter, prompts: list[list[int]], replies: list[list[list[int]]]
) -> list[np.ndarray]:
    flat = [(i, ids) for i, mine in enumerate(replies) for ids in mine]
    targets = [Target(n, i) for n, (i, ids) in enumerate(flat) if ids]
    values = np.full(len(flat), np.nan)
    found = mean_logprobs(experiment, adapter, prompts, [ids for _, ids in flat], targets, "likelihood scoring")
    values[[t.reply for t in targets]] = found
    return np.split(values, np.cumsum([len(mine) for mine in replies])[:-1])


def other_people(names: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """For each context, named DIALOGUE/TURN, up to ``count`` contexts of other dialogues, one a dialogue.

    Which they are hangs on the seed and the context's name.
    """
    by_dialogue: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        by_dialogue.setdefault(name.rpartition("/")[0], []).append(i)
    out = []
    for name in names:
        rng = np.random.default_rng([seed, *name.encode()])
        others = [d for d in by_dialogue if d != name.rpartition("/")[0]]
        taken = [others[i] for i in rng.permutation(len(others))[:count]]
        out.append([by_dialogue[d][int(rng.integers(len(by_dialogue[d])))] for d in taken])
    return out


class Choice(NamedTuple):
    """A context's two replies, and what is wrong with them, if anything: a reason, and the side or ``pair`` that it is of."""

    chosen: Row
    rejected: Row
    fault: tuple[str, str] | None  # (side, reason)


def choose(c: Candidates, values: Row, config: Config, filters: Filters) -> Choice:
    """The pair of a context: of each side one reply, among those without a fault if there are any.

    Of several that may be chosen the one that measures best is; of several drafts the first, or with evolve.rejected=low the
    one that measures nearest to their mean less two standard deviations; where none of them could be measured, that is the
    fault. ``values``: a row of ``measure``.
    """
    e, split = config.evolve, len(c.chosen.replies)
    known = [np.nan if x is None else x for x in values.get(e.measure, [])] or [np.nan] * len(c.replies)
    best, fault = _one(c, c.chosen, np.asarray(known[:split]), filters, low=False)
    worst, other = _one(c, c.rejected, np.asarray(known[split:]), filters, low=e.rejected == "low")
    chosen, rejected = c.chosen.replies[best], c.rejected.replies[worst]
    # A draft's fault is told before a refinement's, as everything hangs on the draft.
    found = (c.rejected.kind, other) if other else (c.chosen.kind, fault) if fault else None
    if found is None and (reason := filters.pair_fault(rejected["text"], chosen["text"])):
        found = ("pair", reason)
    if found is None and config.filters.more_specific:
        own, its = values[SPECIFICITY][best], values[SPECIFICITY][split + worst]
        if own is None or its is None or own <= its:
            found = ("pair", "less_specific")
    return Choice(chosen, rejected, found)


def _one(c: Candidates, side: Side, values: np.ndarray, filters: Filters, low: bool) -> tuple[int, str | None]:
    """The number of a side's reply, and its fault."""
    faults = [filters.reply_fault(c.context.messages, r["text"], r["finish_reason"]) for r in side.replies]
    fine = [i for i, fault in enumerate(faults) if fault is None]
    if len(side.replies) == 1 or not fine:
        return 0, faults[0]
    among = [i for i in fine if not np.isnan(values[i])]
    if not among:
        return fine[0], "not_measured"
    mine = values[among]
    goal = np.abs(mine - (mine.mean() - 2 * mine.std())) if low else -mine
    return among[int(np.argmin(goal))], None


def build_pairs(
    all_: Sequence[Candidates],
    values: Sequence[Row],
    config: Config,
    filters: Filters,
    fits: Callable[[list[Message], str, str], bool],
    model: dict[str, Any],
) -> tuple[list[Row], list[Row]]:
    """A round's kept pairs and its dropped ones, each dropped under its first reason.

    ``values``: rows of ``measure``, or empty ones. ``fits`` says whether prompt, chosen and rejected fit a training row: a text
    may encode to more tokens than were drawn. Kept pairs are TRL's conversational preference rows (prompt, chosen, rejected)
    with where they come from.
    """
    kept, dropped = [], []
    for c, row in zip(all_, values, strict=True):
        made = choose(c, row, config, filters)
        chosen, rejected, fault = made.chosen["text"], made.rejected["text"], made.fault
        if fault is None and not fits(c.context.messages, chosen, rejected):
            fault = ("pair", "row_too_long")
        if fault is not None:
            texts = {c.rejected.kind: rejected, c.chosen.kind: chosen}
            dropped.append({"id": c.context.id, "reason": fault[1], "side": fault[0], **texts})
            continue
        parts = {c.rejected.kind: made.rejected, "reflection": c.reflection, c.chosen.kind: made.chosen}
        kept.append(
            {
                "id": c.context.id,
                "prompt": c.context.messages,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                **({} if c.reflection is None else {"reflection": c.reflection["reflection"]}),
                "seeds": {kind: part["seed"] for kind, part in parts.items() if part and "seed" in part},
                **model,
            }
        )
    return kept, dropped


def agreement(experiment: Experiment, adapter: Adapter, pairs: Sequence[Row], rate: Rate | None) -> np.ndarray:
    """The weights of pairs, float [pairs], on average 1, see ``dpo.pair_weights``."""
    if experiment.config.dpo.pair_weights == JUDGE:
        if rate is None:
            raise AssertionError("nobody was opened who judges")
        marks = rate([(p["prompt"], p[side][0]["content"]) for p in pairs for side in ("chosen", "rejected")])
    else:
        chats = [experiment.instructions.informed(p["prompt"], p["reflection"]) for p in pairs]
        prompts = [experiment.tokenizer.prompt(chat) for chat in chats]
        replies = [
            reply_ids(experiment, prompt, chat, p[side][0]["content"])
            for prompt, chat, p in zip(prompts, chats, pairs, strict=True)
            for side in ("chosen", "rejected")
        ]
        targets = [Target(n, n // 2) for n in range(len(replies))]
        marks = mean_logprobs(experiment, adapter, prompts, replies, targets, "agreement scoring")
    return weights(marks[::2] - marks[1::2])


def weights(preferred: np.ndarray) -> np.ndarray:
    """Twice the logistic function of by how much the chosen replies are preferred (1 where nobody could tell), over its mean."""
    made = 2 / (1 + np.exp(-np.nan_to_num(preferred)))
    out: np.ndarray = made / made.mean()
    return out
