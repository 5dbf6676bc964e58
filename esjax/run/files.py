"""Files that appear whole or not at all, and what is in them by hash."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esjax.errors import InputError, is_full_disk
from esjax.run import buckets
from esjax.run.jsonl import json_line
from esjax.runtime.context import current


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it into place on success, delete it on failure.

    Works for a file or a folder that the body creates.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    discard(temporary)
    try:
        yield temporary
        _sync(temporary)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        discard(temporary)
        raise


def check_writable(path: Path, option: str) -> None:
    """Raise InputError, before any work, where a file or folder cannot be made at ``path``, which an option names."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        if is_full_disk(e):
            raise
        raise InputError(f"{path}: cannot be written ({e.strerror}); give another {option}") from e


def check_new(path: Path, kind: str) -> None:
    """Raise InputError unless a new ``kind``, a file or a folder, can be made at ``path``, which --out names."""
    if path.exists():
        raise InputError(f"{path} exists; give a new {kind} as --out")
    check_writable(path, "--out")


def discard(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with open(file, "rb") as f:
            os.fsync(f.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a whole file, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines, atomically."""
    write_text(path, "".join(map(json_line, rows)))


def publish_text(path: Path, text: str) -> None:
    """Write a whole file of the run: the first process does, and all go on when it is there."""
    if current().processes.writer:
        write_text(path, text)
    buckets.publish(path)


def publish_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The same for JSON Lines."""
    publish_text(path, "".join(map(json_line, rows)))


def sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as f:
            while block := f.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
