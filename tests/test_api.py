"""What `import esjax` offers: the same results as the commands, in memory, without signals, exits or an early import of JAX."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides
from oracles import torch_model, torch_score, worst

import esjax
from esjax.cli import main
from esjax.errors import InputError
from esjax.opened import Model
from esjax.run.files import write_jsonl
from esjax.run.jsonl import read_jsonl
from esjax.runtime.programs import compiled
from esjax.settings.files import load
from esjax.settings.schema import Config

CHATS = [[{"role": "user", "content": "I am so tired. " * i}] for i in (1, 2, 3)]
ANSWERED = [[*chat, {"role": "assistant", "content": "That sounds hard."}] for chat in CHATS]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Model:
    return esjax.open_model(f"{tiny_run}:m1", {"reply.max_tokens": 24})


def rows_of_command(command: str, run: Path, chats: list[Any], tmp_path: Path, *more: str) -> list[dict[str, Any]]:
    write_jsonl(tmp_path / "in.jsonl", [{"id": i, "messages": m} for i, m in enumerate(chats)])
    name = "--prompts" if command == "sample" else "--data"
    files = [name, str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    main([command, "--model", f"{run}:m1", *files, *more])
    return read_jsonl(tmp_path / "out.jsonl")


def test_a_config_from_python_is_that_of_the_command_line(tiny_folder: Path, tmp_path: Path) -> None:
    words = tiny_overrides(tiny_folder)
    values = {name[2:]: None if value == "null" else value for name, value in zip(words[::2], words[1::2], strict=True)}
    config = esjax.load_config(None, values | {"model.source": tiny_folder, "evolve.rounds": 1})
    assert config == load(None, [*words, "--evolve.rounds", "1"])
    (tmp_path / "c.yaml").write_text("seed: 3\n")
    for file, wrong, message in (
        (None, {"evolve.roundz": 1}, r"unknown setting evolve\.roundz: did you mean evolve\.rounds\?"),
        (None, {"evolve": {"rounds": 1}}, "unknown setting evolve"),
        (None, {"evolve.rounds": True}, "expected int"),
        (None, {"sft.micro_rows": 3}, "not a multiple"),
        (tmp_path / "c.yaml", {}, r"setting model: Field required \(in .*c\.yaml"),
    ):
        with pytest.raises(InputError, match=message):
            esjax.load_config(file, wrong)


def test_replies_are_those_of_the_command(model: Model, tiny_run: Path, tmp_path: Path) -> None:
    rows = rows_of_command("sample", tiny_run, CHATS, tmp_path, "--reply.max_tokens", "24", "--num-samples", "2")
    made = model.sample(CHATS, n=2)
    assert [[r.text for r in replies] for replies in made] == [[r["text"] for r in rows[i : i + 2]] for i in (0, 2, 4)]
    assert made[2][1].token_ids == rows[5]["token_ids"]
    assert [r.token_ids for r in model.sample(CHATS[0], 2)] == [r["token_ids"] for r in rows[:2]]  # one chat: one list
    before = compiled()
    other = model.sample(CHATS[0], 2, seed=1)
    assert compiled() == before  # nothing is compiled again, but for other shapes
    model.sample(CHATS[0], 2, max_tokens=25)
    assert compiled() != before
    assert [r.token_ids for r in other] != [r.token_ids for r in made[0]]
    assert model.config.seed == 0  # a call changes nothing for the next
    greedy = model.sample([CHATS[0]] * 2, temperature=0, max_tokens=5)
    assert greedy[0][0].token_ids == greedy[1][0].token_ids
    assert all(r.text in ("yes", "no") for replies in model.sample(CHATS, regex="yes|no") for r in replies)
    schema = {"type": "object", "properties": {"mood": {"enum": ["low", "fair"]}}, "required": ["mood"]}
    assert json.loads(model.sample(CHATS[0], json_schema=schema)[0].text)["mood"] in ("low", "fair")


def test_scores_are_transformers_log_softmax(tiny_folder: Path) -> None:
    """The oracle is transformers' own tokenizer and model; the bare backbone has no system message here either."""
    backbone = esjax.open_model(tiny_folder)
    for chat, score in zip(ANSWERED, backbone.score(ANSWERED), strict=True):
        expected, _ = torch_score(tiny_folder, chat)
        assert score.num_tokens == len(expected)
        assert worst(score.token_logprobs, expected) < 1e-4
        assert score.logprob == pytest.approx(sum(score.token_logprobs), abs=1e-6)


def test_scores_are_those_of_the_command(model: Model, tiny_run: Path, tmp_path: Path) -> None:
    rows = rows_of_command("score", tiny_run, ANSWERED, tmp_path)
    assert [s.logprob for s in model.score(ANSWERED)] == pytest.approx([r["logprob"] for r in rows], abs=1e-4)
    assert model.score(ANSWERED[1]).num_tokens == rows[1]["num_tokens"]
    m0 = esjax.open_model(f"{tiny_run}:m0")
    assert worst(m0.score(ANSWERED[1]).token_logprobs, rows[1]["token_logprobs"]) > 1e-4  # control: another model


