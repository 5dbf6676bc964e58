"""Score given replies: token log-probs by the same primitive that training uses, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax import Array

from esjax.model.decoder import Decoder, Execution, token_logprobs
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone, bind
from esjax.rows import Rows, layout
from esjax.tokens.batches import in_order

BUCKET = 128  # target counts are rounded up to a multiple of this, so that few programs are compiled


class Scorer:
    """Token log-probs of rows under base + adapter, packed into rows of ``row_length``, ``batch_rows`` at a time."""

    def __init__(self, backbone: Backbone, row_length: int, batch_rows: int) -> None:
        self.backbone, self.row_length, self.batch_rows = backbone, row_length, batch_rows
        self._program = jax.jit(partial(_score, backbone.definition), static_argnames=("targets", "how"))

    def score(
        self, adapter: Adapter, examples: Sequence[Rows], advance: Callable[[int], None] = lambda n: None
    ) -> list[list[np.ndarray]]:
        """For each example the log-probs of its targets, float32, one array for each branch (the trunk's first, if any).

        ``advance`` is told how many examples are done after each batch.
        """
        out: list[list[np.ndarray]] = [[] for _ in examples]
        how = self.backbone.execution._replace(layout=layout(examples, packed=True), remat="none")
        for rows, packed in in_order(examples, self.row_length, self.batch_rows):
            most = int((rows.weight != 0).sum())
            targets = -(-most // BUCKET) * BUCKET
            logprobs = np.asarray(self._program(adapter, self.backbone.base, rows, targets=targets, how=how))
            for r, members in enumerate(packed):
                for segment, i in enumerate(members, start=1):
                    mine = (rows.segment[r] == segment) & (rows.weight[r] != 0)
                    branches = np.unique(rows.branch[r][mine])
                    out[i] = [logprobs[r][mine & (rows.branch[r] == b)] for b in branches]
            advance(sum(map(len, packed)))
        return out


def _score(
    definition: nnx.GraphDef[Decoder], adapter: Adapter, base: nnx.State, rows: Rows, targets: int, how: Execution
) -> Array:
    return token_logprobs(bind(definition, adapter, base), rows, targets, how)
