"""Where corpora come from: files of any known format, the Hugging Face hub, TensorFlow Datasets, and mixtures of them."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.corpus import hubs
from esjax.corpus.dialogue import Dialogue, Message, Turn, normalise
from esjax.corpus.readers import FORMATS
from esjax.corpus.readers.base import Format, lost_key, text_of
from esjax.corpus.text import has_halves, is_empty
from esjax.errors import InputError
from esjax.run.directory import bundled_hash, setting_hash
from esjax.run.jsonl import Line, require
from esjax.settings.files import BOM, bundled, similar
from esjax.settings.schema import Config, Sources

SPLITS = ("train", "valid", "test")


class Corpus(NamedTuple):
    """What a source holds."""

    origin: str  # for messages
    dialogues: list[Dialogue]  # those with at least one supporter turn that answers a seeker, in the source's order
    counts: Counter[str]  # "rows" read, and what was left out or mended, by reason
    dropped: list[tuple[str, str]]  # the reason and the place of what was left out
    formats: tuple[str, ...]  # of its rows
    times: list[int] = []  # noqa: RUF012  never changed: how often a mixture's phase 1 takes each dialogue; empty: once


def read(source: Sources, format: str = "sample", seed: int = 0) -> Corpus:
    """Read a corpus.

    Args:
        source: FORMAT:PATH, with wildcards; a path of a file in ``format``; hf:... and tfds:..., see ``hubs``;
            esconv:PATH#train (or valid, test), of the official split of the raw ESConv.json; or several with weights, a
            mixture: each dialogue is taken as often as its source's weight says, a fraction by the ``seed``.

    Texts are treated alike, whatever the format: byte order marks are taken out, turns in which nothing can be seen are left
    out, and a dialogue ends before a turn that holds half a character (a lone surrogate), for that is no text.

    Raises:
        InputError: naming file and line for a broken row, or the source when nothing usable is in it.
        TransientError: the network.
    """
    if isinstance(source, str):
        return _one(source, format)
    parts = [_one(part.source, format) for part in source]
    dialogues, times, counts = list[Dialogue](), list[int](), Counter[str]()
    seen = Counter(d.id for part in parts for d in part.dialogues)
    rng = np.random.default_rng((seed, 2))
    for number, (part, given) in enumerate(zip(parts, source, strict=True), start=1):
        drawn = rng.random(len(part.dialogues))
        for dialogue, chance in zip(part.dialogues, drawn, strict=True):
            often = int(given.weight) + (chance < given.weight % 1)
            if often:
                name = dialogue.id if seen[dialogue.id] == 1 else f"{number}-{dialogue.id}"
                dialogues.append(replace(dialogue, id=name))
                times.append(int(often))
        counts += part.counts
    origin = ", ".join(part.origin for part in parts)
    if not dialogues:
        raise InputError(f"{origin}: no dialogue is left by the weights; raise them")
    dropped, formats = [x for part in parts for x in part.dropped], dict.fromkeys(f for p in parts for f in p.formats)
    return Corpus(origin, dialogues, counts, dropped, tuple(formats), times)


def fingerprint(source: Sources, format: str = "sample") -> str:
    """A hash of what a source holds; of a single file, that of its bytes. Raises InputError."""
    if not isinstance(source, str):
        parts = [[fingerprint(part.source, format), part.weight] for part in source]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if hubs.is_hub(source):
        return hashlib.sha256(json.dumps(hubs.rows(source), sort_keys=True).encode()).hexdigest()
    _, files, split = _files(source, format)
    hashes = [bundled_hash(str(file)) for file in files]
    return (
        hashes[0]
        if len(hashes) == 1 and not split
        else hashlib.sha256(json.dumps([hashes, split]).encode()).hexdigest()
    )


def content(config: Config, key: str) -> str:
    """A hash of what a setting names, a corpus or a file. Raises InputError."""
    section, _, name = key.partition(".")
    if section != "data" and key != "eval.replay":
        return setting_hash(config, key)
    source = getattr(getattr(config, section), name)
    return fingerprint(source, "messages" if name == "replay" else config.data.format)


def _one(source: str, format: str) -> Corpus:
    if hubs.is_hub(source):
        rows = hubs.rows(source)
        if not rows:
            raise InputError(f"{source}: the split is empty; name another one")
        fitting = [f for f in FORMATS.values() if f.fits(rows[0])]
        if not fitting:
            raise InputError(
                f"{source}: the columns {', '.join(map(str, rows[0]))} are those of no known format ({', '.join(FORMATS)}); save "
                "its rows as one of these, for example as JSON Lines of messages"
            )
        return _dialogues(source, fitting[0], [fitting[0].unpack(rows)])
    known, files, split = _files(source, format)
    rows_of = [known.unpack(_fitting(known, known.rows(file), file)) for file in files]
    return _dialogues(source, known, [_official(rows, split) for rows in rows_of] if split else rows_of)


def _files(source: str, format: str) -> tuple[Format, list[Path], str]:
    """A source's format, its files and its split. Raises InputError."""
    name, colon, rest = source.partition(":")
    if colon and name in FORMATS:
        format, path = name, rest
    elif colon and name != "bundled" and not Path(source).exists() and not {"/", "\\", "."} & set(name):
        known = [*FORMATS, "hf", "hf-stream", "tfds", "bundled"]
        close = similar(name, known)
        hint = f": did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known)}"
        raise InputError(f"{source}: {name!r} is no format of corpora{hint}")
    else:
        path = source
    path, _, split = path.partition("#") if format in ("esconv", "pesconv") else (path, "", "")
    if split and split not in SPLITS:
        raise InputError(f"{source}: no such split; allowed: {', '.join(f'#{name}' for name in SPLITS)}")
    given = bundled(path).expanduser()
    if given.exists() or not any(c in str(given) for c in "*?["):
        return FORMATS[format], [given], split
    files = [Path(found) for found in sorted(glob(str(given), recursive=True)) if Path(found).is_file()]
    if not files:
        raise InputError(f"{source}: no file's name matches; give a path, or wildcards that match")
    return FORMATS[format], files, split


