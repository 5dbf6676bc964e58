"""Generation: own seeds, true log-probs, stops, few programs, narrow caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import sample_texts
from flax import nnx

from esjax.errors import InputError
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import prompt_with_replies
from esjax.runtime.programs import compiled
from esjax.sample.constrain import Field, compile_template
from esjax.sample.generate import Generator
from esjax.sample.rowbook import row_seed
from esjax.sample.schedule import Completion
from esjax.sample.score import Scorer
from esjax.tokens.tokenizer import ChatTokenizer

BARE: nnx.State = nnx.State({})  # no adapter
NEW = 40  # tokens generated for a prompt; the tiny model ends some replies before and some not


@dataclass(frozen=True)
class How:
    """How tokens are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


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
    """One generator for each number of lanes, so that programs are compiled once."""
    made: dict[int, Generator] = {}

    def get(lanes: int) -> Generator:
        return made.setdefault(lanes, Generator(backbone, lanes, tokenizer.end_of_turn))

    return get


SEEDS = [row_seed("test", i) for i in range(8)]


@pytest.fixture(scope="session")
def scorer(backbone: Backbone) -> Scorer:
    return Scorer(backbone, 256, 2)


@pytest.fixture(scope="session")
def eight(generator_of: Callable[[int], Generator], prompts: list[list[int]]) -> list[Completion]:
    """The eight prompts answered at once."""
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
    ("lanes", "order"),
    [
        (1, [[i] for i in range(8)]),
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[7, 3, 2, 6, 0, 1, 5, 4]]),
        (3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (3, [[7, 0], [5, 2, 6, 1], [4, 3]]),
        (3, [[6, 0, 7, 2, 4, 1, 3, 5]]),
        (8, [[7, 6, 5, 4, 3, 2, 1, 0]]),
        (8, [[3], [0, 1, 2, 4, 5, 6, 7]]),
    ],
)
def test_a_replys_tokens_depend_on_its_own_seed_alone(
    generator_of: Callable[[int], Generator],
    prompts: list[list[int]],
    eight: list[Completion],
    lanes: int,
    order: list[list[int]],
) -> None:
    expected = [m.token_ids for m in eight]
    assert one_by_one(generator_of(lanes), prompts, SEEDS, order) == expected


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
    """A neighbour beyond the first bucket makes every row another 128 slots longer."""
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


def test_the_stop_token_is_what_ends_a_reply(
    generator_of: Callable[[int], Generator],
    tokenizer: ChatTokenizer,
    prompts: list[list[int]],
    eight: list[Completion],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = generator_of(8)
    programs = compiled()
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
    assert compiled() == programs  # stop tokens are traced, too


def test_what_a_user_may_change_compiles_nothing_new(
    backbone: Backbone, tokenizer: ChatTokenizer, prompts: list[list[int]]
) -> None:
    generator = Generator(backbone, 8, tokenizer.end_of_turn)
    letters = ("[a-z]", "[A-Z]")
    words = [compile_template(["Say", Field(f" {x}+", 6), "."], tokenizer, backbone.arch.vocab) for x in letters]
    assert words[0].automaton.next.shape == words[1].automaton.next.shape
    seen = compiled()

    def since() -> dict[str, int]:
        nonlocal seen
        before, seen = seen, compiled()
        return dict(seen - before)

    texts = [generator.generate(BARE, prompts, SEEDS, How(), NEW)]
    assert since() == {"weights": 1, "prefill": 1, "decode": 1}
    for how in (How(0.0), How(0.3), How(1.7, top_p=0.5), How(1.0, top_k=3), How(0.7, top_p=0.9, top_k=40)):
        texts.append(generator.generate(BARE, prompts, SEEDS, how, NEW))
    for word in words:
        texts.append(generator.generate(BARE, prompts, SEEDS, How(), NEW, word.automaton))
    generator.end_of_turn = 300
    texts.append(generator.generate(BARE, prompts, SEEDS, How(), NEW))
    texts.append(generator.generate(BARE, prompts, [s + 1 for s in SEEDS], How(), NEW))
    texts.append(generator.generate(BARE, prompts, SEEDS, How(), 2))
    different = {str([m.token_ids for m in made]) for made in texts}
    assert len(different) == len(texts)  # each of these does change something
    generator.generate(BARE, prompts[:1], [1], How(), NEW)
    generator.generate(BARE, prompts * 5, range(40), How(), NEW)
    assert since() == {}
    generator.generate(BARE, prompts, SEEDS, How(), NEW + 1)  # controls: a longer ring, and other lanes
    assert since() == {"prefill": 1, "decode": 1}
    Generator(backbone, 4, tokenizer.end_of_turn).generate(BARE, prompts, SEEDS, How(), NEW)
    assert since() == {"weights": 1, "prefill": 1, "decode": 1}


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
            with pytest.raises(InputError, match=r"lower max_tokens, or data\.window"):
                generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), NEW)


def test_row_seeds_are_fixed_and_differ_in_every_part() -> None:
    assert row_seed(0, "round1/draft", "sample-001/3") == 424354227
    parts = [(0, "a", "b"), (1, "a", "b"), (0, "c", "b"), (0, "a", "c")]
    assert len({row_seed(*p) for p in parts}) == 4
    assert all(0 <= row_seed(i) < 2**32 for i in range(100))


def test_a_narrow_cache_moves_logprobs_a_little(
    backbone: Backbone, tokenizer: ChatTokenizer, prompts: list[list[int]], eight: list[Completion]
) -> None:
    """By how much hangs on the dtype's precision; with the arithmetic's own dtype not at all."""

    def moved(name: str) -> float:
        generator = Generator(backbone, 8, tokenizer.end_of_turn, cache_dtype=jnp.dtype(name))
        made = generator.generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), 1)
        return max(
            abs(m.logprobs[0] - e.logprobs[0]) for m, e in zip(made, first, strict=True) if m.token_ids == e.token_ids
        )

    first = Generator(backbone, 8, tokenizer.end_of_turn).generate(BARE, prompts, SEEDS, How(0.9, top_p=0.95), 1)
    assert [m.token_ids[0] for m in first] == [m.token_ids[0] for m in eight]
    assert moved("float32") < 1e-5
    assert 1e-4 < moved("bfloat16") < 0.1
    assert 1e-2 < moved("float8_e4m3fn") < 1.0
