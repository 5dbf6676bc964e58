"""Sharing costs nothing in truth: shared trunks, packed rows and every attention path give the loss and the gradient of
one row a sequence, for random dialogues, branch points, packings and paddings.

The oracle is the naive form: every reply in a row of its own behind its whole prompt, plain causal attention, the losses
written out from their formulas. Nothing of rows, spans or kernels is in it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import remasked
from families import llama
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from esjax import rows
from esjax.model.decoder import Decoder, Execution, token_logprobs
from esjax.model.families import LINEARS
from esjax.model.linear import Lora
from esjax.rows import Layout, Rows
from esjax.settings.schema import DpoSettings
from esjax.train.losses import Pairs, dpo_loss, sft_loss
from esjax.train.step import Objective, gradients

VOCAB = 61
ARCH = llama(VOCAB, 32, 2, 4, 2, 16, 48, tied=True, positions=512)
PATHS = ("dense", "chunked", "pallas", "splash")
WIDTH, HEIGHT = 160, 2  # of a batch of shared rows: more than one block of every kernel
NAIVE_WIDTH, NAIVE_HEIGHT = 40, 40
SEGMENTS, PAIRS, TARGETS = 6, 3, 320
BETA = 0.3


class Dialogue(NamedTuple):
    """Tokens, and replies in pairs: (n, chosen, rejected) answer tokens[:n]."""

    tokens: list[int]
    pairs: list[tuple[int, list[int], list[int]]]


@st.composite
def dialogues(draw: Any) -> list[list[Dialogue]]:
    """Dialogues for two rows; their tokens come from one drawn seed, their shape from hypothesis."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(0, VOCAB, n)]

    def dialogue(room: int) -> Dialogue | None:
        length = draw(st.integers(2, 30))
        points = draw(st.lists(st.integers(2, length), min_size=1, max_size=PAIRS))
        pairs = [(n, ids(draw(st.integers(1, 6))), ids(draw(st.integers(1, 6)))) for n in points]
        made = Dialogue(ids(length), pairs)
        return made if len(shared_row(made).tokens) <= room else None

    batch = []
    for _ in range(HEIGHT):
        row: list[Dialogue] = []
        room = draw(st.integers(80, WIDTH))
        for _ in range(draw(st.integers(1, SEGMENTS))):
            made = dialogue(room)
            if made is not None:
                row.append(made)
                room -= len(shared_row(made).tokens)
        batch.append(row)
    return batch


def shared_row(d: Dialogue) -> Rows:
    return rows.trunk_with_replies(d.tokens, [(n, reply) for n, *pair in d.pairs for reply in pair])


def sft_row(d: Dialogue) -> Rows:
    """The dialogue's own tokens from each branch point up to the next one's prompt are its replies."""
    weight = [0.0] * len(d.tokens)
    for n, chosen, _ in d.pairs:
        for i in range(n - 1, min(n - 1 + len(chosen), len(d.tokens) - 1)):
            weight[i] = 1.0
    return rows.trunk(d.tokens, weight)


def packed(batch: list[list[Dialogue]], make: Any) -> Rows:
    made = rows.stack([rows.pack([make(d) for d in row], WIDTH) for row in batch])
    return jax.tree.map(jnp.asarray, made)


# --- the model, and the naive form ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> tuple[nnx.GraphDef[Decoder], nnx.State, nnx.State]:
    """A random decoder whose adapter is random in A and B."""
    lora = Lora(LINEARS, 4, 2.0)
    definition, adapter, base = nnx.split(Decoder(ARCH, lora, jnp.dtype("float32"), nnx.Rngs(0)), nnx.LoRAParam, ...)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    base.embed.set_value(20 * base.embed[...])  # so that what a token sees matters
    return definition, jax.tree.unflatten(tree, drawn), base


