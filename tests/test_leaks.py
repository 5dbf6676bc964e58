"""Leaks between splits: planted ones are found, clean splits are silent. ``esjax data`` and runs tell of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Refused, read_dialogues

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.leaks import Leak, find_leaks
from esjax.errors import InputError
from esjax.evolve.experiment import Experiment
from esjax.settings.files import bundled, load


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Dialogue]]:
    return {name: read_dialogues("sample", f"bundled:data/sample/{name}.jsonl") for name in ("train", "valid", "test")}


def changed(dialogue: Dialogue, share: float, seed: int, words: list[str]) -> Dialogue:
    """A copy in which this share of the words is another."""
    rng = random.Random(seed)

    def other(text: str) -> str:
        return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())

    turns = tuple(replace(t, text=other(t.text)) for t in dialogue.turns)
    return replace(dialogue, id="copy", turns=turns, situation="")


def planted(splits: dict[str, list[Dialogue]], copy: Dialogue) -> list[Leak]:
    return find_leaks(splits | {"test": [*splits["test"], copy]})


def test_clean_splits_are_silent(splits: dict[str, list[Dialogue]]) -> None:
    assert find_leaks(splits) == []


def test_each_kind_of_leak_is_found(splits: dict[str, list[Dialogue]]) -> None:
    first = splits["train"][3]
    words = [w for d in splits["valid"] for t in d.turns for w in t.text.split()]
    shouted = tuple(replace(t, text=t.text.upper().replace(",", " !")) for t in first.turns)
    half = replace(first, id="copy", turns=first.turns[: len(first.turns) * 2 // 3], situation="")
    elsewhere = replace(splits["test"][0], id="copy", situation=first.situation.upper())
    for copy, kind in (
        (replace(first, id="copy", turns=shouted, situation=""), "copy"),
        (changed(first, 0.2, 0, words), "near copy"),
        (half, "near copy"),
        (elsewhere, "situation"),
    ):
        test = [*splits["test"][1:], copy]  # the one whose text the last copy is of stands aside
        (leak,) = find_leaks({"train": splits["train"], "test": test})
        assert (leak.kind, leak.first, leak.second) == (kind, f"train {first.id}", "test copy")
        assert find_leaks({"train": [*splits["train"], copy]}) == []  # within one split nothing leaks
    assert planted(splits, replace(changed(first, 0.9, 0, words), id="copy")) == []  # control: another dialogue


def test_a_fifth_of_other_words_is_always_noticed(splits: dict[str, list[Dialogue]]) -> None:
    words = [w for d in splits["valid"] for t in d.turns for w in t.text.split()]
    for seed in range(25):
        d = splits["train"][seed % len(splits["train"])]
        assert [leak.first for leak in planted(splits, changed(d, 0.2, seed, words))] == [f"train {d.id}"]


def test_real_esconv_leaks_as_published(esconv: Path) -> None:
    """Its train and valid rows share dialogues, word for word but for a few; its failed set shares none with them."""
    names = {"train": "train_part.jsonl", "valid": "valid.jsonl", "failed": "raw_failed_sample.json"}
    found = find_leaks({name: read_dialogues("esconv", str(esconv / file)) for name, file in names.items()})
    assert len(found) == 11
    assert min(leak.similarity for leak in found) > 0.9
    assert all(leak.first.startswith("train ") and leak.second.startswith("valid ") for leak in found)


def test_a_run_with_a_leak_is_refused_before_it_begins(
    tiny_config_file: Path, tmp_path: Path, refused: Refused, splits: dict[str, list[Dialogue]]
) -> None:
    train = tmp_path / "train.jsonl"
    own, other = (bundled(f"bundled:data/sample/{n}.jsonl").read_text().splitlines(True) for n in ("train", "valid"))
    train.write_text("".join([*own, other[0]]))
    options = ("--data.train", train, "--data.valid", "bundled:data/sample/valid.jsonl")
    line = refused("sft", "--config", tiny_config_file, "--run-dir", tmp_path / "run", *options)
    name = splits["valid"][0].id
    assert f"train {name} and valid {name} (copy, 100% alike)" in line
    assert "data.leaks=allow" in line
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("split", ["test", "train"])
def test_replay_is_training_data(
    split: str, tiny_config_file: Path, tmp_path: Path, splits: dict[str, list[Dialogue]]
) -> None:
    """A test dialogue in it is a leak; a training dialogue is only trained on twice."""
    d = splits[split][0]
    file = tmp_path / "replay.jsonl"
    file.write_text(json.dumps({"id": "copied", "messages": d.messages(len(d.turns))}) + "\n")
    overrides = [
        f"--data.{split}=bundled:data/sample/{split}.jsonl",
        f"--data.replay={file}",
        "--data.replay_share=0.5",
    ]
    config = load(str(tiny_config_file), overrides)
    corpora = Experiment.open(config).corpora
    if split == "train":
        assert corpora.leaks == []
        return
    with pytest.raises(InputError, match=f"test {d.id} and replay copied"):
        _ = corpora.leaks
