"""What was computed once from the same things, kept on this machine: its processes wait for the first that computes it."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from esjax.run.files import replacing, write_text


def remembered(folder: Path | None, hangs_on: Iterable[Any], make: Callable[[], Any]) -> Any:
    """What ``make`` gives, as JSON keeps it; kept in a folder, under a hash of all that it hangs on (JSON values)."""
    return json.loads(
        json.dumps(make())
        if folder is None
        else held(folder, hangs_on, lambda place: write_text(place, json.dumps(make()))).read_text(encoding="utf-8")
    )


def held(folder: Path, hangs_on: Iterable[Any], write: Callable[[Path], object]) -> Path:
    """A file or folder of that name, which ``write`` makes where it is not there yet."""
    digest = hashlib.sha256()
    for value in hangs_on:
        digest.update(json.dumps(value).encode())
    place = folder / digest.hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            with replacing(place) as temporary:
                write(temporary)
    return place
