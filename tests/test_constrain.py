"""Constrained decoding: whatever is drawn, a template's text parses and its fields keep their budgets to the token."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import save_sentencepiece

from esjax.errors import InputError
from esjax.evolve.reflect import FIELDS, form, parse
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import prompt_with_replies
from esjax.runtime import programs
from esjax.sample.constrain import (
    BUCKET,
    LEAVES,
    LONGEST,
    NEVER,
    START,
    Automaton,
    Field,
    Template,
    compile_template,
    free,
)
from esjax.sample.decode import permitted
from esjax.sample.generate import Generator
from esjax.sample.schedule import Completion
from esjax.sample.schema import schema_pattern
from esjax.sample.score import Scorer
from esjax.tokens.tokenizer import ChatTokenizer

BARE: nnx.State = nnx.State({})  # no adapter
FIELD_TOKENS = 8
SCENE: list[str | Field] = ["Mood:", Field(r" [a-z]+", 4), "\nWhy:", Field(r" [A-Z][^\n]*\.", 6), "\n"]
SCENE_FORM = r"Mood: [a-z]+\nWhy: [A-Z][^\n]*\.\n"
LETTERS: list[str | Field] = ["Say:", Field(r"[ab]+", 6, min_tokens=4), "; now", Field(r"[cd]+", 5), "."]
LETTERS_FORM = r"Say:[ab]+; now[cd]+\."


@dataclass(frozen=True)
class Babble:
    """A temperature at which a model says anything."""

    temperature: float = 5.0
    top_p: float = 1.0
    top_k: int = 0


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_folder)


@pytest.fixture(scope="session")
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, None, compute_dtype("float32"))


@pytest.fixture(scope="session")
def vocab(backbone: Backbone) -> int:
    return backbone.arch.vocab


@pytest.fixture(scope="session")
def reflections(tokenizer: ChatTokenizer, vocab: int) -> Template:
    return form(tokenizer, FIELD_TOKENS, vocab)


@pytest.fixture(scope="session")
def scene(tokenizer: ChatTokenizer, vocab: int) -> Template:
    return compile_template(SCENE, tokenizer, vocab)


@pytest.fixture(scope="session")
def letters(tokenizer: ChatTokenizer, vocab: int) -> Template:
    """A template with a field that has a fewest number of tokens."""
    return compile_template(LETTERS, tokenizer, vocab)


@pytest.fixture(scope="session")
def generator(backbone: Backbone, tokenizer: ChatTokenizer) -> Generator:
    """Its shapes hold every prompt and reply of this file, so only a constraint of another size compiles anything."""
    return Generator(backbone, 32, tokenizer.end_of_turn, lanes=2, slots=256, new=128)


@pytest.fixture(scope="session")
def prompt(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.prompt([{"role": "user", "content": "I moved and the boxes win. Think about me."}])


def babble(generator: Generator, prompt: list[int], template: Template, count: int = 64) -> list[Completion]:
    """Replies to the prompt, which the template's opening follows, with seeds 0, 1, ..."""
    prompts = [[*prompt, *template.opening]] * count
    return generator.generate(BARE, prompts, range(count), Babble(), template.max_tokens, template.automaton)


def text_of(tokenizer: ChatTokenizer, template: Template, tokens: Sequence[int]) -> str:
    """The whole text: what is given and what is drawn."""
    return tokenizer.decode([*template.opening, *tokens])


@pytest.fixture(scope="session")
def babbled(generator: Generator, prompt: list[int], reflections: Template) -> list[Completion]:
    """Sixty-four reflections of a random model at temperature 5."""
    return babble(generator, prompt, reflections)


def parses(text: str) -> bool:
    try:
        return list(parse(text)) == list(FIELDS)
    except ValueError:
        return False


# --- an oracle for the budget rule, on the table's transitions alone -------------------------------------------------