def _fitting(known: Format, rows: list[Line], file: Path) -> list[Line]:
    """The rows, all of the format. Raises InputError that names another format of which they look."""
    for row in rows:
        if not known.fits(row) and (other := next((f.name for f in FORMATS.values() if f.fits(row)), None)):
            raise InputError(f"{row.where}: this looks like {other}, not {known.name}; give {other}:{file}")
    return rows


def _official(rows: list[Line], split: str) -> list[Line]:
    """A part of ESConv's official split: shuffled by Python's ``random`` with the seed 13, then 70, 15 and 15 percent of the
    dialogues (process.py of github.com/thu-coai/Emotional-Support-Conversation)."""
    shuffled = list(rows)
    random.Random(13).shuffle(shuffled)
    first, second = int(0.7 * len(rows)), int(0.85 * len(rows))
    return {"train": shuffled[:first], "valid": shuffled[first:second], "test": shuffled[second:]}[split]


def _dialogues(origin: str, known: Format, files: Sequence[list[Line]]) -> Corpus:
    """The dialogues of rows. Raises InputError naming a broken row, or the origin when nothing is usable."""
    dialogues, counts, dropped = list[Dialogue](), Counter[str](), list[tuple[str, str]]()
    first: dict[str, str] = {}
    for number, rows in enumerate(files, start=1):
        for row in rows:
            counts["rows"] += 1
            try:
                require(row, known.fields)
                dialogue = _finished(known.read(row, counts), known.collapse, counts)
                if len(files) > 1:
                    dialogue = replace(dialogue, id=f"{number}-{dialogue.id}")
                if (
                    first.setdefault(dialogue.id, row.where) != row.where
                ):  # they would be drawn from with the same noise
                    place = first[dialogue.id].removeprefix(f"{row.where.rpartition(', ')[0]}, ")
                    raise ValueError(f"the id {dialogue.id!r} is that of {place} too")
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                what = f"the field {e} is missing" if isinstance(e, KeyError) else str(e)
                raise InputError(f"{row.where}: {what}; expected a row of format {known.name}") from e
            if dialogue.supporter_turns():
                dialogues.append(dialogue)
            else:
                counts["no_answer"] += 1
                dropped.append(("no_answer", row.where))
    if not dialogues:
        raise InputError(
            f"{origin}: no dialogue with a supporter's answer in it ({counts['rows']} rows read); roles must alternate, and the "
            "seeker (user) must come first"
        )
    return Corpus(origin, dialogues, counts, dropped, (known.name,))


def _finished(dialogue: Dialogue, collapse: bool, counts: Counter[str]) -> Dialogue:
    """A dialogue whose texts obey the one rule for texts, see ``read``."""
    turns: list[Turn] = []
    for turn in dialogue.turns:
        text = _without_marks(turn.text, counts)
        if has_halves(text):
            counts["lone_surrogates"] += 1
            break
        counts["unseen_turns"] += is_empty(text)
        turns.append(replace(turn, text=text))
    names = ("id", "profile", "emotion", "problem", "situation", "system")
    labels = {name: getattr(dialogue, name).replace(BOM, "").strip() for name in names}
    whole = {
        name: text if not has_halves(text) else text.encode(errors="ignore").decode() for name, text in labels.items()
    }
    return replace(dialogue, turns=normalise(turns, collapse), **whole)


def _without_marks(text: str, counts: Counter[str]) -> str:
    if BOM in text:
        counts["byte_order_marks"] += 1
    return text.replace(BOM, "")


def check_messages(messages: Any, where: str, last: str) -> list[Message]:
    """Check a chat: a list of {"role", "content"} whose last role is ``last``. Raises InputError naming ``where``.

    Content may be text parts. Other keys are allowed where they say nothing: null or empty, or a weight of 1.
    """
    roles = ("system", "user", "assistant")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: expected a non-empty list of messages, objects with role and content")
    out: list[Message] = []
    for i, m in enumerate(messages):
        try:
            if not isinstance(m, dict) or m.get("role") not in roles:
                raise ValueError
            out.append({"role": m["role"], "content": text_of(m.get("content")).replace(BOM, "")})
        except (ValueError, KeyError) as e:
            raise InputError(
                f"{where}: message {i} must have a role among {', '.join(roles)} and a text as content"
            ) from e
        if lost := lost_key(m, ("role", "content")):
            raise InputError(f"{where}: message {i} {lost}")
        if m["role"] == "assistant" and is_empty(out[-1]["content"]):
            raise InputError(f"{where}: message {i} is an answer in which nothing can be seen; take the row out")
    if messages[-1]["role"] != last:
        raise InputError(f"{where}: the last message must be the {last}'s, not the {messages[-1]['role']}'s")
    return out
