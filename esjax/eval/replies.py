"""What is judged: a system's replies to contexts of held-out dialogues, beside the reference replies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Dialogue, Message
from esjax.errors import InputError
from esjax.run.jsonl import read_jsonl


@dataclass(frozen=True)
class Reply:
    """One reply of one system."""

    dialogue: str  # the unit of all statistics
    context: str  # DIALOGUE/TURN
    messages: Sequence[Message]  # what is answered
    reference: str
    text: str
    problem: str = ""  # the dialogue's gold label, where the corpus has one
    finish: str = "stop"  # or "length": it reached its token limit

    @property
    def seeker(self) -> str:
        """All that the seeker wrote."""
        return "\n".join(m["content"] for m in self.messages if m["role"] == "user")


def from_run(rows: Iterable[Mapping[str, Any]], problems: Mapping[str, str]) -> list[Reply]:
    """Replies of a run's file, and the problem of each dialogue."""
    out = []
    for row in rows:
        dialogue = row["id"].rpartition("/")[0]
        texts = row["reference"], row["prediction"]
        out.append(
            Reply(dialogue, row["id"], row["messages"], *texts, problems.get(dialogue, ""), row["finish_reason"])
        )
    return out


def read_predictions(file: Path, dialogues: Sequence[Dialogue]) -> list[Reply]:
    """Another system's replies: JSON Lines {"id": DIALOGUE/TURN, "text" or "prediction"}, to contexts of these dialogues.

    TURN counts a dialogue's turns from 0 and is a supporter turn's: the one that the reply stands in for. Replies come in
    the order of the dialogues, whatever the file's. Raises InputError naming file and line.
    """
    known = {f"{d.id}/{turn}": (d, turn) for d in dialogues for turn in d.supporter_turns()}
    order = {name: i for i, name in enumerate(known)}
    found: dict[str, Reply] = {}
    for number, row in enumerate(read_jsonl(file), start=1):
        where = f"{file}, line {number}"
        name = row.get("id")
        text = row.get("text", row.get("prediction"))
        if not isinstance(name, str) or not isinstance(text, str):
            raise InputError(f'{where}: expected {{"id": DIALOGUE/TURN, "text": REPLY}}')
        if name not in known:
            some = ", ".join(list(known)[:3])
            raise InputError(f"{where}: id {name!r:.80} is no context of the reference data; it has {some}, ...")
        if name in found:
            raise InputError(f"{where}: a second reply with the id {name!r:.80}; give one a context")
        d, turn = known[name]
        finish = str(row.get("finish_reason", "stop"))
        found[name] = Reply(d.id, name, d.messages(turn), d.turns[turn].text, text.strip(), d.problem, finish)
    if not found:
        raise InputError(f"{file}: no reply in it")
    return sorted(found.values(), key=lambda reply: order[reply.context])


def common(systems: Mapping[str, Sequence[Reply]]) -> dict[str, list[Reply]]:
    """The replies to contexts that all systems answered, so that every difference is a paired one. Raises InputError for none."""
    shared = set.intersection(*({r.context for r in replies} for replies in systems.values()))
    if not shared:
        raise InputError(f"{', '.join(systems)}: there is no context that all of them answered")
    return {name: [r for r in replies if r.context in shared] for name, replies in systems.items()}