class Walker:
    """Walks by the rule of the docstrings, from ``next``, ``part``, ``most`` and ``least`` alone; ``cost`` is not read.

    A part may take its most tokens and must then be left, and may not be left before it took its least.
    """

    def __init__(self, a: Automaton) -> None:
        self.next = a.next.astype(int)
        self.part, self.most, self.least = (x.astype(int) for x in (a.part, a.most, a.least))
        self.close = self._tokens_until_left()

    def _tokens_until_left(self) -> np.ndarray:
        """Fewest tokens from each state until some token leads out of its part (or none leads anywhere)."""
        n = len(self.part)
        following = [sorted({int(t) for t in row if t >= 0}) for row in self.next]
        out = [
            0 if not following[s] or any(self.part[t] != self.part[s] for t in following[s]) else 1 << 20
            for s in range(n)
        ]
        queue = deque(s for s in range(n) if out[s] == 0)
        before: dict[int, list[int]] = {s: [] for s in range(n)}
        for s in range(n):
            for t in following[s]:
                if self.part[t] == self.part[s]:
                    before[t].append(s)
        while queue:
            t = queue.popleft()
            for s in before[t]:
                if out[s] > out[t] + 1:
                    out[s] = out[t] + 1
                    queue.append(s)
        return np.asarray(out)

    def mask(self, state: int, used: int) -> np.ndarray:
        """Which tokens [V] may follow where ``used`` tokens of the state's part are spent."""
        if state == 0:
            return np.ones(self.next.shape[1], bool)  # free, for ever
        to = self.next[state]
        stays = self.part[to] == self.part[state]
        spent = np.where(stays, used + 1, 1)
        return (to >= 0) & (spent + self.close[to] <= self.most[to]) & (stays | (used >= self.least[state]))

    def masks(self, used: int) -> np.ndarray:
        """The same for all states [S, V]."""
        return np.stack([self.mask(s, used) for s in range(len(self.part))])

    def walk(self, choose: Callable[[list[int], int], int], end: int, most: int) -> list[int]:
        """Tokens of a walk from the start to the end token, or ``most`` of them."""
        state, used = START, 0
        out: list[int] = []
        while len(out) < most:
            token = choose(np.flatnonzero(self.mask(state, used)).tolist(), state)
            to = int(self.next[state, token])
            used = used + 1 if self.part[to] == self.part[state] else 1
            state = to
            out.append(token)
            if token == end:
                break
        return out


def at_random(rng: np.random.Generator) -> Callable[[list[int], int], int]:
    return lambda allowed, state: int(rng.choice(allowed))


def parts_of(a: Automaton, tokens: Sequence[int]) -> dict[int, int]:
    """How many of the tokens each part of the template took."""
    state, taken = START, dict.fromkeys(np.unique(a.part).tolist(), 0)
    for token in tokens:
        state = int(a.next[state, token])
        assert state > 0
        taken[int(a.part[state])] += 1
    return taken


def loosened(a: Automaton) -> Automaton:
    """The same table with budgets that never bind."""
    return a._replace(most=np.full_like(a.most, LONGEST))


# --- with the model --------------------------------------------------------------------------------------------------


def test_sixty_four_babbled_reflections_all_parse(
    tokenizer: ChatTokenizer, babbled: list[Completion], reflections: Template
) -> None:
    texts = [text_of(tokenizer, reflections, m.token_ids) for m in babbled]
    assert [t for t in texts if not parses(t)] == []
    assert len(set(texts)) == 64
    assert {m.finish for m in babbled} == {"stop"}
    assert all(len(m.token_ids) <= reflections.max_tokens for m in babbled)
    assert not any(parses(t + " and") for t in texts)  # controls: the parser is strict
    assert not any(parses(t.replace("\n", " ", 1)) for t in texts)
    assert not any(parses(tokenizer.decode(m.token_ids)) for m in babbled)  # the opening is given, not drawn


