"""Where corpora come from: files and wildcards, mixtures, ESConv's official split, the hub, and TensorFlow Datasets."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import chat

from esjax.corpus import hubs
from esjax.corpus.sources import fingerprint, read
from esjax.errors import InputError
from esjax.run.directory import bundled_hash
from esjax.settings.files import load
from esjax.settings.schema import Source


def rows(count: int, word: str = "a") -> list[dict[str, Any]]:
    return [{"id": str(i), "messages": chat(f"{word} {i}", f"answer {i}")} for i in range(count)]


def file(folder: Path, name: str, made: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(folder / name)


# --- files -----------------------------------------------------------------------------------------------------------


def test_wildcards_join_files_and_keep_ids_apart(tmp_path: Path) -> None:
    first, second = file(tmp_path, "b.jsonl", rows(2, "b")), file(tmp_path, "a.jsonl", rows(1))
    corpus = read(f"messages:{tmp_path}/*.jsonl")
    assert [(d.id, d.turns[0].text) for d in corpus.dialogues] == [("1-0", "a 0"), ("2-0", "b 0"), ("2-1", "b 1")]
    assert fingerprint(f"messages:{first}") == bundled_hash(first) != fingerprint(f"messages:{second}")
    both = fingerprint(f"messages:{tmp_path}/*.jsonl")
    file(tmp_path, "a.jsonl", rows(1, "c"))
    assert fingerprint(f"messages:{tmp_path}/*.jsonl") != both
    with pytest.raises(InputError, match=r"no file's name matches"):
        read(f"messages:{tmp_path}/*.txt")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mesages:x.jsonl", "'mesages' is no format of corpora: did you mean messages?"),
        ("parquet:x", "'parquet' is no format of corpora"),
        ("esconv:x.json#dev", "no such split; allowed: #train, #valid, #test"),
        ("messages:absent.jsonl", r"absent\.jsonl: cannot be read"),
        ("bundled:nothing.jsonl", "no such bundled file"),
        ("tfds:mine", "the split is missing"),
        ("tfds:not_a_dataset/train", "Dataset not_a_dataset not found"),
        ("hf:name", r"expected hf:ORG/NAME\[@REVISION\]\[/SPLIT\]"),
    ],
)
def test_what_is_no_source_is_one_line(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as e:
        read(source)
    assert "\n" not in str(e.value)


def test_two_rows_of_one_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2: the id '0' is that of line 1 too"):
        read(f"messages:{file(tmp_path, 'a.jsonl', [*rows(1), *rows(1, 'b')])}")


def test_the_official_split_of_esconv(tmp_path: Path) -> None:
    """Oracle: what ESConv's process.py does, written out: seed 13, shuffle, 70 and 85 percent."""
    whole = [
        {"emotion_type": "", "problem_type": "", "situation": "", "dialog": [
            {"speaker": "seeker", "content": f"s {i}", "annotation": {}},
            {"speaker": "supporter", "content": f"h {i}", "annotation": {}},
        ]}
        for i in range(41)
    ]  # fmt: skip
    source = tmp_path / "ESConv.json"
    source.write_text(json.dumps(whole))
    order = list(range(41))
    random.seed(13)
    random.shuffle(order)
    expected = {"train": order[:28], "valid": order[28:34], "test": order[34:]}
    for split, numbers in expected.items():
        got = read(f"esconv:{source}#{split}").dialogues
        assert [d.turns[0].text for d in got] == [f"s {i}" for i in numbers]
        assert [d.id for d in got] == [f"esconv-{i + 1:05d}" for i in numbers]  # as in the whole file
    assert len({fingerprint(f"esconv:{source}{part}") for part in ("", "#train", "#test")}) == 3


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_a_mixture_takes_each_source_as_often_as_its_weight_says(tmp_path: Path) -> None:
    many, few = file(tmp_path, "many.jsonl", rows(400)), file(tmp_path, "few.jsonl", rows(3, "b"))
    mixed = (Source(source=f"messages:{many}", weight=0.25), Source(source=f"messages:{few}", weight=2))
    corpus = read(mixed)
    taken = Counter(d.turns[0].text[0] for d in corpus.dialogues)
    assert taken["b"] == 3
    assert 70 < taken["a"] < 130  # a quarter, drawn
    assert Counter(zip((d.turns[0].text[0] for d in corpus.dialogues), corpus.times, strict=True)).keys() == {
        ("a", 1),
        ("b", 2),
    }
    assert len({d.id for d in corpus.dialogues}) == len(corpus.dialogues)  # "0" of both becomes two ids
    assert read(mixed) == corpus
    assert read(mixed, seed=1).dialogues != corpus.dialogues
    other = (mixed[0], Source(source=f"messages:{few}", weight=3))
    assert fingerprint(mixed) != fingerprint(other)


