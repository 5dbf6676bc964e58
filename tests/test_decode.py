"""Drawing tokens against a sort-based oracle, and generation: own seeds, true log-probs, stops, few programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sample_texts
from flax import nnx
from scipy.stats import chisquare

from esjax.config import InputError
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import prompt_with_replies
from esjax.sample.decode import Draw, draw_token
from esjax.sample.generate import Completion, Generator, row_seed
from esjax.sample.score import Scorer
from esjax.tokens.tokenizer import ChatTokenizer

BARE: nnx.State = nnx.State({})  # no adapter
NEW = 40  # tokens generated for a prompt; the tiny model ends some replies before and some not

draw_jitted = jax.jit(draw_token)
draw_at = jax.jit(jax.vmap(draw_token, in_axes=(None, 0, None)))  # one row [1, V], many uniforms [n, 1] -> [n, 1]


@dataclass(frozen=True)
class How:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


def settings(how: How) -> Draw:
    return Draw(
        jnp.float32(how.temperature), jnp.float32(how.top_p), jnp.int32(how.top_k), jnp.asarray([-1], jnp.int32)
    )


def drawn(logits: np.ndarray, uniform: np.ndarray, how: How) -> np.ndarray:
    """Tokens [n] drawn from one row of logits [V] with uniform numbers [n]."""
    u = jnp.asarray(uniform, jnp.float32)[:, None]
    return np.asarray(draw_at(jnp.asarray(logits)[None], u, settings(how)))[:, 0]


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


# --- one token -------------------------------------------------------------------------------------------------------


def test_temperature_zero_is_greedy() -> None:
    logits = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    uniform = np.linspace(0, 0.999, 64, dtype=np.float32)
    best = logits.argmax(axis=1)
    for how in (How(0.0), How(0.0, top_p=0.3), How(0.0, top_k=5)):
        assert np.asarray(draw_jitted(logits, uniform, settings(how))).tolist() == best.tolist()
    assert np.asarray(draw_jitted(logits, uniform, settings(How(1.0)))).tolist() != best.tolist()


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy() -> None:
    logits = np.random.default_rng(1).normal(size=(64, 300)).astype(np.float32)
    uniform = np.linspace(0, 0.999, 64, dtype=np.float32)
    best = logits.argmax(axis=1).tolist()
    assert np.asarray(draw_jitted(logits, uniform, settings(How(2.0, top_k=1)))).tolist() == best
    assert np.asarray(draw_jitted(logits, uniform, settings(How(2.0, top_p=1e-4)))).tolist() == best
    assert np.asarray(draw_jitted(logits, uniform, settings(How(2.0, top_k=2)))).tolist() != best


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


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("vocab", [40, 600])
def test_exactly_the_oracles_tokens_are_kept(vocab: int, how: How) -> None:
    """In the middle of a token's share of [0, 1) that token is drawn, and nowhere a token that the oracle drops."""
    tried = 0
    grid = (np.arange(512) + 0.5) / 512
    for seed in range(25):
        logits = (np.random.default_rng(seed).normal(size=vocab) * 2).astype(np.float32)
        if how.top_p < 1 and borderline(logits, how):
            continue
        tried += 1
        p = truncated(logits, how)
        ends = np.cumsum(p)
        kept = np.flatnonzero(p > 1e-5)
        middle = ends[kept] - p[kept] / 2
        uniform = np.resize(middle, vocab)  # one shape for all seeds, so that one program serves
        assert drawn(logits, uniform, how)[: len(kept)].tolist() == kept.tolist()
        everywhere = drawn(logits, np.resize(grid, max(vocab, 512)), how)
        assert set(everywhere.tolist()) <= set(np.flatnonzero(p).tolist())
    assert tried > 15


def test_the_oracle_tells_settings_apart() -> None:
    """Control: another setting keeps other tokens, and the drawn ones show it."""
    logits = (np.random.default_rng(0).normal(size=40) * 2).astype(np.float32)
    grid = (np.arange(512) + 0.5) / 512
    sets = {how: set(drawn(logits, grid, how).tolist()) for how in HOWS}
    assert sets[How(1.0, top_k=7)] == set(np.flatnonzero(truncated(logits, How(1.0, top_k=7))).tolist())
    assert sets[How(1.0, top_k=7)] != set(np.flatnonzero(truncated(logits, How(1.0, top_k=8))).tolist())
    assert not sets[How()] <= set(np.flatnonzero(truncated(logits, How(1.0, top_p=0.9))).tolist())