def test_without_the_budget_rule_they_do_not_all_parse(
    tokenizer: ChatTokenizer,
    generator: Generator,
    prompt: list[int],
    babbled: list[Completion],
    reflections: Template,
) -> None:
    """Control: the same table with budgets that never bind runs out of tokens in the middle of a field."""
    before = programs.compiled()
    loose = babble(generator, prompt, reflections._replace(automaton=loosened(reflections.automaton)), 32)
    assert programs.compiled() == before  # the table is an argument
    assert before["decode"] > 0
    failed = [m for m in loose if not parses(text_of(tokenizer, reflections, m.token_ids))]
    assert len(failed) > 16
    assert "length" in {m.finish for m in failed}


def test_without_a_constraint_nothing_parses(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], reflections: Template
) -> None:
    plain = generator.generate(BARE, [[*prompt, *reflections.opening]] * 8, range(8), Babble(), 40)
    assert not any(parses(text_of(tokenizer, reflections, m.token_ids)) for m in plain)


def test_budgets_are_kept_to_the_token(babbled: list[Completion], reflections: Template) -> None:
    fields = range(2, 2 * len(FIELDS) + 1, 2)  # after the opening: field, literal, field, ...
    taken = [parts_of(reflections.automaton, m.token_ids) for m in babbled]
    for field in fields:
        counts = [t[field] for t in taken]
        assert max(counts) == FIELD_TOKENS  # a babbling model uses the budget up, and no more
    for t, m in zip(taken, babbled, strict=True):
        literals = sum(n for part, n in t.items() if part not in fields)
        # the literals and the end are always whole
        assert literals == reflections.max_tokens - FIELD_TOKENS * len(FIELDS)
        assert sum(t.values()) == len(m.token_ids)


def test_fewest_and_most_tokens_are_kept_to_the_token(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], letters: Template, vocab: int
) -> None:
    """Both ends of the allowed range are met by a babbling model, and nothing beyond them."""

    def counts(template: Template, field: int) -> list[int]:
        made = babble(generator, prompt, template)
        assert all(re.fullmatch(LETTERS_FORM, text_of(tokenizer, template, m.token_ids)) for m in made)
        assert {m.finish for m in made} == {"stop"}
        return [parts_of(template.automaton, m.token_ids)[field] for m in made]

    first, second = counts(letters, 2), counts(letters, 4)
    assert (min(first), max(first)) == (4, 6)
    assert (min(second), max(second)) == (1, 5)
    loose = compile_template([LETTERS[0], Field(r"[ab]+", 6), *LETTERS[2:]], tokenizer, vocab)
    assert min(counts(loose, 2)) < 4  # control: nothing but min_tokens kept them from being shorter


def test_constrained_logprobs_are_the_models_own(
    backbone: Backbone, prompt: list[int], babbled: list[Completion], reflections: Template
) -> None:
    """The mask decides what may be drawn, not what is reported."""
    given = [*prompt, *reflections.opening]
    examples = [prompt_with_replies(given, [m.token_ids]) for m in babbled[:4]]
    scored = Scorer(backbone, 256, 2).score(BARE, examples)
    for m, (logprobs,) in zip(babbled, scored, strict=False):
        assert np.abs(np.asarray(m.logprobs) - logprobs).max() < 1e-3
    assert np.abs(np.asarray(babbled[0].logprobs[:5]) - scored[1][0][1:6]).max() > 1e-2


def test_greedy_obeys_the_constraint_too(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], reflections: Template
) -> None:
    given, cold = [*prompt, *reflections.opening], Babble(temperature=0.0)
    (greedy,) = generator.generate(BARE, [given], [0], cold, reflections.max_tokens, reflections.automaton)
    assert parses(text_of(tokenizer, reflections, greedy.token_ids))
    (plain,) = generator.generate(BARE, [given], [0], cold, reflections.max_tokens)
    assert not parses(text_of(tokenizer, reflections, plain.token_ids))


