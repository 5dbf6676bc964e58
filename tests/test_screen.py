"""Screening: what is found, what becomes of it in every phase, and that nobody can make it run for ever."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import chat

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.evolve.experiment import Experiment
from esjax.evolve.pairs import read_pairs, screened_pairs
from esjax.run.directory import RunDir
from esjax.safety.screen import KINDS, Screen
from esjax.settings.schema import Config, ScreenSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

FOUND = {
    "crisis": ["I want to die.", "she says self-harm helps"],
    "personal": """write to ann.lee+x@mail.example.org|see https://x.example/a|it is on www.nowhere|go to help.org please
|call (555) 123-4567 now|my number is +49 170 1234567|call 020 7946 0958|account 12345678901|card 4111 1111 1111 1111
|IBAN DE89 3704 0044 0532 0130 00""".replace("\n", "").split("|"),
    "names": ["Hi, my name is Ann.", "this is Bob speaking", "I'm called Zoë", "you can call me Al"],
    "experience": """When I lost my job I cried.|I went through a divorce too.|I've been there.|my wife and I moved
|as a mother of two, I know|in my experience it helps|It happened to me as well.|I also struggled with that.
|I used to feel the same|I'm a nurse""".replace("\n", "").split("|"),
}
NOT_FOUND = {
    "crisis": ["I am dying to see her.", "a dead end job", "It killed the mood."],
    "personal": """at 10:30 on 12/05/2021|it cost 1,250.00 dollars|24/7 and 10/10|I am 35, born in 1987|in 2019-2020
|50 percent of 2000|wait... what.Then|e.g. this one|3 or 4 times|route 66|pages 100-200|1 000 000 people""".replace(
        "\n", ""
    ).split("|"),
    "names": ["my name is on the list", "this is hard speaking of it", "I am called names", "call me later"],
    "experience": """I understand how you feel.|When I read your message, I felt it.|I hear that your mother left.
|You went through a lot.
|I have a few ideas.|I am here for you.
|Have you been there?|As a friend you did well.|I think I see.""".replace("\n", "").split("|"),
}


def screen(**actions: Any) -> Screen:
    return Screen.load(ScreenSettings(**dict.fromkeys(KINDS, "keep") | actions))


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_what_is_found(kind: str, text: str) -> None:
    looking = screen(**{kind: "mark"})
    (finding,) = looking.find(text, supporter=True)
    assert finding.kind == kind
    assert finding.excerpt in text
    assert bool(looking.find(text, supporter=False)) == (kind != "experience")  # a seeker has a life
    assert screen().find(text, supporter=True) == ()  # nobody looks


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in NOT_FOUND.items() for text in texts])
def test_what_is_not_found(kind: str, text: str) -> None:
    assert screen(**{kind: "mark"}).find(text, supporter=True) == ()


@pytest.mark.parametrize(
    "text",
    ["a" * 50_000, "1 " * 25_000, "a@" * 25_000, "my " * 20_000, "i have " * 9_000, "(1) " * 15_000, "x." * 25_000],
)
def test_no_text_makes_a_pattern_run_away(text: str) -> None:
    began = time.process_time()
    screen(**dict.fromkeys(KINDS, "mark")).find(text, supporter=True)
    assert time.process_time() - began < 5  # a pattern that tries all ways would take years


def test_dialogues_end_before_what_is_dropped() -> None:
    def dialogue(name: str, *texts: str) -> Dialogue:
        return Dialogue(name, tuple(Turn(("seeker", "supporter")[i % 2], t) for i, t in enumerate(texts)))

    given = [
        dialogue("whole", "a", "b", "c", "d"),
        dialogue("marked", "a", "I've been there.", "c", "d"),
        dialogue("cut", "a", "b", "mail a@b.org", "d", "I want to die", "f"),
        dialogue("gone", "I want to die", "b", "c", "d"),
    ]
    made = screen(crisis="drop", personal="drop", experience="mark").screened(given)
    assert [(d.id, [t.text for t in d.turns]) for d in made.kept] == [
        ("whole", ["a", "b", "c", "d"]),
        ("marked", ["a", "I've been there.", "c", "d"]),
        ("cut", ["a", "b"]),
    ]
    assert made.numbers == [0, 1, 2]
    assert made.answers == {"personal": 2, "crisis": 2}
    assert [(f.kind, f.action, f.id, f.turn) for f in made.found] == [
        ("experience", "mark", "marked", 1),
        ("personal", "drop", "cut", 2),
        ("crisis", "drop", "gone", 0),
    ]
    assert made.found[1].excerpt == "mail a@b.org"
    assert screen().screened(given).kept == given  # control


