"""Corpus readers, turn merging, broken files, and the sample corpus against its own data card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from esjax.corpus.dialogue import OPENING, Dialogue, Turn, normalise
from esjax.corpus.sources import check_messages, read_conversations, read_dialogues
from esjax.errors import InputError
from esjax.settings.files import bundled

SAMPLE = {"train": 28, "valid": 4, "test": 8}
STRATEGIES = {
    "Question",
    "Restatement or Paraphrasing",
    "Reflection of feelings",
    "Self-disclosure",
    "Affirmation and Reassurance",
    "Providing Suggestions",
    "Information",
    "Others",
}


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


def esconv_row(*dialog: tuple[str, str, str | None], **changes: Any) -> dict[str, Any]:
    """A row in ESConv's schema, with invented content."""
    spoken = [{"text": t, "speaker": s} | ({"strategy": k} if k else {}) for s, t, k in dialog]
    return {"emotion_type": "fear", "problem_type": "moving", "situation": "New town.", "dialog": spoken} | changes


ESCONV_ROW = esconv_row(
    ("sys", "Hello there. ", "Question"),
    ("sys", " What brings you?", "Others"),
    ("usr", "I moved", None),
    ("usr", "  last \n week", None),
    ("usr", "   ", None),
    ("sys", "A new town is a lot.", "Reflection of feelings"),
    ("usr", "", None),
    ("sys", "Where are you now?", "Question"),
    ("usr", "The kitchen.", None),
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
    assert normalise([]) == ()
    assert normalise([Turn("seeker", "  ")]) == ()


def test_normalise_leaves_clean_turns_alone() -> None:
    clean = (Turn("seeker", "a"), Turn("supporter", "b", "Question"), Turn("seeker", "c"))
    assert normalise(clean) == clean
    assert normalise((*clean, Turn("seeker", "d"))) != clean


def test_messages_and_targets_of_a_dialogue_that_the_seeker_opens() -> None:
    d = Dialogue("x", (Turn("seeker", "a"), Turn("supporter", "b"), Turn("seeker", "c"), Turn("supporter", "d")))
    assert d.supporter_turns() == [1, 3]
    assert d.messages(3) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert len(d.messages(4)) == 4
    assert OPENING not in str(d.messages(4))


def test_an_opening_supporter_turn_is_context_only() -> None:
    d = Dialogue("x", (Turn("supporter", "hello"), Turn("seeker", "a"), Turn("supporter", "b")))
    assert d.supporter_turns() == [2]
    assert d.messages(2) == [
        {"role": "user", "content": OPENING},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "a"},
    ]


# --- readers ---------------------------------------------------------------------------------------------------------


def test_the_sample_reader(tmp_path: Path) -> None:
    (d,) = read_dialogues("sample", lines(tmp_path, [sample_row()]))
    assert (d.id, d.profile, d.emotion, d.problem, d.situation) == (
        "x-1",
        "dry",
        "worry",
        "a move",
        "Packing boxes alone.",
    )
    assert d.turns == (
        Turn("seeker", "The boxes win."),
        Turn("supporter", "Which box is winning?", "Question"),
        Turn("seeker", "The one marked misc."),
        Turn("supporter", "It always is.", None),
    )


def test_the_esconv_reader(tmp_path: Path) -> None:
    rows = [esconv_row(("usr", "a", None), ("sys", "b", "Others")), "", ESCONV_ROW]
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
        esconv_row(("usr", "one", None), ("sys", "1", None)),
        esconv_row(("sys", "only an opening", None), ("usr", "two", None)),
        esconv_row(("usr", "three", None)),
        esconv_row(("usr", "four", None), ("sys", "4", None)),
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

BROKEN_SAMPLE = {
    "not JSON": ("{", "not JSON"),
    "no object": ([1], "expected a JSON object"),
    "a field is missing": ({k: v for k, v in sample_row().items() if k != "profile"}, "'profile' is missing"),
    "a turn without text": (sample_row(turns=[{"role": "seeker"}]), "'text' is missing"),
    "a turn without role": (sample_row(turns=[{"text": "a"}]), "'role' is missing"),
    "an unknown role": (sample_row(turns=[{"role": "user", "text": "a"}]), "role 'user'"),
    "text that is no text": (sample_row(turns=[{"role": "seeker", "text": 5}]), "format sample"),
    "turns that are no list": (sample_row(turns=None), "format sample"),
    "a turn that is no object": (sample_row(turns=["a"]), "format sample"),
}
BROKEN_ESCONV = {
    "not JSON": ("nothing", "not JSON"),
    "a field is missing": ({"dialog": []}, "'emotion_type' is missing"),
    "an unknown speaker": (esconv_row(("narrator", "a", None)), "speaker 'narrator'"),
    "a turn without speaker": (esconv_row() | {"dialog": [{"text": "a"}]}, "'speaker' is missing"),
    "a turn without text": (esconv_row() | {"dialog": [{"speaker": "usr", "annotation": {}}]}, "'text' is missing"),
}


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize(("row", "message"), BROKEN_SAMPLE.values(), ids=BROKEN_SAMPLE)
def test_a_broken_sample_row_names_file_and_line(tmp_path: Path, row: Any, message: str, position: int) -> None:
    rows: list[Any] = [sample_row(), "", sample_row()]
    rows.insert(position, row)
    file = lines(tmp_path, rows)
    with pytest.raises(InputError) as e:
        read_dialogues("sample", file)
    assert str(e.value).startswith(f"{file}, line {position + 1}: ")
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("row", "message"), BROKEN_ESCONV.values(), ids=BROKEN_ESCONV)
def test_a_broken_esconv_row_names_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    file = lines(tmp_path, [ESCONV_ROW, row])
    with pytest.raises(InputError) as e:
        read_dialogues("esconv", file)
    assert str(e.value).startswith(f"{file}, line 2: ")
    assert message in str(e.value)


