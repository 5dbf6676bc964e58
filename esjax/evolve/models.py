"""Which model a command names, and the settings that come with it: a run's own, under what the command was told."""

from __future__ import annotations

import re
from pathlib import Path

from esjax.errors import InputError
from esjax.run import buckets
from esjax.settings.files import Given, load
from esjax.settings.schema import Config


def adapter_folder(run: Path, t: int) -> Path:
    """Where M_t's adapter lies in a run directory."""
    return run / "sft" / "adapter" if t == 0 else run / f"round{t}" / "dpo" / "adapter"


def run_model(spec: str) -> tuple[Path, int] | None:
    """The run directory and t of ``RUN_DIR:mT``; None for a bare backbone. Raises InputError where there is no such model."""
    match = re.fullmatch(r"(.+):m(\d+)", spec)
    if match is None:
        return None
    run, t = buckets.copied(match[1]), int(match[2])
    if not (run / "config.yaml").exists():
        raise InputError(f"{spec}: {run} is not a run directory (no config.yaml in it)")
    if not adapter_folder(run, t).exists():
        have = [f"m{i}" for i in range(100) if adapter_folder(run, i).exists()]
        raise InputError(f"{spec}: M_{t} is not there; this run has {', '.join(have) or 'no finished model'}")
    return run, t


def settings_of(spec: str, told: Given, together: bool = False) -> Config | None:
    """A run's settings with what the command was told over them; None for a bare backbone, which has none.

    ``together`` is for what trains on: settings must then fit one another, too. Raises InputError for what cannot be
    changed in an adapter that is made.
    """
    named = run_model(spec)
    if named is None:
        return None
    file = str(named[0] / "config.yaml")
    own, mixed = load(file, [], together=False), load(file, [], told.settings, together)
    for key, before in own.lora:
        now = getattr(mixed.lora, key)
        if sorted(now) != sorted(before) if key == "targets" else now != before:
            raise InputError(f"lora.{key}={now}: {spec} was made with lora.{key}={before}, which stays; leave it out")
    return mixed
