"""Prompts that begin alike are computed once, and lanes are refilled: the text depends on neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import context
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import random_adapter, real_dialogues

from esjax.errors import InputError
from esjax.model.cache import Fed
from esjax.model.lora import Adapter, lora_from
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import common_prefix
from esjax.sample import decode
from esjax.sample.generate import Generator
from esjax.sample.prefills import Prefills
from esjax.sample.rowbook import Placed, Request
from esjax.sample.schedule import Completion, Scheduler
from esjax.settings.schema import LoraSettings, SamplingSettings
from esjax.tokens.batches import group_by_prefix
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

GREEDY, WARM = SamplingSettings(temperature=0), SamplingSettings(temperature=0.8)
FLOAT32 = compute_dtype("float32")
BARE: nnx.State = nnx.State({})

# --- grouping --------------------------------------------------------------------------------------------------------

STEMS = st.sampled_from([[], [1], [1, 1, 2], [1, 2, 2, 1, 1, 2], [2] * 8])
PROMPTS = st.lists(
    st.builds(lambda stem, rest: [*stem, *rest], STEMS, st.lists(st.integers(1, 2), min_size=1, max_size=6)),
    max_size=12,
)


def check_groups(prompts: Sequence[list[int]], groups: Sequence[list[int]], most: int) -> None:
    """What ``group_by_prefix`` promises."""
    assert sorted(i for g in groups for i in g) == list(range(len(prompts)))
    for group in groups:
        assert 1 <= len(group) <= most
        lengths = [len(prompts[i]) for i in group]
        assert lengths == sorted(lengths, reverse=True)
        assert all(2 * common_prefix(prompts[i], prompts[group[0]]) >= len(prompts[i]) for i in group)
    work = [(len(g), len(prompts[g[0]])) for g in groups]
    assert work == sorted(work, reverse=True)


@settings(deadline=None, max_examples=300)
@given(PROMPTS, st.integers(1, 5))
def test_members_of_a_group_begin_like_its_longest(prompts: list[list[int]], most: int) -> None:
    check_groups(prompts, group_by_prefix(prompts, most), most)


def test_a_wrong_grouping_is_found_out() -> None:
    dialogue = list(range(100, 180))
    prompts = [*(dialogue[:n] for n in (20, 80, 40, 60)), [7] * 70]
    groups = group_by_prefix(prompts, 4)
    assert groups == [[1, 3, 2, 0], [4]]
    check_groups(prompts, groups, 4)
    wrong = ([[1, 3, 2, 0]], [[3, 1, 2, 0], [4]], [[1, 3, 2, 4], [0]], [[4], [1, 3, 2, 0]], [[1, 3, 2, 0, 0], [4]])
    for groups in wrong:
        with pytest.raises(AssertionError):
            check_groups(prompts, groups, 4)
    with pytest.raises(AssertionError):
        check_groups(prompts, group_by_prefix(prompts, 4), 3)
    assert group_by_prefix(prompts, 3) == [[1, 3, 2], [4], [0]]


# --- real dialogues --------------------------------------------------------------------------------------------------


class Replies(NamedTuple):
    """What was drawn for requests 0, 1, ..."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


def answers(generator: Generator, adapter: Adapter, groups: Sequence[list[Request]]) -> Replies:
    """Replies in the order of the requests' keys."""
    out: dict[int, Completion] = {}

    def done(request: Request, completion: Completion) -> list[list[Request]]:
        assert request.key not in out
        out[request.key] = completion
        return []

    generator.work(adapter, groups, done)
    made = [out[key] for key in sorted(out)]
    return Replies([m.token_ids for m in made], [m.logprobs for m in made])


def joined(parts: Iterable[Replies]) -> Replies:
    """One after another."""
    tokens, logprobs = zip(*parts, strict=True)
    return Replies([*chain(*tokens)], [*chain(*logprobs)])


def worst_logprob(a: Replies, b: Replies) -> float:
    return float(np.abs(np.subtract([*chain(*a.logprobs)], [*chain(*b.logprobs)])).max())


class Case(NamedTuple):
    """All turns of real dialogues, and the replies of an unshared run."""

    backbone: Backbone
    adapter: Adapter
    end_of_turn: int
    requests: dict[str, list[Request]]
    expected: dict[str, Replies]

    @property
    def longest(self) -> int:
        return max(len(r.prompt) for r in self.requests["greedy"])

    def generator(self, replies: int, **how: int) -> Generator:
        return Generator(self.backbone, replies, self.end_of_turn, **how)