def test_tokens_that_tie_with_the_threshold_stay() -> None:
    logits = np.log(np.asarray([0.4, 0.2, 0.2, 0.2], np.float32))
    grid = (np.arange(512) + 0.5) / 512
    assert set(drawn(logits, grid, How(1.0, top_k=2)).tolist()) == {0, 1, 2, 3}
    assert set(drawn(logits, grid, How(1.0, top_k=1)).tolist()) == {0}


def test_forbidden_tokens_do_not_count_for_top_k_and_top_p() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=600).astype(np.float32)
    logits[rng.random(600) < 0.9] = -np.inf
    grid = (np.arange(600) + 0.5) / 600
    for how in (How(), How(1.0, top_k=5), How(1.0, top_p=0.7)):
        p = truncated(logits, how)
        assert set(drawn(logits, grid, how).tolist()) <= set(np.flatnonzero(p).tolist())
    assert len(set(drawn(logits, grid, How(1.0, top_k=5)).tolist())) == 5


def test_a_token_without_probability_is_never_drawn() -> None:
    """Not even where the uniform number meets the end of another token's share to the last bit: a constraint relies on it.

    jax.random.uniform gives multiples of 2^-23; those next to the shares' ends are the ones where rounding can go wrong.
    """
    vocab, wrong = 1024, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        logits = (rng.normal(size=vocab) * 2).astype(np.float32)
        forbidden = rng.random(vocab) < 0.9
        logits[forbidden] = -np.inf
        ends = np.cumsum(truncated(logits, How()))[~forbidden]
        near = np.clip(np.round(ends * 2**23)[:, None] + np.arange(-2, 3), 0, 2**23 - 1).ravel() / 2**23
        uniform = np.resize(near, vocab).astype(np.float32)
        tokens = np.asarray(draw_jitted(np.broadcast_to(logits, (vocab, vocab)), uniform, settings(How())))
        wrong += [(seed, float(u), int(t)) for u, t in zip(uniform, tokens, strict=True) if forbidden[t]]
    assert wrong == []


@pytest.mark.parametrize(
    "how", [How(0.8, top_p=0.9), How(1.2, top_k=20), How(1.0, top_p=0.8, top_k=30), How(1.5)], ids=str
)
def test_frequencies_are_the_truncated_distributions(how: How) -> None:
    logits = (np.random.default_rng(5).normal(size=300) * 1.5).astype(np.float32)
    n = 10_000
    tokens = drawn(logits, np.asarray(jax.random.uniform(jax.random.key(9), (n,))), how)
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


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, None, compute_dtype("float32"))


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_folder)


@pytest.fixture(scope="session")
def prompts(tokenizer: ChatTokenizer) -> list[list[int]]:
    """Eight prompts of different lengths, all in the first bucket."""
    texts = sample_texts()[:8]
    out = [tokenizer.prompt([{"role": "user", "content": t[: 20 + 15 * i]}]) for i, t in enumerate(texts)]
    assert len({len(p) for p in out}) > 4
    assert max(map(len, out)) + NEW < 128
    return out


@pytest.fixture(scope="session")
def generator_of(backbone: Backbone, tokenizer: ChatTokenizer) -> Callable[[int], Generator]:
    """One generator for each batch size, so that programs are compiled once."""
    made: dict[int, Generator] = {}

    def get(batch: int) -> Generator:
        return made.setdefault(batch, Generator(backbone, batch, tokenizer.end_of_turn))

    return get


SEEDS = [row_seed("test", i) for i in range(8)]


@pytest.fixture(scope="session")
def scorer(backbone: Backbone) -> Scorer:
    return Scorer(backbone, 256, 2)


@pytest.fixture(scope="session")
def eight(generator_of: Callable[[int], Generator], prompts: list[list[int]]) -> list[Completion]:
    """The eight prompts answered in one batch."""
    return generator_of(8).generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)