def test_a_file_of_the_other_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'turns'|'id'"):
        read_dialogues("sample", lines(tmp_path, [ESCONV_ROW]))
    with pytest.raises(InputError, match="'emotion_type'"):
        read_dialogues("esconv", lines(tmp_path, [sample_row()]))


@pytest.mark.parametrize("rows", [[], ["", "  "], [esconv_row(("sys", "hello", None), ("usr", "a", None))]])
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


def chat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": r, "content": c} for r, c in messages]


def test_conversations(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 1, "messages": chat(("user", "2 + 2?"), ("assistant", "4")), "topic": "sums"},
        {"id": "b", "messages": chat(("system", "s"), ("user", "u"), ("assistant", "a"))},
    ]
    got = read_conversations(lines(tmp_path, rows))
    assert got == [("1", rows[0]["messages"]), ("b", rows[1]["messages"])]
    assert got != [("1", rows[1]["messages"]), ("b", rows[0]["messages"])]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        (None, "non-empty list"),
        ("hello", "non-empty list"),
        (chat(("user", "u")), "the last message must be the assistant's"),
        (chat(("user", "u"), ("bot", "a")), "message 1 must have a role among system, user, assistant"),
        (chat(("user", None), ("assistant", "a")), "message 0"),
        (["u", "a"], "message 0"),
    ],
)
def test_broken_conversations_name_file_and_line(tmp_path: Path, messages: Any, message: str) -> None:
    good = {"id": "g", "messages": chat(("user", "u"), ("assistant", "a"))}
    file = lines(tmp_path, [good, {"id": "x", "messages": messages}])
    with pytest.raises(InputError) as e:
        read_conversations(file)
    assert str(e.value).startswith(f"{file}, line 2: ")
    assert message in str(e.value)


def test_empty_conversations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl: empty"):
        read_conversations(lines(tmp_path, []))


def test_check_messages_asks_for_the_wanted_last_role() -> None:
    asked = chat(("user", "u"))
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
    faults = []
    if list(row) != ["id", "profile", "emotion", "problem", "situation", "turns"]:
        faults.append("keys")
    if not all(
        isinstance(row[k], str) and row[k].strip() for k in ("id", "profile", "emotion", "problem", "situation")
    ):
        faults.append("labels")
    turns = row["turns"]
    if not 8 <= len(turns) <= 14:
        faults.append("length")
    if [t["role"] for t in turns] != ["seeker", "supporter"] * (len(turns) // 2):
        faults.append("alternation")
    for t in turns:
        wanted = {"role", "text"} | ({"strategy"} if t["role"] == "supporter" else set())
        if set(t) != wanted:
            faults.append("turn keys")
        if not t["text"].strip() or t["text"] != t["text"].strip():
            faults.append("text")
        if t["role"] == "supporter" and t.get("strategy") not in STRATEGIES:
            faults.append("strategy")
    return faults


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
    turns = good["turns"]
    first, second = turns[0], turns[1]
    assert card_faults(good) == []
    assert card_faults({**good, "note": ""}) == ["keys"]
    assert card_faults({**good, "profile": " "}) == ["labels"]
    assert card_faults({**good, "turns": turns[:6]}) == ["length"]
    assert card_faults({**good, "turns": turns * 2}) == ["length"]
    assert card_faults({**good, "turns": turns[:-1]}) == ["alternation"]
    assert card_faults({**good, "turns": [{**first, "strategy": "Others"}, *turns[1:]]}) == ["turn keys"]
    assert card_faults({**good, "turns": [{**first, "text": " a"}, *turns[1:]]}) == ["text"]
    assert card_faults({**good, "turns": [first, {**second, "strategy": "Advice"}, *turns[2:]]}) == ["strategy"]


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
    rows = sample["replay"]
    assert len(rows) == 60
    for row in rows:
        assert list(row) == ["id", "messages"]
        assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
        assert all(set(m) == {"role", "content"} and m["content"].strip() for m in row["messages"])
    assert len({row["id"] for row in rows}) == 60
    assert len({row["messages"][0]["content"] for row in rows}) == 60
    assert not {row["id"] for row in rows} & {row["id"] for name in SAMPLE for row in sample[name]}
    read = read_conversations("bundled:data/sample/replay.jsonl")
    assert read == [(row["id"], row["messages"]) for row in rows]
    assert read != [(row["id"], row["messages"]) for row in rows[::-1]]