def case(backbone: Backbone, adapter: Adapter, esconv: Path, window: int, most: Callable[[int], int]) -> Case:
    """Twenty dialogues; reply i has ``most(i)`` tokens. Unshared: sixteen rows, each with one prompt and then given up."""
    tokenizer = ChatTokenizer(backbone.folder)
    encoder = Encoder(tokenizer, window, "")
    dialogues = real_dialogues(esconv)[:20]
    prompts = [tokenizer.prompt(context(encoder, d, t)) for d in dialogues for t in d.supporter_turns()]
    requests = {
        name: [Request(i, p, 1000 + i, how, most(i)) for i, p in enumerate(prompts)]
        for name, how in (("greedy", GREEDY), ("sampled", WARM))
    }
    made = Case(backbone, adapter, tokenizer.end_of_turn, requests, {})
    slots = -(-made.longest // 128) * 128
    generator = made.generator(16, lanes=1, slots=slots, new=max(most(i) for i in range(len(prompts))))
    for name, all_of_them in requests.items():
        parts = [
            answers(generator, adapter, [[r] for r in all_of_them[i : i + 16]]) for i in range(0, len(prompts), 16)
        ]
        made.expected[name] = joined(parts)
    usage = generator.usage
    assert usage.replies == 2 * len(prompts)
    assert usage.computed_tokens == usage.prompt_tokens - usage.replies  # nothing was shared
    return made


def compare(case: Case, lanes: int) -> dict[str, float]:
    """A shared run against the unshared one: the worst difference of log-probs."""
    generator = case.generator(lanes)
    differences = {}
    for name, requests in case.requests.items():
        got, expected = answers(generator, case.adapter, generator.grouped(requests)), case.expected[name]
        wrong = [i for i, (a, b) in enumerate(zip(got.tokens, expected.tokens, strict=True)) if a != b]
        assert wrong == []
        differences[name] = worst_logprob(got, expected)
    usage = generator.usage
    assert usage.computed_tokens < usage.prompt_tokens / 2
    # More replies than lanes; and one that is done does not wait for those that began with it.
    assert usage.replies > 10 * lanes
    lengths = [len(tokens) for made in case.expected.values() for tokens in made.tokens]
    together = sum(max(lengths[i : i + lanes]) for i in range(0, len(lengths), lanes))
    assert usage.tokens == sum(lengths)
    assert usage.steps == together if lanes == 1 else usage.steps < 0.95 * together
    return differences


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, lora_from(LoraSettings(rank=4)), FLOAT32)


@pytest.fixture(scope="module")
def tiny_case(tiny: Backbone, esconv: Path) -> Case:
    made = case(tiny, random_adapter(tiny, 2), esconv, 1024, lambda i: 4 + 5 * i % 21)
    assert len(made.requests["greedy"]) > 100
    assert (
        len({tuple(x) for x in made.expected["greedy"].tokens}) > 50
    )  # a random model repeats itself when it is greedy
    assert made.expected["greedy"].tokens != made.expected["sampled"].tokens
    return made


@pytest.mark.parametrize("lanes", [1, 3, 16])
def test_the_text_does_not_depend_on_what_is_shared(tiny_case: Case, lanes: int) -> None:
    """All turns of twenty real dialogues, by a tiny model with a random adapter."""
    assert max(compare(tiny_case, lanes).values()) <= 1e-4


