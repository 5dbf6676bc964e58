"""Words in every script, text in which nothing can be seen, and the files that hold text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import chat, read_conversations, read_dialogues, sample_texts

from esjax.corpus.dialogue import Turn, normalise
from esjax.corpus.sources import check_messages, read
from esjax.corpus.text import is_empty, spaced, words
from esjax.errors import InputError
from esjax.eval.metrics import METRICS
from esjax.eval.metrics.distinct import distinct
from esjax.eval.replies import Reply
from esjax.evolve.answers import read_chats
from esjax.evolve.filters import Filters
from esjax.evolve.pairs import read_pairs
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import bundled, load, read_text
from esjax.settings.schema import FilterSettings, ScreenSettings

CHINESE = "我明白你的感受，这确实很难，我们一起想想办法。"


# --- scripts without spaces ------------------------------------------------------------------------------------------


def asked(file: Path) -> Any:
    return read_chats(file, "user")


COUNTS = {CHINESE: 20, "カーテンを閉めました。": 10, "I know 北京 well.": 5, "네, 정말 힘드셨겠어요.": 3, "ไม่เป็นไร": 7}


@pytest.mark.parametrize(("text", "count"), COUNTS.items())
def test_words_of_every_script(text: str, count: int) -> None:
    assert len(words(text)) == len(spaced(text)) == count


def test_words_of_english_are_what_they_were() -> None:
    for text in [*sample_texts(), "well-known — a 'b' x\u00a0y; don’t a_b 3.5 naïve"]:
        assert words(text) == re.findall(r"[\w']+", text.lower().replace("’", "'"))
        assert spaced(text) == text.split()


def test_replies_without_spaces_are_judged_like_others(filters: Filters) -> None:
    asked = chat("我最近总是睡不着觉，工作压力特别大，不知道怎么办")
    assert filters.reply_fault(asked, CHINESE, "stop") is None
    assert filters.reply_fault(asked, "好的。", "stop") == "few_words"
    assert filters.reply_fault(asked, "我很难过。" * 8, "stop") == "repetition"
    assert filters.reply_fault(asked, "工作压力特别大，不知道怎么办", "stop") == "speaks_for_seeker"
    assert filters.pair_fault(CHINESE, CHINESE + "好") == "near_identical"
    assert filters.pair_fault(CHINESE, "我在这里陪你，慢慢说，不用着急，先喝口水，好好休息一下吧") is None
    assert filters.pair_fault(CHINESE, "我在这里陪你") == "too_short"
    length = METRICS["words"].each
    assert length is not None
    assert length([Reply("d", "d/1", [], "", CHINESE)]) == [20]
    assert distinct(["很难很难"], 1) == 0.5


# --- nothing to see --------------------------------------------------------------------------------------------------

UNSEEN = [
    "",
    " \n",
    "\u200b",
    "\ufeff\u200d",
    "\u3164",
    "\u115f\uffa0",
    "\u2800",
    "\ufe0f",
    "\U000e0100",
    "\u00ad\x00",
    "\u034f",
]


@pytest.mark.parametrize("text", UNSEEN)
def test_a_turn_in_which_nothing_can_be_seen_is_none(text: str) -> None:
    assert is_empty(text)
    turns = [Turn("seeker", "a"), Turn("supporter", text), Turn("seeker", "b"), Turn("supporter", "c")]
    assert normalise(turns) == (Turn("seeker", "a b"), Turn("supporter", "c"))


@pytest.mark.parametrize("text", ["a", ".", "\U0001f642", "❤️", "漢", "é", "\u200ba"])
def test_what_can_be_seen_is_a_turn(text: str) -> None:
    assert not is_empty(text)
    assert normalise([Turn("seeker", text)]) == (Turn("seeker", text),)


# --- files -----------------------------------------------------------------------------------------------------------

GOOD = '{"id": "a", "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "%s"}]}'
DEEP = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": NaN, "messages": []}', "NaN is no JSON number"),
        ('{"id": -Infinity, "messages": []}', "-Infinity is no JSON number"),
        ('{"id": 1e999, "messages": []}', "the number 1e999 is too large"),
        ('{"id": %s, "messages": []}' % ("9" * 5000), "4300 digits"),
        ('{"id": "a", "id": "b", "messages": []}', "the key 'id' stands there twice"),
        (DEEP, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": "\x00", "messages": []}', "not JSON (Invalid control character"),
        ("\x00" * 9, "not JSON"),
        ('{"id": 1}', "the field 'messages' is missing"),
        ("[1]", "expected a JSON object, found list"),
    ],
    ids=lambda x: str(x)[:24],
)
@pytest.mark.parametrize("read", [read_conversations, asked])
def test_what_no_row_can_be_is_one_line_with_its_line(tmp_path: Path, line: str, message: str, read: Any) -> None:
    file = tmp_path / "rows.jsonl"
    ok = GOOD % "fine" if read is read_conversations else '{"id": "a", "messages": [{"role": "user", "content": "u"}]}'
    file.write_bytes(f"{ok}\n\n \r\n{line}\n".encode())
    with pytest.raises(InputError) as e:
        read(str(file) if read is read_conversations else file)
    assert str(e.value).startswith(f"{file}, line 4: ")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("half", ["\\ud83d", "\\udfff"])
def test_half_a_character_in_a_prompt_is_refused_and_ends_a_dialogue(tmp_path: Path, half: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"id": "a", "messages": chat(f"u {half}")}).replace("\\\\", "\\"))
    with pytest.raises(InputError, match=r"line 1: \\\\?\\u[0-9a-f]{4} is half a character|is half a character"):
        asked(file)
    long = {"id": "a", "messages": chat("u", "one", "v", f"two {half}")}
    file.write_text(json.dumps(long).replace("\\\\", "\\"))
    made = read(str(file), "messages")
    assert [t.text for t in made.dialogues[0].turns] == ["u", "one", "v"]
    assert made.counts["lone_surrogates"] == 1


def test_right_values_of_odd_text(tmp_path: Path) -> None:
    """Oracle: json.loads of each line."""
    texts = ["a\u2028b\x85c", "\\u0000", "\\ud83d\\ude42 \U0001f642", "\\r\\n", "\ufeff", "\ufdd0"]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(("\ufeff" + "\r\n".join(GOOD % t for t in texts)).encode())
    rows = read_jsonl(file)
    assert rows == [json.loads(GOOD % t) for t in texts]
    assert [r.where for r in rows] == [f"{file}, line {i}" for i in range(1, 7)]
    twice = tmp_path / "twice.jsonl"  # two such files, one behind the other
    twice.write_bytes(file.read_bytes() + b"\n" + file.read_bytes())
    assert read_jsonl(twice) == [*rows, *rows]


def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("\ufeff\\bzebra\nhorse\u2028foal\n".encode())
    assert read_text(str(text)) == "\\bzebra\nhorse\u2028foal"
    mine = Filters.load(FilterSettings(), ScreenSettings(personal_patterns=str(text)))
    assert mine.screen.dropped("A zebra", False) == mine.screen.dropped("horse\u2028foal", False) == "personal"
    assert mine.screen.dropped("A horse", False) is None
    config = tmp_path / "config.yaml"
    config.write_text("\ufeff" + bundled("bundled:configs/quickstart.yaml").read_text(), encoding="utf-8")
    assert load(str(config), []) == load(None, [])


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "latin-1"])
def test_files_in_another_encoding_are_refused(tmp_path: Path, codec: str) -> None:
    file = tmp_path / "text.jsonl"
    bom = "\ufeff" if codec == "utf-16-be" else ""
    file.write_bytes((bom + GOOD % "é").encode(codec))
    for open_it in (read_jsonl, lambda f: read_text(str(f)), lambda f: load(str(f), [])):
        with pytest.raises(InputError, match="UTF-16" if bom or codec == "utf-16" else "not UTF-8") as e:
            open_it(file)
        assert str(file) in str(e.value)


def test_pairs_and_prompts_name_the_line_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    pair = {"prompt": chat("u"), "chosen": [{"role": "assistant", "content": "c"}], "rejected": []}
    file.write_text("\n\n" + json.dumps(pair) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 3, rejected: expected a non-empty list of messages"):
        read_pairs(file)
    file.write_text("\n" + json.dumps({"id": 1, "messages": []}))
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2: expected a non-empty list of messages"):
        asked(file)


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0), ("name", "Ann"), ("tool_calls", [{"id": 1}]), ("weight", 0.5), ("train", False)]
)
def test_a_key_of_a_message_that_would_be_lost_is_refused(key: str, value: Any) -> None:
    messages = [*chat("u"), {"role": "assistant", "content": "a", key: value}]
    with pytest.raises(InputError, match=f"here: message 1 has the key '{key}'"):
        check_messages(messages, "here", last="assistant")


def test_keys_that_say_nothing_are_left_out() -> None:
    said = {"role": "assistant", "content": "a"}
    messages = [*chat("u"), said | {"weight": 1, "name": None, "tool_calls": [], "refusal": None}]
    assert check_messages(messages, "here", last="assistant") == [*chat("u"), said]


# --- ESConv's own files ----------------------------------------------------------------------------------------------

LABELS = {"emotion_type": "fear", "problem_type": "moving", "situation": "New town."}
PREPARED = [("usr", "I moved"), ("sys", "Where to?"), ("usr", "Far."), ("sys", "Ah.")]


def esconv_row(names: tuple[str, str], raw: bool) -> dict[str, Any]:
    """An invented dialogue in one of ESConv's schemas."""
    turns: list[dict[str, Any]] = []
    for speaker, text in PREPARED:
        turn: dict[str, Any] = {"speaker": names[speaker == "sys"], "content" if raw else "text": text}
        strategy = {"strategy": "Question"} if speaker == "sys" else {}
        turns.append(turn | ({"annotation": strategy | {"feedback": "5"}} if raw else strategy))
    return LABELS | {"dialog": turns} | ({"survey_score": {}, "experience_type": "x"} if raw else {})


