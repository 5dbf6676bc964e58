"""Multiple choice by log-likelihood, in EmoBench's format, on items written for this project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused
from oracles import torch_logprobs, torch_model

import esjax
from esjax.cli import main
from esjax.eval.choices import Item, accuracies, choice_likelihoods, read_items
from esjax.evolve.experiment import open_model
from esjax.evolve.models import model_settings
from esjax.settings.files import Overrides

EA: list[dict[str, Any]] = [
    {
        "qid": "1",
        "language": "en",
        "category": "Personal-Others",
        "question type": kind,
        "scenario": "Mira's neighbour has stopped answering the door since his dog died.",
        "subject": "Mira",
        "choices": ["Leave a note and a cake", "Ring every hour", "Buy him another dog", "Say nothing"],
        "label": label,
    }
    for kind, label in (
        ("Action", "Leave a note and a cake"),
        ("Response", "Say nothing"),
        ("Action", "Ring every hour"),
    )
]
EU: dict[str, Any] = {
    "qid": "2",
    "language": "en",
    "coarse_category": "complex_emotions",
    "finegrained_category": "mixture_of_emotions",
    "scenario": "Tom's daughter moved out today, and left her old lamp on his desk.",
    "subject": "Tom",
    "emotion_choices": ["Pride and sadness", "Anger", "Boredom"],
    "emotion_label": "Pride and sadness",
    "cause_choices": ["She is grown up, and gone", "The lamp is broken"],
    "cause_label": "She is grown up, and gone",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_items_of_both_files(tmp_path: Path) -> None:
    first, second, *_ = read_items(write(tmp_path / "EA.jsonl", EA))
    assert (first.task, first.category, first.right) == ("EA", "Personal-Others", 0)
    assert first.question.startswith(EA[0]["scenario"])
    assert first.question.endswith("What is the most effective action for Mira?")
    assert second.question.endswith("What is the most effective response for Mira?")
    assert second.right == 3
    emotion, cause = read_items(write(tmp_path / "EU.jsonl", [EU]))
    assert (emotion.task, len(emotion.choices), emotion.right) == ("EU emotion", 3, 0)
    assert (cause.task, len(cause.choices), cause.right) == ("EU cause", 2, 0)
    assert "Which emotion does Tom feel" in emotion.question
    assert "Why does Tom feel" in cause.question


def test_likelihoods_are_those_of_torch(tiny_folder: Path) -> None:
    experiment, adapter = open_model(str(tiny_folder), model_settings(str(tiny_folder), Overrides()))
    chat = [{"role": "user", "content": EA[0]["scenario"]}]
    found: dict[int, Any] = {}
    choice_likelihoods(experiment, adapter, [(chat, EA[0]["choices"])], found.__setitem__)
    prompt = experiment.tokenizer.prompt(chat)
    model = torch_model(tiny_folder)
    for i, choice in enumerate(EA[0]["choices"]):
        reply = experiment.tokenizer.reply(prompt, [*chat, {"role": "assistant", "content": choice}])
        theirs = torch_logprobs(model, prompt, reply)
        assert found[0].sums[i] == pytest.approx(theirs.sum(), abs=1e-3)
        assert found[0].tokens[i] == len(reply)
    assert np.ptp(found[0].sums) > 1


def test_the_likeliest_is_picked(tiny_folder: Path) -> None:
    """Of items made so that the answer is known from single scores."""
    experiment, adapter = open_model(str(tiny_folder), model_settings(str(tiny_folder), Overrides()))
    model = esjax.open_model(tiny_folder)
    choices = ("No.", "I hear you, and I am sorry that it came to this today.", "Yes, of course it is")
    question = "What would you say?"
    scores = model.score(
        [[{"role": "user", "content": question}, {"role": "assistant", "content": c}] for c in choices]
    )
    by_sum = int(np.argmax([s.logprob for s in scores]))
    by_mean = int(np.argmax([s.logprob / s.num_tokens for s in scores]))
    items = [Item("1", "EA", "x" if right else "y", question, choices, right) for right in range(3)]
    made = {(a.task, a.category): a for a in accuracies(experiment, adapter, items)}
    assert made["EA", ""].items == 3
    assert made["EA", ""].by_mean == made["EA", ""].by_sum == pytest.approx(1 / 3)
    assert made["EA", "y"].by_sum == float(by_sum == 0)
    assert made["EA", "y"].by_mean == float(by_mean == 0)
    assert made["EA", ""].chance == pytest.approx(1 / 3)


def test_emotion_and_cause_together(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write(tmp_path / "EU.jsonl", [EU, EU | {"emotion_label": "Anger"}]), tmp_path / "out.json"
    main(["eval", "--choices", str(file), "--model", str(tiny_folder), "--out", str(out)])
    made = {(r["task"], r["category"]): r for r in json.loads(out.read_text())}
    assert made["EU together", ""]["items"] == 2
    assert made["EU together", ""]["chance"] == pytest.approx(1 / 6)
    assert made["EU together", ""]["by_sum"] <= min(made[f"EU {x}", ""]["by_sum"] for x in ("emotion", "cause"))
    assert made["EU emotion", ""]["by_sum"] in (0.0, 0.5)  # the same question with two labels
    assert "EU together" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"label": "Sing"}, "'label' is 'Sing', which is 0 of the choices, not one"),
        ({"choices": ["a"]}, "'choices' is no list of two or more texts"),
        ({"choices": ["a", "a"], "label": "a"}, "which is 2 of the choices"),
        ({"scenario": " "}, "'scenario' is missing"),
    ],
)
def test_bad_items_are_named(
    row: dict[str, Any], told: str, tmp_path: Path, tiny_folder: Path, refused: Refused
) -> None:
    file = write(tmp_path / "EA.jsonl", [EA[0], EA[1] | row])
    line = refused("eval", "--choices", file, "--model", tiny_folder)
    assert "EA.jsonl, line 2" in line
    assert told in line


def test_choices_need_a_model(tmp_path: Path, tiny_folder: Path, refused: Refused) -> None:
    file = write(tmp_path / "items.jsonl", EA)
    assert "eval.candidates" in refused("eval", "--choices", file, "--model", tiny_folder, "--eval.candidates", 3)
    assert "needs --model" in refused("eval", "--choices", write(tmp_path / "EA.jsonl", EA))