def one_by_one(
    generator: Generator, prompts: Sequence[list[int]], seeds: Sequence[int], order: Sequence[Sequence[int]]
) -> list[list[int]]:
    """Tokens of each prompt, generated in the given groups."""
    out: dict[int, list[int]] = {}
    for group in order:
        made = generator.generate(
            BARE, [prompts[i] for i in group], [seeds[i] for i in group], How(0.9, top_p=0.95), NEW
        )
        out |= {i: m.token_ids for i, m in zip(group, made, strict=True)}
    return [out[i] for i in range(len(prompts))]


@pytest.mark.parametrize(
    ("batch", "order"),
    [
        (1, [[i] for i in range(8)]),
        (3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (3, [[7, 0], [5, 2, 6], [1], [4, 3]]),
        (8, [[7, 6, 5, 4, 3, 2, 1, 0]]),
        (8, [[3], [0, 1, 2, 4, 5, 6, 7]]),
    ],
)
def test_a_rows_tokens_depend_on_its_own_seed_alone(
    generator_of: Callable[[int], Generator],
    prompts: list[list[int]],
    eight: list[Completion],
    batch: int,
    order: list[list[int]],
) -> None:
    expected = [m.token_ids for m in eight]
    assert one_by_one(generator_of(batch), prompts, SEEDS, order) == expected


def test_another_seed_gives_another_text(
    generator_of: Callable[[int], Generator], prompts: list[list[int]], eight: list[Completion]
) -> None:
    seeds = [s + 1 if i % 2 else s for i, s in enumerate(SEEDS)]
    got = generator_of(8).generate(BARE, prompts, seeds, How(0.9, top_p=0.95), NEW)
    assert [a.token_ids == b.token_ids for a, b in zip(got, eight, strict=True)] == [True, False] * 4
    same = generator_of(8).generate(BARE, [prompts[0]] * 8, [5] * 4 + [6] * 4, How(0.9, top_p=0.95), NEW)
    assert len({tuple(m.token_ids) for m in same}) == 2


def test_a_long_neighbour_changes_nothing(
    generator_of: Callable[[int], Generator],
    tokenizer: ChatTokenizer,
    prompts: list[list[int]],
    eight: list[Completion],
) -> None:
    """A neighbour beyond the first bucket pads every row of the batch by another 128 slots."""
    long = tokenizer.prompt([{"role": "user", "content": " ".join(sample_texts()[:4])}])
    assert 128 < len(long) <= 256
    got = generator_of(3).generate(
        BARE, [prompts[0], long, prompts[5]], [SEEDS[0], 3, SEEDS[5]], How(0.9, top_p=0.95), NEW
    )
    assert got[0].token_ids == eight[0].token_ids
    assert got[2].token_ids == eight[5].token_ids
    assert got[1].token_ids != eight[1].token_ids


def test_greedy_needs_no_seed_and_takes_the_likeliest(
    generator_of: Callable[[int], Generator], backbone: Backbone, scorer: Scorer, prompts: list[list[int]]
) -> None:
    generator = generator_of(8)
    first = generator.generate(BARE, prompts, SEEDS, How(0.0), NEW)
    again = generator.generate(BARE, prompts, [1] * 8, How(0.0), NEW)
    assert [m.token_ids for m in first] == [m.token_ids for m in again]
    warm = generator.generate(BARE, prompts, SEEDS, How(1.0), NEW)
    assert [m.token_ids for m in first] != [m.token_ids for m in warm]
    # The likeliest token by the scorer: no other continuation of the same prompt by one token scores higher.
    rivals = [*range(0, backbone.arch.vocab, 50), first[0].token_ids[0]]
    rows = [prompt_with_replies(prompts[0], [[t] for t in rivals])]  # one trunk, a branch a rival
    scores = [float(x[0]) for x in scorer.score(BARE, rows)[0]]
    assert scores[-1] == max(scores)
    assert scores[-1] == pytest.approx(first[0].logprobs[0], abs=1e-3)


@pytest.mark.parametrize("how", [How(0.9, top_p=0.95), How(2.0, top_k=50), How(0.0)], ids=str)
def test_reported_logprobs_are_the_scorers(
    generator_of: Callable[[int], Generator], scorer: Scorer, prompts: list[list[int]], how: How
) -> None:
    """Log-probs are the model's own (temperature 1, nothing cut off), whatever the drawing was."""
    made = generator_of(8).generate(BARE, prompts, SEEDS, how, NEW)
    examples = [prompt_with_replies(p, [m.token_ids]) for p, m in zip(prompts, made, strict=True)]
    scored = scorer.score(BARE, examples)
    for m, (logprobs,) in zip(made, scored, strict=True):
        assert len(m.logprobs) == len(m.token_ids)
        assert np.abs(np.asarray(m.logprobs) - logprobs).max() < 1e-3
    swapped = [prompt_with_replies(prompts[1], [made[0].token_ids])]
    ((other,),) = scorer.score(BARE, swapped)
    assert np.abs(np.asarray(made[0].logprobs) - other).max() > 1e-2


def test_stops_and_finish_reasons(
    generator_of: Callable[[int], Generator], tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    made = [m for seed in range(4) for m in generator_of(8).generate(BARE, prompts, [seed] * 8, How(1.0), NEW)]
    for m in made:
        if m.finish == "stop":
            assert m.token_ids.index(tokenizer.end_of_turn) == len(m.token_ids) - 1
        else:
            assert len(m.token_ids) == NEW
            assert tokenizer.end_of_turn not in m.token_ids
        assert 1 <= len(m.token_ids) <= NEW
    assert {m.finish for m in made} == {"stop", "length"}


def test_the_stop_token_is_what_ends_a_row(
    generator_of: Callable[[int], Generator],
    tokenizer: ChatTokenizer,
    prompts: list[list[int]],
    eight: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = generator_of(8)
    programs = generator.programs
    monkeypatch.setattr(generator, "end_of_turn", -1)  # never drawn
    endless = generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)
    assert {m.finish for m in endless} == {"length"}
    for m, stopped in zip(endless, eight, strict=True):
        assert len(m.token_ids) == NEW
        assert m.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    third = endless[0].token_ids[2]
    monkeypatch.setattr(generator, "end_of_turn", third)
    (early, *_) = generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)
    assert early.finish == "stop"
    assert early.token_ids == endless[0].token_ids[: endless[0].token_ids.index(third) + 1]
    assert generator.programs == programs  # stop tokens are traced, too


def test_what_a_user_may_change_compiles_nothing_new(
    generator_of: Callable[[int], Generator], prompts: list[list[int]], eight: list[Completion]
) -> None:
    generator = generator_of(8)
    before = generator.programs
    for how in (How(0.0), How(0.3), How(1.7, top_p=0.5), How(1.0, top_k=3), How(0.7, top_p=0.9, top_k=40)):
        generator.generate(BARE, prompts, SEEDS, how, NEW)
    generator.generate(BARE, prompts[:3], [1, 2, 3], How(), NEW)
    assert generator.programs == before >= 1
    generator.generate(BARE, prompts, SEEDS, How(), 2)  # control: another shape is another program
    assert generator.programs == before + 1


def test_a_prompt_over_the_models_positions_is_refused(
    generator_of: Callable[[int], Generator],
    backbone: Backbone,
    prompts: list[list[int]],
    eight: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = generator_of(8)
    longest = max(map(len, prompts))
    with pytest.raises(InputError, match=r"a prompt of 4090 tokens and 7 new ones exceed the model's 4096 positions"):
        generator.generate(BARE, [prompts[0], [5] * 4090], [0, 1], How(), 7)
    for room, fits in ((longest + NEW, True), (longest + NEW - 1, False)):
        limited = replace(backbone, arch=replace(backbone.arch, max_positions=room))
        monkeypatch.setattr(generator, "backbone", limited)
        if fits:
            got = generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)
            assert [m.token_ids for m in got] == [m.token_ids for m in eight]
        else:
            with pytest.raises(InputError, match="shorten data"):
                generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)


def test_more_prompts_than_the_batch_are_an_error(
    generator_of: Callable[[int], Generator], prompts: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="8 prompts for a batch of 3"):
        generator_of(3).generate(BARE, prompts, SEEDS, How(), NEW)


def test_row_seeds_are_fixed_and_differ_in_every_part() -> None:
    assert row_seed(0, "round1/draft", "sample-001/3") == 424354227
    parts = [(0, "a", "b"), (1, "a", "b"), (0, "c", "b"), (0, "a", "c")]
    assert len({row_seed(*p) for p in parts}) == 4
    assert all(0 <= row_seed(i) < 2**32 for i in range(100))
