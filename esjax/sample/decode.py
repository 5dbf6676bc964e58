"""The decoding loop: lanes draw until they stop, then take the next waiting leaf of their row, without the host.

Everything the user may change between runs is traced: temperature, top-p, top-k, seeds, stop tokens, the constraint. Each
reply has its own key, folded with the token's number, so its text depends neither on its neighbours nor on its lane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from esjax.model.cache import Cache, Fed
from esjax.model.cached import Weights, step
from esjax.model.decoder import Execution
from esjax.model.layers import softcap
from esjax.runtime.mesh import constrain, replicated
from esjax.sample.constrain import Constraint, Counted

COLD = 1e-6  # a lower temperature is greedy: logits over it would overflow, and differences of rounding decide there


class Draw(NamedTuple):
    """How tokens are drawn, one entry a reply."""

    temperature: Any  # float32; below COLD is greedy
    top_p: Any  # float32 in (0, 1]
    top_k: Any  # int32; 0 is all


class Continuation(NamedTuple):
    """A prompt that waits to be continued, or is: arrays [R, Q] of those waiting in a row, [R, M] of those in its lanes.

    Its row holds all of the prompt but the last token, which is the first to be fed.
    """

    uid: Any  # int32, whose reply it is; -1 in a lane that has nothing to do
    trunk_start: Any  # int32, the slots of its row that it sees: a part of a trunk ...
    trunk_end: Any
    own_start: Any  # ... and a branch of its own (empty where start and end are equal)
    own_end: Any
    token: Any  # int32, to be fed next: the prompt's last token, later the newest drawn
    position: Any  # int32, that token's
    seed: Any  # uint32
    most: Any  # int32, most tokens to draw
    draw: Draw
    state: Any  # int32, of the constraint; 0 is free


class Lanes(NamedTuple):
    """What the loop carries from call to call."""

    leaf: Continuation  # [R, M]
    drawn: Array  # int32 [R, M], tokens drawn so far
    used: Array  # int32 [R, M], tokens spent in the current part of the constraint
    units: Array  # int32 [R, M], repetitions begun in the constraint's counted one that the state lies in; 0 outside
    clock: Array  # int32, steps ever made: where in the ring the next one writes


class Log(NamedTuple):
    """What one call drew, [K, R, M]; entries of idle lanes have uid -1."""

    uid: Array  # int32
    token: Array  # int32
    logprob: Array  # float32, under the model's own distribution (temperature 1, nothing cut off)
    stopped: Array  # bool, a stop token


class Asked(NamedTuple):
    """What one call of the loop is given to do. ``stop`` tokens that are -1 never match."""

    waiting: Continuation  # [R, Q], in the order in which they are taken
    count: Any  # int32 [R], how many of each row's are meant
    stop: Any  # int32 [n], tokens that end a reply
    constraint: Constraint
    patience: Any  # int32, how many lanes may have nothing left to do
    steps: Any  # int32, most steps to make, up to K


class Called(NamedTuple):
    """What one call of the loop returns."""

    lanes: Lanes
    cache: Cache
    started: Array  # int32 [R], how many of each row's waiting leaves were taken
    steps: Array  # int32, steps made, of K at most
    log: Log


def idle_lanes(rows: int, lanes: int) -> Lanes:
    """Lanes [R, M] with nothing to do."""
    zero, one = jnp.zeros((rows, lanes), jnp.int32), jnp.ones((rows, lanes), jnp.float32)
    draw = Draw(one, one, zero)
    leaf = Continuation(zero - 1, zero, zero, zero, zero, zero, zero, zero.astype(jnp.uint32), zero, draw, zero)
    return Lanes(leaf, zero, zero, zero, jnp.int32(0))


def run(
    weights: Callable[[], Weights], cache: Cache, lanes: Lanes, asked: Asked, steps: int, execution: Execution
) -> Called:
    """Draw until all leaves are done, as many steps as asked or ``steps`` (K, static) are made, or patience has run out.

    ``weights`` is called inside the loop, so that what it slices is sliced where it is used and never copied.
    """
    waiting, count, stop, constraint, patience, most = asked
    r, m = lanes.drawn.shape

    def idle(lanes: Lanes, started: Array) -> Array:
        """How many lanes have nothing to do now and nothing that waits for them."""
        without = jnp.sum(lanes.leaf.uid < 0, axis=1)
        return jnp.sum(jnp.maximum(without - (count - started), 0))

    def go_on(state: Called) -> Array:
        unemployed = idle(state.lanes, state.started)
        return (state.steps < jnp.minimum(most, steps)) & (unemployed < jnp.minimum(patience, r * m))

    def advance(state: Called) -> Called:
        lanes, started = _take(state.lanes, waiting, count, state.started)
        leaf = lanes.leaf
        busy = leaf.uid >= 0
        w, spans = weights(), (leaf.trunk_start, leaf.trunk_end, leaf.own_start, leaf.own_end)
        fed = Fed(leaf.token, leaf.position, *spans, jnp.where(busy, lanes.drawn + 1, 1))
        x, cache = step(w, state.cache, fed, lanes.clock, execution)
        with jax.named_scope("head"):
            logits = softcap(_logits(x, w.head, execution), w.arch.logits_cap)
        flat: Continuation = jax.tree.map(lambda a: a.reshape(-1), leaf)
        drawn, used, units = lanes.drawn.reshape(-1), lanes.used.reshape(-1), lanes.units.reshape(-1)
        with jax.named_scope("draw"):
            allowed = jnp.where(permitted(constraint, flat.state, used, units), logits, -jnp.inf)
            token = draw_token(allowed, lambda: noise(flat.seed, drawn, logits.shape[1]), flat.draw)
            logprob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
        following = jnp.maximum(constraint.next[flat.state, token].astype(jnp.int32), 0)
        stays = constraint.part[following] == constraint.part[flat.state]
        used = jnp.where(stays, used + 1, 1)
        if isinstance(constraint, Counted):
            begun = units + constraint.units[flat.state, token].astype(jnp.int32)
            units = jnp.where(constraint.stride[following] > 0, begun, 0)
        token, logprob, following, used, units = replicated(
            [x.reshape(r, m) for x in (token, logprob, following, used, units)]
        )
        stopped = busy & jnp.any(token[..., None] == stop, axis=-1)
        over = stopped | (lanes.drawn + 1 >= leaf.most)
        log = Log(leaf.uid, token, logprob, stopped)
        log = jax.tree.map(
            lambda all, now: jax.lax.dynamic_update_index_in_dim(all, now, state.steps, 0), state.log, log
        )
        leaf = leaf._replace(
            uid=jnp.where(over, -1, leaf.uid),
            token=token,
            position=leaf.position + 1,
            state=jnp.where(over | ~busy, 0, following),  # a lane with nothing to do is free to draw anything
        )
        lanes = Lanes(leaf, lanes.drawn + 1, used, units, lanes.clock + 1)
        return Called(lanes, cache, started, state.steps + 1, log)

    blank = jnp.full((steps, r, m), -1, jnp.int32)
    log = Log(blank, blank, blank.astype(jnp.float32), blank > 0)
    begin = Called(replicated(lanes), cache, jnp.zeros(r, jnp.int32), jnp.int32(0), replicated(log))
    made = jax.lax.while_loop(go_on, advance, begin)
    small = replicated((made.lanes, made.started, made.steps, made.log))  # for every host to read
    return Called(small[0], made.cache, *small[1:])


def _logits(x: Array, head: Array, execution: Execution) -> Array:
    """x head^T of x [B, D] and head [V, D], in float32 [B, V]."""
    if execution.attention == "chunked":  # a CPU: with the head as the left operand a third less time
        turned = jnp.einsum("vd,bd->vb", head, x, preferred_element_type=jnp.float32)
        logits = jax.lax.optimization_barrier(turned).T  # or the compiler would turn it back
    else:
        logits = jnp.einsum("bd,vd->bv", x, head, preferred_element_type=jnp.float32)
    return constrain(logits, "batch", "vocab")


def _take(lanes: Lanes, waiting: Continuation, count: Array, started: Array) -> tuple[Lanes, Array]:
    """Lanes with nothing to do take their row's next waiting leaves, in order."""
    free = lanes.leaf.uid < 0
    place = started[:, None] + jnp.cumsum(free, axis=1) - 1
    takes = free & (place < count[:, None])
    place = jnp.clip(place, 0, waiting.uid.shape[1] - 1)

    def choose(old: Array, offered: Array) -> Array:
        return jnp.where(takes, jnp.take_along_axis(offered, place, axis=1), old)

    leaf = jax.tree.map(choose, lanes.leaf, waiting)
    drawn, used, units = (jnp.where(takes, 0, x) for x in (lanes.drawn, lanes.used, lanes.units))
    return lanes._replace(leaf=leaf, drawn=drawn, used=used, units=units), started + takes.sum(axis=1)


