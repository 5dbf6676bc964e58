"""Score given replies: token log-probs by the same primitive that training uses, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from esjax.errors import Stopped
from esjax.model.decoder import Decoder, Execution, token_logprobs
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone, bind
from esjax.rows import Rows, layout, trunk
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, check_split, replicated, shard_batch
from esjax.runtime.programs import program
from esjax.tokens.batches import Packed, batch, pack

MOST_TOPS = 20  # likeliest tokens that are told of a place
TOPS_BUCKET = 256  # rows of texts whose likeliest tokens are wanted have a multiple of so many tokens
TOPS_ROW = 2048  # and so many at most, unless one text is longer


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
        packed = pack([len(e.tokens) for e in examples], self.row_length)
        steps = [packed[i : i + self.batch_rows] for i in range(0, len(packed), self.batch_rows)]
        needed = [step for step in steps if not left.isdisjoint(i for row in step for i in row)]
        for members, rows, computed in self.batches(adapter, examples, needed):
            logprobs = np.asarray(computed)
            for r, row in enumerate(members):
                for segment, i in enumerate(row, start=1):
                    mine = (rows.segment[r] == segment) & (rows.weight[r] != 0)
                    branches = np.unique(rows.branch[r][mine])
                    out[i] = [logprobs[r][mine & (rows.branch[r] == b)] for b in branches]
                    if i in left:
                        done(i, out[i])
        return out

    def batches(
        self, adapter: Adapter, examples: Sequence[Rows], steps: Iterable[list[Packed]]
    ) -> Iterator[tuple[list[Packed], Rows, Array]]:
        """Batches packed as ``steps`` say, which name the examples of each row: the packing, the rows [B, T] and the
        log-probs of their targets, float32 [B, T]. Raises Stopped on SIGTERM."""
        execution = self.backbone.execution._replace(layout=layout(examples, packed=True), remat="none")
        adapter = self.backbone.computed(adapter)
        with current().stop.deferred() as stops:
            for members in steps:
                if stops():
                    raise Stopped
                rows = batch(examples, members, self.row_length, range(self.batch_rows))
                yield (
                    members,
                    rows,
                    SCORE(self.backbone.definition, execution, adapter, self.backbone.base, shard_batch(rows)),
                )


def mean_divergence(
    backbone: Backbone, adapters: tuple[Adapter, Adapter], examples: Sequence[Rows], row_length: int, batch_rows: int
) -> float:
    """KL(p || q) a token between two models of one backbone, p the first adapter's: the mean over all targets of the examples,
    each of the whole vocabulary (nats). Raises Stopped on SIGTERM."""
    packed = pack([len(e.tokens) for e in examples], row_length)
    how = backbone.execution._replace(layout=layout(examples, packed=True), remat="none")
    first, second = map(backbone.computed, adapters)
    total, count = 0.0, 0
    with current().stop.deferred() as stops:
        for i in range(0, len(packed), batch_rows):
            if stops():
                raise Stopped
            rows = batch(examples, packed[i : i + batch_rows], row_length, range(batch_rows))
            total += float(DIVERGENCE(backbone.definition, how, first, second, backbone.base, shard_batch(rows)))
            count += int((rows.weight != 0).sum())
    return total / max(count, 1)


def _split(x: Array, size: int) -> Array:
    """[B, T, ...] in chunks of ``size`` tokens, the last filled up: [chunks, B, size, ...]."""
    b, t = x.shape[:2]
    count = -(-t // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - t), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(b, count, size, *x.shape[2:]).swapaxes(0, 1)


def _divergence(
    definition: nnx.GraphDef[Decoder],
    execution: Execution,
    first: Adapter,
    second: Adapter,
    base: nnx.State,
    rows: Rows,
) -> Array:
    """The sum over all targets."""
    p, q = (bind(definition, adapter, base) for adapter in (first, second))
    b, t = rows.tokens.shape
    size = max(1, min(t, execution.logits // (b * p.arch.vocab)))

    def one(part: tuple[Array, Array, Array]) -> Array:
        x, y, wanted = part
        a, z = jax.nn.log_softmax(p.logits(x)), jax.nn.log_softmax(q.logits(y))
        each = jnp.sum(jnp.exp(a) * (a - z), axis=-1)
        return jnp.sum(jnp.where(wanted, each, 0.0))

    wanted = rows.weight != 0
    parts = (_split(x, size) for x in (p(rows, execution), q(rows, execution), wanted))
    return replicated(jnp.sum(jax.lax.map(one, tuple(parts))))


DIVERGENCE = program("divergence", _divergence, static_argnums=(0, 1))


def _score(
    definition: nnx.GraphDef[Decoder], execution: Execution, adapter: Adapter, base: nnx.State, rows: Rows
) -> Array:
    return replicated(token_logprobs(bind(definition, adapter, base), rows, None, execution))


SCORE = program("score", _score, static_argnums=(0, 1))  # one for all scorers: rounds and models share its compilations


class Tops(NamedTuple):
    """What a model expects at each place of a text but the first, by its log-probs."""

    logprobs: np.ndarray  # float32 [n - 1], of the tokens that stand there
    ids: np.ndarray  # int32 [n - 1, MOST_TOPS], the likeliest tokens, in order
    top: np.ndarray  # float32 [n - 1, MOST_TOPS], theirs


def tops(backbone: Backbone, adapter: Adapter, texts: Sequence[Sequence[int]]) -> list[Tops]:
    """For each text the log-probs of its tokens from the second on, and of the likeliest ones in their places.

    Texts share rows, as few and as short as hold them, so that many short texts cost little more than one.
    """
    examples, sizes = [trunk(ids) for ids in texts], [len(ids) for ids in texts]
    length = -(-max(max(sizes), min(sum(sizes), TOPS_ROW)) // TOPS_BUCKET) * TOPS_BUCKET
    packed = pack(sizes, length)
    how = backbone.execution._replace(layout="packed", remat="none")
    computed, at_once = backbone.computed(adapter), batch_groups()
    out: dict[int, Tops] = {}
    for first in range(0, len(packed), at_once):
        members = packed[first : first + at_once]
        rows = batch(examples, members, length, range(at_once))
        made = [np.asarray(x) for x in TOPS(backbone.definition, how, computed, backbone.base, shard_batch(rows))]
        for r, row in enumerate(members):
            for segment, i in enumerate(row, start=1):
                places = np.flatnonzero(rows.segment[r] == segment)[:-1]  # what follows the last is another text
                out[i] = Tops(*(x[r, places] for x in made))
    return [out[i] for i in range(len(texts))]


def _tops(
    definition: nnx.GraphDef[Decoder], execution: Execution, adapter: Adapter, base: nnx.State, rows: Rows
) -> tuple[Array, Array, Array]:
    model = bind(definition, adapter, base)
    b, t = rows.tokens.shape
    size = max(1, min(t, execution.logits // (b * model.arch.vocab)))

    def one(part: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        logprobs = jax.nn.log_softmax(model.logits(part[0]))
        top, ids = jax.lax.top_k(logprobs, MOST_TOPS)
        return jnp.take_along_axis(logprobs, part[1][..., None], axis=-1)[..., 0], ids, top

    following = jnp.pad(rows.tokens[:, 1:], ((0, 0), (0, 1)))
    made = jax.lax.map(one, (_split(model(rows, execution), size), _split(following, size)))
    joined = [x.swapaxes(0, 1).reshape(b, -1, *x.shape[3:]) for x in made]
    return replicated(tuple(joined))


TOPS = program("tops", _tops, static_argnums=(0, 1))