def test_a_token_that_is_not_seen_changes_the_text(tiny_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a branch that sees a token of its trunk less."""
    spans = Placed.spans

    def short(placed: Placed) -> tuple[int, int, int, int]:
        start, end, *own = spans.fget(placed)  # type: ignore[attr-defined]
        return start, max(start, end - 1), own[0], own[1]

    monkeypatch.setattr(Placed, "spans", property(short))
    generator = tiny_case.generator(16)
    some = tiny_case.requests["greedy"][:48]
    got = answers(generator, tiny_case.adapter, generator.grouped(some))
    expected = Replies(*(x[:48] for x in tiny_case.expected["greedy"]))
    assert got.tokens != expected.tokens


@pytest.mark.slow
def test_the_real_models_text_does_not_depend_on_what_is_shared(smollm_folder: Path, esconv: Path) -> None:
    """SmolLM2 with a random adapter; 16 tokens at most."""
    backbone = load_backbone(smollm_folder, lora_from(LoraSettings(rank=8)), FLOAT32)
    real = case(backbone, random_adapter(backbone, 3, size=0.01), esconv, 1024, lambda i: 4 + 5 * i % 13)
    for lanes in (3, 16):
        differences = compare(real, lanes)
        print(f"lanes {lanes}: worst difference of a log-prob", {k: f"{v:.1e}" for k, v in differences.items()})
        assert max(differences.values()) <= 1e-4


# --- what real dialogues do not show ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, None, FLOAT32)


def numbers(seed: int, count: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(5, 900, count).tolist()


def test_nothing_is_lost_without_an_adapter(bare: Backbone) -> None:
    generator = Generator(bare, 4, 1)
    stem = numbers(0, 55)
    prompts = [stem[:n] for n in (20, 30, 40, 55)]
    alone = [generator.generate(BARE, [p], [0], GREEDY, 8)[0].token_ids for p in prompts]
    assert [m.token_ids for m in generator.generate(BARE, prompts, [0] * 4, GREEDY, 8)] == alone
    assert [m.token_ids for m in generator.generate(BARE, prompts[::-1], [0] * 4, GREEDY, 8)] != alone


def test_a_branch_may_lie_in_front_of_its_trunk(bare: Backbone) -> None:
    """The second group's first branch fills the row; the others get the slots of the first group, which is done."""
    stem = numbers(1, 150)
    first, *others = [Request(0, numbers(2, 151), 0, WARM, 6)] + [
        Request(i, [*stem, *numbers(2 + i, 61)], 0, WARM, 6) for i in range(1, 5)
    ]
    generator = Generator(bare, 1, -1, slots=384, new=6)
    alone = [answers(generator, BARE, [[r]]) for r in (first, *others)]
    before = generator.usage.computed_tokens
    both = answers(generator, BARE, [[first], others])
    assert generator.slots == 384
    assert generator.usage.computed_tokens - before == 150 + 150 + 4 * 60
    expected = joined(alone)
    assert both.tokens == expected.tokens
    assert worst_logprob(both, expected) < 1e-4
    assert len({tuple(x) for x in both.tokens}) > 3


def test_a_beginning_that_does_not_fit_beside_is_computed_again(bare: Backbone) -> None:
    """Rows do not grow, and nothing is compiled, where a prompt would fit without what it shares."""
    stem = numbers(3, 60)
    requests = [Request(i, [*stem, *numbers(4 + i, 50)], 0, GREEDY, 4) for i in range(2)]
    generator = Generator(bare, 1, -1, slots=128, new=4)
    alone = [answers(generator, BARE, [[r]]) for r in requests]
    assert answers(generator, BARE, [[r] for r in requests]).tokens == [x.tokens[0] for x in alone]
    assert generator.slots == 128
    long = [r._replace(prompt=[*r.prompt, *numbers(9, 50)]) for r in requests]  # control
    answers(generator, BARE, [[r] for r in long])
    assert generator.slots > 128


@pytest.fixture(scope="module")
def many() -> list[Request]:
    """Prompts of several lengths and replies of several lengths, so that lanes come free at different times."""
    prompts = [numbers(20 + i, 10 + 9 * i) for i in range(8)]
    return [Request(i, prompts[i % 8], 100 + i, WARM, 5 + 7 * i % 36) for i in range(40)]


@pytest.fixture(scope="module")
def alone(bare: Backbone, many: list[Request]) -> Replies:
    """Each of the many answered by itself: its tokens fill the ring once at most."""
    generator = Generator(bare, 1, 1, slots=128, new=40)
    made = [answers(generator, BARE, [[r]]) for r in many]
    return joined(made)


def test_replies_are_right_when_the_ring_has_wrapped_around(
    bare: Backbone, many: list[Request], alone: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(bare, 2, 1)
    made = answers(generator, BARE, generator.grouped(many))
    assert generator.new == 40
    assert generator.usage.steps > 6 * generator.new
    assert made.tokens == alone.tokens
    assert worst_logprob(made, alone) < 1e-4
    assert {len(t) == r.max_tokens for t, r in zip(made.tokens, many, strict=True)} == {True, False}

    def greedy_step(*arguments: Any) -> Any:
        """Control: a lane sees a slot more of its ring than it has filled."""
        return step(*(x._replace(newest=x.newest + 1) if isinstance(x, Fed) else x for x in arguments))

    step = decode.step
    monkeypatch.setattr(decode, "step", greedy_step)
    generator = Generator(bare, 2, 1)
    wrong = answers(generator, BARE, generator.grouped(many))
    assert sum(a != b for a, b in zip(wrong.tokens, alone.tokens, strict=True)) > 3


def test_a_prompt_is_computed_before_it_is_drawn_from(
    bare: Backbone, many: list[Request], alone: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computing a prompt may wait until there are others; a lane that does not wait for it draws other words."""
    generator = Generator(bare, 4, 1)
    assert answers(generator, BARE, [[r] for r in many]).tokens == alone.tokens
    monkeypatch.setattr(Prefills, "next", hurried)  # control: as if all that is queued were computed
    wrong = answers(Generator(bare, 4, 1), BARE, [[r] for r in many])
    assert sum(a != b for a, b in zip(wrong.tokens, alone.tokens, strict=True)) > 3


def hurried(queued: Prefills, urgent: Callable[[], bool]) -> None:
    """Computes nothing, and says that it has."""
    queued.done = [n + len(queue) for n, queue in zip(queued.done, queued.queues, strict=True)]
    for queue in queued.queues:
        queue.clear()


def test_lanes_go_on_while_the_host_looks(
    bare: Backbone, many: list[Request], alone: Replies, monkeypatch: pytest.MonkeyPatch
) -> None:
    def looked(clocked: bool) -> list[bool]:
        """Of each look whether lanes were under way."""
        under_way: list[bool] = []

        def take_in(scheduler: Scheduler, log: Any) -> None:
            if log is not None:
                under_way.append(scheduler.flying is not None)
            usual(scheduler, log)

        monkeypatch.setattr(Scheduler, "_take_in", take_in)
        assert answers(Generator(bare, 8, 1, clocked=clocked), BARE, [[r] for r in many]).tokens == alone.tokens
        return under_way

    usual = Scheduler._take_in
    assert sum(looked(clocked=False)) >= 2
    assert not any(looked(clocked=True))  # control: it waits, so that times can be told apart


def follow(generator: Generator, many: list[Request], follower: Request) -> Replies:
    """Four of the many with short replies; when the first is done, another request follows it. Its key is the last."""
    out: dict[int, Completion] = {}

    def done(request: Request, completion: Completion) -> list[list[Request]]:
        out[request.key] = completion
        return [[follower]] if request.key == 0 else []

    generator.work(BARE, [[r._replace(max_tokens=5)] for r in many[:4]], done, more_may_follow=True)
    made = [out[key] for key in sorted(out)]
    return Replies([m.token_ids for m in made], [m.logprobs for m in made])


def test_a_follower_may_be_longer_than_any_prompt_before(bare: Backbone, many: list[Request], alone: Replies) -> None:
    follower = Request(9, numbers(50, 150), 3, WARM, 5)
    generator = Generator(bare, 2, 1)
    made = follow(generator, many, follower)
    assert generator.slots == 256
    expected = answers(generator, BARE, [[follower]])
    assert made.tokens == [*(t[:5] for t in alone.tokens[:4]), *expected.tokens]
    other = answers(generator, BARE, [[follower._replace(seed=4)]])
    assert other.tokens != expected.tokens


def test_a_follower_with_a_longer_reply_is_right_or_refused(bare: Backbone, many: list[Request]) -> None:
    """It must not see the end of its own text only: the ring is as long as the longest reply that was asked for."""
    follower = Request(9, many[3].prompt, 3, WARM, 40)
    expected = answers(Generator(bare, 2, -1, new=40), BARE, [[follower]])
    assert follow(Generator(bare, 2, -1, new=40), many, follower).tokens[-1:] == expected.tokens
    try:
        made = follow(Generator(bare, 2, -1), many, follower)
    except (InputError, ValueError):
        return
    assert made.tokens[-1:] == expected.tokens
    assert worst_logprob(Replies(made.tokens[-1:], made.logprobs[-1:]), expected) < 1e-4
