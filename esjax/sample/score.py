"""Score given replies: token log-probs by the same primitive that training uses, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flax import nnx
from jax import Array

from esjax.errors import Stopped
from esjax.hosts import deferred
from esjax.mesh import check_split, everywhere, put_batch
from esjax.model.decoder import Decoder, Execution, token_logprobs
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone, bind
from esjax.programs import program
from esjax.rows import Rows, layout
from esjax.tokens.batches import in_order


class Scorer:
    """Token log-probs of rows under base + adapter, packed into rows of ``row_length``, ``batch_rows`` at a time."""

    def __init__(self, backbone: Backbone, row_length: int, batch_rows: int) -> None:
        check_split("rows scored at once (sft.micro_rows, dpo.micro_rows)", batch_rows)
        self.backbone, self.row_length, self.batch_rows = backbone, row_length, batch_rows

    def score(
        self,
        adapter: Adapter,
        examples: Sequence[Rows],
        done: Callable[[int, list[np.ndarray]], object] = lambda i, branches: None,
        wanted: Iterable[int] | None = None,
    ) -> list[list[np.ndarray]]:
        """For each example the log-probs of its targets, float32, one array for each branch (the trunk's first, if any).

        ``done`` is told each example's number and what it gets, batch after batch. Where some are ``wanted``, batches
        without any of them are left out, and only those are told; a row holds the same examples as ever, for the same
        rounding. Raises Stopped on SIGTERM.
        """
        left = set(range(len(examples)) if wanted is None else wanted)
        out: list[list[np.ndarray]] = [[] for _ in examples]
        how = self.backbone.execution._replace(layout=layout(examples, packed=True), remat="none")
        with deferred() as stops:
            for rows, packed in in_order(examples, self.row_length, self.batch_rows):
                if left.isdisjoint(i for members in packed for i in members):
                    continue
                if stops():
                    raise Stopped
                placed = put_batch(rows)
                logprobs = np.asarray(SCORE(self.backbone.definition, how, adapter, self.backbone.base, placed))
                for r, members in enumerate(packed):
                    for segment, i in enumerate(members, start=1):
                        mine = (rows.segment[r] == segment) & (rows.weight[r] != 0)
                        branches = np.unique(rows.branch[r][mine])
                        out[i] = [logprobs[r][mine & (rows.branch[r] == b)] for b in branches]
                        if i in left:
                            done(i, out[i])
        return out


def _score(definition: nnx.GraphDef[Decoder], how: Execution, adapter: Adapter, base: nnx.State, rows: Rows) -> Array:
    return everywhere(token_logprobs(bind(definition, adapter, base), rows, None, how))


SCORE = program("score", _score, static_argnums=(0, 1))  # one for all scorers: rounds and models share its compilations
