"""Losses as sums over a batch and the weight to divide by, so that accumulation over micro-batches is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.rows import Rows
from esjax.settings.schema import DpoSettings


class Totals(NamedTuple):
    """Sums over a batch; every one of them divided by ``weight`` is a mean."""

    loss: Array
    weight: Array
    metrics: dict[str, Array]


Loss = Callable[[Array, Rows, Any], Totals]  # (token log-probs [B, T], rows, extra data of the batch) -> Totals


def sft_loss(logprobs: Array, rows: Rows, extra: Any) -> Totals:
    """Negative log-likelihood, weighted; divided by the number of target tokens."""
    return Totals(-jnp.sum(rows.weight * logprobs), jnp.sum(rows.weight), {})


class Pairs(NamedTuple):
    """The reference of a batch of pairs: branches 2p - 1 (chosen) and 2p (rejected) of segment s are pair [s - 1, p - 1]."""

    reference: Any  # float32 [B, segments, pairs, 2], log-probs of chosen and rejected under the reference
    weight: (
        Any  # float32 [B, segments, pairs], what a pair's loss is multiplied by, usually 1; 0 where there is no pair
    )


def branch_sums(values: Array, rows: Rows, segments: int, branches: int) -> Array:
    """Sum ``values`` [B, T] over each branch of each segment: [B, segments, branches]; trunks and padding are left out."""
    slot = (rows.segment - 1) * branches + rows.branch - 1
    slot = jnp.where((rows.segment > 0) & (rows.branch > 0), slot, segments * branches)
    total = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=segments * branches + 1))(values, slot)
    return total[:, :-1].reshape(-1, segments, branches)


reply_sums = jax.jit(branch_sums, static_argnums=(2, 3))  # for a reference that is summed as the loss sums


class Preference(NamedTuple):
    """Of each pair the loss [...], the margin [...], and the rewards of chosen and rejected [..., 2]."""

    loss: Array
    margin: Array
    rewards: Array


def preference(settings: DpoSettings, policy: Any, reference: Any, tokens: Any) -> Preference:
    """The loss of pairs, by the log-probs [..., 2] of chosen c and rejected r under model and reference, and their tokens.

    A reward is r(y) = beta (log pi(y) - log ref(y)), with length_normalised a token; the margin is m = r(c) - r(r), and
    x = m - target_margin + length_weight (|c| - |r|) (SimPO's and R-DPO's terms). With e the label smoothing:

    - sigmoid: -(1 - e) log sigmoid(x) - e log sigmoid(-x) (Rafailov et al. 2023, eq. 7; Mitchell 2023)
    - robust: (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e) (Chowdhury et al. 2024, eq. 12)
    - hinge: max(0, 1 - x) (Zhao et al. 2023)
    - ipo: (m / beta - 1 / (2 beta))^2 of rewards a token (Azar et al. 2024, eq. 17)
    - apo_zero: 1 - sigmoid(r(c)) + sigmoid(r(r)) (D'Oosterlinck et al. 2024, eq. 7)
    - apo_down: sigmoid(r(c)) + 1 - sigmoid(m) (the same, eq. 8)
    - simpo: sigmoid's, of r(y) = beta log pi(y) / |y| (Meng et al. 2024, eq. 6)
    - nll: -log pi(c) / |c|, which sees no rejected reply
    """
    change = policy if settings.loss == "simpo" else policy - reference
    if settings.length_normalised or settings.loss in ("ipo", "simpo"):
        change = change / tokens
    rewards, e = settings.beta * change, settings.label_smoothing
    margin = rewards[..., 0] - rewards[..., 1]
    x = margin - settings.target_margin + settings.length_weight * (tokens[..., 0] - tokens[..., 1])
    right, wrong = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    if settings.loss in ("sigmoid", "simpo"):
        loss = (1 - e) * right + e * wrong
    elif settings.loss == "robust":
        loss = ((1 - e) * right - e * wrong) / (1 - 2 * e)
    elif settings.loss == "hinge":
        loss = jax.nn.relu(1 - x)
    elif settings.loss == "ipo":
        loss = jnp.square(margin / settings.beta - 1 / (2 * settings.beta))
    elif settings.loss == "nll":
        loss = -policy[..., 0] / tokens[..., 0]
    elif settings.loss == "apo_zero":
        loss = 1 - jax.nn.sigmoid(rewards[..., 0]) + jax.nn.sigmoid(rewards[..., 1])
    else:
        loss = jax.nn.sigmoid(rewards[..., 0]) + 1 - jax.nn.sigmoid(margin)
    return Preference(loss, margin, rewards)


def dpo_loss(settings: DpoSettings) -> Loss:
    """The loss of ``preference``, times each pair's weight; divided by the number of pairs.

    To it comes nll_weight times the mean token NLL of the chosen reply (Pang et al. 2024). What rows weigh less than 1 counts
    less in every sum over a reply (LD-DPO, see ``evolve.pairs``). Targets on trunks are replay: their NLL is added, weighted
    as the rows say, see ``train.loop``.
    """

    def loss(logprobs: Array, rows: Rows, extra: Pairs) -> Totals:
        _, segments, pairs, _ = extra.reference.shape
        shape = (-1, segments, pairs, 2)
        policy = branch_sums(rows.weight * logprobs, rows, segments, 2 * pairs).reshape(shape)
        tokens = jnp.maximum(branch_sums(rows.weight, rows, segments, 2 * pairs).reshape(shape), 1.0)
        each, margin, rewards = preference(settings, policy, extra.reference, tokens)
        nll = -policy[..., 0] / tokens[..., 0]

        def total(x: Array) -> Array:
            return jnp.sum(jnp.where(extra.weight > 0, x, 0.0))

        metrics = {
            "preference_loss": total(each),
            "margin": total(margin),
            "accuracy": total((margin > 0).astype(jnp.float32)),
            "chosen_reward": total(rewards[..., 0]),
            "rejected_reward": total(rewards[..., 1]),
            "chosen_nll": total(nll),
            # How far the model is from its reference, in nats a token: no sign, so that pairs do not cancel one another.
            "drift": total(jnp.mean(jnp.abs(policy - extra.reference) / tokens, axis=-1)),
        }
        replay = -jnp.sum(jnp.where(rows.branch == 0, rows.weight * logprobs, 0.0))
        if settings.replay_weight > 0:
            metrics["replay_nll"] = replay / settings.replay_weight
        return Totals(
            total(extra.weight * (each + settings.nll_weight * nll)) + replay, total(jnp.ones_like(margin)), metrics
        )

    return loss
