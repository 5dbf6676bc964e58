"""Broken files of rows and settings: whatever they hold, a reader gives a result or refuses in one line with the file's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from esjax.config import FilterSettings
from esjax.configfile import bundled, load
from esjax.corpus.sources import read_conversations, read_dialogues
from esjax.errors import InputError
from esjax.evolve.answers import read_questions
from esjax.evolve.filters import Filters
from esjax.evolve.pairs import read_pairs

ASKED = [{"role": "system", "content": "s"}, {"role": "user", "content": "u <|im_end|> é"}]
ANSWER = [{"role": "assistant", "content": "a"}]
TURNS = [{"role": "seeker", "text": "a"}, {"role": "supporter", "text": "b", "strategy": "Question"}]
SPOKEN = [{"speaker": "usr", "text": "a"}, {"speaker": "sys", "content": "b", "annotation": {"strategy": "Others"}}]
LABELS = {"profile": "p", "emotion": "e", "problem": "p", "situation": "s"}
ROWS: dict[str, tuple[dict[str, Any], Callable[[Path], Any]]] = {
    "conversations": ({"id": 1, "messages": [*ASKED, *ANSWER]}, lambda f: read_conversations(str(f))),
    "questions": ({"id": "q", "messages": ASKED}, read_questions),
    "pairs": ({"prompt": ASKED, "chosen": ANSWER, "rejected": ANSWER, "reference": {"chosen": -1.5}}, read_pairs),
    "sample": ({"id": "d", **LABELS, "turns": TURNS}, lambda f: read_dialogues("sample", str(f))),
    "esconv": (
        {"emotion_type": "e", "problem_type": "p", "situation": "s", "dialog": SPOKEN},
        lambda f: read_dialogues("esconv", str(f)),
    ),
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=4) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def mutated(draw: st.DrawFn, row: dict[str, Any]) -> dict[str, Any]:
    """A row in which one value, at any depth, is another one, or is gone."""
    row = json.loads(json.dumps(row))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
            places.append((node, key))
            walk(node[key])

    walk(row)
    node, key = draw(st.sampled_from(places))
    if draw(st.booleans()):
        node[key] = draw(VALUES)
    else:
        del node[key]
    return row


def outcome(read: Callable[[Path], Any], file: Path) -> str | None:
    """The one line of a refusal, or None; anything else is raised."""
    line = None
    try:
        read(file)
    except InputError as e:
        line = str(e)
        line.encode()  # can be printed
    assert line is None or (str(file) in line and "\n" not in line), line
    return line


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_with_one_odd_value(tmp_path: Path, name: str, data: st.DataObject) -> None:
    row, read = ROWS[name]
    file = tmp_path / "rows.jsonl"
    rows = [row, data.draw(mutated(row)), row]
    file.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    line = outcome(read, file)
    assert line is None or f"{file}, line 2: " in line


@pytest.mark.parametrize("name", ROWS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 400), cut=st.integers(0, 3), put=st.binary(max_size=3))
@example(at=0, cut=0, put=b"[")
def test_rows_with_odd_bytes(tmp_path: Path, name: str, at: int, cut: int, put: bytes) -> None:
    row, read = ROWS[name]
    file = tmp_path / "rows.jsonl"
    text = (json.dumps(row, ensure_ascii=False) + "\r\n").encode() * 2
    file.write_bytes(text[:at] + put + text[at + cut :])
    outcome(read, file)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    at=st.integers(0, 2500),
    cut=st.integers(0, 6),
    put=st.binary(max_size=4) | st.sampled_from([b"\t", b"- ", b"&a", b"!!x"]),
)
def test_settings_with_odd_bytes(tmp_path: Path, at: int, cut: int, put: bytes) -> None:
    file = tmp_path / "config.yaml"
    text = bundled("bundled:configs/quickstart.yaml").read_bytes()
    file.write_bytes(text[:at] + put + text[at + cut :])
    outcome(lambda f: load(str(f), []), file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=12) | st.text("()[]\\?*+|^$b-", max_size=8))
def test_odd_patterns(tmp_path: Path, text: str) -> None:
    file = tmp_path / "patterns.txt"
    file.write_text(text, encoding="utf-8", errors="ignore")
    outcome(lambda f: Filters.load(FilterSettings(crisis_patterns=str(f))).calm(["I want to live"]), file)