def test_the_automaton_of_no_constraint_constrains_nothing(
    generator: Generator, prompt: list[int], reflections: Template, vocab: int
) -> None:
    """Neither does the free state of one that is there for other replies."""

    def tokens(first_seed: int, constraint: Automaton | None) -> list[list[int]]:
        seeds = range(first_seed, first_seed + 8)
        return [m.token_ids for m in generator.generate(BARE, [prompt] * 8, seeds, Babble(), 40, constraint)]

    unconstrained = tokens(0, free(vocab))
    bound = tokens(0, reflections.automaton)
    plain = tokens(0, None)  # with the reflections' table still on the device
    assert plain == unconstrained
    assert all(a != b for a, b in zip(bound, plain, strict=True))  # controls: a constraint tells, and so does a seed
    assert all(a != b for a, b in zip(tokens(8, free(vocab)), plain, strict=True))


def test_another_template_of_as_many_states_compiles_nothing(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    one = compile_template(["Good", Field(r" [a-z]+", 4), "."], tokenizer, vocab)
    other = compile_template(["A bad or", Field(r" [A-Z][a-z]*", 6), "! Oh!\n"], tokenizer, vocab)
    assert one.automaton.next.shape == other.automaton.next.shape == (BUCKET, vocab)
    assert (one.automaton.next != other.automaton.next).any()
    made = babble(generator, prompt, one, 4)
    assert all(re.fullmatch(r"Good [a-z]+\.", text_of(tokenizer, one, m.token_ids)) for m in made)
    before = programs.compiled()
    made = babble(generator, prompt, other, 4)
    assert all(re.fullmatch(r"A bad or [A-Z][a-z]*! Oh!\n", text_of(tokenizer, other, m.token_ids)) for m in made)
    assert programs.compiled() == before
    larger = Automaton(*(np.pad(x, [(0, 7 * BUCKET)] + [(0, 0)] * (x.ndim - 1)) for x in other.automaton))
    again = babble(generator, prompt, other._replace(automaton=larger), 4)
    assert [m.token_ids for m in again] == [m.token_ids for m in made]
    assert programs.compiled() - before == {"decode": 1}  # control: a table of another size does


# --- without a model -------------------------------------------------------------------------------------------------


def test_costs_are_the_shortest_ways(reflections: Template, scene: Template, letters: Template) -> None:
    """The table that the loop reads says what follows from the transitions and the budgets."""

    def costs(a: Automaton) -> np.ndarray:
        walker = Walker(a)
        to = walker.next
        price = 1 + walker.close[to]
        stays = walker.part[to] == walker.part[:, None]
        out = np.where(stays, np.minimum(price, NEVER), np.where(price <= walker.most[to], LEAVES, NEVER))
        out[to < 0] = NEVER
        out[0] = 0  # free
        return out

    for table in (t.automaton for t in (reflections, scene, letters)):
        assert (table.cost == costs(table)).all()
        assert (table.cost != costs(table._replace(part=np.zeros_like(table.part)))).any()
    costly = reflections.automaton.cost
    assert ((costly > 1) & (costly < NEVER)).any()  # some ways are longer than a token


@pytest.mark.parametrize("name", ["reflections", "scene", "letters"])
def test_the_loop_permits_what_the_rule_allows(name: str, request: pytest.FixtureRequest) -> None:
    """For every state, at the beginning, in the middle, at the end and beyond the end of its budget."""
    table: Automaton = request.getfixturevalue(name).automaton
    states = jnp.arange(len(table.part))

    def loop(used: int) -> np.ndarray:
        return np.asarray(permitted(Automaton(*map(jnp.asarray, table)), states, jnp.full_like(states, used)))

    walker = Walker(table)
    limits = sorted({int(x) for x in table.most if 0 < x < LONGEST})
    some = sorted({0, 1, *(m + d for m in limits for d in (-3, -2, -1, 0, 1)), 100})
    for used in some:
        assert (loop(used) == walker.masks(used)).all(), used
    full = limits[-1]
    assert (loop(full) != walker.masks(full - 1)).any()  # controls: the number of tokens and the budget tell
    less = Walker(table._replace(most=np.where(table.most < LONGEST, table.most - 1, table.most)))
    assert (loop(full - 1) != less.masks(full - 1)).any()
    more = Walker(table._replace(least=table.least + 1))
    assert (loop(int(table.least.max())) != more.masks(int(table.least.max()))).any()


def test_the_free_state_allows_everything(reflections: Template, scene: Template, vocab: int) -> None:
    for table in (free(vocab), reflections.automaton, scene.automaton):
        on_device = Automaton(*map(jnp.asarray, table))
        for used in (0, 1, FIELD_TOKENS + 1, LONGEST):
            assert np.asarray(permitted(on_device, jnp.asarray([0]), jnp.asarray([used]))).all()
        assert (table.next[0] == 0).all()
    assert (free(vocab).next[START] == 0).all()
    assert not np.asarray(permitted(on_device, jnp.asarray([START]), jnp.asarray([0]))).all()  # control


def test_the_free_state_allows_everything_for_ever(vocab: int) -> None:
    """Also in replies longer than the longest part of a template."""
    on_device = Automaton(*map(jnp.asarray, free(vocab)))
    assert np.asarray(permitted(on_device, jnp.asarray([0]), jnp.asarray([LONGEST + 1]))).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_walks_end_in_what_parses(
    tokenizer: ChatTokenizer, reflections: Template, scene: Template, letters: Template, seed: int
) -> None:
    cases: list[tuple[Template, Callable[[str], Any]]] = [
        (reflections, parses),
        (scene, re.compile(SCENE_FORM).fullmatch),
        (letters, re.compile(LETTERS_FORM).fullmatch),
    ]
    for template, good in cases:
        rng = np.random.default_rng(seed)
        tokens = Walker(template.automaton).walk(at_random(rng), tokenizer.end_of_turn, template.max_tokens)
        assert tokens[-1] == tokenizer.end_of_turn
        assert len(tokens) <= template.max_tokens
        assert good(text_of(tokenizer, template, tokens))


def test_walks_without_the_budget_rule_do_not_all_end(tokenizer: ChatTokenizer, reflections: Template) -> None:
    """Control of the walks."""
    rng = np.random.default_rng(0)
    loose = Walker(loosened(reflections.automaton))
    walks = [loose.walk(at_random(rng), tokenizer.end_of_turn, reflections.max_tokens) for _ in range(20)]
    assert not all(parses(text_of(tokenizer, reflections, w)) for w in walks)


def test_a_walk_that_avoids_the_end_takes_exactly_the_most_tokens(
    tokenizer: ChatTokenizer, reflections: Template
) -> None:
    table, most = reflections.automaton, reflections.max_tokens
    walker = Walker(table)

    def avoid(allowed: list[int], state: int) -> int:
        return max(allowed, key=lambda t: (table.part[table.next[state, t]] == table.part[state], -t))

    tokens = walker.walk(avoid, tokenizer.end_of_turn, most + 5)
    assert tokens[-1] == tokenizer.end_of_turn
    assert len(tokens) == most
    assert parses(text_of(tokenizer, reflections, tokens))


def test_a_walk_that_seeks_the_end_takes_exactly_the_fewest_tokens(tokenizer: ChatTokenizer, letters: Template) -> None:
    table = letters.automaton

    def seek(allowed: list[int], state: int) -> int:
        return min(allowed, key=lambda t: (table.part[table.next[state, t]] == table.part[state], t))

    tokens = Walker(table).walk(seek, tokenizer.end_of_turn, letters.max_tokens)
    assert (parts_of(table, tokens)[2], parts_of(table, tokens)[4]) == (4, 1)
    free_of_it = Walker(table._replace(least=np.zeros_like(table.least)))  # control
    assert len(free_of_it.walk(seek, tokenizer.end_of_turn, letters.max_tokens)) == len(tokens) - 3


def test_no_special_token_is_allowed_but_the_end_and_that_only_at_the_end(
    tokenizer: ChatTokenizer, reflections: Template
) -> None:
    table = reflections.automaton
    bound = table.next[START:]  # state 0 is free
    for special in tokenizer.special - {tokenizer.end_of_turn}:
        assert (bound[:, special] < 0).all()
    ends = START + np.flatnonzero(bound[:, tokenizer.end_of_turn] >= 0)
    assert set(table.part[ends].tolist()) == {2 * len(FIELDS)}  # states of the last field
    final = np.unique(table.next[ends, tokenizer.end_of_turn])
    assert len(final) == 1
    assert (table.next[final[0]] < 0).all()


def test_a_literal_alone(tokenizer: ChatTokenizer, vocab: int) -> None:
    """All of it is given; what is drawn is the end."""
    template = compile_template(["Good morning."], tokenizer, vocab)
    assert tokenizer.decode(template.opening) == "Good morning."
    assert template.max_tokens == 1
    walk = Walker(template.automaton).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, 99)
    assert walk == [tokenizer.end_of_turn]
    assert Walker(template.automaton).mask(START, 0).sum() == 1
    assert compile_template(["Good evening."], tokenizer, vocab).opening != template.opening


