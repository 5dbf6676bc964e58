"""Specificity: how much likelier a reply is in its own context than in another person's, under one model.

log p(reply | C_n) - log p(reply | C of another dialogue), in nats a token. A reply that would fit anybody scores near 0. All
systems' replies are scored under the same model (M_0 in a run), on trunks that replies to one context share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from esjax.eval.replies import Reply
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.rows import Rows, trunk_with_replies
from esjax.run.progress import progress
from esjax.runtime.mesh import rows_at_once
from esjax.sample.score import Scorer


class Target(NamedTuple):
    """A reply in a context, its own or another one."""

    system: str
    reply: int
    context: int


def specificity(
    experiment: Experiment,
    adapter: Adapter,
    systems: Mapping[str, Sequence[Reply]],
    others: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
    """The specificity of each system's replies, float [replies] in nats a token; NaN of an empty one or without others.

    ``others``: for each context, those of other dialogues that its replies are scored in as well; their mean is taken off.
    """
    replies = next(iter(systems.values()))
    encoder, dpo = (
        experiment.encoder,
        experiment.config.dpo,
    )  # scored as the references of pairs are, by the same program
    prompts = [experiment.tokenizer.prompt(encoder.with_system(list(r.messages))) for r in replies]
    texts = {name: _tokens(experiment, prompts, each) for name, each in systems.items()}
    wanted: dict[int, list[Target]] = {}
    for name, tokens in texts.items():
        for i, ids in enumerate(tokens):
            for context in (i, *others[i]) if ids and others[i] else ():
                wanted.setdefault(context, []).append(Target(name, i, context))
    needs = [len(prompts[c]) + max(len(texts[t.system][t.reply]) for t in group) for c, group in wanted.items()]
    longest = max([dpo.row_length, *needs])  # another's long reply to a long context may need more
    rows, members = list[Rows](), list[list[Target]]()
    for context, targets in wanted.items():
        stem = prompts[context]
        for group in _groups(targets, lambda t: len(texts[t.system][t.reply]) + 1, longest - len(stem) + 1):
            rows.append(trunk_with_replies(stem, [(len(stem), texts[t.system][t.reply]) for t in group]))
            members.append(group)
    means: dict[Target, float] = {}

    def done(i: int, branches: list[np.ndarray]) -> None:
        means.update({t: float(x.mean(dtype=np.float64)) for t, x in zip(members[i], branches, strict=True)})
        advance(1)

    scorer = Scorer(experiment.backbone, longest, rows_at_once("dpo", dpo))
    with progress("specificity scoring", len(rows)) as advance:
        scorer.score(adapter, rows, done)
    return {
        name: np.asarray(
            [
                means[Target(name, i, i)] - np.mean([means[Target(name, i, c)] for c in others[i]])
                if ids and others[i]
                else np.nan
                for i, ids in enumerate(tokens)
            ]
        )
        for name, tokens in texts.items()
    }


def _tokens(experiment: Experiment, prompts: Sequence[list[int]], replies: Sequence[Reply]) -> list[list[int]]:
    """Each reply's tokens, its end of turn among them; none of an empty one."""
    tokenizer, encoder = experiment.tokenizer, experiment.encoder
    return [
        tokenizer.reply(prompt, encoder.with_system([*r.messages, {"role": "assistant", "content": r.text}]))
        if r.text
        else []
        for prompt, r in zip(prompts, replies, strict=True)
    ]


def _groups(targets: Sequence[Target], size: Callable[[Target], int], room: int) -> list[list[Target]]:
    """Targets of one context, as many on one trunk as a row has room for."""
    out: list[list[Target]] = []
    used = room + 1
    for t in targets:
        if used + size(t) > room:
            out.append([])
            used = 0
        out[-1].append(t)
        used += size(t)
    return out
