"""Corpus readers, turn merging, broken files, and the sample corpus against its own data card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import chat, read_conversations, read_dialogues

from esjax.corpus.dialogue import OPENING, Dialogue, Turn, normalise
from esjax.corpus.sources import check_messages
from esjax.errors import InputError
from esjax.settings.files import bundled

SAMPLE = {"train": 28, "valid": 4, "test": 8}
STRATEGIES = set(
    """Question|Restatement or Paraphrasing|Reflection of feelings|Self-disclosure|Affirmation and Reassurance
|Providing Suggestions|Information|Others""".replace("\n", "").split("|")
)


def lines(tmp_path: Path, rows: Sequence[Any]) -> str:
    """A JSON Lines file; strings are written as they are."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(file)


def sample_row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": "x-1",
        "profile": "dry",
        "emotion": "worry",
        "problem": "a move",
        "situation": "Packing boxes alone.",
        "turns": [
            {"role": "seeker", "text": "The boxes win."},
            {"role": "supporter", "text": "Which box is winning?", "strategy": "Question"},
            {"role": "seeker", "text": "The one marked misc."},
            {"role": "supporter", "text": "It always is."},
        ],
    }
    return row | changes


def esconv_row(*dialog: tuple[str, ...], **changes: Any) -> dict[str, Any]:
    """A row in ESConv's schema, with invented content: speaker, text and, where there is one, strategy."""
    spoken = [dict(zip(("speaker", "text", "strategy"), turn, strict=False)) for turn in dialog]
    return {"emotion_type": "fear", "problem_type": "moving", "situation": "New town.", "dialog": spoken} | changes


ESCONV_ROW = esconv_row(
    ("sys", "Hello there. ", "Question"),
    ("sys", " What brings you?", "Others"),
    ("usr", "I moved"),
    ("usr", "  last \n week"),
    ("usr", "   "),
    ("sys", "A new town is a lot.", "Reflection of feelings"),
    ("usr", ""),
    ("sys", "Where are you now?", "Question"),
    ("usr", "The kitchen."),
)


# --- turns -----------------------------------------------------------------------------------------------------------


def test_normalise_strips_drops_and_merges() -> None:
    got = normalise(
        [
            Turn("seeker", " a \n b "),
            Turn("supporter", " "),
            Turn("seeker", "c\t"),
            Turn("supporter", "d", None),
            Turn("supporter", "e", "Question"),
            Turn("supporter", "f", "Others"),
            Turn("seeker", "g"),
        ]
    )
    assert got == (Turn("seeker", "a b c"), Turn("supporter", "d e f", "Question"), Turn("seeker", "g"))
    assert normalise(got) == got  # what is clean stays
    assert normalise([]) == ()
    assert normalise([Turn("seeker", "  ")]) == ()


@pytest.mark.parametrize(
    ("texts", "targets", "before_last"),
    [
        ({"a": "seeker", "b": "supporter", "c": "seeker", "d": "supporter"}, [1, 3], ["a", "b", "c"]),
        ({"h": "supporter", "a": "seeker", "b": "supporter"}, [2], [OPENING, "h", "a"]),  # an opening is context only
    ],
)
def test_messages_and_targets_of_a_dialogue(texts: Any, targets: list[int], before_last: list[str]) -> None:
    d = Dialogue("x", tuple(Turn(role, text) for text, role in texts.items()))
    assert d.supporter_turns() == targets
    assert d.messages(targets[-1]) == chat(*before_last)


# --- readers ---------------------------------------------------------------------------------------------------------


def test_the_sample_reader(tmp_path: Path) -> None:
    (d,) = read_dialogues("sample", lines(tmp_path, [sample_row()]))
    labels = (d.id, d.profile, d.emotion, d.problem, d.situation)
    assert labels == ("x-1", "dry", "worry", "a move", "Packing boxes alone.")
    assert d.turns == (
        Turn("seeker", "The boxes win."),
        Turn("supporter", "Which box is winning?", "Question"),
        Turn("seeker", "The one marked misc."),
        Turn("supporter", "It always is.", None),
    )


