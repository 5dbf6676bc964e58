"""Drawing one token, against a sort-based oracle: exactly the kept tokens, with their shares, undisturbed by rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare, kstest

from esjax.sample import decode
from esjax.sample.decode import Draw, draw_token

BARE: nnx.State = nnx.State({})  # no adapter
NEW = 40  # tokens generated for a prompt; the tiny model ends some replies before and some not

draw_jitted = jax.jit(lambda logits, noise, draw: draw_token(logits, lambda: noise, draw))
noise = jax.jit(decode.noise, static_argnums=2)


@dataclass(frozen=True)
class How:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def drawn(logits: np.ndarray, noise: Any, hows: How | Sequence[How]) -> list[int]:
    """Tokens [B] drawn from logits [B, V] or [V] with noise [B, V]; one How for all, or one a row."""
    each = [hows] * len(noise) if isinstance(hows, How) else hows
    draw = Draw(
        jnp.asarray([h.temperature for h in each], jnp.float32),
        jnp.asarray([h.top_p for h in each], jnp.float32),
        jnp.asarray([h.top_k for h in each], jnp.int32),
    )
    return np.asarray(draw_jitted(jnp.broadcast_to(logits, noise.shape), noise, draw)).tolist()


def pushed(vocab: int) -> np.ndarray:
    """Noise [V, V] with which each token in turn wins any race that it may take part in."""
    return np.where(np.eye(vocab, dtype=bool), 1e-20, 1.0).astype(np.float32)


def some_noise(n: int, vocab: int, number: int = 0) -> jax.Array:
    """Real noise [n, V] of seeds 0, 1, ..."""
    return noise(jnp.arange(n, dtype=jnp.uint32), jnp.full(n, number), vocab)


def truncated(logits: np.ndarray, how: How) -> np.ndarray:
    """Oracle: the distribution [V] after temperature, top-k and top-p, by sorting, in float64."""
    x = logits.astype(np.float64) / how.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: how.top_k] if how.top_k else order
    share = np.cumsum(p[kept]) / p[kept].sum()
    if how.top_p < 1:
        kept = kept[: int(np.argmax(share >= how.top_p)) + 1]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


def borderline(logits: np.ndarray, how: How) -> bool:
    """Whether float32 may rightly see the nucleus end one token earlier or later."""
    p = truncated(logits, replace(how, top_p=1.0))
    return bool(np.abs(np.cumsum(np.sort(p)[::-1]) - how.top_p).min() < 1e-5)


def test_temperature_zero_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    best = logits.argmax(axis=1).tolist()
    for how in (How(0.0), How(0.0, top_p=0.3), How(0.0, top_k=5)):
        assert drawn(logits, some_noise(64, 300), how) == best
    assert drawn(logits, some_noise(64, 300), How(1.0)) != best


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy() -> None:
    logits = np.random.default_rng(1).normal(size=(64, 300)).astype(np.float32)
    best = logits.argmax(axis=1).tolist()
    assert drawn(logits, some_noise(64, 300), How(2.0, top_k=1)) == best
    assert drawn(logits, some_noise(64, 300), How(2.0, top_p=1e-4)) == best
    assert drawn(logits, some_noise(64, 300), How(2.0, top_k=2)) != best


HOWS = [
    How(),
    How(0.5),
    How(2.0, top_k=1),
    How(1.0, top_k=7),
    How(0.7, top_k=39),
    How(1.0, top_k=1000),
    How(1.0, top_p=0.9),
    How(0.7, top_p=0.5),
    How(1.5, top_p=0.99),
    How(0.8, top_p=0.8, top_k=10),
    How(1.3, top_p=0.95, top_k=3),
]


def members(logits: np.ndarray, how: How) -> set[int]:
    """Which tokens are drawn when all noise is for them. Where a token is not, one of those is drawn."""
    tokens = drawn(logits, pushed(len(logits)), how)
    kept = {v for v, token in enumerate(tokens) if v == token}
    assert set(tokens) == kept
    return kept


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("vocab", [40, 600])
def test_exactly_the_oracles_tokens_are_kept(vocab: int, how: How) -> None:
    tried = 0
    for seed in range(25):
        logits = (np.random.default_rng(seed).normal(size=vocab) * 2).astype(np.float32)
        if how.top_p < 1 and borderline(logits, how):
            continue
        tried += 1
        assert members(logits, how) == set(np.flatnonzero(truncated(logits, how)).tolist())
    assert tried > 15


def test_the_oracle_tells_settings_apart() -> None:
    """Control: another setting keeps other tokens, and the drawn ones show it."""
    logits = (np.random.default_rng(0).normal(size=40) * 2).astype(np.float32)
    sets = {how: members(logits, how) for how in HOWS}
    assert sets[How(1.0, top_k=7)] != set(np.flatnonzero(truncated(logits, How(1.0, top_k=8))).tolist())
    assert sets[How(1.0, top_p=0.9)] != set(np.flatnonzero(truncated(logits, How(1.0, top_p=0.95))).tolist())
    assert not sets[How()] <= set(np.flatnonzero(truncated(logits, How(1.0, top_p=0.9))).tolist())


def test_tokens_that_tie_with_the_threshold_stay() -> None:
    logits = np.log(np.asarray([0.4, 0.2, 0.2, 0.2], np.float32))
    assert members(logits, How(1.0, top_k=2)) == {0, 1, 2, 3}
    assert members(logits, How(1.0, top_p=0.5)) == {0, 1, 2, 3}
    assert members(logits, How(1.0, top_k=1)) == members(logits, How(1.0, top_p=0.39)) == {0}


def test_forbidden_tokens_are_not_drawn_and_do_not_count() -> None:
    """Not even if all noise is for them; and the rest is drawn as if they did not exist. A constraint relies on it."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        logits = (rng.normal(size=600) * 2).astype(np.float32)
        forbidden = rng.permutation(600) >= 60
        logits[forbidden] = -np.inf
        allowed = np.flatnonzero(~forbidden)
        for how in (How(), How(0.3), How(1.0, top_k=5), How(1.0, top_p=0.7), How(0.9, top_p=0.9, top_k=20)):
            kept = members(logits, how)
            assert kept == {int(allowed[i]) for i in members(logits[allowed], how)}
            assert not any(forbidden[list(kept)])
            zero = np.where(forbidden, 0.0, 20.0).astype(np.float32)[None]
            assert set(drawn(logits, zero, how)) <= kept
    assert len(members(logits, How(1.0, top_k=5))) == 5


