"""How likely replies are in their own contexts and in other people's, under one model, on trunks that replies share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from esjax.corpus.dialogue import Message
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.rows import Rows, trunk_with_replies
from esjax.run.progress import progress
from esjax.runtime.mesh import batch_groups, rows_at_once
from esjax.sample.score import Scorer

ROOM = 2048  # tokens of a row that is longer than those of DPO, at most, unless one reply needs more


class Target(NamedTuple):
    """A reply, by its number, in a context, by its number."""

    reply: int
    context: int


def mean_logprobs(
    experiment: Experiment,
    adapter: Adapter,
    prompts: Sequence[list[int]],
    replies: Sequence[list[int]],
    targets: Sequence[Target],
    label: str,
) -> np.ndarray:
    """The mean log-prob of a token, float64 [targets], of ``replies`` (token ids, none empty) behind ``prompts``.

    A prompt is computed once for as many replies to it as a row holds: rows are as long as the most wanted prompt with all
    its replies, up to ROOM tokens, and as many at once as hold the tokens of as many rows of DPO.
    """
    wanted: dict[int, list[int]] = {}
    for number, target in enumerate(targets):
        wanted.setdefault(target.context, []).append(number)
    sizes = [len(replies[t.reply]) + 1 for t in targets]
    dpo = experiment.config.dpo
    whole = [len(prompts[c]) - 1 + sum(sizes[n] for n in group) for c, group in wanted.items()]
    needs = [len(prompts[c]) - 1 + max(sizes[n] for n in group) for c, group in wanted.items()]
    length = max([dpo.row_length, *(min(n, ROOM) for n in whole), *needs])
    rows, members = list[Rows](), list[list[int]]()
    for context, numbers in wanted.items():
        stem = prompts[context]
        for group in _groups(numbers, sizes, length - len(stem) + 1):
            rows.append(trunk_with_replies(stem, [(len(stem), replies[targets[n].reply]) for n in group]))
            members.append(group)
    means = np.zeros(len(targets))

    def done(i: int, branches: list[np.ndarray]) -> None:
        means[members[i]] = [x.mean(dtype=np.float64) for x in branches]
        advance(1)

    shares = batch_groups()
    at_once = max(1, rows_at_once("dpo", dpo) * dpo.row_length // length // shares) * shares
    with progress(label, len(rows)) as advance:
        Scorer(experiment.backbone, length, at_once).score(adapter, rows, done)
    return means


def specificity(
    experiment: Experiment,
    adapter: Adapter,
    prompts: Sequence[list[int]],
    replies: Sequence[Sequence[list[int]]],
    others: Sequence[Sequence[int]],
) -> list[np.ndarray]:
    """For each context the specificity of each of its replies: how much likelier it is there than in other people's contexts.

    log p(reply | C_n) - mean log p(reply | C of another dialogue), in nats a token; NaN of an empty reply, or without others.
    A reply that would fit anybody is near 0. ``others``: for each context, those of other dialogues that are taken.
    """
    flat = [(i, ids) for i, mine in enumerate(replies) for ids in mine]
    targets = [Target(n, c) for n, (i, ids) in enumerate(flat) if ids and others[i] for c in (i, *others[i])]
    found = mean_logprobs(experiment, adapter, prompts, [ids for _, ids in flat], targets, "specificity scoring")
    means = dict(zip(targets, found, strict=True))
    values = [
        means[Target(n, i)] - np.mean([means[Target(n, c)] for c in others[i]]) if ids and others[i] else np.nan
        for n, (i, ids) in enumerate(flat)
    ]
    ends = np.cumsum([len(mine) for mine in replies])
    return np.split(np.asarray(values, float), ends[:-1])


def reply_ids(experiment: Experiment, prompt: list[int], messages: list[Message], text: str) -> list[int]:
    """A reply's tokens behind a chat and its prompt's tokens, its end of turn among them; none of an empty one."""
    return experiment.tokenizer.reply(prompt, [*messages, {"role": "assistant", "content": text}]) if text else []


def _groups(numbers: Sequence[int], sizes: Sequence[int], room: int) -> list[list[int]]:
    """Replies to one prompt, as many on one trunk as a row has room for."""
    out: list[list[int]] = []
    used = room + 1
    for n in numbers:
        if used + sizes[n] > room:
            out.append([])
            used = 0
        out[-1].append(n)
        used += sizes[n]
    return out
