"""The same experiment with several seeds: is what one run shows a matter of its seed?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.eval.compare import compared
from esjax.eval.results import OVER, Value, read_parquet, summarise_seeds
from esjax.run import buckets
from esjax.run.files import write_text
from esjax.run.jsonl import json_text
from esjax.settings.files import load
from esjax.settings.identity import differing
from esjax.settings.schema import Config

FEWEST = 3  # two seeds' own variance is hardly known


def summarised(folders: Sequence[str], out: Path | None) -> list[dict[str, Any]]:
    """Means and differences over the seeds of evaluated runs (or of folders of `esjax eval --out`), as records; see
    ``summarise_seeds``. ``out``: a JSON file for them. Raises InputError where runs differ in more than their seed."""
    if len(folders) < FEWEST:
        raise InputError(f"--seeds: {len(folders)} runs say little of what seeds do; give {FEWEST} or more")
    runs = [_read(folder) for folder in folders]
    values = [each for _, each in runs]
    seeds: dict[int, str] = {}
    for folder, (config, _) in zip(folders, runs, strict=True):
        if other := [key for key in differing(runs[0][0], config) if key != "seed"]:
            raise InputError(f"{folder} differs from {folders[0]} in {', '.join(other)}: only seeds may differ")
        if config.seed in seeds:
            raise InputError(f"{folder} and {seeds[config.seed]} have the same seed, {config.seed}; give each once")
        seeds[config.seed] = folder
    names = [
        n for n in dict.fromkeys(v.model for v in values[0]) if all(any(v.model == n for v in each) for each in values)
    ]
    records = summarise_seeds(values, compared([n for n in names if OVER not in n])).rows()
    if out is not None:
        write_text(out, json_text(records, indent=1) + "\n")
    return records


def _read(folder: str) -> tuple[Config, list[Value]]:
    place = buckets.copied(folder)
    table = place / "eval" / "results.parquet"
    if not (place / "config.yaml").exists() or not table.exists():
        raise InputError(
            f"{folder}: no evaluated run (no config.yaml and eval/results.parquet in it); run `esjax eval` on it"
        )
    return load(str(place / "config.yaml"), together=False), read_parquet(table)
