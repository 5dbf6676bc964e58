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
from conftest import chat
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from test_tokens import save_sentencepiece

from esjax.errors import InputError
from esjax.evolve.reflect import FIELDS, form, parse
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import prompt_with_replies
from esjax.runtime import programs
from esjax.sample.constrain import (
    BUCKET,
    LONGEST,
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


Choose = Callable[[list[int], int], int]  # which of the allowed tokens follows, in a state


def first(allowed: list[int], state: int) -> int:
    return allowed[0]


def at_random(seed: int) -> Choose:
    rng = np.random.default_rng(seed)
    return lambda allowed, state: int(rng.choice(allowed))


@dataclass(frozen=True)
class Model:
    """The tiny model with its tokenizer, and what the tests do with them."""

    tokenizer: ChatTokenizer
    backbone: Backbone
    generator: Generator
    prompt: list[int]

    @property
    def vocab(self) -> int:
        return self.backbone.arch.vocab

    def compile(self, *parts: str | Field) -> Template:
        return compile_template(list(parts), self.tokenizer, self.vocab)

    def sample(self, template: Template, count: int = 64, automaton: Automaton | None = None) -> list[Completion]:
        """Replies to the prompt, which the template's opening follows, with seeds 0, 1, ..."""
        prompts = [[*self.prompt, *template.opening]] * count
        table = template.automaton if automaton is None else automaton
        return self.generator.generate(BARE, prompts, range(count), Babble(), template.max_tokens, table)

    def text(self, template: Template, tokens: Sequence[int]) -> str:
        """The whole text: what is given and what is drawn."""
        return self.tokenizer.decode([*template.opening, *tokens])

    def babble(self, template: Template, count: int = 64, automaton: Automaton | None = None) -> list[str]:
        return [self.text(template, m.token_ids) for m in self.sample(template, count, automaton)]

    def walk(self, template: Template, choose: Choose = first, most: int | None = None) -> list[int]:
        """A walk through the template's table by the rule of the docstrings, up to the end token or its most tokens."""
        walker = Walker(template.automaton)
        return walker.walk(choose, self.tokenizer.end_of_turn, template.max_tokens if most is None else most)


@pytest.fixture(scope="session")
def model(tiny_folder: Path, tokenizer: ChatTokenizer) -> Model:
    """The generator's shapes hold every prompt and reply of this file, so only a constraint of another size compiles."""
    backbone = load_backbone(tiny_folder, None, compute_dtype("float32"))
    generator = Generator(backbone, 32, tokenizer.end_of_turn, lanes=2, slots=256, new=128)
    prompt = tokenizer.prompt(chat("I moved and the boxes win. Think about me."))
    return Model(tokenizer, backbone, generator, prompt)


@pytest.fixture(scope="session")
def reflections(model: Model) -> Template:
    return form(model.tokenizer, FIELD_TOKENS, model.vocab)


@pytest.fixture(scope="session")
def scene(model: Model) -> Template:
    return model.compile(*SCENE)


@pytest.fixture(scope="session")
def letters(model: Model) -> Template:
    """A template with a field that has a fewest number of tokens."""
    return model.compile(*LETTERS)


@pytest.fixture(scope="session")
def babbled(model: Model, reflections: Template) -> list[Completion]:
    """Sixty-four reflections of a random model at temperature 5."""
    return model.sample(reflections)


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


def test_64_babbled_reflections_all_parse(model: Model, babbled: list[Completion], reflections: Template) -> None:
    texts = [model.text(reflections, m.token_ids) for m in babbled]
    assert [t for t in texts if not parses(t)] == []
    assert len(set(texts)) == 64
    assert {m.finish for m in babbled} == {"stop"}
    assert not any(parses(t + " and") for t in texts)  # controls: the parser is strict
    assert not any(parses(t.replace("\n", " ", 1)) for t in texts)
    assert not any(parses(model.tokenizer.decode(m.token_ids)) for m in babbled)  # the opening is given, not drawn


def test_without_the_budget_rule_or_the_constraint_they_do_not_parse(model: Model, reflections: Template) -> None:
    """Controls: budgets that never bind run out of tokens in the middle of a field; without a constraint nothing parses."""
    model.sample(reflections, 32)
    before = programs.compiled()
    loose = model.sample(reflections, 32, loosened(reflections.automaton))
    assert programs.compiled() == before  # the table is an argument
    assert before["decode"] > 0
    assert sum(not parses(model.text(reflections, m.token_ids)) for m in loose) > 16
    assert "length" in {m.finish for m in loose}
    assert not any(parses(t) for t in model.babble(reflections, 8, free(model.vocab)))


def test_budgets_are_kept_to_the_token(babbled: list[Completion], reflections: Template) -> None:
    fields = range(2, 2 * len(FIELDS) + 1, 2)  # after the opening: field, literal, field, ...
    taken = [parts_of(reflections.automaton, m.token_ids) for m in babbled]
    for field in fields:
        assert max(t[field] for t in taken) == FIELD_TOKENS  # a babbling model uses the budget up, and no more
    for t, m in zip(taken, babbled, strict=True):
        literals = sum(n for part, n in t.items() if part not in fields)
        # the literals and the end are always whole
        assert literals == reflections.max_tokens - FIELD_TOKENS * len(FIELDS)
        assert sum(t.values()) == len(m.token_ids) <= reflections.max_tokens


def test_fewest_and_most_tokens_are_kept_to_the_token(model: Model, letters: Template) -> None:
    """Both ends of the allowed range are met by a babbling model, and nothing beyond them."""

    def counts(template: Template, *fields: int) -> list[list[int]]:
        made = model.sample(template)
        assert all(re.fullmatch(LETTERS_FORM, model.text(template, m.token_ids)) for m in made)
        taken = [parts_of(template.automaton, m.token_ids) for m in made]
        return [[t[field] for t in taken] for field in fields]

    first, second = counts(letters, 2, 4)
    assert (min(first), max(first)) == (4, 6)
    assert (min(second), max(second)) == (1, 5)
    loose = model.compile(LETTERS[0], Field(r"[ab]+", 6), *LETTERS[2:])
    assert min(counts(loose, 2)[0]) < 4  # control: nothing but min_tokens kept them from being shorter


def test_constrained_logprobs_are_the_models(model: Model, babbled: list[Completion], reflections: Template) -> None:
    """The mask decides what may be drawn, not what is reported."""
    given = [*model.prompt, *reflections.opening]
    examples = [prompt_with_replies(given, [m.token_ids]) for m in babbled[:4]]
    scored = Scorer(model.backbone, 256, 2).score(BARE, examples)
    for m, (logprobs,) in zip(babbled, scored, strict=False):
        assert np.abs(np.asarray(m.logprobs) - logprobs).max() < 1e-3
    assert np.abs(np.asarray(babbled[0].logprobs[:5]) - scored[1][0][1:6]).max() > 1e-2


def test_greedy_obeys_the_constraint_too(model: Model, reflections: Template) -> None:
    def greedy(constraint: Automaton | None) -> str:
        given, cold = [[*model.prompt, *reflections.opening]], Babble(temperature=0.0)
        (made,) = model.generator.generate(BARE, given, [0], cold, reflections.max_tokens, constraint)
        return model.text(reflections, made.token_ids)

    assert parses(greedy(reflections.automaton))
    assert not parses(greedy(None))


def test_the_automaton_of_no_constraint_constrains_nothing(model: Model, reflections: Template) -> None:
    """Neither does the free state of one that is there for other replies."""

    def tokens(first_seed: int, constraint: Automaton | None) -> list[list[int]]:
        seeds, prompts = range(first_seed, first_seed + 8), [model.prompt] * 8
        return [m.token_ids for m in model.generator.generate(BARE, prompts, seeds, Babble(), 40, constraint)]

    unconstrained, bound = tokens(0, free(model.vocab)), tokens(0, reflections.automaton)
    plain = tokens(0, None)  # with the reflections' table still on the device
    assert plain == unconstrained
    assert all(a != b for a, b in zip(bound, plain, strict=True))  # controls: a constraint tells, and so does a seed
    assert all(a != b for a, b in zip(tokens(8, free(model.vocab)), plain, strict=True))


def test_another_template_of_as_many_states_compiles_nothing(model: Model) -> None:
    one = model.compile("Good", Field(r" [a-z]+", 4), ".")
    other = model.compile("A bad or", Field(r" [A-Z][a-z]*", 6), "! Oh!\n")
    assert one.automaton.next.shape == other.automaton.next.shape == (BUCKET, model.vocab)
    assert (one.automaton.next != other.automaton.next).any()
    assert all(re.fullmatch(r"Good [a-z]+\.", t) for t in model.babble(one, 4))
    before = programs.compiled()
    made = model.babble(other, 4)
    assert all(re.fullmatch(r"A bad or [A-Z][a-z]*! Oh!\n", t) for t in made)
    assert programs.compiled() == before
    larger = Automaton(*(np.pad(x, [(0, 7 * BUCKET)] + [(0, 0)] * (x.ndim - 1)) for x in other.automaton))
    assert model.babble(other, 4, larger) == made
    assert programs.compiled() - before == {"decode": 1}  # control: a table of another size does


# --- without a model -------------------------------------------------------------------------------------------------


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


def test_the_free_state_allows_everything(reflections: Template, scene: Template, model: Model) -> None:
    for table in (free(model.vocab), reflections.automaton, scene.automaton):
        on_device = Automaton(*map(jnp.asarray, table))
        for used in (0, 1, FIELD_TOKENS + 1, LONGEST):
            assert np.asarray(permitted(on_device, jnp.asarray([0]), jnp.asarray([used]))).all()
        assert (table.next[0] == 0).all()
    assert (free(model.vocab).next[START] == 0).all()
    longer = permitted(Automaton(*map(jnp.asarray, free(model.vocab))), jnp.asarray([0]), jnp.asarray([LONGEST + 1]))
    assert np.asarray(longer).all()  # also in replies longer than the longest part of a template
    assert not np.asarray(permitted(on_device, jnp.asarray([START]), jnp.asarray([0]))).all()  # control


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_walks_end_in_what_parses(
    model: Model, reflections: Template, scene: Template, letters: Template, seed: int
) -> None:
    cases: list[tuple[Template, Callable[[str], Any]]] = [
        (reflections, parses),
        (scene, re.compile(SCENE_FORM).fullmatch),
        (letters, re.compile(LETTERS_FORM).fullmatch),
    ]
    for template, good in cases:
        tokens = model.walk(template, at_random(seed))
        assert tokens[-1] == model.tokenizer.end_of_turn
        assert good(model.text(template, tokens))


def test_a_walk_that_avoids_the_end_takes_exactly_the_most_tokens(model: Model, reflections: Template) -> None:
    table = reflections.automaton

    def avoid(allowed: list[int], state: int) -> int:
        return max(allowed, key=lambda t: (table.part[table.next[state, t]] == table.part[state], -t))

    tokens = model.walk(reflections, avoid, reflections.max_tokens + 5)
    assert tokens[-1] == model.tokenizer.end_of_turn
    assert len(tokens) == reflections.max_tokens
    assert parses(model.text(reflections, tokens))


def test_a_walk_that_seeks_the_end_takes_exactly_the_fewest_tokens(model: Model, letters: Template) -> None:
    table = letters.automaton

    def seek(allowed: list[int], state: int) -> int:
        return min(allowed, key=lambda t: (table.part[table.next[state, t]] == table.part[state], t))

    tokens = model.walk(letters, seek)
    assert (parts_of(table, tokens)[2], parts_of(table, tokens)[4]) == (4, 1)
    free_of_it = letters._replace(automaton=table._replace(least=np.zeros_like(table.least)))  # control
    assert len(model.walk(free_of_it, seek)) == len(tokens) - 3


def test_no_special_token_is_allowed_but_the_end_at_the_end(tokenizer: ChatTokenizer, reflections: Template) -> None:
    table = reflections.automaton
    bound = table.next[START:]  # state 0 is free
    for special in tokenizer.special - {tokenizer.end_of_turn}:
        assert (bound[:, special] < 0).all()
    ends = START + np.flatnonzero(bound[:, tokenizer.end_of_turn] >= 0)
    assert set(table.part[ends].tolist()) == {2 * len(FIELDS)}  # states of the last field
    (final,) = np.unique(table.next[ends, tokenizer.end_of_turn])
    assert (table.next[final] < 0).all()


def test_what_every_text_begins_with_is_given_and_the_rest_drawn(model: Model) -> None:
    alone = model.compile("Good morning.")
    assert model.tokenizer.decode(alone.opening) == "Good morning."
    assert model.walk(alone, most=99) == [model.tokenizer.end_of_turn]
    assert (alone.max_tokens, Walker(alone.automaton).mask(START, 0).sum()) == (1, 1)
    template = model.compile("Good", Field(" [a-z]+", 1), ". Bye")
    assert model.tokenizer.decode(template.opening) == "Good"
    walk = model.walk(template, most=99)
    assert len(walk) == template.max_tokens
    assert re.fullmatch(r" [a-z]+\. Bye", model.tokenizer.decode(walk))
    opened = model.compile(Field(r"[a-z]+[.]", 5), "\nEnd")  # a field may open a template
    assert opened.opening == []
    assert all(re.fullmatch(r"[a-z]+\.\nEnd", t) for t in model.babble(opened, 32))


REFUSED: list[tuple[list[str | Field], str]] = [
    (["Name:", Field(r" [a-z]+", 8), "and so on"], "begins with a token"),  # where does the field end?
    (["A:", Field("[^\\s\\S]", 4)], ""),  # no text at all
    (["A:", Field("(", 4)], ""),  # no expression
    (["A:", Field("x{0}", 4)], ""),  # the empty text alone: no token enters the field
    (["A:", Field("wxyzwxyzwxyz", 3)], ""),  # the shortest text is longer than the budget
    (["A:", Field("[a-z]+", 4, min_tokens=5)], ""),
    (["A:", Field("[a-z]+", 4, min_tokens=-1)], ""),
    (["A:", Field("[a-z]+", LONGEST + 1)], ""),
    (["A", "~" * 40000], r"the constraint needs \d{5} states"),
    (["A:", Field(r"[a-z]*\.", 8, min_tokens=2)], "cannot go on"),  # more tokens than the pattern's texts have
    (["A:", Field("(?:yes|no)", 8, min_tokens=4)], "cannot go on"),
    (["A:", Field("[a-z]+(?:;b)?", 8, min_tokens=4)], "cannot go on"),
]


@pytest.mark.parametrize(("parts", "message"), REFUSED, ids=[str(x)[:40] for x, _ in REFUSED])
def test_what_cannot_be_filled_is_refused(model: Model, parts: list[str | Field], message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.compile(*parts)


@pytest.mark.parametrize(
    "parts",
    [
        ["Name:", Field(r" [a-z]+", 8), ". And so on"],
        ["A:", "~" * 400],
        ["A:", Field("[a-z]+", 8, min_tokens=8)],
        *(["A:", Field(p, 8)] for p in (r"[a-z]*\.", "(?:yes|no)", "[a-z]+(?:;b)?")),
    ],
)
def test_what_can_be_filled_is_not_refused(model: Model, parts: list[str | Field]) -> None:
    """Control."""
    assert model.compile(*parts).max_tokens > 8


def test_a_field_whose_texts_cannot_have_so_many_tokens_is_refused_or_filled(model: Model) -> None:
    """After two of three tokens, as "th;", the field may not be left, and the shortest way on takes two tokens."""
    pattern = "[the]+;(?:[the]+;)*"
    try:
        template = model.compile("A:", Field(pattern, 3, min_tokens=3))
    except InputError:
        return
    assert all(re.fullmatch(f"A:{pattern}", t) for t in model.babble(template))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"[0-9]+(?:\.[0-9]+)?;", "1.5;"),
        (r"[0-9]+(?:\.[0-9]+)?", "1.5"),
        (r"[a-z][^\n]*[.!?]", "a. b."),
        ("a(?:;a)*", "a;a"),
    ],
)
def test_a_text_that_could_end_may_go_on(model: Model, pattern: str, text: str) -> None:
    """What the pattern matches can be written letter by letter."""
    assert re.fullmatch(pattern, text)
    table = model.compile(Field(pattern, 9), "\n").automaton
    state = START
    for letter in text + "\n":
        (token,) = model.tokenizer.encode(letter)
        state = int(table.next[state, token])
        assert state > 0


