"""One reader for each corpus format: a file becomes dialogues, or replay conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue, Message, Role, Turn, normalise
from esjax.corpus.text import is_empty
from esjax.errors import InputError
from esjax.run.jsonl import Line, json_array, json_object, read_jsonl, require
from esjax.settings.files import bundled, read_whole


def read_dialogues(format: str, path: str) -> list[Dialogue]:
    """Read a corpus file.

    Args:
        format: "sample" (data/sample of this project) or "esconv" (ESConv's own files: JSON Lines, the raw JSON array,
            the hub's rows with all of it in "text").
        path: a local file, or bundled:PATH.

    Returns:
        Dialogues with at least one supporter turn that answers a seeker, in the file's order.

    Raises:
        InputError: naming file and line for a broken row, or the file when nothing usable is in it.
    """
    file = bundled(path)
    dialogues = []
    read, rows = READERS[format]
    first: dict[str, str] = {}
    for row in rows(file):
        try:
            dialogues.append(read(row))
            name = str(dialogues[-1].id)
            if first.setdefault(name, row.where) != row.where:  # they would be drawn from with the same noise
                raise ValueError(f"the id {name!r} is that of {first[name].removeprefix(f'{file}, ')} too")
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            what = f"the field {e} is missing" if isinstance(e, KeyError) else str(e)
            raise InputError(f"{row.where}: {what}; expected a row of format {format}") from e
    usable = [d for d in dialogues if d.supporter_turns()]
    if not usable:
        raise InputError(f"{file}: no dialogue with a supporter's answer in it ({len(dialogues)} rows read)")
    return usable


def read_conversations(path: str) -> list[tuple[str, list[Message]]]:
    """Read JSON Lines of {"id", "messages"}; the last message must be the assistant's. Raises InputError."""
    file = bundled(path)
    out = []
    for row in read_jsonl(file, ("id", "messages")):
        messages = check_messages(row["messages"], row.where, last="assistant")
        if all(m["role"] != "user" for m in messages):
            raise InputError(f"{row.where}: there is no user message before the assistant's")
        out.append((str(row["id"]), messages))
    if not out:
        raise InputError(f"{file}: empty; expected one JSON object a line with id and messages")
    return out


def check_messages(messages: Any, where: str, last: str) -> list[Message]:
    """Check a chat: a list of {"role", "content"} whose last role is ``last``. Raises InputError naming ``where``.

    Other keys are allowed where they say nothing: null or empty, or a weight of 1.
    """
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a non-empty list of messages, objects with role and content")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
            raise InputError(f"{where}: message {i} must have a role among {', '.join(roles)} and a text as content")
        if lost := _lost(m, ("role", "content")):
            raise InputError(f"{where}: message {i} {lost}")
        if m["role"] == "assistant" and is_empty(m["content"]):
            raise InputError(f"{where}: message {i} is an answer in which nothing can be seen; take the row out")
    if messages[-1]["role"] != last:
        raise InputError(f"{where}: the last message must be the {last}'s, not the {messages[-1]['role']}'s")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _lost(message: dict[str, Any], known: tuple[str, ...]) -> str | None:
    """Which key of a message says something that no reader would hear, if one does."""
    for key, value in message.items():
        says_nothing = value is None or value in ([], {}, "") or (key == "weight" and value == 1)
        if key not in known and not says_nothing:
            return (
                f"has the key {key!r} ({json.dumps(value)[:40]}), which would be lost; allowed: {', '.join(known)}; "
                "take the key or the row out"
            )
    return None


def _objects(row: Line, field: str) -> list[dict[str, Any]]:
    """The turns of a row. Raises ValueError."""
    found = row[field]
    if not isinstance(found, list) or not all(isinstance(t, dict) for t in found):
        raise ValueError(f"{field} must be a list of objects")
    return found


def _text(value: Any) -> str:
    """A turn's text. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a turn's text is {json.dumps(value):.40}, and must be a text")
    return value


def _sample_rows(file: Path) -> list[Line]:
    return read_jsonl(file, ("id", "profile", "emotion", "problem", "situation", "turns"))


def _sample(row: Line) -> Dialogue:
    turns = []
    for t in _objects(row, "turns"):
        if t["role"] not in ("seeker", "supporter"):
            raise ValueError(f"role {t['role']!r} is not seeker or supporter")
        turns.append(Turn(t["role"], _text(t["text"]), t.get("strategy")))
        if lost := _lost(t, ("role", "text", "strategy")):
            raise ValueError(f"a turn {lost}")
    labels = {k: row[k] for k in ("profile", "emotion", "problem", "situation")}
    return Dialogue(id=row["id"], turns=normalise(turns), where=row.where, **labels)


ESCONV_FIELDS = ("emotion_type", "problem_type", "situation", "dialog")


def _esconv_rows(file: Path) -> list[Line]:
    """The rows of JSON Lines or of one JSON array, out of the hub's "text" where they lie in it."""
    text = read_whole(file, "a JSON Lines file, or a JSON array of dialogues")
    rows = json_array(text, str(file)) if text.lstrip().startswith("[") else read_jsonl(file)
    whole = [
        json_object(r["text"], r.where, r.number) if list(r) == ["text"] and isinstance(r["text"], str) else r
        for r in rows
    ]
    for row in whole:
        require(row, ESCONV_FIELDS)
    return whole


def _esconv(row: Line) -> Dialogue:
    # "usr" and "sys" in the prepared files, "seeker" and "supporter" in the raw one, "speaker" and "listener" in the failed set.
    speakers: dict[str, Role] = {"usr": "seeker", "seeker": "seeker", "speaker": "seeker"}
    speakers |= {"sys": "supporter", "supporter": "supporter", "listener": "supporter"}
    turns = []
    for t in _objects(row, "dialog"):
        if str(t["speaker"]) not in speakers:
            raise ValueError(f"speaker {t['speaker']!r} is not among {', '.join(speakers)}")
        raw = "content" in t and "text" not in t
        strategy = (t.get("annotation") or {}).get("strategy") if raw else t.get("strategy")
        turns.append(Turn(speakers[t["speaker"]], _text(t["content" if raw else "text"]), strategy))
    return Dialogue(
        id=f"esconv-{row.number:05d}",
        turns=normalise(turns),
        emotion=row["emotion_type"],
        problem=row["problem_type"],
        situation=row["situation"],
        where=row.where,
    )


READERS: dict[str, tuple[Callable[[Line], Dialogue], Callable[[Path], list[Line]]]] = {
    "sample": (_sample, _sample_rows),
    "esconv": (_esconv, _esconv_rows),
}