def test_every_form_of_esconv_is_read_alike(tmp_path: Path) -> None:
    prepared = esconv_row(("usr", "sys"), raw=False)
    raws = [esconv_row(names, raw=True) for names in (("seeker", "supporter"), ("speaker", "listener"))]
    files = {
        "lines.jsonl": json.dumps(prepared) + "\n",
        "hub.jsonl": json.dumps({"text": json.dumps(prepared)}) + "\n",
        "raw.json": json.dumps(raws[:1]),
        "pretty.json": "\ufeff" + json.dumps(raws[:1], indent=2),
        "failed.json": json.dumps(raws[1:], indent=4),
        "hub.json": json.dumps([{"text": json.dumps(prepared)}]),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    got = {name: read_dialogues("esconv", str(tmp_path / name)) for name in files}
    (expected,) = got["lines.jsonl"]
    assert [(t.role, t.strategy) for t in expected.turns] == [("seeker", None), ("supporter", "Question")] * 2
    assert all(dialogues == [expected] for dialogues in got.values())
    assert got["raw.json"][0].where == f"{tmp_path / 'raw.json'}, object 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps([LABELS | {"dialog": []}, LABELS]), "object 2: the field 'dialog' is missing"),
        (json.dumps([1]), "object 1: expected a JSON object, found int"),
        ('[{"a": 1},\n {"b": }]', "not JSON (Expecting value at line 2"),
        ("[]", "no dialogue"),
        (json.dumps({"text": "hello"}), "line 1: not JSON"),
    ],
)
def test_broken_arrays_name_the_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "raw.json").write_text(text)
    with pytest.raises(InputError) as e:
        read_dialogues("esconv", str(tmp_path / "raw.json"))
    assert str(tmp_path / "raw.json") in str(e.value)
    assert message in str(e.value)


def test_the_real_failed_set(esconv: Path) -> None:
    raw = json.loads((esconv / "raw_failed_sample.json").read_text())
    got = read_dialogues("esconv", str(esconv / "raw_failed_sample.json"))
    assert len(got) == len(raw)
    for d, row in zip(got, raw, strict=True):
        for role, name in (("seeker", "speaker"), ("supporter", "listener")):
            spoken = " ".join(x["content"] for x in row["dialog"] if x["speaker"] == name)
            assert " ".join(t.text for t in d.turns if t.role == role) == " ".join(spoken.split())


@pytest.mark.parametrize("answer", ["", " \n", "\u200b\u2060", "\u3164"])
def test_an_answer_in_which_nothing_can_be_seen_is_refused(tmp_path: Path, answer: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps({"id": 1, "messages": chat("u", answer)}))
    with pytest.raises(InputError, match=r"line 2: message 1 is an answer in which nothing can be seen"):
        read_conversations(str(file))
    file.write_text("\n" + json.dumps({"id": 1, "messages": chat("u", ".")}))
    assert len(read_conversations(str(file))) == 1
