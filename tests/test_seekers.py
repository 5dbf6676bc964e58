"""Simulated seekers: what each side is asked, one stream of work, kills, and what the numbers are."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused
from test_hosts import SIGNALLER

import esjax
from esjax.cli import main
from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.eval.seekers import Speaker, Talks, fitting, people, seeker_prompts, steps, talk_values
from esjax.evolve.experiment import open_model
from esjax.run.journal import Journal
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import load
from esjax.settings.schema import SeekerSettings

SEEKERS = ["--eval.seekers.count", "3", "--eval.seekers.turns", "2", "--eval.seekers.max_tokens", "8"]
SEEKERS += ["--eval.reflections", "true"]
WIDE = ["--data.window", "1024", "--sft.row_length", "1024", "--eval.backbone", "false"]


@pytest.fixture(scope="module")
def talked(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("talks") / "out"
    main(["eval", "--run-dir", str(tiny_run), "--out", str(out), *SEEKERS, *WIDE[:2], "--eval.backbone", "false"])
    return out / "eval"


def test_a_conversation_is_a_chain_of_steps(talked: Path) -> None:
    kinds = ["feeling", "reply", "answer", "reply", "feeling", "grade"]
    assert steps(2) == kinds
    for model in ("m0", "m1", "m2"):
        rows = read_jsonl(talked / f"{model}.talks.jsonl")
        assert [r["kind"] for r in rows] == kinds * 3
        assert all(1 <= r["value"] <= 5 for r in rows if "value" in r)
        assert all(r["text"] for r in rows if "text" in r)
    texts = [[r.get("text") for r in read_jsonl(talked / f"{m}.talks.jsonl")] for m in ("m0", "m2")]
    assert texts[0] != texts[1]


def test_the_numbers_are_the_seekers(talked: Path) -> None:
    records = {(r["metric"], r["model"]): r for r in json.loads((talked / "results.json").read_text())}
    rows = read_jsonl(talked / "m1.talks.jsonl")
    felt = [
        [r["value"] for r in rows if r["id"] == who and r["kind"] in ("feeling", "answer")]
        for who in {r["id"] for r in rows}
    ]
    assert records["talk_end", "m1"]["value"] == pytest.approx(np.mean([f[-1] for f in felt]))
    assert records["talk_gain", "m1"]["value"] == pytest.approx(np.mean([f[-1] - f[0] for f in felt]))
    assert set(records["talk_gain", "m2"]["differences"]) == {"m0", "m1"}


def test_values_by_hand() -> None:
    rows = [
        {"id": who, "kind": kind, "value": value}
        for who, values in {"a": (2, 3, 4, 5), "b": (3, 2, 2, 1), "c": (3, 4, 3, 2)}.items()
        for kind, value in zip(("feeling", "answer", "feeling", "grade"), values, strict=True)
    ]
    made: dict[str, list[float]] = {}
    for v in talk_values("m", rows):
        made.setdefault(v.metric, []).append(v.value)
    assert made == {
        "talk_end": [4, 2, 3],
        "talk_gain": [2, -1, 0],
        "talk_helped": [5, 1, 2],
        "talk_better": [1, 0, 0],
        "talk_worse": [0, 1, 0],
        "talk_feeling": [2, 3, 4, 3, 2, 2, 3, 4, 3],
    }


@pytest.fixture(scope="module")
def talks(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Talks:
    config = load(str(tiny_run / "config.yaml"), {"data.window": 1024, "sft.row_length": 1024})
    speaker = Speaker(*open_model(f"{tiny_run}:m1", config))
    cards = people(read("bundled:data/sample/test.jsonl", "sample", 0).dialogues, 2)
    journal = Journal(tmp_path_factory.mktemp("journal") / "talks.jsonl", 2 * len(steps(2)))
    return Talks(speaker, None, cards, SeekerSettings(count=2, turns=2), journal)


MADE: list[dict[str, Any]] = [
    {"kind": "feeling", "value": 2},
    {"kind": "reply", "text": "That sounds hard."},
    {"kind": "answer", "value": 3, "text": "It is."},
    {"kind": "reply", "text": "Since when?"},
]


def test_the_model_sees_the_conversation_alone(talks: Talks) -> None:
    opening = talks.cards[0].turns[0].text
    system, *chat = talks._as_supporter(0, MADE)
    assert system == {"role": "system", "content": talks.model.experiment.encoder.system}
    assert [(m["role"], m["content"]) for m in chat] == [
        *(("user", opening), ("assistant", "That sounds hard."), ("user", "It is."), ("assistant", "Since when?"))
    ]
    card = talks.cards[0]
    assert card.situation
    assert not any(card.situation in m["content"] for m in chat)


def test_the_seeker_has_a_card_and_a_feeling(talks: Talks) -> None:
    card = talks.cards[0]
    first, own, reply, said, last = talks._as_seeker(0, MADE, "feeling")
    assert first["role"] == "user"
    assert all(text in first["content"] for text in (card.profile, card.situation, card.problem, card.emotion))
    assert [m["content"] for m in (own, reply, said)] == [card.turns[0].text, "That sounds hard.", "It is."]
    assert [m["role"] for m in (own, reply, said, last)] == ["assistant", "user", "assistant", "user"]
    assert last["content"].startswith("Since when?")
    assert "Before, it was 3." in last["content"]
    assert "Before, it was 3." in talks._as_seeker(0, MADE, "answer")[-1]["content"]
    at_first = talks._as_seeker(0, [], "feeling")
    assert "Before, it was not known." in at_first[-1]["content"]


def test_old_turns_are_left_out_and_the_card_stays(talks: Talks) -> None:
    experiment = talks.model.experiment
    chat = talks._as_seeker(0, MADE, "feeling")
    whole = experiment.tokenizer.prompt(chat)
    assert fitting(experiment, chat, 8) == whole
    shorter = fitting(experiment, chat, 1024 - len(whole) + 1)
    assert shorter == experiment.tokenizer.prompt([chat[0], *chat[3:]])
    assert len(shorter) < len(whole)
    with pytest.raises(InputError, match=r"raise data\.window"):
        fitting(experiment, chat, 1020)


@pytest.mark.slow
def test_a_killed_conversation_goes_on_to_the_same_bytes(talked: Path, tiny_run: Path, tmp_path: Path) -> None:
    command = ["eval", "--run-dir", str(tiny_run), "--out", str(tmp_path / "out"), *SEEKERS, *WIDE[:2]]
    command += ["--eval.backbone", "false"]
    for where in (("esjax.eval.seekers", "Talks", "_row", 9), ("esjax.eval.seekers", "Talks", "_row", 26)):
        words = ["SIGKILL", *map(str, where), *command]
        done = subprocess.run([sys.executable, "-c", SIGNALLER, *words], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    main(command)
    for name in ("m0.talks.jsonl", "m1.talks.jsonl", "m2.talks.jsonl", "results.json", "results.parquet"):
        assert (tmp_path / "out" / "eval" / name).read_bytes() == (talked / name).read_bytes(), name


def test_another_model_plays_the_seekers(tiny_run: Path, tiny_folder: Path, talked: Path, tmp_path: Path) -> None:
    """All models meet the same one: what it first feels is the same for all, where each by itself need not."""
    command = ["eval", "--run-dir", str(tiny_run), "--out", str(tmp_path / "out"), *SEEKERS, *WIDE[:2]]
    main([*command, "--eval.backbone", "false", "--eval.seekers.model", str(tiny_folder)])
    rows = {m: read_jsonl(tmp_path / "out" / "eval" / f"{m}.talks.jsonl") for m in ("m0", "m1", "m2")}
    first = [[r["value"] for r in rows[m] if r["step"] == 0] for m in rows]
    assert first[0] == first[1] == first[2]
    model = esjax.open_model(tiny_folder, {"data.window": 1024})
    assert model.config.data.window == 1024
    assert rows["m0"] != read_jsonl(talked / "m0.talks.jsonl")


def test_what_does_not_fit_is_said(tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["eval", "--run-dir", tiny_run, "--out", tmp_path / "out", "--eval.seekers.count"]
    assert "eval.seekers.count=500: only" in refused(*command, 500)
    assert "card.txt is missing" in refused(*command, 2, "--eval.seekers.prompts", tmp_path)
    assert "does not exist" in refused(*command, 2, "--eval.seekers.model", tmp_path / "none")
    broken = tmp_path / "prompts"
    broken.mkdir()
    for name in ("card", "opening", "answer", "feeling", "grade"):
        (broken / f"{name}.txt").write_text("{{ reply")
    assert "not a Jinja template" in refused(*command, 2, "--eval.seekers.prompts", broken)
    assert seeker_prompts("bundled:prompts/seeker").keys() == {"card", "opening", "answer", "feeling", "grade"}