def test_a_field_is_not_entered_by_a_way_that_its_budget_does_not_finish(model: Model) -> None:
    """One alternative fits the budget and the other does not: the choice falls with the field's first token."""
    template = model.compile("A:", Field(r"(?:q|wxyzwxyzwxyz)", 3))
    long = len(model.tokenizer.encode("wxyzwxyzwxyz"))
    assert long > 3
    assert set(model.babble(template, 32)) == {"A:q"}
    roomy = model.compile("A:", Field(r"(?:q|wxyzwxyzwxyz)", long))
    assert Walker(roomy.automaton).mask(START, 0).sum() > Walker(template.automaton).mask(START, 0).sum() == 1


@pytest.mark.parametrize("pattern", [r"[a-z]*\.", r"(?:ab)*c", r"\.|[a-z]+\."])
def test_a_field_may_return_to_where_it_began(model: Model, pattern: str) -> None:
    template = model.compile("A:", Field(pattern, 4), "\nB")
    for seed in range(20):
        assert re.fullmatch(f"A:(?:{pattern})\nB", model.text(template, model.walk(template, at_random(seed))))


def test_reflections_parse_with_a_byte_fallback_vocabulary_as_well(tmp_path: Path) -> None:
    """Llama 2's and Mistral's tokenizers put a space before a text that is encoded alone; a literal is no such text."""
    save_sentencepiece(tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    template = form(tokenizer, FIELD_TOKENS, len(tokenizer.hf))
    tokens = Walker(template.automaton).walk(at_random(0), tokenizer.end_of_turn, template.max_tokens)
    assert tokens[-1] == tokenizer.end_of_turn
    parse(tokenizer.decode([*template.opening, *tokens]))


# --- JSON schemas: with a model; test_schema.py has the rest ---------------------------------------------------------

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"mood": {"enum": ["glad", 'so "so"']}, "age": {"type": "integer"}, "name": {"type": "string"}},
    "required": ["mood", "age", "name"],
    "additionalProperties": False,
}


