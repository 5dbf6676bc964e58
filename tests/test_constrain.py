"""Constrained decoding: whatever is drawn, a template's text parses and its fields keep their budgets to the token."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import save_sentencepiece

from esjax.config import InputError
from esjax.evolve.reflect import FIELDS, automaton, parse
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.rows import prompt_with_replies
from esjax.sample.constrain import Automaton, Field, compile_template
from esjax.sample.generate import Completion, Generator
from esjax.sample.score import Scorer
from esjax.tokens.tokenizer import ChatTokenizer

BARE: nnx.State = nnx.State({})  # no adapter
FIELD_TOKENS = 8
SCENE: list[str | Field] = ["Mood:", Field(r" [a-z]+", 4), "\nWhy:", Field(r" [A-Z][^\n]*\.", 6), "\n"]
SCENE_FORM = r"Mood: [a-z]+\nWhy: [A-Z][^\n]*\.\n"


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
def reflections(tokenizer: ChatTokenizer, vocab: int) -> tuple[Automaton, int]:
    return automaton(tokenizer, FIELD_TOKENS, vocab)


@pytest.fixture(scope="session")
def scene(tokenizer: ChatTokenizer, vocab: int) -> tuple[Automaton, int]:
    return compile_template(SCENE, tokenizer, vocab)


@pytest.fixture(scope="session")
def generator(backbone: Backbone, tokenizer: ChatTokenizer) -> Generator:
    return Generator(backbone, 32, tokenizer.end_of_turn)


@pytest.fixture(scope="session")
def prompt(tokenizer: ChatTokenizer) -> list[int]:
    return tokenizer.prompt([{"role": "user", "content": "I moved and the boxes win. Think about me."}])


def babble(
    generator: Generator, prompt: list[int], constraint: Automaton, most: int, count: int = 64
) -> list[Completion]:
    made: list[Completion] = []
    for start in range(0, count, 32):
        made += generator.generate(BARE, [prompt] * 32, range(start, start + 32), Babble(), most, constraint)
    return made


@pytest.fixture(scope="session")
def babbled(generator: Generator, prompt: list[int], reflections: tuple[Automaton, int]) -> list[Completion]:
    """Sixty-four reflections of a random model at temperature 5."""
    return babble(generator, prompt, *reflections)


def parses(text: str) -> bool:
    try:
        return list(parse(text)) == list(FIELDS)
    except ValueError:
        return False


# --- an oracle for the budget rule, on the table's transitions alone -------------------------------------------------


class Walker:
    """Walks a table by the rule of the docstring: a field may take its budget of tokens and must then be left."""

    def __init__(self, a: Automaton, budget: int | None = None) -> None:
        self.next = a.next.astype(int)
        self.part = a.part.astype(int)
        self.budget = a.budget if budget is None else np.full(len(a.part), budget)
        self.close = self._tokens_until_left()

    def _tokens_until_left(self) -> list[int]:
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
        return out

    def allowed(self, state: int, used: int) -> list[int]:
        tokens = []
        for token in np.flatnonzero(self.next[state] >= 0):
            to = self.next[state, token]
            spent = used + 1 if self.part[to] == self.part[state] else 1
            if spent + self.close[to] <= self.budget[to]:
                tokens.append(int(token))
        return tokens

    def walk(self, choose: Callable[[list[int], int], int], end: int, most: int) -> list[int]:
        """Tokens of a walk from the start to the end token, or ``most`` of them."""
        state, used = 0, 0
        out: list[int] = []
        while len(out) < most:
            token = choose(self.allowed(state, used), state)
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
    state, taken = 0, dict.fromkeys(np.unique(a.part[1:]).tolist(), 0)
    for token in tokens:
        state = int(a.next[state, token])
        assert state >= 0
        taken[int(a.part[state])] += 1
    return taken


# --- with the model --------------------------------------------------------------------------------------------------


def test_sixty_four_babbled_reflections_all_parse(
    tokenizer: ChatTokenizer, babbled: list[Completion], reflections: tuple[Automaton, int]
) -> None:
    texts = [tokenizer.decode(m.token_ids) for m in babbled]
    assert [t for t in texts if not parses(t)] == []
    assert len(set(texts)) == 64
    assert {m.finish for m in babbled} == {"stop"}
    assert all(len(m.token_ids) <= reflections[1] for m in babbled)
    assert not any(parses(t + " and") for t in texts)  # controls: the parser is strict
    assert not any(parses(t.replace("\n", " ", 1)) for t in texts)


def test_without_the_budget_rule_they_do_not_all_parse(
    tokenizer: ChatTokenizer,
    generator: Generator,
    prompt: list[int],
    babbled: list[Completion],
    reflections: tuple[Automaton, int],
) -> None:
    """Control: the same table with budgets that never bind runs out of tokens in the middle of a field."""
    table, most = reflections
    programs = generator.programs
    loose = babble(generator, prompt, table._replace(budget=np.full_like(table.budget, 1 << 30)), most, 32)
    assert generator.programs == programs  # the table is an argument
    failed = [m for m in loose if not parses(tokenizer.decode(m.token_ids))]
    assert len(failed) > 16
    assert "length" in {m.finish for m in failed}


def test_without_a_constraint_nothing_parses(tokenizer: ChatTokenizer, generator: Generator, prompt: list[int]) -> None:
    free = generator.generate(BARE, [prompt] * 8, range(8), Babble(), 40)
    assert not any(parses(tokenizer.decode(m.token_ids)) for m in free)


def test_budgets_are_kept_to_the_token(babbled: list[Completion], reflections: tuple[Automaton, int]) -> None:
    table, most = reflections
    fields = range(2, 2 * len(FIELDS) + 1, 2)  # literal, field, literal, field, ...
    taken = [parts_of(table, m.token_ids) for m in babbled]
    for field in fields:
        counts = [t[field] for t in taken]
        assert max(counts) == FIELD_TOKENS  # a babbling model uses the budget up, and no more
    for t, m in zip(taken, babbled, strict=True):
        literals = sum(n for part, n in t.items() if part not in fields)
        assert literals == most - FIELD_TOKENS * len(FIELDS)  # the literals and the end are always whole
        assert sum(t.values()) == len(m.token_ids)


def test_constrained_logprobs_are_the_models_own(
    backbone: Backbone, prompt: list[int], babbled: list[Completion]
) -> None:
    """The mask decides what may be drawn, not what is reported."""
    examples = [prompt_with_replies(prompt, [m.token_ids]) for m in babbled[:4]]
    scored = Scorer(backbone, 256, 2).score(BARE, examples)
    for m, (logprobs,) in zip(babbled, scored, strict=False):
        assert np.abs(np.asarray(m.logprobs) - logprobs).max() < 1e-3
    assert np.abs(np.asarray(babbled[0].logprobs[:5]) - scored[1][0][1:6]).max() > 1e-2


def test_greedy_obeys_the_constraint_too(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], reflections: tuple[Automaton, int]
) -> None:
    table, most = reflections
    (greedy,) = generator.generate(BARE, [prompt], [0], Babble(temperature=0.0), most, table)
    assert parses(tokenizer.decode(greedy.token_ids))


# --- without a model -------------------------------------------------------------------------------------------------


def test_the_tables_distances_are_the_shortest(
    reflections: tuple[Automaton, int], scene: tuple[Automaton, int]
) -> None:
    for table, _ in (reflections, scene):
        assert table.close.tolist() == Walker(table).close
        assert max(table.close[table.close < 1 << 20]) > 0
        assert table.close.tolist() != Walker(table._replace(part=np.zeros_like(table.part))).close


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_walks_end_in_what_parses(
    tokenizer: ChatTokenizer, reflections: tuple[Automaton, int], scene: tuple[Automaton, int], seed: int
) -> None:
    for (table, most), good in (
        (reflections, parses),
        (scene, lambda text: re.fullmatch(SCENE_FORM, text) is not None),
    ):
        rng = np.random.default_rng(seed)
        tokens = Walker(table).walk(at_random(rng), tokenizer.end_of_turn, most)
        assert tokens[-1] == tokenizer.end_of_turn
        assert len(tokens) <= most
        assert good(tokenizer.decode(tokens))


def test_walks_without_the_budget_rule_do_not_all_end(
    tokenizer: ChatTokenizer, reflections: tuple[Automaton, int]
) -> None:
    """Control of the walks."""
    table, most = reflections
    rng = np.random.default_rng(0)
    loose = Walker(table, budget=1 << 30)
    texts = [tokenizer.decode(loose.walk(at_random(rng), tokenizer.end_of_turn, most)) for _ in range(20)]
    assert not all(parses(t) for t in texts)


def test_a_walk_that_avoids_the_end_takes_exactly_the_most_tokens(
    tokenizer: ChatTokenizer, reflections: tuple[Automaton, int]
) -> None:
    table, most = reflections
    walker = Walker(table)

    def avoid(allowed: list[int], state: int) -> int:
        return max(allowed, key=lambda t: (table.part[table.next[state, t]] == table.part[state], -t))

    tokens = walker.walk(avoid, tokenizer.end_of_turn, most + 5)
    assert tokens[-1] == tokenizer.end_of_turn
    assert len(tokens) == most
    assert parses(tokenizer.decode(tokens))


def test_no_special_token_is_allowed_but_the_end_and_that_only_at_the_end(
    tokenizer: ChatTokenizer, reflections: tuple[Automaton, int]
) -> None:
    table, _ = reflections
    for special in tokenizer.special - {tokenizer.end_of_turn}:
        assert (table.next[:, special] < 0).all()
    ends = np.flatnonzero(table.next[:, tokenizer.end_of_turn] >= 0)
    assert set(table.part[ends].tolist()) == {2 * len(FIELDS)}  # states of the last field
    final = np.unique(table.next[ends, tokenizer.end_of_turn])
    assert len(final) == 1
    assert (table.next[final[0]] < 0).all()


def test_a_literal_alone(tokenizer: ChatTokenizer, vocab: int) -> None:
    table, most = compile_template(["Good morning."], tokenizer, vocab)
    tokens = Walker(table).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, 99)
    assert tokenizer.decode(tokens) == "Good morning."
    assert len(tokens) == most
    other, _ = compile_template(["Good evening."], tokenizer, vocab)
    assert Walker(other).walk(lambda allowed, _: allowed[0], tokenizer.end_of_turn, 99) != tokens


def test_a_template_that_a_field_makes_ambiguous_is_refused(tokenizer: ChatTokenizer, vocab: int) -> None:
    with pytest.raises(InputError, match="begins with a token"):
        compile_template(["Name:", Field(r" [a-z]+", 8), "and so on"], tokenizer, vocab)
    compile_template(["Name:", Field(r" [a-z]+", 8), ". And so on"], tokenizer, vocab)


@pytest.mark.parametrize(
    "parts",
    [
        ["A:", Field("[^\\s\\S]", 4)],  # no text at all
        ["A:", Field("(", 4)],  # no expression
        ["A:", Field("x*", 4)],  # also the empty text: no token enters the field
        ["A:", Field("wxyzwxyzwxyz", 3)],  # the shortest text is longer than the budget
    ],
    ids=["no text", "broken", "empty", "budget"],
)
def test_fields_that_cannot_be_filled_are_refused(
    tokenizer: ChatTokenizer, vocab: int, parts: list[str | Field]
) -> None:
    with pytest.raises(InputError):
        compile_template(parts, tokenizer, vocab)


def test_a_field_is_not_entered_by_a_way_that_its_budget_does_not_finish(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    """One alternative fits the budget and the other does not: the choice falls with the field's first token."""
    table, most = compile_template(["A:", Field(r"(?:q|wxyzwxyzwxyz)", 3)], tokenizer, vocab)
    assert len(tokenizer.encode("wxyzwxyzwxyz")) > 3
    made = babble(generator, prompt, table, most, 32)
    assert {tokenizer.decode(m.token_ids) for m in made} == {"A:q"}