def test_findings_are_kept_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    find = Screen.find
    monkeypatch.setattr(
        Screen, "find", lambda self, text, supporter: looked.append(text) or find(self, text, supporter)
    )
    given = [Dialogue("a", (Turn("seeker", "I want to die"), Turn("supporter", "b")))]
    made = [screen(crisis=action).screened(given, tmp_path) for action in ("mark", "mark", "drop")]
    assert made[0] == made[1]
    assert made[2].kept == []
    assert looked == ["I want to die", "b"] * 2  # another action is another screening


# --- in every phase --------------------------------------------------------------------------------------------------

PLANTED = {
    "crisis": "Sometimes I want to die.",
    "personal": "Write to ann@mail.example.org.",
    "experience": "When I lost my job I cried.",
    "names": "My name is Ann.",
}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def planted(tiny_folder: Path, tiny_config: Config, tmp_path: Path) -> Any:
    """An experiment without a model, whose corpora and pairs hold each of these, a byte order mark, an answer of zero-width
    characters and half a character."""

    def talk(name: str, answer: str) -> dict[str, Any]:
        texts = ["Hi", f"One {name}", "So", answer, "Yes", f"Three {name}"]
        said = [{"role": ("seeker", "supporter")[i % 2], "text": text} for i, text in enumerate(texts)]
        labels = {"id": name, "profile": "", "emotion": "", "problem": "", "situation": ""}
        return {**labels, "turns": said}

    texts = PLANTED | {"bom": "\ufeffFour", "unseen": "\u200b\u2060", "half": "Five \ud83d"}
    train = write(tmp_path / "train.jsonl", [talk(name, text) for name, text in texts.items()])
    replay = write(
        tmp_path / "replay.jsonl", [{"id": k, "messages": chat("Sum?", "Six", "And?", t)} for k, t in PLANTED.items()]
    )
    empty = write(tmp_path / "valid.jsonl", [talk("other", "Nothing")])

    def make(**actions: Any) -> Experiment:
        data = tiny_config.data.model_copy(
            update={
                "train": train,
                "replay": replay,
                "valid": empty,
                "test": empty,
                "replay_share": 0.5,
                "leaks": "allow",
            }
        )
        config = tiny_config.model_copy(update={"data": data, "screen": ScreenSettings(**actions)})
        tokenizer = ChatTokenizer(tiny_folder)
        return Experiment(config, cast(Any, None), tokenizer, Encoder(tokenizer, 768, ""), cast(Any, None))

    return make


@pytest.mark.parametrize("action", ["drop", "mark", "keep"])
def test_planted_texts_reach_no_row_that_they_should_not(planted: Any, tmp_path: Path, action: str) -> None:
    experiment: Experiment = planted(**dict.fromkeys(KINDS, action))
    tokenizer = experiment.tokenizer
    examples, facts = experiment.corpora.sft_rows
    pool, _ = experiment.corpora.pool
    rows = [*(e.tokens.tolist() for e in examples), *(c.prompt.ids.tolist() for c in pool)]
    text = "\n".join([*map(tokenizer.decode, rows), *(c.reference for c in pool)])
    assert {kind for kind, planted_text in PLANTED.items() if planted_text in text} == (
        set() if action == "drop" else set(PLANTED)
    )
    assert not any(mark in text for mark in ("\ufeff", "\u200b", "\ud83d", "Five"))
    assert "Four" in text  # what is mended stays
    assert facts["corpus"] == {"rows": 7, "byte_order_marks": 1, "unseen_turns": 1, "lone_surrogates": 1}
    counted = {f"{action} {kind}": 1 for kind in KINDS}
    assert facts.get("screened", {}) == ({} if action == "keep" else {"train": counted, "replay": counted})
    with RunDir(tmp_path / "run", experiment.config) as run:
        experiment.corpora.write_screened(run)
    listed = [json.loads(line) for line in (tmp_path / "run" / "screened.jsonl").read_text().splitlines()]
    assert {(r["source"], r["kind"], r["id"]) for r in listed} == (
        set() if action == "keep" else {(source, kind, kind) for source in ("train", "replay") for kind in KINDS}
    )


@pytest.mark.parametrize("action", ["drop", "mark", "keep"])
def test_planted_pairs(tmp_path: Path, action: str) -> None:
    def pair(name: str, reply: str) -> dict[str, Any]:
        return {"id": name, "prompt": "Hi", "chosen": reply, "rejected": "No."}

    texts = PLANTED | {"half": "Five \ud83d", "good": "\ufeffGood"}
    file = Path(write(tmp_path / "pairs.jsonl", [pair(name, text) for name, text in texts.items()]))
    made = screened_pairs(read_pairs(file), screen(**dict.fromkeys(KINDS, action)))
    assert [p["id"] for p in made.kept] == (["good"] if action == "drop" else [*PLANTED, "good"])
    assert made.kept[-1]["chosen"][0]["content"] == "Good"
    dropped = {"lone_surrogates": 1} | (dict.fromkeys(KINDS, 1) if action == "drop" else {})
    assert made.dropped == dropped
    assert {row["kind"] for row in made.found} == (set() if action == "keep" else set(KINDS))
