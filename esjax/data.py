"""What ``esjax data`` tells of corpora: what they hold, what a training row is, and where splits leak into one another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.table import Table
from rich.text import Text

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.leaks import Leak, find_leaks
from esjax.corpus.sources import read
from esjax.corpus.text import words
from esjax.errors import InputError
from esjax.hub.fetch import resolve
from esjax.run.files import publish_jsonl
from esjax.safety.screen import Screen
from esjax.settings.files import read_text
from esjax.settings.schema import Config
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

LABELS = ("profile", "emotion", "problem", "situation")
EXAMPLES, MOST_NAMES = 10, 12


def inspect(source: str, config: Config, tokens: bool) -> dict[str, Any]:
    """Counts of what a source holds, what was left out and why, what screening finds, and ten dialogues; lengths are
    minimum, median, mean and maximum. With ``tokens``, lengths in tokens of the config's model, too. Raises InputError."""
    corpus = read(source, config.data.format, config.seed)
    dialogues = corpus.dialogues
    turns = [t for d in dialogues for t in d.turns]
    screened = Screen.load(config.screen).screened(dialogues)
    facts: dict[str, Any] = {
        "source": source,
        "rows": corpus.counts["rows"],
        "dialogues": len(dialogues),
        "turns": len(turns),
        "answers": sum(len(d.supporter_turns()) for d in dialogues),
        "left_out_or_mended": {k: n for k, n in sorted(corpus.counts.items()) if n and k != "rows"},
        "screening": dict(Counter(f"{f.action} {f.kind}" for f in screened.found)),
        "answers_lost_to_screening": sum(screened.answers.values()),
        "turns_a_dialogue": _spread(len(d.turns) for d in dialogues),
        **{
            f"words_a_{role}_turn": _spread(len(words(t.text)) for t in turns if t.role == role)
            for role in ("seeker", "supporter")
        },
        "strategies": _names(t.strategy for t in turns),
        **{f"{name}s": _names(getattr(d, name) for d in dialogues) for name in ("emotion", "problem")},
        "languages": _names(_language(d) for d in dialogues),
    }
    if tokens:
        facts |= _tokens(dialogues, config)
    return facts | {"examples": [_row(d) for d in dialogues[:EXAMPLES]]}


def _language(dialogue: Dialogue) -> str:
    """The likeliest language of all that is said, an ISO 639-1 code."""
    from py3langid.langid import classify

    return str(classify("\n".join(t.text for t in dialogue.turns))[0])


def _tokens(dialogues: Sequence[Dialogue], config: Config) -> dict[str, Any]:
    encoder = _encoder(config)
    chats = [encoder.chat(d) for d in dialogues]
    rows = [row for made in encoder.examples(chats) for row in made]
    history = dict(encoder.counts)
    return {
        "tokens_a_row": _spread(len(row.tokens) for row in rows),
        "tokens_a_context": _spread(len(p.ids) for p in encoder.prompts(chats, config.context_room)),
        "target_tokens": sum(int((row.weight != 0).sum()) for row in rows),
        "history": history,
    }


def _encoder(config: Config) -> Encoder:
    tokenizer = ChatTokenizer(resolve(config.model.source, config.model.sha256), config.model.chat_template)
    return Encoder(tokenizer, config.data.window, read_text(config.prompts.system))


def row(source: str, config: Config, number: int) -> dict[str, Any]:
    """A training row of phase 1, counted from 1: its decoded text in parts, targets or not. Raises InputError."""
    corpus, encoder = read(source, config.data.format, config.seed), _encoder(config)
    made = encoder.examples([encoder.chat(d) for d in corpus.dialogues])
    rows = [(d.id, r) for d, each in zip(corpus.dialogues, made, strict=True) for r in each]
    if not 1 <= number <= len(rows):
        raise InputError(f"--row {number}: {source} makes {len(rows)} rows; give 1 to {len(rows)}")
    name, r = rows[number - 1]
    target = [False, *(bool(w) for w in r.weight[:-1])]  # whether a token is predicted with a loss
    starts = [i for i in range(len(target)) if i == 0 or target[i] != target[i - 1]]
    hf = encoder.tokenizer.hf
    parts = [
        {"text": hf.decode(r.tokens[a:b].tolist(), clean_up_tokenization_spaces=False), "target": target[a]}
        for a, b in zip(starts, [*starts[1:], len(target)], strict=True)
    ]
    return {"id": name, "row": number, "tokens": len(target), "target_tokens": sum(target), "parts": parts}


def marked(made: Mapping[str, Any], colour: bool) -> Text:
    """A row's text, its targets in colour, or within ⟦ and ⟧."""
    out = Text()
    for part in made["parts"]:
        if part["target"]:
            out.append(part["text"] if colour else f"⟦{part['text']}⟧", "bold green" if colour else None)
        else:
            out.append(part["text"])
    return out


def export(source: str, config: Config, out: Path) -> int:
    """Write a source's dialogues as JSON Lines of messages with their labels; returns how many. Raises InputError."""
    if out.exists():
        raise InputError(f"--out {out} exists; remove it or give another name")
    dialogues = read(source, config.data.format, config.seed).dialogues
    publish_jsonl(out, [_row(d) for d in dialogues])
    return len(dialogues)


def check(sources: Sequence[str], config: Config) -> list[Leak]:
    """The leaks between two or three sources: train, valid and test. Raises InputError."""
    if not 2 <= len(sources) <= 3:
        raise InputError(f"esjax data check takes two or three sources (train, valid, test), not {len(sources)}")
    names = ("train", "valid", "test")
    return find_leaks({n: read(s, config.data.format).dialogues for n, s in zip(names, sources, strict=False)})


def table(facts: Mapping[str, Any]) -> Table:
    """What ``inspect`` found, for people."""
    out = Table(title=str(facts["source"]), title_justify="left", show_header=False)
    for key, value in facts.items():
        if key in ("source", "examples") or value == {}:
            continue
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        out.add_row(key.replace("_", " "), Text(shown))
    for example in facts["examples"]:
        said = "\n".join(f"{m['role']}: {m['content']}" for m in example["messages"][:4])
        out.add_row(Text(example["id"]), Text(said))
    return out


def _row(d: Dialogue) -> dict[str, Any]:
    messages: list[dict[str, Any]] = [dict(m) for m in d.messages(len(d.turns))]
    for message, turn in zip(messages[len(messages) - len(d.turns) :], d.turns, strict=True):
        if not turn.trained:
            message["weight"] = 0
    return {"id": d.id, "messages": messages} | {name: getattr(d, name) for name in LABELS if getattr(d, name)}


def _spread(numbers: Iterable[int]) -> dict[str, float]:
    found = list(numbers)
    if not found:
        return {}
    return {"min": min(found), "median": median(found), "mean": round(fmean(found), 1), "max": max(found)}


def _names(values: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(v for v in values if v).most_common(MOST_NAMES))