def test_a_mixture_is_a_setting(tmp_path: Path) -> None:
    first = file(tmp_path, "a.jsonl", rows(2))
    given = f"[{{source: 'messages:{first}', weight: 2}}, {{source: 'messages:{first}'}}]"
    config = load(None, ["--data.train", given])
    assert config.data.train == (Source(source=f"messages:{first}", weight=2), Source(source=f"messages:{first}"))
    for bad, message in (
        ("[{source: a, weight: 0}]", r"setting data\.train\.0\.weight=0: Input should be greater than 0"),
        ("[{sauce: a}]", r"setting data\.train"),
    ):
        with pytest.raises(InputError, match=message):
            load(None, ["--data.train", bad])


# --- the Hugging Face hub --------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path) -> dict[str, str]:
    """A dataset's repository as the hub's cache keeps it, and the environment of a process that stays offline."""
    place = tmp_path / "home" / "hub" / "datasets--lab--talks"
    snapshot = place / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("a" * 40)
    file(snapshot, "train.jsonl", rows(3))
    file(snapshot, "test.jsonl", rows(1, "t"))
    return os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}


NO_TENSORFLOW = """
import atexit, os, sys
atexit.register(lambda: "tensorflow" in sys.modules and os._exit(9))
"""


def in_process(environment: dict[str, str], sources: list[str]) -> list[str]:
    """What a process says of sources: their seekers' first texts, or the error."""
    code = (
        f"{NO_TENSORFLOW}from esjax.corpus.sources import read\nfrom esjax.errors import InputError\n"
        "for source in sys.argv[1:]:\n"
        "    try: print([d.turns[0].text for d in read(source).dialogues])\n"
        "    except InputError as e: print(e)\n"
    )
    made = subprocess.run([sys.executable, "-c", code, *sources], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout.splitlines()


def test_a_repository_of_the_hub_offline(hub: dict[str, str]) -> None:
    sources = [
        "hf:lab/talks",
        "hf:lab/talks/test",
        f"hf:lab/talks@{'a' * 40}/train",
        "hf:lab/talks/valid",
        "hf:lab/wrong",
    ]
    train, test, pinned, unknown, wrong = in_process(hub, sources)
    assert train == pinned == str(["a 0", "a 1", "a 2"])
    assert test == str(["t 0"])
    assert "Unknown split" in unknown
    assert "'train', 'test'" in unknown
    assert wrong.startswith(
        "hf:lab/wrong is not in the cache of datasets, and it is told to stay offline; check the name"
    )


def test_folders_of_datasets(tmp_path: Path) -> None:
    packed = [{"text": json.dumps({"emotion_type": "", "problem_type": "", "situation": "", "dialog": [
        {"speaker": "usr", "text": f"s {i}"}, {"speaker": "sys", "text": "h"}]})} for i in range(3)]  # fmt: skip
    saved = datasets.Dataset.from_list(packed)
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(tmp_path / "two")
    texts = {s: [d.turns[0].text for d in read(f"hf:{tmp_path}/{s}").dialogues] for s in ("one", "two", "two/test")}
    assert texts == {"one": ["s 0", "s 1", "s 2"], "two": ["s 0", "s 1", "s 2"], "two/test": ["s 1"]}
    with pytest.raises(InputError, match="no split 'valid'; there are train, test"):
        read(f"hf:{tmp_path}/two/valid")
    cut = read(f"hf-stream:{tmp_path}/two/train[:2]").dialogues
    assert [d.turns[0].text for d in cut] == ["s 0", "s 1"]
    datasets.Dataset.from_list([{"picture": 1}]).save_to_disk(tmp_path / "other")
    with pytest.raises(InputError, match=r"the columns picture are those of no known format \(sample, pesconv"):
        read(f"hf:{tmp_path}/other")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="the split is empty"):
        read(f"hf:{tmp_path}/empty")