def test_literals_behind_a_field_are_drawn(tokenizer: ChatTokenizer, vocab: int) -> None:
    """Only what every text begins with is given."""
    template = compile_template(["Good", Field(" [a-z]+", 1), ". Bye"], tokenizer, vocab)
    assert tokenizer.decode(template.opening) == "Good"
    walk = Walker(template.automaton).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, 99)
    assert len(walk) == template.max_tokens
    assert re.fullmatch(r" [a-z]+\. Bye", tokenizer.decode(walk))
    other = compile_template(["Good", Field(" [a-z]+", 1), ". Bye!"], tokenizer, vocab)
    assert Walker(other.automaton).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, 99) != walk


def test_a_template_that_a_field_makes_ambiguous_is_refused(tokenizer: ChatTokenizer, vocab: int) -> None:
    with pytest.raises(InputError, match="begins with a token"):
        compile_template(["Name:", Field(r" [a-z]+", 8), "and so on"], tokenizer, vocab)
    compile_template(["Name:", Field(r" [a-z]+", 8), ". And so on"], tokenizer, vocab)


@pytest.mark.parametrize(
    "field",
    [
        Field("[^\\s\\S]", 4),  # no text at all
        Field("(", 4),  # no expression
        Field("x{0}", 4),  # the empty text alone: no token enters the field
        Field("wxyzwxyzwxyz", 3),  # the shortest text is longer than the budget
        Field("[a-z]+", 4, min_tokens=5),
        Field("[a-z]+", 4, min_tokens=-1),
        Field("[a-z]+", LONGEST + 1),
    ],
    ids=["no text", "broken", "empty", "budget", "fewest > most", "none", "too many"],
)
def test_fields_that_cannot_be_filled_are_refused(tokenizer: ChatTokenizer, vocab: int, field: Field) -> None:
    with pytest.raises(InputError):
        compile_template(["A:", field], tokenizer, vocab)


