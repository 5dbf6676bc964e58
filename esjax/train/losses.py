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

    reference: Any  # float32 [B, segments, pairs, 2], log-probs of chosen and rejected under M_t
    valid: Any  # bool [B, segments, pairs]


def branch_sums(values: Array, rows: Rows, segments: int, branches: int) -> Array:
    """Sum ``values`` [B, T] over each branch of each segment: [B, segments, branches]; trunks and padding are left out."""
    slot = (rows.segment - 1) * branches + rows.branch - 1
    slot = jnp.where((rows.segment > 0) & (rows.branch > 0), slot, segments * branches)
    total = jax.vmap(lambda v, s: jax.ops.segment_sum(v, s, num_segments=segments * branches + 1))(values, slot)
    return total[:, :-1].reshape(-1, segments, branches)


reply_sums = jax.jit(branch_sums, static_argnums=(2, 3))  # for a reference that is summed as the loss sums


def dpo_loss(settings: DpoSettings) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7); divided by the number of pairs.

    Per pair, with margin m = beta * ((log pi(c) - log ref(c)) - (log pi(r) - log ref(r))):
    -(1 - e) log sigmoid(m) - e log sigmoid(-m), where e is the label smoothing (conservative DPO, Mitchell 2023), plus
    nll_weight times the mean token NLL of the chosen reply (Pang et al. 2024). With length_normalised every log-prob is
    divided by its reply's token count (Meng et al. 2024 do so without a reference). Targets on trunks are replay: their
    NLL is added, weighted as the rows say, see ``train.loop``.
    """
    e = settings.label_smoothing

    def loss(logprobs: Array, rows: Rows, extra: Pairs) -> Totals:
        _, segments, pairs, _ = extra.reference.shape
        shape = (-1, segments, pairs, 2)
        policy = branch_sums(rows.weight * logprobs, rows, segments, 2 * pairs).reshape(shape)
        tokens = jnp.maximum(branch_sums(rows.weight, rows, segments, 2 * pairs).reshape(shape), 1.0)
        change = policy - extra.reference
        rewards = settings.beta * change
        if settings.length_normalised:
            rewards = rewards / tokens
        margin = rewards[..., 0] - rewards[..., 1]
        preference = -(1 - e) * jax.nn.log_sigmoid(margin) - e * jax.nn.log_sigmoid(-margin)
        nll = -policy[..., 0] / tokens[..., 0]

        def total(x: Array) -> Array:
            return jnp.sum(jnp.where(extra.valid, x, 0.0))

        metrics = {
            "preference_loss": total(preference),
            "margin": total(margin),
            "accuracy": total((margin > 0).astype(jnp.float32)),
            "chosen_reward": total(rewards[..., 0]),
            "rejected_reward": total(rewards[..., 1]),
            "chosen_nll": total(nll),
            # How far the model is from its reference, in nats a token: no sign, so that pairs do not cancel one another.
            "drift": total(jnp.mean(jnp.abs(change) / tokens, axis=-1)),
        }
        replay = -jnp.sum(jnp.where(rows.branch == 0, rows.weight * logprobs, 0.0))
        if settings.replay_weight > 0:
            metrics["replay_nll"] = replay / settings.replay_weight
        return Totals(total(preference + settings.nll_weight * nll) + replay, total(jnp.ones_like(margin)), metrics)

    return loss
