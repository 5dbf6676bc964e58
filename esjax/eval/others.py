"""Replies of any systems, compared with each other on one source of reference dialogues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.eval.replies import Reply, common, read_predictions
from esjax.eval.results import Summary, Value, summarise, write_parquet
from esjax.run.files import replacing, write_text
from esjax.run.jsonl import json_text
from esjax.run.progress import say
from esjax.settings.schema import Config


def named(files: Sequence[str]) -> dict[str, Path]:
    """Files given as NAME=FILE, or as FILE, which then is the name. Raises InputError for two of a name."""
    out: dict[str, Path] = {}
    for text in files:
        name, equals, place = text.partition("=")
        name, place = (name, place) if equals else (Path(text).stem, text)
        if name in out:
            raise InputError(f"--predictions: two systems are called {name}; give NAME=FILE")
        out[name] = Path(place)
    return out


def read_systems(files: Mapping[str, Path], source: str, config: Config) -> dict[str, list[Reply]]:
    """Each system's replies to the contexts that all of them answered. Raises InputError naming file and line."""
    dialogues = read(source, config.data.format, config.seed).dialogues
    systems = {name: read_predictions(file, dialogues) for name, file in files.items()}
    shared = common(systems)
    count = len(next(iter(shared.values())))
    for name, replies in systems.items():
        if len(replies) != count:
            say(
                f"{name}: {len(replies)} replies, of which {count} are compared: those whose contexts all systems answered"
            )
    return shared


def write(out: Path, values: Sequence[Value], names: Sequence[str], config: Config) -> list[dict[str, Any]]:
    """Compare all systems with the first, and write results.parquet and results.json to a new folder. Returns the records."""
    made: Summary = summarise(values, [(name, names[0]) for name in names[1:]], config.eval.resamples, config.seed)
    with replacing(out) as folder:
        folder.mkdir()
        write_parquet(folder / "results.parquet", values)
        write_text(folder / "results.json", json_text(made.rows(), indent=1) + "\n")
    return made.rows()