def test_a_stream_fetches_no_more_than_its_first_rows(hub: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    file(folder, "train-00000.jsonl", rows(3))
    (folder / "train-00001.jsonl").write_text("{broken")  # and must not be read
    few, whole, plain, repository, part, unknown = in_process(
        hub,
        [
            f"hf-stream:{folder}/train[:2]",
            f"hf-stream:{folder}/train",
            f"hf:{folder}/train[:2]",
            "hf-stream:lab/talks/test",
            "hf-stream:lab/talks/train[:1]",
            "hf-stream:lab/talks/valid[:1]",
        ],
    )
    assert few == str(["a 0", "a 1"])
    assert "JSON parse error" in whole
    assert "could not be loaded" in plain
    assert repository == str(["t 0"])
    assert part == str(["a 0"])
    assert "valid" in unknown
    assert "train" in unknown


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------


def test_a_tfds_dataset_is_built_and_read_without_tensorflow(tmp_path: Path) -> None:
    """By the README's line, in processes in which importing TensorFlow fails."""
    environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path / "tfds"), "JAX_PLATFORMS": "cpu"}
    code = NO_TENSORFLOW + "from esjax.cli import main; main(sys.argv[1:])"
    said = [
        {"role": "system", "content": "s"},
        *chat("u", "v", "w"),
        {"role": "assistant", "content": "x", "weight": 0},
    ]
    own = file(tmp_path, "own.jsonl", [*rows(2), {"id": "z", "messages": [*said, *chat("y", "z")]}])
    build = ["data", "build", "sample:bundled:data/sample/train.jsonl", f"messages:{own}", "--name", "mine"]
    made = subprocess.run([sys.executable, "-c", code, *build], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "tfds:esjax_dialogues/mine/valid" in made.stdout
    again = subprocess.run([sys.executable, "-c", code, *build], env=environment, capture_output=True, text=True)
    assert (again.returncode, "remove it, or give another --name" in again.stderr) == (2, True)
    sources = [f"tfds:esjax_dialogues/mine{version}" for version in ("/train", ":1.0.0/valid", "/test")]
    train, valid, test = in_process(environment, sources)
    assert train == str([d.turns[0].text for d in read("sample:bundled:data/sample/train.jsonl").dialogues])
    assert valid == str(["a 0", "a 1", "u"])
    assert test.endswith("no split 'test'; there are train, valid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", environment["TFDS_DATA_DIR"])
        hubs.rows.cache_clear()
        assert (
            read("tfds:esjax_dialogues/mine/train").dialogues
            == read("sample:bundled:data/sample/train.jsonl").dialogues
        )
        read_back = read("tfds:esjax_dialogues/mine/valid").dialogues
    assert read_back == read(f"messages:{own}").dialogues
    assert [t.trained for t in read_back[2].turns] == [True, True, True, False, True, True]
    assert read_back[2].system == "s"


# --- real ESConv -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dialogues", "turns", "answers"),
    [("train_part.jsonl", 217, 5104, 2552), ("valid.jsonl", 130, 2977, 1439), ("raw_failed_sample.json", 40, 802, 382)],
)
def test_real_esconv_has_so_many(esconv: Path, name: str, dialogues: int, turns: int, answers: int) -> None:
    corpus = read(f"esconv:{esconv / name}")
    assert len(corpus.dialogues) == corpus.counts["rows"] == dialogues
    assert sum(len(d.turns) for d in corpus.dialogues) == turns
    assert sum(len(d.supporter_turns()) for d in corpus.dialogues) == answers
    seekers = {t.text for d in corpus.dialogues for t in d.turns if t.role == "seeker"}
    targets = [d.turns[i].text for d in corpus.dialogues for i in d.supporter_turns()]
    assert (
        sum(text in seekers for text in targets if len(text) > 40) == 0
    )  # controls: the other way round it would be all
