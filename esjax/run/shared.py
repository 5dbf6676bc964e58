"""Finished stages that several runs have in common, kept beside them: what one made, another takes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.run.files import check_writable, replacing, sha256, write_text
from esjax.run.jsonl import json_text
from esjax.runtime.context import current

ENTRY = "entry.json"
BESIDE = ("metrics.jsonl",)  # what lies beside a trained model and belongs to it
AT_ROOT = ("screened.jsonl",)  # what phase 1 leaves in the run's own folder


class Shared:
    """A folder with finished stages, each under a hash of all that it was made from.

    Files are linked where the file system can, as they are never changed in place, and else copied.
    """

    def __init__(self, folder: str | Path) -> None:
        if "://" in str(folder):
            raise InputError(f"--shared {folder}: give a folder that all hosts share")
        self.folder = Path(folder).expanduser()
        check_writable(self.folder / ENTRY, "--shared")

    def key(self, name: str, inputs: Mapping[str, str], settings: Mapping[str, Any], base: Mapping[str, str]) -> str:
        """What identifies a stage: its name, its inputs' hashes, the settings that define its result, the backbone's hashes."""
        made_from = json.dumps([name, dict(inputs), dict(settings), dict(base)], sort_keys=True)
        return hashlib.sha256(made_from.encode()).hexdigest()[:24]

    def take(self, key: str, run: Path) -> dict[str, Any] | None:
        """Put a kept stage's files into a run; gives what its manifest says of it, or None where no run made it yet.

        Raises InputError where the files are not what was kept.
        """
        kept = self.folder / key
        found = current().processes.share(int((kept / ENTRY).is_file()))
        if not found:
            return None
        if current().processes.writer:
            for file in sorted((kept / "files").rglob("*")):
                place = run / file.relative_to(kept / "files")
                if file.is_file() and not place.exists():
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _link(file, place)
        current().processes.wait("shared stage taken")
        entry: dict[str, Any] = json.loads((kept / ENTRY).read_text(encoding="utf-8"))
        for place, digest in entry["outputs"].items():
            if sha256(run / place) != digest:
                raise InputError(
                    f"{kept}: not what was kept there ({place} differs); delete this folder to have it made again"
                )
        return entry

    def keep(self, key: str, run: Path, outputs: Sequence[Path], entry: Mapping[str, Any]) -> None:
        """Keep a stage that a run has finished; what another run kept meanwhile stays."""
        kept = self.folder / key
        if not current().processes.writer or (kept / ENTRY).is_file():
            return
        beside = [output.with_name(name) for output in outputs for name in BESIDE]
        places = {*outputs, *(p for p in (*beside, *(run / name for name in AT_ROOT)) if p.exists())}
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(kept / "files") as temporary:
            for place in sorted(places):
                files = [place] if place.is_file() else [f for f in place.rglob("*") if f.is_file()]
                for file in files:
                    target = temporary / file.relative_to(run)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link(file, target)
        write_text(kept / ENTRY, json_text(entry, indent=1) + "\n")


def _link(file: Path, place: Path) -> None:
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        with replacing(place) as temporary:
            shutil.copyfile(file, temporary)
