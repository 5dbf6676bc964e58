"""Specificity: how much likelier a reply is in its own context than in another person's, under one model (M_0 in a run)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from esjax.eval.replies import Reply
from esjax.evolve import likelihood
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter


def specificity(
    experiment: Experiment,
    adapter: Adapter,
    systems: Mapping[str, Sequence[Reply]],
    others: Sequence[Sequence[int]],
) -> dict[str, np.ndarray]:
    """The specificity of each system's replies, float [replies] in nats a token, see ``evolve.likelihood``.

    ``others``: for each context, those of other dialogues that its replies are scored in as well; their mean is taken off.
    """
    chats = [experiment.encoder.with_system(list(r.messages)) for r in next(iter(systems.values()))]
    prompts = [experiment.tokenizer.prompt(chat) for chat in chats]
    replies = [
        [likelihood.reply_ids(experiment, prompt, chat, r.text) for r in made]
        for prompt, chat, *made in zip(prompts, chats, *systems.values(), strict=True)
    ]
    found = likelihood.specificity(experiment, adapter, prompts, replies, others)
    return {name: np.asarray([values[n] for values in found]) for n, name in enumerate(systems)}
