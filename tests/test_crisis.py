"""What shows signs of crisis is trained on in no phase: SFT, replay, rounds, foreign pairs; and how signs are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import Refused, chat, read_dialogues

from esjax.corpus.dialogue import Dialogue, Turn
from esjax.errors import InputError
from esjax.evolve import references
from esjax.evolve.experiment import Experiment
from esjax.evolve.filters import Filters
from esjax.evolve.pairs import contexts, read_pairs, screened_pairs
from esjax.run.directory import RunDir
from esjax.settings.schema import Config
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

SIGN = "I want to die."


def dialogue(*texts: str, id: str = "d") -> Dialogue:
    return Dialogue(id, tuple(Turn(("seeker", "supporter")[i % 2], t) for i, t in enumerate(texts)))


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def row(id: str, *texts: str) -> dict[str, Any]:
    turns = [{"role": t.role, "text": t.text} for t in dialogue(*texts).turns]
    return {"id": id, "profile": "", "emotion": "", "problem": "", "situation": "", "turns": turns}


@pytest.fixture
def experiment(tiny_folder: Path, tiny_config: Config, tmp_path: Path) -> Experiment:
    """A experiment without a model, whose corpus has a crisis in the middle of one dialogue and another's beginning."""
    data = [
        row("a", "Hi", "One", SIGN, "Two", "So", "Three"),
        row("b", SIGN, "Four", "Yes", "Five"),
        row("c", "Hm", "Six"),
    ]
    replay = [
        {"id": "r", "messages": chat("Sum?", "Seven", SIGN, "Eight")},
        {"id": "s", "messages": [{"role": "system", "content": "At suicide, call."}, *chat("Sum?", "Nine")]},
        {"id": "t", "messages": chat(SIGN, "Ten")},
    ]
    settings = {"train": write(tmp_path / "train.jsonl", data), "replay": write(tmp_path / "replay.jsonl", replay)}
    config = tiny_config.model_copy(
        update={"data": tiny_config.data.model_copy(update={**settings, "format": "sample", "replay_share": 0.5})}
    )
    tokenizer = ChatTokenizer(tiny_folder)
    return Experiment(config, cast(Any, None), tokenizer, Encoder(tokenizer, 768, ""), cast(Any, None))


def test_no_answer_to_a_crisis_is_a_target_of_sft(experiment: Experiment, capsys: pytest.CaptureFixture[str]) -> None:
    examples, facts = experiment.corpora.sft_rows
    said = {experiment.tokenizer.decode([int(t) for t in e.tokens[1:][e.weight[:-1] > 0]]) for e in examples}
    assert said == {"One", "Six", "Seven", "Nine"}
    assert not any("die" in experiment.tokenizer.decode(e.tokens.tolist()) for e in examples)
    assert facts["screened"] == {"train": {"drop crisis": 2}, "replay": {"drop crisis": 2}}
    assert facts["answers_dropped"] == {"crisis": 6}
    out = capsys.readouterr().err
    assert "train.jsonl: found and dropped: 2 crisis; 4 answers are not trained on" in out
    assert "replay.jsonl: found and dropped: 2 crisis; 2 answers" in out


def test_no_round_sees_a_crisis_that_the_window_would_cut_off(experiment: Experiment) -> None:
    long = [row("a", SIGN, "Yes", *["word " * 100, "Hm"] * 4), row("b", *["word " * 100, "Hm"] * 5)]
    write(Path(experiment.config.data.train), long)
    pool = contexts(experiment.corpora.train, experiment.encoder, 480, "train.jsonl", "")
    assert {c.id.split("/")[0] for c in pool} == {"b"}
    assert experiment.corpora.screened.answers == {"crisis": 5}
    # Control: cut to the window, the last context of the other dialogue holds no sign any more.
    whole = read_dialogues("sample", experiment.config.data.train)
    late = [c for c in contexts(whole, experiment.encoder, 480, "train.jsonl", "") if c.id == "a/9"]
    assert late
    assert experiment.filters.reply_fault(late[0].messages, "It sounds hard to me.", "stop") is None


def test_a_corpus_of_crises_alone_is_refused(experiment: Experiment) -> None:
    write(Path(experiment.config.data.train), [row("b", SIGN, "Four")])
    with pytest.raises(InputError, match=r"train\.jsonl: every dialogue holds what is dropped"):
        _ = experiment.corpora.train


def pair(*texts: str, chosen: str = "Yes you", rejected: str = "No") -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    return {"prompt": chat(*texts)} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}


PAIRS = [pair("Hi"), pair(SIGN, "Oh", "Hi"), pair("Hi", SIGN, "Yes"), pair("Hi", chosen="End it all"), pair("Ho")]


def test_foreign_pairs_of_a_crisis_are_dropped_and_counted(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(write(tmp_path / "pairs.jsonl", PAIRS))
    taken: list[Any] = []

    def score(experiment: Experiment, start: Any, pairs: list[Any], target: Path, label: str) -> None:
        taken.extend(pairs)
        target.write_text("")

    monkeypatch.setattr(references, "write_references", score)
    with RunDir(tmp_path / "run", experiment.config) as run:
        references.score_pairs(experiment, run, file, cast(Any, None), "m0")
    assert [p["prompt"][0]["content"] for p in taken] == ["Hi", "Hi", "Ho"]
    assert taken[1]["prompt"][1]["content"] == SIGN  # the supporter's own words are no sign of the seeker's
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["pairs"]
    assert (stage["kept"], stage["dropped"]) == (3, {"crisis": 2})
    assert "kept 3 of 5 pairs; dropped: 2 crisis" in capsys.readouterr().err


def test_nothing_but_crises_is_one_line_and_no_run_directory(
    tiny_config_file: Path, tmp_path: Path, filters: Filters, refused: Refused
) -> None:
    file = write(tmp_path / "pairs.jsonl", [pair(SIGN), pair("Hi", rejected=SIGN)])
    line = refused("dpo", "--config", tiny_config_file, "--run-dir", tmp_path / "run", "--pairs", file)
    assert "pairs.jsonl" in line
    assert "4 crisis; see the screen settings" in line or "2 crisis; see the screen settings" in line
    assert not (tmp_path / "run").exists()
    assert len(screened_pairs(read_pairs(Path(write(tmp_path / "p", PAIRS))), filters.screen).kept) == 3


SPELLINGS = """I am suicidal.|I could kill myself.|I WANT TO DIE|I want to end it all|no reason\tto live
|they would be better off without me|I started cutting myself again|my husband hits, he hits me|I dont want to wake up
|I don’t want to live|I don't want to live|I donʼt want to live|I don`t want to live|don\u02bbt want to live
|I WANT  TO\nDIE|i want\u00a0to die|I wa\u200bnt to d\u00adie|Ｉ ｗａｎｔ ｔｏ ｄｉｅ|self\u2011harm|self\u2013harm
|_I want to die_|I want\u2800to die|I want\x00 to die""".replace("\n|", "|").split("|")
CALM = """I want to diet|I am dying to see her face.|I was killing time at the station.|The diet is over and I live again.
|We beat them at chess; I was cutting bread.|Nobody wants the party to end.|self\u2011help|_I want to sing_""".split(
    "|"
)


@pytest.mark.parametrize("text", SPELLINGS)
def test_signs_are_found_in_every_spelling(filters: Filters, text: str) -> None:
    assert filters.screen.dropped(text, supporter=False) == "crisis"


@pytest.mark.parametrize("text", CALM)
def test_ordinary_words_are_no_crisis(filters: Filters, text: str) -> None:
    assert filters.screen.dropped(text, supporter=False) is None
