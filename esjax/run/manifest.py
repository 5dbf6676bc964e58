"""The manifest of a run directory: what stages are done, from what, with which versions; and checks against it."""

from __future__ import annotations

import json
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from esjax.errors import InputError
from esjax.run.files import sha256


class _Stage(BaseModel):
    """What the manifest says of a stage; facts of its own beside it."""

    status: Literal["started", "done"]
    inputs: dict[str, str]
    seconds: float = 0.0
    settings: list[str] = []
    makes: list[str] = Field(["-"], min_length=1)
    outputs: dict[str, str] = {}

    @model_validator(mode="after")
    def _timed(self) -> Self:
        if self.status == "done" and "seconds" not in self.model_fields_set:
            raise ValueError("a stage that is done says how long it took")
        return self


class _Manifest(BaseModel):
    stages: dict[str, _Stage]
    base: dict[str, str] = {}
    revision: str | None = None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run directory; an empty one where there is none. Raises InputError when it is damaged."""
    file = path / "manifest.json"
    if not file.exists():
        return {"stages": {}}
    try:
        text = file.read_text(encoding="utf-8")
        _Manifest.model_validate_json(text)
        manifest: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: not a manifest; restore it or choose another --run-dir") from e
    return manifest


def check_base(path: Path, manifest: dict[str, Any], base: dict[str, str]) -> None:
    """Raise InputError unless a backbone's files have the hashes of the one that a run was begun with."""
    then = manifest.get("base", base)  # older runs did not say
    changed = [name for name in sorted({*then, *base}) if then.get(name) != base.get(name)]
    if changed:
        then_at = manifest.get("revision")
        named = f"name its commit (model.source=hf:ORG/NAME@{then_at})" if then_at else "restore the files"
        raise InputError(
            f"{path}: this run was made with another backbone; differing: {', '.join(changed)}; {named}, name a "
            "model.source with the same ones, or choose another --run-dir"
        )


def check_made(path: Path, name: str, entry: dict[str, Any]) -> None:
    """Raise InputError when something that a finished stage made is not what it was."""
    for place, digest in entry.get("outputs", {}).items():
        if (path / place).exists() and sha256(path / place) != digest:
            raise InputError(
                f"{path / place}: changed since stage {name} made it; restore it or choose another --run-dir"
            )


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {
        p: version(p) for p in ("esjax", "jax", "flax", "optax", "transformers")
    }


def peak_memory() -> float:
    """The most memory that this process has had so far on its machine, in GiB."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(most / (1 << 30 if sys.platform == "darwin" else 1 << 20), 2)