def test_the_esconv_reader(tmp_path: Path) -> None:
    rows = [esconv_row(("usr", "a"), ("sys", "b", "Others")), "", ESCONV_ROW]
    first, second = read_dialogues("esconv", lines(tmp_path, rows))
    assert first.turns == (Turn("seeker", "a"), Turn("supporter", "b", "Others"))
    assert second.turns == (
        Turn("supporter", "Hello there. What brings you?", "Question"),
        Turn("seeker", "I moved last week"),
        Turn("supporter", "A new town is a lot. Where are you now?", "Reflection of feelings"),
        Turn("seeker", "The kitchen."),
    )
    assert second.supporter_turns() == [2]
    assert (second.emotion, second.problem, second.situation, second.profile) == ("fear", "moving", "New town.", "")
    assert first.id != second.id


def test_dialogues_without_an_answer_are_left_out_and_order_is_kept(tmp_path: Path) -> None:
    rows = [
        esconv_row(("usr", "one"), ("sys", "1")),
        esconv_row(("sys", "only an opening"), ("usr", "two")),
        esconv_row(("usr", "three")),
        esconv_row(("usr", "four"), ("sys", "4")),
    ]
    got = read_dialogues("esconv", lines(tmp_path, rows))
    assert [d.turns[0].text for d in got] == ["one", "four"]