@pytest.mark.parametrize("pattern", [r"[a-z]*\.", r"(?:ab)*c", r"\.|[a-z]+\."])
def test_a_field_may_return_to_where_it_began(tokenizer: ChatTokenizer, vocab: int, pattern: str) -> None:
    table, most = compile_template(["A:", Field(pattern, 4), "\nB"], tokenizer, vocab)
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = Walker(table).walk(at_random(rng), tokenizer.end_of_turn, most)
        assert re.fullmatch(f"A:(?:{pattern})\nB", tokenizer.decode(tokens))


def test_a_field_may_open_a_template(
    tokenizer: ChatTokenizer, generator: Generator, prompt: list[int], vocab: int
) -> None:
    table, most = compile_template([Field(r"[a-z]+[.]", 5), "\nEnd"], tokenizer, vocab)
    made = babble(generator, prompt, table, most, 32)
    assert all(re.fullmatch(r"[a-z]+\.\nEnd", tokenizer.decode(m.token_ids)) for m in made)


def test_reflections_parse_with_a_byte_fallback_vocabulary_as_well(tmp_path: Path) -> None:
    """Llama 2's and Mistral's tokenizers put a space before a text that is encoded alone; a literal is no such text."""
    save_sentencepiece(tmp_path)
    tokenizer = ChatTokenizer(tmp_path)
    table, most = automaton(tokenizer, FIELD_TOKENS, len(tokenizer.hf))
    rng = np.random.default_rng(0)
    tokens = Walker(table).walk(at_random(rng), tokenizer.end_of_turn, most)
    assert tokens[-1] == tokenizer.end_of_turn
    parse(tokenizer.decode(tokens))
