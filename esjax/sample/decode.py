"""The decoding program: one prefill, one ``lax.while_loop``; what the user may change between runs is traced.

Temperature, top-p, top-k, seeds, stop tokens and the automaton's table are arguments, so changing them compiles nothing.
Every leaf draws from its own key, folded with the token's number: its text does not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from esjax.model.attention import Spans, sees, spans
from esjax.model.decoder import Cache, Decoder, Execution
from esjax.model.lora import Adapter
from esjax.model.weights import bind
from esjax.rows import Rows
from esjax.sample.constrain import Automaton


class Draw(NamedTuple):
    """How tokens are drawn; arrays of fixed shape, so that a change compiles nothing."""

    temperature: Any  # float32; 0 is greedy
    top_p: Any  # float32 in (0, 1]
    top_k: Any  # int32; 0 is all
    stop: Any  # int32 [n], tokens that end a row; -1 entries never match


class Trace(NamedTuple):
    """What decoding returns."""

    tokens: Array  # int32 [B * M, N], the stop token included; 0 after it
    logprobs: Array  # float32 [B * M, N], under the model's own distribution (temperature 1, nothing cut off)
    length: Array  # int32 [B * M], tokens drawn
    stopped: Array  # bool [B * M], whether a stop token ended the row


class State(NamedTuple):
    """The loop's state."""

    drawn: Array  # int32, tokens drawn so far by every live leaf
    token: Array  # int32 [B * M], the newest token
    alive: Array  # bool [B * M]
    trace: Trace
    automaton: Array  # int32 [B * M], state of the constraint
    used: Array  # int32 [B * M], tokens spent in the current part of the constraint's template
    cache: Cache


def decode(
    definition: nnx.GraphDef[Decoder],
    adapter: Adapter,
    base: nnx.State,
    prompts: Rows,
    leaves: Array,
    seeds: Array,
    live: Array,
    draw: Draw,
    constraint: Automaton | None,
    max_tokens: int,
    how: Execution,
) -> Trace:
    """Grow each row at its M leaves. Results are [B * M, ...], row by row.

    Args:
        prompts: rows [B, T]: trunks with branches, or several segments; what they share is computed and cached once.
        leaves: int32 [B, M], the row index of each prompt's last token.
        seeds: uint32 [B, M], one a leaf.
        live: bool [B, M], false for leaves that only fill the batch.
        max_tokens: N, static.
    """
    model = bind(definition, adapter, base)
    (b, t), m = prompts.tokens.shape, leaves.shape[1]
    how = how._replace(layout="causal" if m == 1 else "branched")  # one prompt a row, or any
    slots = t + max_tokens * m  # the n-th new tokens of a row's leaves lie beside each other
    hidden, cache = model.prefill(prompts, slots, how)
    keys = jax.vmap(jax.random.key)(seeds.reshape(-1))
    own = Spans(*(jnp.take_along_axis(x, leaves, axis=1) for x in spans(prompts)))
    index = jnp.arange(t)
    prompt_mask = jax.vmap(lambda s, leaf: sees(s, leaf, index))(own, leaves)
    prompt_mask = jnp.pad(prompt_mask, ((0, 0), (0, 0), (0, max_tokens * m)))
    leaf_position = jnp.take_along_axis(prompts.position, leaves, axis=1)
    slot = jnp.arange(slots)
    new_of_leaf = (slot >= t) & ((slot - t) % m == jnp.arange(m)[:, None])  # [M, S]

    def pick(x: Array, state: State) -> State:
        """Draw the next token from hidden states [B * M, D] and record it."""
        logits = model.logits(x)
        allowed, chosen_next = logits, None
        if constraint is not None:
            chosen_next = constraint.next[state.automaton].astype(jnp.int32)
            allowed = jnp.where(_within_budget(constraint, state, chosen_next), logits, -jnp.inf)
        uniform = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, state.drawn)))(keys)
        token = draw_token(allowed, uniform, draw)
        logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        token, logprob = jnp.where(state.alive, token, 0), jnp.where(state.alive, logprob, 0.0)
        stop = state.alive & jnp.any(token[:, None] == draw.stop, axis=1)
        trace = state.trace
        trace = Trace(
            trace.tokens.at[:, state.drawn].set(token),
            trace.logprobs.at[:, state.drawn].set(logprob),
            trace.length + state.alive,
            trace.stopped | stop,
        )
        automaton, used = state.automaton, state.used
        if constraint is not None and chosen_next is not None:
            automaton = jnp.maximum(jnp.take_along_axis(chosen_next, token[:, None], axis=1)[:, 0], 0)
            used = jnp.where(constraint.part[automaton] == constraint.part[state.automaton], used + 1, 1)
        return State(state.drawn + 1, token, state.alive & ~stop, trace, automaton, used, state.cache)

    def advance(state: State) -> State:
        at = t + (state.drawn - 1) * m
        mask = prompt_mask | (new_of_leaf & (slot < at + m))
        token = state.token.reshape(b, m)
        x, cache = model.step(token, leaf_position + state.drawn, state.cache, at, mask)
        return pick(x.reshape(b * m, -1), state._replace(cache=cache))

    zeros = jnp.zeros(b * m, jnp.int32)
    empty = Trace(
        jnp.zeros((b * m, max_tokens), jnp.int32), jnp.zeros((b * m, max_tokens)), zeros, jnp.zeros(b * m, bool)
    )
    at_leaves = jnp.take_along_axis(hidden, leaves[..., None], axis=1).reshape(b * m, -1)
    first = pick(at_leaves, State(jnp.int32(0), zeros, live.reshape(-1), empty, zeros, zeros, cache))
    return jax.lax.while_loop(lambda s: (s.drawn < max_tokens) & jnp.any(s.alive), advance, first).trace