def naive_tokens(replies: list[tuple[list[int], list[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """(prompt, reply) in a row each: tokens and which of them are targets."""
    tokens = np.zeros((NAIVE_HEIGHT, NAIVE_WIDTH), np.int32)
    wanted = np.zeros((NAIVE_HEIGHT, NAIVE_WIDTH), bool)
    assert len(replies) <= NAIVE_HEIGHT
    for i, (prompt, reply) in enumerate(replies):
        tokens[i, : len(prompt) + len(reply)] = [*prompt, *reply]
        wanted[i, len(prompt) : len(prompt) + len(reply)] = True
    return tokens, wanted


def naive_logprobs(definition: Any, adapter: Any, base: Any, tokens: Any) -> jax.Array:
    """log p(token i | those before) of plain causal sequences [B, T], all logits at once; 0 for the first."""
    b, t = tokens.shape
    zeros = jnp.zeros((b, t), jnp.int32)
    position = jnp.broadcast_to(jnp.arange(t), (b, t))
    plain = Rows(tokens, position, zeros + 1, zeros, zeros, zeros.astype(jnp.float32))
    decoder = nnx.merge(definition, adapter, base)
    logits = decoder.logits(decoder(plain, Execution("dense", "causal")))
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)[..., 0]
    return jnp.pad(picked, ((0, 0), (1, 0)))


class Answer(NamedTuple):
    loss: float
    gradient: np.ndarray
    logprobs: list[float]  # of all targets, sorted


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@partial(jax.jit, static_argnums=0)
def _naive(definition: Any, adapter: Any, base: Any, tokens: Any, wanted: Any, reference: Any, dpo: Any) -> Any:
    def total(adapter: Any) -> Any:
        each = naive_logprobs(definition, adapter, base, tokens) * wanted
        sums = each.sum(axis=1).reshape(-1, 2)
        present = wanted.any(axis=1).reshape(-1, 2).all(axis=1)
        margin = BETA * ((sums[:, 0] - reference[:, 0]) - (sums[:, 1] - reference[:, 1]))
        preference = jnp.sum(jnp.where(present, jnp.log1p(jnp.exp(-margin)), 0.0))
        return jnp.where(dpo, preference, -each.sum()), each

    return jax.value_and_grad(total, has_aux=True)(adapter)


def naive(model: Any, replies: list[tuple[list[int], list[int]]], reference: np.ndarray, dpo: bool) -> Answer:
    definition, adapter, base = model
    tokens, wanted = naive_tokens(replies)
    (loss, each), gradient = _naive(definition, adapter, base, tokens, wanted, reference, dpo)
    return Answer(float(loss), flat(gradient), sorted(np.asarray(each)[wanted].tolist()))


@partial(jax.jit, static_argnums=(0, 5))
def _shared(definition: Any, adapter: Any, base: Any, batch: Rows, extra: Any, how: Execution) -> Any:
    loss = sft_loss if extra is None else dpo_loss(DpoSettings(beta=BETA))
    totals, gradient = gradients(Objective(definition, loss, TARGETS, how), adapter, base, batch, extra)
    scored = token_logprobs(nnx.merge(definition, adapter, base), batch, TARGETS, how._replace(remat="none"))
    return totals.loss, gradient, scored


def shared(model: Any, path: Any, layout: Layout, batch: Rows, extra: Any) -> Answer:
    how = Execution(path, layout, "full", interpret=True)
    loss, gradient, scored = _shared(*model, batch, extra, how)
    return Answer(float(loss), flat(gradient), sorted(np.asarray(scored)[np.asarray(batch.weight) != 0].tolist()))


def apart(a: Answer, b: Answer) -> float:
    """The largest of the relative differences of loss, gradient and log-probs."""
    assert len(a.logprobs) == len(b.logprobs)
    gradient = float(np.linalg.norm(a.gradient - b.gradient) / np.linalg.norm(b.gradient))
    scores = float(np.abs(np.subtract(a.logprobs, b.logprobs)).max() / np.abs(b.logprobs).max())
    return max(abs(a.loss - b.loss) / abs(b.loss), gradient, scores)


# --- the properties ---------------------------------------------------------------------------------------------------


def preference_case(batch: list[list[Dialogue]]) -> tuple[list[tuple[list[int], list[int]]], np.ndarray, Pairs]:
    """The replies one a row, their references, and the references as the loss of shared rows takes them."""
    replies, reference = [], np.zeros((NAIVE_HEIGHT // 2, 2), np.float32)
    values = np.zeros((HEIGHT, SEGMENTS, PAIRS, 2), np.float32)
    valid = np.zeros((HEIGHT, SEGMENTS, PAIRS), bool)
    for r, row in enumerate(batch):
        for s, d in enumerate(row):
            for p, (n, *pair) in enumerate(d.pairs):
                number = len(replies) // 2
                reference[number] = (-3.0 - number, -2.0 + 0.5 * number)
                values[r, s, p], valid[r, s, p] = reference[number], True
                replies += [(d.tokens[:n], reply) for reply in pair]
    return replies, reference, Pairs(values, valid)


def few(batch: list[list[Dialogue]]) -> list[list[Dialogue]]:
    """No more pairs than the naive form has rows for, and at least one dialogue."""
    left, out = NAIVE_HEIGHT // 2, []
    for row in batch:
        kept = []
        for d in row:
            if len(d.pairs) <= left:
                kept.append(d)
                left -= len(d.pairs)
        out.append(kept)
    return out


@pytest.mark.parametrize("path", PATHS)
def test_preferences_on_shared_trunks(model: Any, path: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(dialogues())
    def equal(drawn: list[list[Dialogue]]) -> None:
        batch = few(drawn)
        assume(any(batch))
        replies, reference, extra = preference_case(batch)
        expected = naive(model, replies, reference, dpo=True)
        together = packed(batch, shared_row)
        assert apart(shared(model, path, "branched", together, extra), expected) <= 1e-5

    equal()


@pytest.mark.parametrize("layout", ["packed", "branched"])
@pytest.mark.parametrize("path", PATHS)
def test_all_turns_of_a_dialogue_at_once(model: Any, path: str, layout: Layout) -> None:
    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(dialogues())
    def equal(drawn: list[list[Dialogue]]) -> None:
        batch = [[d for d in row if (sft_row(d).weight != 0).any()] for row in drawn]
        replies = []
        for d in [d for row in batch for d in row]:
            weight = sft_row(d).weight
            targets = [i + 1 for i in np.flatnonzero(weight)]
            replies += [(d.tokens[:i], [d.tokens[i]]) for i in targets]  # one target a row: the plainest form there is
        assume(0 < len(replies) <= NAIVE_HEIGHT)
        expected = naive(model, replies, np.zeros((NAIVE_HEIGHT // 2, 2), np.float32), dpo=False)
        assert apart(shared(model, path, layout, packed(batch, sft_row), None), expected) <= 1e-5

    equal()


@pytest.mark.parametrize("path", PATHS)
def test_a_mask_off_by_one_is_caught(model: Any, path: str) -> None:
    rng = np.random.default_rng(5)
    ids = lambda n: [int(i) for i in rng.integers(0, VOCAB, n)]  # noqa: E731
    d = [Dialogue(ids(20), [(6, ids(4), ids(3)), (17, ids(2), ids(5))]), Dialogue(ids(9), [(9, ids(3), ids(3))])]
    batch = [d, [Dialogue(ids(30), [(11, ids(6), ids(2))])]]
    replies, reference, extra = preference_case(batch)
    expected = naive(model, replies, reference, dpo=True)
    good = packed(batch, shared_row)
    assert apart(shared(model, path, "branched", good, extra), expected) <= 1e-5
    ones = np.ones_like(good.segment)
    wrong = {
        "one trunk token less": remasked(good, -1),
        "one trunk token more": remasked(good, 1),
        "branches that see each other": remasked(good, branch=np.minimum(good.branch, 1)),
        "segments that see each other": remasked(good, segment=np.where(good.segment == 2, ones, good.segment)),
        "a position off by one": good._replace(position=good.position + (good.branch > 0)),
    }
    for what, broken in wrong.items():
        # The loss reads branch and segment as well, so only the log-probs say what the mask did.
        got = shared(model, path, "branched", broken, extra)
        assert float(np.abs(np.subtract(got.logprobs, expected.logprobs)).max()) > 1e-3, what