def fits_schema(text: str) -> bool:
    try:
        return Draft202012Validator(SCHEMA).is_valid(json.loads(text))
    except json.JSONDecodeError:
        return False


def test_babbled_json_is_json_of_the_schema(model: Model) -> None:
    template = model.compile(Field(schema_pattern(json.dumps(SCHEMA), "mine"), 80))
    texts = model.babble(template, 32)
    assert [t for t in texts if not fits_schema(t)] == []
    assert len(set(texts)) == 32
    for name in SCHEMA["properties"]:
        assert len({json.loads(t)[name] for t in texts}) > 1
    loose = model.babble(template, 32, loosened(template.automaton))
    assert not all(map(fits_schema, loose))  # control: the budget's doing


def test_a_schema_whose_shortest_text_exceeds_the_budget_is_refused(model: Model) -> None:
    pattern = schema_pattern(json.dumps(SCHEMA), "mine")
    with pytest.raises(InputError, match="too small: its shortest text takes") as e:
        model.compile(Field(pattern, 5))
    enough = int(str(e.value).rsplit(maxsplit=1)[-1])
    exact = model.compile(Field(pattern, enough))
    assert fits_schema(model.tokenizer.decode(model.walk(exact)))
    with pytest.raises(InputError, match="too small"):
        model.compile(Field(pattern, enough - 1))
