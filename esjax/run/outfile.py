"""The place that ``--out`` names: checked before anything is computed, and held by one command at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Literal

from esjax.errors import InputError, TransientError
from esjax.runtime.context import current


@contextmanager
def held(out: Path, kind: Literal["file", "folder"] = "file") -> Iterator[None]:
    """Within, ``out`` is this command's: a lock on a file beside it says so (a file's .part), which goes if it ends empty.

    Raises InputError where ``out`` is there or cannot be written, TransientError while another command writes it.
    """
    taken: BufferedRandom | None = None
    try:
        with current().processes.in_step():
            if current().processes.writer:
                taken = _take(out, kind)
        yield
    finally:
        if taken is not None:
            place = Path(taken.name)
            if place.exists() and not place.stat().st_size:
                place.unlink()
            taken.close()


def _take(out: Path, kind: str) -> BufferedRandom:
    exists = InputError(f"{out} exists; give a new {kind} as --out")
    if out.is_dir() or not out.name:
        raise exists
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as e:
        raise InputError(f"--out {out}: {out.parent} is not a folder") from e
    place = out.with_name(f"{out.name}.part" if kind == "file" else f".{out.name}.lock")
    if out.exists() and not place.exists():
        raise exists
    while True:
        file = open(place, "a+b")  # noqa: SIM115  closed by held, or by the end of the process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.close()
            raise TransientError(f"{out}: another command is writing it; wait for it or give another --out") from e
        if place.exists() and os.path.samestat(os.fstat(file.fileno()), place.stat()):
            break
        file.close()  # the command that held it has ended just now, and deleted it
    if out.exists() and not place.stat().st_size:
        place.unlink()
        file.close()
        raise exists
    return file
