"""Which model is planned for: its shape is enough, so no weights are fetched."""

from __future__ import annotations

import json
from pathlib import Path

from esjax.errors import InputError
from esjax.hub.fetch import resolve, unreachable
from esjax.model.families import Architecture, architecture, read_architecture
from esjax.settings.files import bundled, read_text
from esjax.settings.schema import Config


def shape_of(given: str | None, config: Config) -> Architecture:
    """The shape in a config.json, one that comes with esjax by name, or that of the config's own model. Raises InputError."""
    source = config.model.source
    if given is None and not source.startswith("hf:"):
        return read_architecture(resolve(source, config.model.sha256))
    if given is None:
        return _read(_fetched(source))
    if Path(given).suffix == ".json":
        return _read(given)
    known = sorted(p.stem for p in bundled("bundled:configs/shapes").glob("*.json"))
    if given not in known:
        raise InputError(f"--shape {given}: give a config.json, or one of {', '.join(known)}")
    return _read(f"bundled:configs/shapes/{given}.json")


def _read(path: str) -> Architecture:
    try:
        read = json.loads(read_text(path))
    except ValueError as e:
        raise InputError(f"{path}: not JSON ({e})") from e
    if not isinstance(read, dict):
        raise InputError(f"{path}: not a JSON object; give a model's config.json")
    return architecture(read, path)


def _fetched(source: str) -> str:
    """The path of a hub model's config.json."""
    from huggingface_hub import hf_hub_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    try:
        return hf_hub_download(name, "config.json", revision=revision or None)
    except Exception as e:
        raise unreachable(f"{source}: its config.json could not be fetched", e, "give --shape NAME") from e
