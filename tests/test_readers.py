"""Each reader on rows in its exact schema, with what goes wrong in real files of it. All texts are invented."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import chat

from esjax.corpus.dialogue import Turn
from esjax.corpus.readers import FORMATS
from esjax.corpus.sources import Corpus, read
from esjax.errors import InputError
from esjax.evolve.pairs import read_pairs

SAID = [("usr", "I moved."), ("sys", "Where to?"), ("usr", "Far."), ("sys", "Ah.")]
ESCONV = {
    "emotion_type": "fear",
    "problem_type": "moving",
    "situation": "New town.",
    "dialog": [{"speaker": who, "text": text} for who, text in SAID],
}
EXTES = {
    "scene": "Work",
    "description": "A desk was taken.",
    "content": [
        {"User": "My desk is gone."},
        {"AI Strategy": "Reflective Statements", "AI": "Your desk was taken."},
        {"User": "Yes."},
        {"AI Strategy": "Clarification"},
        {"AI": "By whom?"},
        "stray",
        {"Users": "typo"},
        {"User": 5},
        {"User": "By a plant."},
        {"AI": "A plant!", "AI Strategy": "Juggling"},
    ],
}
CSV = """conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags
hit:0_conv:1,1,proud,I grew a melon_comma_ a big one,3,I grew a melon_comma_ a "big one.,5|5|5_2|2|5,
hit:0_conv:1,2,proud,I grew a melon_comma_ a big one,0,How big?,5|5|5_2|2|5,
hit:1_conv:2,2,sad,It rained,7,Oh no.,5|5|5_4|3|5,<x>
hit:1_conv:2,1,sad,It rained,9,It rained on it.,5|5|5_4|3|5,
"""
# What a row of each format is, and the turns that come of it: S of the seeker, H of the supporter, who helps.
ROWS: dict[str, tuple[Any, list[str]]] = {
    "esconv": (ESCONV, ["S I moved.", "H Where to?", "S Far.", "H Ah."]),
    "pesconv": (ESCONV | {"persona": ["I am tall.", " I bake."]}, ["S I moved.", "H Where to?", "S Far.", "H Ah."]),
    "extes": (
        EXTES,
        ["S My desk is gone.", "H Your desk was taken.", "S Yes.", "H By whom?", "S By a plant.", "H A plant!"],
    ),
    "augesc": ({"text": str([list(turn) for turn in SAID])}, ["S I moved.", "H Where to?", "S Far.", "H Ah."]),
    "messages": ({"messages": chat("a\n\n b ", "c", "d", "e")}, ["S a\n\n b", "H c", "S d", "H e"]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b\nc"}]},
        ["S a", "H b\nc"],
    ),
    "alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"}, ["S Add.\n\n1 2", "H 3"]),
    "sample": (
        {
            "id": "x",
            "profile": "",
            "emotion": "",
            "problem": "",
            "situation": "",
            "system": "Be brief.",
            "turns": [{"role": "seeker", "text": "a"}, {"role": "supporter", "text": "b", "strategy": "Other"}],
        },
        ["S a", "H b"],
    ),
}


def given(tmp_path: Path, rows: Any, name: str = "rows.jsonl") -> str:
    file = tmp_path / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def read_as(format: str, tmp_path: Path, *rows: Any) -> Corpus:
    return read(f"{format}:{given(tmp_path, rows)}")


def turns(corpus: Corpus, n: int = 0) -> list[str]:
    return [f"{'S' if t.role == 'seeker' else 'H'} {t.text}" for t in corpus.dialogues[n].turns]


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("array", [False, True])
def test_a_row_becomes_a_dialogue(tmp_path: Path, format: str, array: bool) -> None:
    row, expected = ROWS[format]
    other = row | {"id": "y"} if "id" in row else row
    file = given(tmp_path, [json.dumps([row, other])] if array else [row, "", other])
    corpus = read(f"{format}:{file}")
    assert turns(corpus) == turns(corpus, 1) == expected
    assert corpus.counts["rows"] == len({d.id for d in corpus.dialogues}) == 2


def test_every_format_is_tried() -> None:
    assert ROWS.keys() | {"empathetic", "preference"} == FORMATS.keys()


@pytest.mark.parametrize("format", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_another_format_s_file_is_refused_by_its_name(tmp_path: Path, format: str, other: str) -> None:
    file = given(tmp_path, [ROWS[other][0]])
    if format == other or (format, other) == ("esconv", "pesconv"):  # a persona more does no harm
        assert read(f"{format}:{file}").dialogues
        return
    with pytest.raises(InputError) as e:
        read(f"{format}:{file}")
    assert str(e.value) == f"{file}, line 1: this looks like {other}, not {format}; give {other}:{file}"


def test_labels_and_strategies(tmp_path: Path) -> None:
    extes = read_as("extes", tmp_path, EXTES)
    (d,) = extes.dialogues
    assert (d.problem, d.situation) == ("Work", "A desk was taken.")
    assert [t.strategy for t in d.turns if t.role == "supporter"] == [
        *("Restatement or Paraphrasing", "Question", "Juggling"),
    ]
    assert (extes.counts["malformed_items"], extes.counts["unknown_strategies"]) == (3, 1)
    assert read_as("pesconv", tmp_path, ROWS["pesconv"][0]).dialogues[0].profile == "I am tall. I bake."
    (d,) = read_as("sample", tmp_path, ROWS["sample"][0]).dialogues
    assert (d.system, d.turns[1]) == ("Be brief.", Turn("supporter", "b", "Others"))


def test_esconv_s_raw_rows(tmp_path: Path) -> None:
    """``annotation`` holds the strategy; in the failed set the seeker is "speaker" and the supporter "listener"."""
    for seeker, supporter in (("seeker", "supporter"), ("speaker", "listener")):
        said = [
            {"speaker": supporter, "annotation": {"strategy": "Questions"}, "content": "Hello\n"},
            {"speaker": seeker, "annotation": {"feedback": "4"}, "content": "Hi"},
            {"speaker": supporter, "annotation": {}, "content": "Yes?\n"},
            {"speaker": supporter, "annotation": {"strategy": "Other"}, "content": "Go on."},
        ]
        raw = ESCONV | {"dialog": said, "survey_score": {"seeker": {}}, "experience_type": "x"}
        (d,) = read_as("esconv", tmp_path, raw).dialogues
        assert [(t.role, t.text, t.strategy) for t in d.turns] == [
            ("supporter", "Hello", "Question"),
            ("seeker", "Hi", None),
            ("supporter", "Yes? Go on.", "Others"),
        ]
        assert d.supporter_turns() == [2]


def test_the_hub_s_one_column(tmp_path: Path) -> None:
    packed = {"text": json.dumps(ESCONV)}
    assert turns(read_as("esconv", tmp_path, packed)) == ROWS["esconv"][1]


def test_augesc_s_text_file(tmp_path: Path) -> None:
    lines = ["[['usr', 'It\\'s me.'], ['sys', \"Who's me?\"]]", "", "[['usr', 'a'], ['sys', 'b']]"]
    corpus = read_as("augesc", tmp_path, *lines)
    assert turns(corpus) == ["S It's me.", "H Who's me?"]
    for line, what in (
        ("[['usr', 'a'], ['sys'", "not a Python literal"),
        ("__import__('os')", "not a Python literal"),
        ("[['usr', 'a', 'b']]", "no pair of usr or sys and a text"),
        ("[['bot', 'a']]", "no pair of usr or sys"),
    ):
        with pytest.raises(InputError, match=rf"line 2: .*{what}"):
            read_as("augesc", tmp_path, lines[0], line)


def test_empathetic_dialogues(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_text(CSV)
    corpus = read(f"empathetic:{file}")
    first, second = corpus.dialogues
    assert [turns(corpus, n) for n in (0, 1)] == [
        ['S I grew a melon, a "big one.', "H How big?"],
        ["S It rained on it.", "H Oh no."],  # in the order of their numbers, not of the file
    ]
    assert (first.id, first.emotion, first.situation) == ("hit:0_conv:1", "proud", "I grew a melon, a big one")
    assert second.emotion == "sad"
    rows = [dict(zip(CSV.splitlines()[0].split(","), line.split(","), strict=False)) for line in CSV.splitlines()[1:]]
    assert read_as("empathetic", tmp_path, *rows).dialogues == [first, second]  # the hub's columns
    with pytest.raises(InputError, match="this looks like esconv"):
        read_as("empathetic", tmp_path, ESCONV)
    for broken, message in (
        (CSV.replace("hit:1_conv:2,2", "hit:1_conv:2,two"), "line 4: invalid literal for int"),
        (CSV.replace("hit:1_conv:2,2,sad", "hit:1_conv:2"), "line 4: "),
        (CSV + "hit:2,1\n", "line 6: the field 'context' is missing"),
    ):
        file.write_text(broken)
        with pytest.raises(InputError, match=message):
            read(f"empathetic:{file}")


def test_chats_with_weights_parts_and_a_system_message(tmp_path: Path) -> None:
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "no target", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "target", "weight": 1},
        {"role": "assistant", "content": "goes on"},
    ]
    (d,) = read_as("messages", tmp_path, {"messages": said}).dialogues
    assert d.system == "Be brief."
    assert [(t.text, t.trained) for t in d.turns] == [
        *(("ab", True), ("no target", False), ("c", True), ("target\n\ngoes on", True)),
    ]
    assert d.supporter_turns() == [3]
    assert d.messages(1) == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "ab"}]
    for change, message in (
        ({"weight": 0.5}, "message 1 has the weight 0.5; allowed: 0, no target, and 1"),
        ({"content": [{"type": "image"}]}, "message 1: a turn's text is"),
        ({"content": None}, "message 1: a turn's text is null"),
        ({"role": "tool"}, "message 1 must have a role among system"),
        ({"tool_calls": [1]}, "message 1 has the key 'tool_calls'"),
    ):
        rows = {"messages": [said[1], said[4] | change]}
        with pytest.raises(InputError, match=f"line 1: {message}"):
            read_as("messages", tmp_path, rows)
    system = {"conversations": ROWS["sharegpt"][0]["conversations"], "system": "Be kind."}
    assert read_as("sharegpt", tmp_path, system).dialogues[0].system == "Be kind."
    with pytest.raises(InputError, match="from 'tool' is not among human"):
        read_as("sharegpt", tmp_path, {"conversations": [{"from": "tool", "value": "x"}]})


# --- the one rule for texts ------------------------------------------------------------------------------------------


def test_what_is_no_text_is_left_out_and_counted(tmp_path: Path) -> None:
    said = chat("\ufeffa\u2028b", "\u200b\u2060", "c\u0085d", "e\ufefff", "g", "h \ud83d", "i", "j")
    for format, name, row in (
        ("esconv", "text", ESCONV | {"dialog": [_esconv(m) for m in said]}),
        ("sharegpt", "value", {"conversations": [{"from": _human(m), "value": m["content"]} for m in said]}),
    ):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        if format == "sharegpt":  # a chat's answer in which nothing can be seen is refused: its row is broken
            with pytest.raises(InputError, match="message 1 is an answer in which nothing can be seen"):
                read(f"{format}:{file}")
            row["conversations"][1]["value"] = "seen"
            file.write_text(json.dumps(row) + "\n", encoding="utf-8")
        corpus = read(f"{format}:{file}")
        expected = (
            ["S a b c d", "H ef", "S g"]
            if format == "esconv"
            else ["S a\u2028b", "H seen", "S c\u0085d", "H ef", "S g"]
        )
        assert turns(corpus) == expected
        assert (corpus.counts["byte_order_marks"], corpus.counts["lone_surrogates"]) == (2, 1)
        assert corpus.counts["unseen_turns"] == (format == "esconv")


def _esconv(message: dict[str, str]) -> dict[str, str]:
    return {"speaker": "usr" if message["role"] == "user" else "sys", "text": message["content"]}


def _human(message: dict[str, str]) -> str:
    return "human" if message["role"] == "user" else "gpt"


def test_roles_that_never_alternate(tmp_path: Path) -> None:
    alone = ESCONV | {"dialog": [{"speaker": "usr", "text": "a"}, {"speaker": "usr", "text": "b"}]}
    corpus = read_as("esconv", tmp_path, alone, ESCONV)
    assert (len(corpus.dialogues), corpus.counts["no_answer"]) == (1, 1)
    assert corpus.dropped == [("no_answer", f"{tmp_path / 'rows.jsonl'}, line 1")]
    with pytest.raises(
        InputError, match=r"no dialogue with a supporter's answer in it \(1 rows read\); roles must alternate"
    ):
        read_as("esconv", tmp_path, alone)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_the_three_forms_of_pairs(tmp_path: Path) -> None:
    prompt, good, bad = chat("a", "b", "c"), chat("good", first=1), chat("bad", first=1)
    plain = {"prompt": "c", "chosen": "good", "rejected": "bad"}
    forms = [
        ({"prompt": prompt, "chosen": good, "rejected": bad}, prompt),
        ({"chosen": [*prompt, *good], "rejected": [*prompt, *bad]}, prompt),
        (plain, chat("c")),
    ]
    for row, expected in forms:
        (pair,) = read_pairs(Path(given(tmp_path, [row])))
        assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (expected, good, bad)
    for row, message in (
        ({"chosen": "a", "rejected": "b"}, "the field 'prompt' is missing; without it"),
        ({"chosen": chat("a", "b"), "rejected": chat("x", "c")}, "do not begin with the same messages"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
        (plain | {"rejected": "good"}, "chosen and rejected are the same"),
    ):
        with pytest.raises(InputError, match=message):
            read_pairs(Path(given(tmp_path, [row])))
    with pytest.raises(InputError, match=r"this looks like preference"):
        read_as("messages", tmp_path, plain)
