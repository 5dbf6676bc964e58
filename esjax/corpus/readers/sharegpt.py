"""ShareGPT's chats, as LLaMA-Factory and Axolotl read them."""

from __future__ import annotations

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.readers.base import Counts, Format, objects, text_of
from esjax.corpus.readers.messages import dialogue
from esjax.run.jsonl import Line

NAMES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"}
NAMES |= {"system": "system"}


def read(row: Line, counts: Counts) -> Dialogue:
    """{"conversations": [{"from": "human" | "gpt" | "system", "value"}], "system"}."""
    said = []
    for t in objects(row, "conversations"):
        if t["from"] not in NAMES:
            raise ValueError(f"from {t['from']!r} is not among {', '.join(NAMES)}")
        said.append((NAMES[t["from"]], text_of(t["value"]), True))
    if row.get("system") and (not said or said[0][0] != "system"):
        said.insert(0, ("system", text_of(row["system"]), True))
    return dialogue(row, said, "sharegpt")


FORMAT = Format("sharegpt", ("conversations",), lambda row: "conversations" in row, read, collapse=False)