def test_more_states_than_there_are_numbers_are_refused(tokenizer: ChatTokenizer, vocab: int) -> None:
    with pytest.raises(InputError, match=r"the constraint needs \d{5} states"):
        compile_template(["A", "~" * 40000], tokenizer, vocab)
    assert compile_template(["A", "~" * 400], tokenizer, vocab).max_tokens > 100


def test_a_pattern_that_cannot_go_on_is_refused_more_tokens_than_its_texts_have(
    tokenizer: ChatTokenizer, vocab: int
) -> None:
    for pattern, fewest in ((r"[a-z]*\.", 2), ("(?:yes|no)", 4), ("[a-z]+(?:;b)?", 4)):
        with pytest.raises(InputError, match="cannot go on"):
            compile_template(["A:", Field(pattern, 8, min_tokens=fewest)], tokenizer, vocab)
        compile_template(["A:", Field(pattern, 8)], tokenizer, vocab)
    compile_template(["A:", Field("[a-z]+", 8, min_tokens=8)], tokenizer, vocab)


def test_a_field_whose_texts_cannot_have_so_many_tokens_is_refused_or_filled(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    """After two of three tokens, as "th;", the field may not be left, and the shortest way on takes two tokens."""
    pattern = "[the]+;(?:[the]+;)*"
    try:
        template = compile_template(["A:", Field(pattern, 3, min_tokens=3)], tokenizer, vocab)
    except InputError:
        return
    made = babble(generator, prompt, template)
    assert all(re.fullmatch(f"A:{pattern}", text_of(tokenizer, template, m.token_ids)) for m in made)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"[0-9]+(?:\.[0-9]+)?;", "1.5;"),
        (r"[0-9]+(?:\.[0-9]+)?", "1.5"),
        (r"[a-z][^\n]*[.!?]", "a. b."),
        ("a(?:;a)*", "a;a"),
    ],
)
def test_a_text_that_could_end_may_go_on(tokenizer: ChatTokenizer, vocab: int, pattern: str, text: str) -> None:
    """What the pattern matches can be written letter by letter."""
    assert re.fullmatch(pattern, text)
    table = compile_template([Field(pattern, 9), "\n"], tokenizer, vocab).automaton
    state = START
    for letter in text:
        (token,) = tokenizer.encode(letter)
        state = int(table.next[state, token])
        assert state > 0
    (newline,) = tokenizer.encode("\n")
    assert table.next[state, newline] > 0


