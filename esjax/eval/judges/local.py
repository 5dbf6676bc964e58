"""A judge that is a model on these devices: its answer is how likely it finds each choice, so there always is one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from esjax.eval.choices import Likelihoods, choice_likelihoods
from esjax.eval.judges.judge import Answer, Done, Question
from esjax.evolve.experiment import model_hash, open_model
from esjax.evolve.models import named_model


class Local:
    """A model as a judge: each choice is scored as the whole answer, all choices of a question on one trunk."""

    alone = False

    def __init__(self, spec: str, sha256: str | None) -> None:
        """``spec`` as of ``esjax sample --model``, and the file's hash where it needs one. Raises InputError."""
        self.experiment, self._adapter = open_model(spec, named_model(spec, sha256))
        self.name = f"model:{spec} {model_hash(spec, self.experiment)} {self.experiment.backbone.dtype}"

    def ask(self, questions: Sequence[Question], done: Done) -> None:
        def scored(i: int, found: Likelihoods) -> None:
            weights = np.exp(found.sums - found.sums.max())
            done(i, Answer(tuple((weights / weights.sum()).tolist()), found.read))

        choice_likelihoods(self.experiment, self._adapter, [(q.messages, q.choices) for q in questions], scored)