def test_reflections_have_their_three_fields(model: Model) -> None:
    one, many = model.reflect(CHATS[0]), model.reflect(CHATS)
    assert many[0] == one
    assert all(list(r) == ["profile", "emotional_state", "situation"] and all(r.values()) for r in many)


def test_dpo_and_sft_from_python_make_what_evolve_makes(tiny_run: Path, tiny_config: Config, tmp_path: Path) -> None:
    adapter = esjax.sft(tiny_config, tmp_path / "a")
    weights = "adapter_model.safetensors"
    assert (adapter / weights).read_bytes() == (tiny_run / "sft" / "adapter" / weights).read_bytes()
    pairs = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read_jsonl(tiny_run / "round1/pairs.jsonl")]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    config = esjax.load_config(tmp_path / "a" / "config.yaml", {"dpo.beta": 0.2})
    adapter = esjax.dpo(config, tmp_path / "b", tmp_path / "pairs.jsonl", f"{tmp_path}/a:m0")
    assert (adapter / weights).exists()
    assert abs(read_jsonl(tmp_path / "b" / "dpo" / "metrics.jsonl")[0]["loss"] - 0.693147) < 1e-3


def test_a_finished_run_gives_its_table_again(tiny_run: Path, tiny_config: Config) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run = esjax.evolve(tiny_config, tiny_run)
    assert list(dict.fromkeys(r["model"] for r in run.records)) == ["backbone", "m0", "m1", "m2"]
    assert run.value("perplexity", "m2") != run.value("perplexity", "m0")
    assert run.folder == tiny_run
    assert len(run.table.rows) == len(run.differences.rows) > 8
    assert "M_2 - M_0" in [str(c.header) for c in run.differences.columns]
    assert "M_2" in str(run.table._repr_mimebundle_([], []))  # what a notebook shows
    assert signal.getsignal(signal.SIGTERM) is before


def test_export_is_read_by_transformers(model: Model, tmp_path: Path) -> None:
    model.export(tmp_path / "hf")
    opened = esjax.open_model(tmp_path / "hf", {"prompts.system": model.config.prompts.system})
    assert opened.score(ANSWERED[0]).logprob == pytest.approx(model.score(ANSWERED[0]).logprob, abs=1e-3)
    assert torch_model(tmp_path / "hf").config.hidden_size == 64
    with pytest.raises(InputError, match="exists; give a new folder"):
        model.export(tmp_path / "hf")
    with pytest.raises(InputError, match="only a run's model or an adapter can be exported"):
        opened.export(tmp_path / "again")


def test_bad_input_is_an_error_that_says_what_to_do(model: Model, tiny_run: Path, tiny_folder: Path) -> None:
    user = {"role": "user", "content": "Hi."}
    for call, message in (
        (lambda: model.sample([]), "give a chat, which is a list of messages"),
        (lambda: model.sample("Hi."), "give a chat, which is a list of messages"),
        (lambda: model.sample(ANSWERED[0]), "chat 0: the last message must be the user's"),
        (lambda: model.score([ANSWERED[0], [user]]), "chat 1: the last message must be the assistant's"),
        (lambda: model.sample([user], n=0), "n = 0: at least 1"),
        (lambda: model.sample([user], temprature=1), "sample has no temprature; it has n, seed, temperature"),
        (lambda: model.sample([user], top_p=2), r"setting reply\.top_p=2"),
        (lambda: model.sample([user], regex="("), "not a regular expression"),
        (lambda: model.sample([{"role": "user", "content": "word " * 5000}]), "exceed the model's 4096 positions"),
        (lambda: esjax.open_model(f"{tiny_run}:m7"), "M_7 is not there; this run has m0, m1, m2"),
        (lambda: esjax.open_model(tiny_run), "is a run directory; name one of its models"),
        (lambda: esjax.open_model("/absent"), "/absent does not exist"),
        (lambda: esjax.open_model(tiny_folder, {"lora.rank": 4}), r"lora\.rank: .* is a bare backbone"),
        (lambda: esjax.open_model(tiny_folder, {"dpo.beta": 4}), r"dpo\.beta: an opened model makes no use of it"),
    ):
        with pytest.raises(InputError, match=message):
            call()  # type: ignore[no-untyped-call]


def test_importing_is_cheap_and_the_method_s_package_can_be_called(tmp_path: Path) -> None:
    code = """
import sys, esjax
assert sorted(esjax.__all__) == sorted(set(esjax.__all__) & set(dir(esjax)))
config = esjax.load_config(None, {"evolve.rounds": 1})
assert config.evolve.rounds == 1
heavy = {"jax", "flax", "transformers", "orbax", "numpy"} & set(sys.modules)
assert not heavy, heavy
from esjax.evolve.reflect import parse
import esjax.evolve.filters as filters
from esjax.errors import InputError
try:
    esjax.evolve(config.model_copy(update={"model": config.model.model_copy(update={"source": "/absent"})}), sys.argv[1])
except InputError as error:
    assert "/absent does not exist" in str(error)
try:
    esjax.nothing
except AttributeError as error:
    assert "no attribute nothing" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
