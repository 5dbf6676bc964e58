"""What the sampler refuses or never draws: padding, control tokens, numbers that are none, two rows of one id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import read_dialogues
from oracles import BARE

from esjax.cli import main
from esjax.errors import InputError, RunError
from esjax.evolve.answers import read_chats
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.run.jsonl import json_line
from esjax.sample.constrain import BUCKET, Field, compile_template, drawable, free, narrowed
from esjax.sample.decode import permitted
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request, row_seed
from esjax.settings.files import load
from esjax.tokens.tokenizer import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_folder)


@pytest.fixture(scope="module")
def backbone(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, None, compute_dtype("float32"))


class How:
    temperature, top_p, top_k = 50.0, 1.0, 0


def test_only_text_and_the_end_of_the_turn_are_drawable(tokenizer: ChatTokenizer) -> None:
    vocab = len(tokenizer.hf)
    allowed = drawable(tokenizer, vocab + 7)  # a padded embedding
    assert not allowed[vocab:].any()
    control = tokenizer.special - {tokenizer.end_of_turn}
    assert control
    assert not allowed[list(control)].any()
    assert allowed[tokenizer.end_of_turn]
    assert allowed.sum() == vocab - len(control)


def test_the_free_state_draws_no_other_token_for_ever(backbone: Backbone, tokenizer: ChatTokenizer) -> None:
    """At a temperature at which everything is drawn; without the mask the same tokens come."""
    vocab = backbone.arch.vocab
    few = np.zeros(vocab, bool)
    few[100:140] = True
    prompts = [tokenizer.prompt([{"role": "user", "content": "Hello."}])] * 4

    def tokens(mask: np.ndarray | None) -> set[int]:
        made = Generator(backbone, 4, tokenizer.end_of_turn, slots=128, new=64, drawable=mask)
        return {t for m in made.generate(BARE, prompts, range(4), How(), 64) for t in m.token_ids}

    assert tokens(few) <= set(range(100, 140))
    assert not tokens(None) <= set(range(100, 140))  # control
    table = jax.tree.map(jnp.asarray, narrowed(free(vocab), few))
    for used in (0, 1, 100_000, 2**31 - 2):
        assert (np.asarray(permitted(table, jnp.asarray([0]), jnp.asarray([used])))[0] == few).all()


def test_a_constraint_over_another_number_of_words(tokenizer: ChatTokenizer) -> None:
    """An embedding smaller or larger than the tokenizer's vocabulary."""
    vocab = len(tokenizer.hf)
    smaller = compile_template([Field("[a-z ]+", 9)], tokenizer, vocab - 20).automaton
    larger = compile_template([Field("[a-z ]+", 9)], tokenizer, vocab + 20).automaton
    assert smaller.next.shape == (BUCKET, vocab - 20)
    assert (larger.next[1:, vocab:] == -1).all()
    assert (larger.next[:, : vocab - 20] == smaller.next).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_end_with_the_row(backbone: Backbone, tokenizer: ChatTokenizer, bad: float) -> None:
    base = jax.tree.map(lambda x: x, backbone.base)
    leaves, tree = jax.tree.flatten(base)
    broken = jax.tree.unflatten(tree, [x.at[(0,) * x.ndim].set(bad) if x.ndim == 1 else x for x in leaves])
    generator = Generator(replace(backbone, base=broken), 4, tokenizer.end_of_turn, slots=128, new=64)
    request = Request(0, tokenizer.prompt([{"role": "user", "content": "Hi."}]), 0, How(), 8, name="row-7")
    with pytest.raises(RunError, match=r"^row-7: the model's logits are not finite"):
        generator.work(BARE, [[request]], lambda r, c: ())


def test_json_has_no_number_that_is_none() -> None:
    assert json_line({"a": 1.5}) == '{"a": 1.5}\n'
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RunError, match="not finite"):
            json_line({"id": "x", "logprob": bad})


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((json.dumps(r) if r is not None else "") + "\n" for r in rows))
    return path


def question(name: Any) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": "Hello."}]}


def test_two_rows_of_one_id_are_refused_with_both_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", [question("a"), None, question(1), question("b"), question("1")])
    with pytest.raises(InputError, match="lines 3 and 5: both have the id '1'"):
        read_chats(file, "user")
    file = write(tmp_path / "p.jsonl", [question("a"), None, question(1.5)])
    with pytest.raises(InputError, match=r"line 3: the id is 1\.5; give a text or a whole number"):
        read_chats(file, "user")
    file = write(tmp_path / "p.jsonl", [question("a"), question(1), question("a/1")])
    assert len(read_chats(file, "user")) == 3  # control


def test_two_dialogues_of_one_id_are_refused(tmp_path: Path) -> None:
    turns = [{"role": "seeker", "text": "Hi."}, {"role": "supporter", "text": "Hello."}]
    row = {"id": "a", "profile": "", "emotion": "", "problem": "", "situation": "", "turns": turns}
    file = write(tmp_path / "d.jsonl", [row, None, row | {"id": "b"}, row])
    with pytest.raises(InputError, match="line 4: the id 'a' is that of line 1 too"):
        read_dialogues("sample", str(file))
    assert len(read_dialogues("sample", str(write(file, [row, row | {"id": "b"}])))) == 2  # control


def test_other_parts_are_another_seed() -> None:
    """And the parts of a run's stages have the seeds that they always had."""
    assert row_seed(0, "round1/draft", "sample-001/3") == 424354227
    groups = [("a", 1), ("a/1",), (0, "sample", "a", 1), (0, "sample", "a/1"), (0, "a", "b/c"), (0, "a/b", "c")]
    assert len({row_seed(*parts) for parts in groups}) == len(groups)
    assert row_seed(0, "eval", 1) == row_seed(0, "eval", "1")  # so rows whose ids are equal as text are refused


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("reply.top_k", "3000000000"),
        ("reply.max_tokens", "3000000000"),
        ("evolve.reflection.top_k", "3000000000"),
        ("evolve.reflection.field_tokens", "40000"),
        ("evolve.batch", "100000"),
        ("reply.batch", "100000"),
        ("reply.temperature", "1e39"),
        ("seed", "4294967296"),
    ],
)
def test_numbers_that_overflow_are_refused_by_name(setting: str, value: str) -> None:
    with pytest.raises(InputError, match=setting.replace(".", r"\.")):
        load(None, [f"--{setting}", value])
    load(None, ["--reply.top_k", "2147483647"])  # control


def test_sample_says_which_option_cannot_be_followed(
    tiny_folder: Path, tiny_config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = write(tmp_path / "p.jsonl", [question("a")]), tmp_path / "out.jsonl"
    common = ["sample", "--config", str(tiny_config_file), "--model", str(tiny_folder)]
    common += ["--prompts", str(prompts), "--out", str(out)]
    with pytest.raises(SystemExit) as end:
        main([*common, "--regex", r"a\b"])
    assert end.value.code == 2
    assert "--regex" in capsys.readouterr().err.replace("\n", " ")
    main([*common, "--regex", "^(yes|no)$"])  # nothing is left behind that would refuse the mended command
    assert json.loads(out.read_text())["text"] in ("yes", "no")