def independent_merge(dialog: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(speaker, text) of merged turns, by grouping: an oracle that shares no code with the reader."""
    spoken = [(t["speaker"], t["text"].split()) for t in dialog if t["text"].split()]
    starts = [i for i in range(len(spoken)) if i == 0 or spoken[i][0] != spoken[i - 1][0]]
    ends = [*starts[1:], len(spoken)]
    return [
        (spoken[a][0], " ".join(w for _, words in spoken[a:b] for w in words))
        for a, b in zip(starts, ends, strict=True)
    ]


@pytest.mark.parametrize("name", ["valid.jsonl", "train_part.jsonl"])
def test_real_esconv(esconv: Path, name: str) -> None:
    raw = [json.loads(line) for line in (esconv / name).read_text().splitlines() if line.strip()]
    got = read_dialogues("esconv", str(esconv / name))
    assert len(got) == len({d.id for d in got}) == len(raw)
    names = {"usr": "seeker", "sys": "supporter"}
    for d, row in zip(got, raw, strict=True):
        expected = [(names[s], t) for s, t in independent_merge(row["dialog"])]
        assert [(t.role, t.text) for t in d.turns] == expected
        assert (d.emotion, d.problem, d.situation) == (row["emotion_type"], row["problem_type"], row["situation"])
        for turn in d.supporter_turns():
            chat = d.messages(turn)
            assert [m["role"] for m in chat] == ["user", "assistant"] * (len(chat) // 2) + ["user"]
    merged = sum(len(row["dialog"]) - len(d.turns) for d, row in zip(got, raw, strict=True))
    openings = sum(d.turns[0].role == "supporter" for d in got)
    assert merged > 0  # controls: the file has what the rules are for
    assert openings > 0 or name != "valid.jsonl"


# --- broken files ----------------------------------------------------------------------------------------------------

ROLE = {"role": "seeker", "text": "a"}
BROKEN: list[tuple[str, Any, str]] = [
    ("sample", "{", "not JSON"),
    ("sample", [1], "expected a JSON object"),
    ("sample", {k: v for k, v in sample_row().items() if k != "profile"}, "'profile' is missing"),
    ("sample", sample_row(turns=[{"role": "seeker"}]), "'text' is missing"),
    ("sample", sample_row(turns=[{"text": "a"}]), "'role' is missing"),
    ("sample", sample_row(turns=[ROLE | {"role": "user"}]), "role 'user'"),
    ("sample", sample_row(turns=[ROLE | {"text": 5}]), "format sample"),
    ("sample", sample_row(turns=None), "format sample"),
    ("sample", sample_row(turns=["a"]), "format sample"),
    ("sample", ESCONV_ROW, "this looks like esconv"),  # a file of the other format
    ("esconv", "nothing", "not JSON"),
    ("esconv", sample_row(), "this looks like sample"),
    ("esconv", esconv_row(("narrator", "a")), "speaker 'narrator'"),
    ("esconv", esconv_row(dialog=[{"text": "a"}]), "'speaker' is missing"),
    ("esconv", esconv_row(dialog=[{"speaker": "usr", "annotation": {}}]), "'text' is missing"),
]
CONVERSATIONS: list[tuple[Any, str]] = [
    ([], "non-empty list"),
    (None, "non-empty list"),
    ("hello", "non-empty list"),
    ([*chat("u"), {"role": "bot", "content": "a"}], "message 1 must have a role among system"),
    ([{"role": "user", "content": None}, *chat("a", first=1)], "message 0"),
    (["u", "a"], "message 0"),
]


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [*BROKEN, *(("replay", {"id": "x", "messages": m}, message) for m, message in CONVERSATIONS)],
)
@pytest.mark.parametrize("position", [0, 2])
def test_a_broken_row_names_file_and_line(tmp_path: Path, format: Any, row: Any, message: str, position: int) -> None:
    good = {"sample": sample_row(), "esconv": ESCONV_ROW, "replay": {"id": "g", "messages": chat("u", "a")}}[format]
    rows: list[Any] = [good, "", good]
    rows.insert(position, row)
    file = lines(tmp_path, rows)
    with pytest.raises(InputError) as e:
        read_conversations(file) if format == "replay" else read_dialogues(format, file)
    assert str(e.value).startswith(f"{file}, line {position + 1}: ")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("rows", [[], ["", "  "], [esconv_row(("sys", "hello"), ("usr", "a"))]])
def test_a_corpus_without_an_answer_is_refused(tmp_path: Path, rows: list[Any]) -> None:
    file = lines(tmp_path, rows)
    with pytest.raises(InputError, match="no dialogue with a supporter's answer in it") as e:
        read_dialogues("esconv", file)
    assert file in str(e.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jsonl: cannot be read"):
        read_dialogues("sample", str(tmp_path / "absent.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(sample_row()).encode() + b" \xe9\n")
    with pytest.raises(InputError, match=r"latin\.jsonl: cannot be read \(not UTF-8\)"):
        read_dialogues("sample", str(tmp_path / "latin.jsonl"))


def test_conversations(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "messages": chat("2 + 2?", "4"), "topic": "sums"},
        {"id": "b", "messages": [{"role": "system", "content": "s"}, *chat("a", "u", "a", first=1)]},
    ]
    got = read_conversations(lines(tmp_path, rows))
    system, *said = rows[1]["messages"]
    opened = [system, {"role": "user", "content": OPENING}, *said]  # templates want a user before the assistant
    assert got == [("1", rows[0]["messages"]), ("b", opened)]
    with pytest.raises(InputError, match=r"rows\.jsonl: no dialogue with a supporter's answer"):
        read_conversations(lines(tmp_path, []))


def test_check_messages_asks_for_the_wanted_last_role() -> None:
    asked = chat("u")
    assert check_messages(asked, "here", last="user") == asked
    with pytest.raises(InputError, match="here: the last message must be the assistant's, not the user's"):
        check_messages(asked, "here", last="assistant")


# --- the sample corpus -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sample() -> dict[str, list[dict[str, Any]]]:
    """The rows of the shipped files, as JSON."""
    names = (*SAMPLE, "replay")
    files = {n: bundled(f"bundled:data/sample/{n}.jsonl").read_text(encoding="utf-8") for n in names}
    return {n: [json.loads(line) for line in text.splitlines()] for n, text in files.items()}


def card_faults(row: dict[str, Any]) -> list[str]:
    """What in a dialogue's row the data card does not allow."""
    turns, labels = row["turns"], ("id", "profile", "emotion", "problem", "situation")
    supporter = [t for t in turns if t["role"] == "supporter"]
    allowed = {
        "keys": list(row) == [*labels, "turns"],
        "labels": all(isinstance(row[k], str) and row[k].strip() for k in labels),
        "length": 8 <= len(turns) <= 14,
        "alternation": [t["role"] for t in turns] == ["seeker", "supporter"] * (len(turns) // 2),
        "turn keys": all(("strategy" in t) == (t in supporter) and {"role", "text"} <= set(t) for t in turns),
        "text": all(t["text"] and t["text"] == t["text"].strip() for t in turns),
        "strategy": all(t.get("strategy") in STRATEGIES for t in supporter),
    }
    return [name for name, ok in allowed.items() if not ok]


@pytest.mark.parametrize(("name", "count"), SAMPLE.items())
def test_the_sample_dialogues_obey_their_card(sample: dict[str, list[dict[str, Any]]], name: str, count: int) -> None:
    assert len(sample[name]) == count
    assert {row["id"]: card_faults(row) for row in sample[name] if card_faults(row)} == {}
    read = read_dialogues("sample", f"bundled:data/sample/{name}.jsonl")
    for d, row in zip(read, sample[name], strict=True):
        assert [(t.role, t.text) for t in d.turns] == [(t["role"], t["text"]) for t in row["turns"]]


def test_the_card_is_enforced(sample: dict[str, list[dict[str, Any]]]) -> None:
    """Controls: each fault is found in a row that has it."""
    good = sample["test"][0]
    first, second, *rest = good["turns"]
    assert card_faults(good) == []
    for change, fault in (
        ({"note": ""}, "keys"),
        ({"profile": " "}, "labels"),
        ({"turns": [first, second, *rest[:4]]}, "length"),
        ({"turns": good["turns"] * 2}, "length"),
        ({"turns": [first, second, *rest[:-1]]}, "alternation"),
        ({"turns": [{**first, "strategy": "Others"}, second, *rest]}, "turn keys"),
        ({"turns": [{**first, "text": " a"}, second, *rest]}, "text"),
        ({"turns": [first, {**second, "strategy": "Advice"}, *rest]}, "strategy"),
    ):
        assert card_faults({**good, **change}) == [fault]


def test_the_sample_is_what_its_card_says_in_all(sample: dict[str, list[dict[str, Any]]]) -> None:
    card = bundled("bundled:data/sample/README.md").read_text(encoding="utf-8")
    for name, rows in sample.items():
        assert f"| `{name}.jsonl` | {len(rows)} |" in card
    dialogues = [row for name in SAMPLE for row in sample[name]]
    used = {t["strategy"] for row in dialogues for t in row["turns"] if t["role"] == "supporter"}
    assert used <= STRATEGIES
    for strategy in STRATEGIES:
        assert strategy in card
    assert len({row["id"] for row in dialogues}) == len(dialogues) == 40
    assert len({row["situation"].lower() for row in dialogues}) == len(dialogues)
    texts = [t["text"] for row in dialogues for t in row["turns"] if len(t["text"].split()) > 4]
    assert len(set(texts)) == len(texts)  # held-out turns are not in the training file


def test_the_sample_replay_obeys_its_card(sample: dict[str, list[dict[str, Any]]]) -> None:
    held_out = [json.loads(line) for line in bundled("bundled:data/sample/replay_test.jsonl").read_text().splitlines()]
    assert (len(sample["replay"]), len(held_out)) == (48, 12)
    rows = [*sample["replay"], *held_out]
    for row in rows:
        assert list(row) == ["id", "messages"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(set(m) == {"role", "content"} and m["content"].strip() for m in row["messages"])
    assert len({row["id"] for row in rows}) == 60
    assert len({row["messages"][0]["content"] for row in rows}) == 60
    assert not {row["id"] for row in rows} & {row["id"] for name in SAMPLE for row in sample[name]}
    read = read_conversations("bundled:data/sample/replay.jsonl")
    assert read == [(row["id"], row["messages"]) for row in rows[:48]]
    assert read != [(row["id"], row["messages"]) for row in rows[47::-1]]