def test_a_field_is_not_entered_by_a_way_that_its_budget_does_not_finish(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    """One alternative fits the budget and the other does not: the choice falls with the field's first token."""
    template = compile_template(["A:", Field(r"(?:q|wxyzwxyzwxyz)", 3)], tokenizer, vocab)
    long = len(tokenizer.encode("wxyzwxyzwxyz"))
    assert long > 3
    made = babble(generator, prompt, template, 32)
    assert {text_of(tokenizer, template, m.token_ids) for m in made} == {"A:q"}
    roomy = compile_template(["A:", Field(r"(?:q|wxyzwxyzwxyz)", long)], tokenizer, vocab)
    assert Walker(roomy.automaton).mask(START, 0).sum() > Walker(template.automaton).mask(START, 0).sum() == 1


@pytest.mark.parametrize("pattern", [r"[a-z]*\.", r"(?:ab)*c", r"\.|[a-z]+\."])
def test_a_field_may_return_to_where_it_began(tokenizer: ChatTokenizer, vocab: int, pattern: str) -> None:
    template = compile_template(["A:", Field(pattern, 4), "\nB"], tokenizer, vocab)
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = Walker(template.automaton).walk(at_random(rng), tokenizer.end_of_turn, template.max_tokens)
        assert re.fullmatch(f"A:(?:{pattern})\nB", text_of(tokenizer, template, tokens))


def test_a_field_may_open_a_template(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    template = compile_template([Field(r"[a-z]+[.]", 5), "\nEnd"], tokenizer, vocab)
    assert template.opening == []
    made = babble(generator, prompt, template, 32)
    assert all(re.fullmatch(r"[a-z]+\.\nEnd", tokenizer.decode(m.token_ids)) for m in made)


def test_reflections_parse_with_a_byte_fallback_vocabulary_as_well(tmp_path: Path) -> None:
    """Llama 2's and Mistral's tokenizers put a space before a text that is encoded alone; a literal is no such text."""
    save_sentencepiece(tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    template = form(tokenizer, FIELD_TOKENS, len(tokenizer.hf))
    rng = np.random.default_rng(0)
    tokens = Walker(template.automaton).walk(at_random(rng), tokenizer.end_of_turn, template.max_tokens)
    assert tokens[-1] == tokenizer.end_of_turn
    parse(text_of(tokenizer, template, tokens))


# --- JSON schemas ----------------------------------------------------------------------------------------------------

MOODS = ["glad", "sad", 'so "so"']
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": MOODS}, "age": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["mood", "age", "name"],
}


def fits_schema(text: str) -> bool:
    """Whether a text is JSON of the schema above."""
    try:
        made = json.loads(text)
    except json.JSONDecodeError:
        return False
    return (
        isinstance(made, dict)
        and set(made) == set(SCHEMA["properties"])
        and isinstance(made["name"], str)
        and type(made["age"]) is int
        and made["mood"] in MOODS
    )


def test_babbled_json_is_json_of_the_schema(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    pattern = schema_pattern(json.dumps(SCHEMA), "mine")
    template = compile_template([Field(pattern, 80)], tokenizer, vocab)
    made = babble(generator, prompt, template, 32)
    texts = [text_of(tokenizer, template, m.token_ids) for m in made]
    assert [t for t in texts if not fits_schema(t)] == []
    assert len(set(texts)) == 32
    for name in SCHEMA["properties"]:
        assert len({json.loads(t)[name] for t in texts}) > 1
    loose = babble(generator, prompt, template._replace(automaton=loosened(template.automaton)), 32)
    assert not all(fits_schema(text_of(tokenizer, template, m.token_ids)) for m in loose)  # control: the budget's doing


@pytest.mark.parametrize(
    "text",
    [
        '{"mood": "sad", "age": 1.5, "name": "x"}',
        '{"mood": "sad", "age": true, "name": "x"}',
        '{"mood": "sad", "age": 1, "name": 3}',
        '{"mood": "mad", "age": 1, "name": "x"}',
        '{"mood": "sad", "age": 1}',
        '{"mood": "sad", "age": 1, "name": "x"',
    ],
)
def test_other_json_does_not_fit_the_schema(text: str) -> None:
    """Control of the check, and of the expression."""
    pattern = schema_pattern(json.dumps(SCHEMA), "mine")
    assert not fits_schema(text)
    assert re.fullmatch(pattern, text) is None
    good = '{"mood": "sad", "age": 1, "name": "x"}'
    assert fits_schema(good)
    assert re.fullmatch(pattern, good)


@pytest.mark.parametrize(
    "schema",
    ["", "not json", "1", "[1]", "null", '{"type": "nonsense"}', '{"$ref": "#/absent"}', '{"type": "object"'],
)
def test_a_broken_schema_is_refused_by_name(schema: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.json: not a JSON schema that can be followed"):
        schema_pattern(schema, "mine.json")


@pytest.mark.parametrize("schema", ['{"enum": []}', '{"type": "string", "pattern": "("}'])
def test_a_schema_that_nothing_fits_is_refused_when_it_is_compiled(
    tokenizer: ChatTokenizer, vocab: int, schema: str
) -> None:
    with pytest.raises(InputError):
        compile_template([Field(schema_pattern(schema, "mine"), 40)], tokenizer, vocab)


def test_a_schema_whose_shortest_text_exceeds_the_budget_is_refused(tokenizer: ChatTokenizer, vocab: int) -> None:
    pattern = schema_pattern(json.dumps(SCHEMA), "mine")
    with pytest.raises(InputError, match="too small: its shortest text takes") as e:
        compile_template([Field(pattern, 5)], tokenizer, vocab)
    enough = int(str(e.value).rsplit(maxsplit=1)[-1])
    exact = compile_template([Field(pattern, enough)], tokenizer, vocab)
    tokens = Walker(exact.automaton).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, exact.max_tokens)
    assert fits_schema(tokenizer.decode(tokens))
    with pytest.raises(InputError, match="too small"):
        compile_template([Field(pattern, enough - 1)], tokenizer, vocab)