def test_rows_of_one_batch_each_have_their_own_settings() -> None:
    logits = (np.random.default_rng(2).normal(size=(66, 600)) * 2).astype(np.float32)
    hows = [*HOWS[:-1], How(0.0)] * 6
    e = some_noise(66, 600)
    together = drawn(logits, e, hows)
    alone = [drawn(logits[i : i + 1], e[i : i + 1], [how])[0] for i, how in enumerate(hows)]
    assert together == alone
    others = drawn(logits, e, [*hows[5:], *hows[:5]])  # control: the settings matter
    assert sum(a != b for a, b in zip(together, others, strict=True)) > 10


@pytest.mark.parametrize(
    "how", [How(0.8, top_p=0.9), How(1.2, top_k=20), How(1.0, top_p=0.8, top_k=30), How(1.5)], ids=str
)
def test_frequencies_are_the_truncated_distributions(how: How) -> None:
    logits = (np.random.default_rng(5).normal(size=300) * 1.5).astype(np.float32)
    n = 10_000
    tokens = drawn(logits, some_noise(n, 300), how)
    p = truncated(logits, how)
    counts = np.bincount(tokens, minlength=300)
    assert counts[p == 0].sum() == 0

    def p_value(q: np.ndarray) -> float:
        """Chi-squared of the counts against q; tokens expected less than five times share a bin."""
        rare = q * n < 5
        observed, expected = ([*x[~rare], x[rare].sum()] for x in (counts, q * n))
        pairs = [(o, e) for o, e in zip(observed, expected, strict=True) if e > 0]
        got, want = (np.asarray(x, np.float64) for x in zip(*pairs, strict=True))
        return float(chisquare(got, want * got.sum() / want.sum()).pvalue)

    assert p_value(p) > 1e-3
    assert p_value(truncated(logits, replace(how, temperature=how.temperature * 1.4))) < 1e-6  # controls
    assert p_value(np.roll(p, 1)) < 1e-6


