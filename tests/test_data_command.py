"""``esjax data``: what a corpus holds, a training row with its targets, messages out of anything, leaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused

from esjax.cli import main
from esjax.corpus.sources import read

TRAIN = "sample:bundled:data/sample/train.jsonl"
TALK = {
    "emotion_type": "fear",
    "problem_type": "moving",
    "situation": "",
    "dialog": [
        {"speaker": "usr", "text": "I moved far away."},
        {"speaker": "sys", "text": "Where to?", "strategy": "Questions"},
        {"speaker": "usr", "text": "\u200b"},
        {"speaker": "usr", "text": "I want to die, mail a@b.org"},
        {"speaker": "sys", "text": "Ah.", "strategy": "Others"},
    ],
}


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    rows = [TALK, TALK | {"emotion_type": "shame"}, TALK | {"dialog": TALK["dialog"][:1]}]  # type: ignore[index]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"esconv:{tmp_path / 'talks.jsonl'}"


def said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    main(["data", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_inspect_counts(corpus: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = said(capsys, "inspect", corpus)
    expected = {
        "rows": 3,
        "dialogues": 2,
        "turns": 8,
        "answers": 4,
        "left_out_or_mended": {"no_answer": 1, "unseen_turns": 2},
        "screening": {"drop crisis": 2, "drop personal": 2},
        "answers_lost_to_screening": 2,
        "turns_a_dialogue": {"min": 4, "median": 4.0, "mean": 4, "max": 4},
        "words_a_seeker_turn": {"min": 4, "median": 6.0, "mean": 6, "max": 8},
        "words_a_supporter_turn": {"min": 1, "median": 1.5, "mean": 1.5, "max": 2},
        "strategies": {"Question": 2, "Others": 2},
        "emotions": {"fear": 1, "shame": 1},
        "problems": {"moving": 2},
        "languages": {"en": 2},
    }
    assert {key: facts[key] for key in expected} == expected
    assert [e["id"] for e in facts["examples"]] == ["esconv-00001", "esconv-00002"]
    assert "target_tokens" not in facts
    with_model = said(capsys, "inspect", corpus, "--model", tiny_folder)
    assert with_model["target_tokens"] > 0
    assert with_model["tokens_a_context"]["min"] > 0
    main(["data", "inspect", corpus])
    shown = capsys.readouterr().out
    assert "esconv-00001" in shown
    assert "no_answer 1" in shown


def test_languages_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said_in = {
        "de": ("Ich habe meine Stelle verloren und bin sehr traurig.", "Das tut mir leid. Was ist denn passiert?"),
        "es": ("He perdido mi trabajo y estoy muy triste.", "Lo siento mucho. ¿Qué ha pasado?"),
        "zh": ("我丢了工作，很难过。", "听起来真的很不容易。"),
    }
    talks = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said_in.values()
    ]
    file = tmp_path / "talks.jsonl"
    file.write_text("".join(json.dumps(talk) + "\n" for talk in [*talks, talks[0]]), encoding="utf-8")
    assert said(capsys, "inspect", f"messages:{file}")["languages"] == {"de": 2, "es": 1, "zh": 1}


def test_a_row_shows_its_targets(
    corpus: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    row = said(capsys, "inspect", corpus, "--model", tiny_folder, "--row", 2)
    assert [p["text"] for p in row["parts"] if p["target"]] == ["Where to?<|im_end|>", "Ah.<|im_end|>"]
    assert row["id"] == "esconv-00002"
    main(["data", "inspect", corpus, "--model", str(tiny_folder), "--row", "1"])
    assert "⟦Where to?<|im_end|>⟧" in capsys.readouterr().out
    assert "makes 2 rows; give 1 to 2" in refused("data", "inspect", corpus, "--model", tiny_folder, "--row", 3)
    assert "--row needs --model" in refused("data", "inspect", corpus, "--row", 1)


def test_export_writes_messages_that_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    out = tmp_path / "out.jsonl"
    assert said(capsys, "export", TRAIN, "--out", out) == {"dialogues": 28}
    back, own = read(f"messages:{out}").dialogues, read(TRAIN).dialogues
    assert [(d.id, [t.text for t in d.turns], d.emotion) for d in back] == [
        (d.id, [t.text for t in d.turns], d.emotion) for d in own
    ]
    assert "exists" in refused("data", "export", TRAIN, "--out", out)
    assert "needs --out" in refused("data", "export", TRAIN)


def test_check_tells_of_leaks(corpus: str, capsys: pytest.CaptureFixture[str], refused: Refused) -> None:
    clean = [TRAIN, *(f"sample:bundled:data/sample/{name}.jsonl" for name in ("valid", "test"))]
    assert said(capsys, "check", *clean) == []
    with pytest.raises(SystemExit) as e:
        main(["data", "check", TRAIN, TRAIN])
    assert e.value.code == 1
    assert "28 leaks: train sample-" in capsys.readouterr().err
    assert "takes two or three sources" in refused("data", "check", corpus)
    assert "takes one source, not 2" in refused("data", "inspect", corpus, corpus)
    assert "--out: only esjax data export" in refused("data", "check", corpus, corpus, "--out", "x")
