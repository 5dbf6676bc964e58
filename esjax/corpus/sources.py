"""One reader for each corpus format: a file becomes dialogues, or replay conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esjax.configfile import bundled
from esjax.corpus.dialogue import Dialogue, Message, Turn, normalise
from esjax.errors import InputError
from esjax.runlog import read_jsonl


def read_dialogues(format: str, path: str) -> list[Dialogue]:
    """Read a corpus file.

    Args:
        format: "sample" (data/sample of this project) or "esconv" (ESConv's own JSON lines).
        path: a local file, or bundled:PATH.

    Returns:
        Dialogues with at least one supporter turn that answers a seeker, in the file's order.

    Raises:
        InputError: naming file and line for a broken row, or the file when nothing usable is in it.
    """
    file = bundled(path)
    dialogues = []
    first: dict[str, int] = {}
    for number, row in _numbered(file, READERS[format][1]):
        try:
            dialogues.append(READERS[format][0](row, number))
            name = str(dialogues[-1].id)
            if first.setdefault(name, number) != number:  # they would be drawn from with the same noise
                raise ValueError(f"the id {name!r} is that of line {first[name]} too")
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            what = f"the field {e} is missing" if isinstance(e, KeyError) else str(e)
            raise InputError(f"{file}, line {number}: {what}; expected a row of format {format}") from e
    usable = [d for d in dialogues if d.supporter_turns()]
    if not usable:
        raise InputError(f"{file}: no dialogue with a supporter's answer in it ({len(dialogues)} rows read)")
    return usable


def read_conversations(path: str) -> list[tuple[str, list[Message]]]:
    """Read JSON Lines of {"id", "messages"}; the last message must be the assistant's. Raises InputError."""
    file = bundled(path)
    out = []
    for number, row in _numbered(file, ("id", "messages")):
        where = f"{file}, line {number}"
        messages = check_messages(row["messages"], where, last="assistant")
        if all(m["role"] != "user" for m in messages):
            raise InputError(f"{where}: there is no user message before the assistant's")
        out.append((str(row["id"]), messages))
    if not out:
        raise InputError(f"{file}: empty; expected one JSON object a line with id and messages")
    return out


def check_messages(messages: Any, where: str, last: str) -> list[Message]:
    """Check a chat: a list of {"role", "content"} whose last role is ``last``. Raises InputError naming ``where``."""
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a non-empty list of objects with role and content")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or m.get("role") not in roles or not isinstance(m.get("content"), str):
            raise InputError(f"{where}: message {i} must have a role among {', '.join(roles)} and a text as content")
    if messages[-1]["role"] != last:
        raise InputError(f"{where}: the last message must be the {last}'s, not the {messages[-1]['role']}'s")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _numbered(file: Path, required: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    rows = read_jsonl(file, required)
    lines = [i for i, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1) if line.strip()]
    return list(zip(lines, rows, strict=True))


def _sample(row: dict[str, Any], number: int) -> Dialogue:
    turns = []
    for t in row["turns"]:
        if t["role"] not in ("seeker", "supporter"):
            raise ValueError(f"role {t['role']!r} is not seeker or supporter")
        turns.append(Turn(t["role"], t["text"], t.get("strategy")))
    labels = {k: row[k] for k in ("profile", "emotion", "problem", "situation")}
    return Dialogue(id=row["id"], turns=normalise(turns), **labels)


def _esconv(row: dict[str, Any], number: int) -> Dialogue:
    speakers = {"usr": "seeker", "sys": "supporter"}
    turns = []
    for t in row["dialog"]:
        if t["speaker"] not in speakers:
            raise ValueError(f"speaker {t['speaker']!r} is not usr or sys")
        turns.append(Turn(speakers[t["speaker"]], t["text"], t.get("strategy")))  # type: ignore[arg-type]
    return Dialogue(
        id=f"esconv-{number:05d}",
        turns=normalise(turns),
        emotion=row["emotion_type"],
        problem=row["problem_type"],
        situation=row["situation"],
    )


Reader = Callable[[dict[str, Any], int], Dialogue]
READERS: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "sample": (_sample, ("id", "profile", "emotion", "problem", "situation", "turns")),
    "esconv": (_esconv, ("emotion_type", "problem_type", "situation", "dialog")),
}