def permitted(constraint: Constraint, state: Array, used: Array, units: Array | None = None) -> Array:
    """Which tokens [B, V] may follow: those that leave their part, where it is long enough, or from where it can be closed.

    Where the constraint counts repetitions, with ``units`` [B] begun: a token may not exceed their limit, nor leave before
    the fewest, and what is missing of these must be there in the budget too.
    """
    cost = constraint.cost[state]
    left = constraint.most[state] - used
    if not isinstance(constraint, Counted) or units is None:
        return jnp.where(cost < 0, (used >= constraint.least[state])[:, None], cost <= left[:, None])
    more = constraint.units[state].astype(jnp.int32)
    leaves = more < 0
    begun = units[:, None] + jnp.where(leaves, ~more, more)
    missing = jnp.maximum(0, constraint.fewest[state][:, None] - begun)
    need = cost + -(-missing // jnp.maximum(1, constraint.stride[state])[:, None])
    fits = jnp.where(cost < 0, (used >= constraint.least[state])[:, None], need <= left[:, None])
    return fits & (begun <= constraint.limit[state][:, None]) & ~(leaves & (missing > 0))


def noise(seed: Array, number: Array, vocab: int) -> Array:
    """Exponential variates [B, V] for the ``number``-th token of the replies with these seeds [B].

    Made of all 32 bits and never 0: jax.random.exponential has 23 and gives 0 once in 2^23, which would win any race.
    """

    def one(seed: Array, number: Array) -> Array:
        bits = jax.random.bits(jax.random.fold_in(jax.random.key(seed), number), (vocab,), jnp.uint32)
        u = bits.astype(jnp.float32) * jnp.float32(2**-32) + jnp.float32(2**-33)
        return -jnp.log1p(-jnp.minimum(u, jnp.float32(1 - 2**-24)))

    return jax.vmap(one)(seed, number)


def draw_token(logits: Array, noise: Any, draw: Draw) -> Array:
    """Draw one token a row from float32 logits [B, V]: top-k, then top-p, of the probabilities at each row's temperature.

    The token is the argmax of p / e, where ``noise()`` gives exponential variates e [B, V]: a race that each token wins with
    its probability (the Gumbel-max trick), and that rounding disturbs only where two tokens are neck and neck; with the
    inverse of the cumulative distribution, every token of a long tail could tip it.

    Top-p needs neither a sort nor a search: a winner belongs to the nucleus exactly when the tokens above it have less than
    top-p together; if it does not, no token as unlikely does, and the race is decided among the others. That is exact, and
    two or three rounds do. Tokens that tie with the least likely one of the nucleus, or of the top k, belong to it.
    """
    hot = draw.temperature >= COLD

    def race() -> Array:
        temperature = jnp.where(hot, draw.temperature, 1.0)[:, None]
        top = jnp.max(logits, axis=-1, keepdims=True) / temperature

        def likely() -> Array:
            return jnp.exp(logits / temperature - top)  # unnormalised, most likely = 1

        # One number a row comes out of the branch: [B, V] would be copied, whether there is a top-k or not.
        least = jax.lax.cond(
            jnp.any(draw.top_k > 0), lambda: _least_of_top_k(likely(), draw.top_k), lambda: jnp.zeros(len(top))
        )
        p = likely()
        p = jnp.where(p >= least[:, None], p, 0.0)
        speed = jnp.where(hot[:, None], p / jnp.maximum(noise(), 1e-30), logits)  # a cold row's winner is the likeliest
        enough = jnp.maximum(draw.top_p, COLD) * jnp.sum(p, axis=-1)  # never 0: the most likely token has none above it

        def decide(pivot: Array) -> tuple[Array, Array, Array]:
            winner = _argmax(jnp.where(p > pivot[:, None], speed, -jnp.inf))
            level = jnp.take_along_axis(p, winner[:, None], axis=1)
            above = jnp.sum(jnp.where(p > level, p, 0.0), axis=-1)
            return winner, level[:, 0], ~(above >= enough) | (draw.top_p >= 1) | ~hot

        def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            winner, pivot, good = state
            other, level, better = decide(pivot)
            return jnp.where(good, winner, other), jnp.where(good, pivot, level), good | better

        first = decide(jnp.full(len(p), -1.0))
        winner, _, _ = jax.lax.while_loop(lambda s: ~jnp.all(s[2]), again, first)
        return winner

    return jax.lax.cond(jnp.any(hot), race, lambda: _argmax(logits))


def _argmax(x: Array) -> Array:
    """Index of the first maximum [B]; two plain reductions, which vectorise where XLA's own argmax does not."""
    top = jnp.max(x, axis=-1, keepdims=True)
    index = jnp.where(x >= top, jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape[-1])
    return jnp.minimum(jnp.min(index, axis=-1), x.shape[-1] - 1)


def _least_of_top_k(p: Array, k: Array) -> Array:
    """A number [B] that just the k [B] largest of p [B, V] reach, and those that tie with the last of them; 0 where k is 0.

    Positive floats are ordered as their bits are, so 31 halvings find the exact threshold; mostly far fewer find one
    between the k-th and the next.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)

    def halve(bounds: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, done = bounds  # at least k tokens at low, fewer at high
        middle = low + (high - low) // 2
        reach = jnp.sum(bits >= middle[:, None], axis=-1)
        low, high = jnp.where(reach >= k, middle, low), jnp.where(reach >= k, high, middle)
        return low, high, done | (reach == k) | (high - low <= 1)

    low = jnp.zeros(len(p), jnp.int32)
    high = jnp.full(len(p), 0x3F800001, jnp.int32)  # just above 1.0, the largest p
    low, _, _ = jax.lax.while_loop(lambda bounds: ~jnp.all(bounds[2]), halve, (low, high, k <= 0))
    return jnp.where(k > 0, jax.lax.bitcast_convert_type(low, jnp.float32), 0.0)