def test_a_long_tail_wins_no_more_than_its_share() -> None:
    """49,151 tokens of 1e-13 each are together drawn once in 10^8 times: noise of exactly 0 would let each of them win."""
    vocab, each = 49_152, 250
    logits = np.full(vocab, -30, np.float32)
    logits[0] = 0
    rare = 0
    for number in range(8):
        rare += sum(t != 0 for t in drawn(logits, some_noise(each, vocab, number), How()))
    assert rare == 0
    logits[1:] = -11  # control: together 45% of all
    assert 0.35 < np.mean(np.asarray(drawn(logits, some_noise(each, vocab), How())) != 0) < 0.55


def test_noise_depends_on_seed_and_number_alone() -> None:
    seeds, numbers = np.asarray([7, 8, 7, 2**32 - 1], np.uint32), np.asarray([0, 0, 3, 3], np.int32)
    batch = np.asarray(noise(seeds, numbers, 500))
    for i in range(4):
        assert (np.asarray(noise(seeds[i : i + 1], numbers[i : i + 1], 500))[0] == batch[i]).all()
    turned = np.asarray(noise(seeds[::-1], numbers[::-1], 500))
    assert (turned[::-1] == batch).all()
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(batch[a], batch[b])[0, 1]) < 0.2
            assert (batch[a] != batch[b]).mean() > 0.99


def test_noise_is_exponential() -> None:
    for number in (0, 1, 100):
        x = np.asarray(some_noise(100, 1000, number), np.float64).ravel()
        assert kstest(x, "expon").pvalue > 1e-3
        assert kstest(x * 1.05, "expon").pvalue < 1e-6  # controls
        assert kstest(np.sort(x)[: len(x) * 99 // 100], "expon").pvalue < 1e-6


@pytest.mark.parametrize("how", [How(), How(0.8, top_p=0.9), How(1.0, top_k=50)], ids=str)
def test_rounding_of_logits_disturbs_hardly_any_draw(how: How) -> None:
    """Why tokens are drawn by a race: other shapes of a batch round otherwise, and should not change the text."""
    rng = np.random.default_rng(6)
    logits = (rng.normal(size=1000) * 2).astype(np.float32)

    def changed(size: float) -> int:
        other = logits + rng.normal(size=1000).astype(np.float32) * np.float32(size)
        total = 0
        for number in range(10):
            e = some_noise(2000, 1000, number)
            total += sum(a != b for a, b in zip(drawn(logits, e, how), drawn(other, e, how), strict=True))
        return total

    assert changed(1e-6) <= 5
    assert changed(1e-2) > 20  # control


@pytest.mark.parametrize("temperature", [2e-38, 1e-45, 1e-40, 1e-10, 9e-7])
def test_the_tiniest_temperatures_are_greedy(temperature: float) -> None:
    logits = (np.random.default_rng(3).normal(size=(64, 300)) * 30).astype(np.float32)
    assert drawn(logits, some_noise(64, 300), How(temperature)) == logits.argmax(axis=1).tolist()
    assert drawn(logits, some_noise(64, 300), How(30.0)) != logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("top_p", [1e-45, 1e-40, 1e-30, 1e-10])
def test_the_tiniest_nucleus_is_the_likeliest_token(top_p: float) -> None:
    """It used to go round for ever where top-p vanished."""
    logits = np.random.default_rng(4).normal(size=(64, 300)).astype(np.float32)
    assert drawn(logits, some_noise(64, 300), How(2.0, top_p=top_p)) == logits.argmax(axis=1).tolist()


def test_the_highest_temperature_draws_no_forbidden_token() -> None:
    logits = np.where(np.arange(300) < 10, 1.0, -np.inf).astype(np.float32)
    assert set(drawn(logits, some_noise(500, 300), How(1e6))) == set(range(10))