def _within_budget(constraint: Automaton, state: State, following: Array) -> Array:
    """Which tokens [B, V] are allowed: those with a next state that leaves the part, or from where it can still be closed."""
    here = state.automaton
    stays = constraint.part[following] == constraint.part[here][:, None]
    spent = jnp.where(stays, state.used[:, None] + 1, 1)
    return (following >= 0) & (spent + constraint.close[following] <= constraint.budget[following])


def draw_token(logits: Array, uniform: Array, draw: Draw) -> Array:
    """Draw one token a row from float32 logits [B, V], given uniform numbers [B] in [0, 1).

    Top-k, then top-p, on the probabilities at the given temperature. Both keep the tokens above a threshold, which is
    found by bisection over the float's bits instead of sorting the vocabulary; tokens that tie with the threshold stay.
    """

    def sample() -> Array:
        x = logits / draw.temperature
        p = jnp.exp(x - jnp.max(x, axis=-1, keepdims=True))  # unnormalised, most likely = 1

        def keep(p: Array, enough: Array, measure: Array) -> Array:
            return jnp.where(p >= _threshold(p, enough, measure), p, 0.0)

        p = jax.lax.cond(
            draw.top_k > 0, lambda p: keep(p, draw.top_k.astype(jnp.float32), jnp.ones_like(p)), lambda p: p, p
        )
        total = jnp.sum(p, axis=-1, keepdims=True)
        p = jax.lax.cond(draw.top_p < 1, lambda p: keep(p, draw.top_p * total, p), lambda p: p, p)
        return _inverse_cdf(p, uniform)

    return jax.lax.cond(draw.temperature > 0, sample, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _threshold(p: Array, enough: Array, measure: Array) -> Array:
    """The largest threshold [B, 1] at which the ``measure`` [B, V] of the tokens with p >= threshold is still ``enough``.

    Positive floats are ordered as their bits are, so bisection over the bits is exact after 31 halvings.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # enough at low, not enough at high
        middle = low + (high - low) // 2
        ok = jnp.sum(jnp.where(bits >= middle, measure, 0.0), axis=-1, keepdims=True) >= enough
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low = jnp.zeros((p.shape[0], 1), jnp.int32)
    high = jnp.full((p.shape[0], 1), 0x3F800001, jnp.int32)  # just above 1.0, the largest p
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _inverse_cdf(p: Array, uniform: Array, block: int = 256) -> Array:
    """The token at which the cumulative sum of unnormalised p [B, V] passes uniform * total: first the block, then within."""
    b, v = p.shape
    blocks = jnp.pad(p, ((0, 0), (0, -v % block))).reshape(b, -1, block)
    sums = jnp.sum(blocks, axis=-1)
    mass = jnp.cumsum(sums, axis=-1)
    goal = uniform[:, None] * mass[:, -1:]
    which = jnp.argmax((mass > goal) & (sums > 0), axis=-1)
    inside = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]
    before = jnp.where(which > 0, jnp.take_along_axis(mass, jnp.maximum(which - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    within = jnp.cumsum(inside, axis=-1)
    # Rounding may put the goal past the block's own sum; its last token with any mass is then the answer.
    goal = jnp.clip(goal[:, 0] - before, 0.0, within[:, -1] * (1 - 1e-6))
    return (which * block + jnp.argmax((within > goal[:, None]) & (inside > 0), axis=-1)).astype(jnp.int32)
