"""What a run writes: files that appear whole or not at all, journals, metrics and progress.

Everything under RUN except ``manifest.json`` and ``tensorboard/`` is a function of the config and the inputs alone, so a
killed and resumed run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from tensorboardX import SummaryWriter

from esjax.errors import InputError, is_full_disk
from esjax.run import buckets
from esjax.run.jsonl import json_line, json_text, read_jsonl
from esjax.runtime.processes import hosts

T = TypeVar("T")
console = Console(stderr=True)


def say(message: str) -> None:
    """One line for the person who watches, from the first process; on stderr, so that stdout holds results only."""
    if hosts.writer:
        console.print(message, highlight=False, markup=False, soft_wrap=True)


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
    if hosts.writer:
        write_text(path, text)
    buckets.publish(path)


def publish_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The same for JSON Lines."""
    publish_text(path, "".join(map(json_line, rows)))


class Journal:
    """A JSON Lines file whose rows are made in any order, so that a kill loses none that was made. A context manager.

    Lines ``[index, row]`` gather in ``path.part``, each written out at once; whole lines found there from a killed run are
    kept. ``finish`` gives the file its name when all rows are there, in the order of their indices. All processes of a run
    add the same rows; the first writes them.

    A file outside a run directory says itself what it was made from: ``of``, a mapping from option or setting to value or
    hash, is the first line of ``path.part``, and rows of another one are refused by name.
    """

    def __init__(self, path: Path, total: int, of: dict[str, Any] | None = None) -> None:
        self.path, self.total, self.of = path, total, of
        self._part = path.with_name(path.name + ".part")
        self._file: BinaryIO | None = None
        self.rows: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Journal:
        if self.path.exists():
            if self.of is not None and self._differing(self._part_lines()[0]):
                raise InputError(f"{self.path} exists; give a new file as --out")
            self.rows = dict(enumerate(read_jsonl(self.path)))
            if len(self.rows) != self.total:
                raise InputError(
                    f"{self.path}: {len(self.rows)} rows instead of {self.total}; delete it to have it made again"
                )
            if hosts.writer:
                self._part.unlink(missing_ok=True)  # of a run that was killed between the name and the end
            return self
        self.path.parent.mkdir(parents=True, exist_ok=True)
        of, rows, size = self._part_lines()
        differing = self._differing(of) if rows else []
        if differing:
            raise InputError(
                f"{self._part}: {len(rows)} rows of another command, which differs in {', '.join(differing)}; give the same as "
                "then to go on with it, or delete it"
            )
        self.rows = rows
        hosts.wait(f"{self.path.name} read")
        if hosts.writer:
            self._file = open(self._part, "ab")  # closed in __exit__
            self._file.truncate(size if rows else 0)
            if not rows and self.of is not None:
                self._write({"of": self.of})
        if rows and self.of is not None:
            say(f"{self.path}: {len(rows)} of {self.total} rows were finished before")
        return self

    def _part_lines(self) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]], int]:
        """What a killed command left: what it made rows of, its rows, and the bytes of its whole lines."""
        lines = self._part.read_bytes().splitlines(keepends=True) if self._part.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill may have torn the last one
        try:
            if lines and not lines[0].startswith((b'{"of"', b"[")[: 1 if self.of is not None else 2]):
                raise ValueError("not a journal")  # but somebody's file
            read = list(map(json.loads, whole))
            of = read.pop(0)["of"] if read and isinstance(read[0], dict) else None
            return of, dict(read), sum(map(len, whole))
        except (ValueError, TypeError, LookupError) as e:
            raise InputError(f"{self._part}: damaged; delete it to have its rows made again") from e

    def _differing(self, of: dict[str, Any] | None) -> list[str]:
        """The options and settings in which what was found is not of this command."""
        mine, found = self.of or {}, of or {}
        return [key for key in mine | found if mine.get(key) != found.get(key)]

    def __exit__(self, *_: object) -> None:
        if self._file is not None and not self._file.closed:
            self._file.close()
            buckets.keep(self._part, now=True)

    @property
    def missing(self) -> list[int]:
        """Indices of the rows that are still to be made."""
        return [i for i in range(self.total) if i not in self.rows]

    def add(self, index: int, row: dict[str, Any]) -> None:
        """Keep a row. Each index is given once."""
        if index in self.rows or not 0 <= index < self.total:
            raise AssertionError(f"{self.path}: row {index} of {self.total} is not wanted")
        self.rows[index] = row
        if self._file is not None:
            self._write([index, row])
            buckets.keep(self._part)

    def _write(self, line: Any) -> None:
        assert self._file is not None
        self._file.write((json_text(line, ensure_ascii=False) + "\n").encode())
        self._file.flush()

    def finish(self) -> list[dict[str, Any]]:
        """Write the file, and return its rows."""
        if self.missing:
            raise AssertionError(f"{self.path}: row {self.missing[0]} was not made")
        rows = [self.rows[i] for i in range(self.total)]
        if self._file is not None:
            write_jsonl(self.path, rows)
            self._file.close()
            self._part.unlink()
        buckets.publish(self.path)
        if self._file is not None:
            buckets.keep(self._part, now=True)  # it is gone
        return rows


def gather(
    path: Path,
    total: int,
    label: str,
    work: Callable[[list[int], Callable[..., None]], None],
    of: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Fill a JSON Lines file: ``work(missing, add)`` makes the missing rows and calls ``add(index, row, tokens=0)``.

    ``of``: see Journal.
    """
    with Journal(path, total, of) as journal:
        if journal.missing:
            with progress(label, total, done=len(journal.rows)) as advance:

                def add(index: int, row: dict[str, Any], tokens: int = 0) -> None:
                    journal.add(index, row)
                    advance(1, tokens)

                work(journal.missing, add)
        return journal.finish()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens = task.fields["tokens"]
        more = f", {tokens / task.elapsed:.0f} tokens/s" if tokens and task.elapsed else ""
        return Text((f"{task.speed:.2f}/s" if task.speed else "-/s") + more)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with count, rate and time left, on stderr or in a notebook, else lines; yields ``advance(n, tokens=0)``.

    Where tokens are told, their rate is shown as well.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    # In a notebook rich draws a bar with ipywidgets, where they are installed.
    live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    start = time.monotonic()
    count = drawn = 0
    last = start

    def rates(seconds: float) -> str:
        per_second = f"{count / max(seconds, 1e-9):.2f}/s"
        return per_second + (f", {drawn / max(seconds, 1e-9):.0f} tokens/s" if drawn else "")

    def advance(n: int, tokens: int = 0) -> None:
        nonlocal count, drawn, last
        count += n
        drawn += tokens
        bar.update(task, advance=n, tokens=drawn)
        now = time.monotonic()
        # A log file gets a line every 15 s instead of a bar.
        if hosts.writer and not live and now - last > 15 and count:
            left = (total - done - count) * (now - start) / count
            say(f"  {label}: {done + count}/{total}, {rates(now - start)}, {left:.0f} s left")
            last = now

    with Progress(*columns, console=console, transient=True, disable=not (hosts.writer and live)) as bar:
        task = bar.add_task(label, total=total, completed=done, tokens=0)
        yield advance
    seconds = time.monotonic() - start
    if count:
        say(f"  {label}: {count} in {seconds:.1f} s ({rates(seconds)})")


class Metrics:
    """One phase's ``metrics.jsonl`` (a function of the run alone: no clock in it) and its TensorBoard scalars.

    On resume, ``rewind(step)`` drops what was logged after the restored checkpoint.
    """

    def __init__(self, path: Path, tensorboard: Path) -> None:
        self.path, self.tensorboard = path, tensorboard
        self.board = SummaryWriter(str(tensorboard)) if hosts.writer else None

    def rewind(self, step: int) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        rows = []
        for line in lines:  # a kill or a power cut may have left anything at the end
            with suppress(ValueError, TypeError, LookupError):
                row = json.loads(line)
                if line.endswith(b"\n") and row["step"] <= step:
                    rows.append(row)
        publish_jsonl(self.path, rows)

    def log(self, step: int, **values: float) -> None:
        if self.board is None:
            return
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json_line({"step": step, **values}))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def keep(self) -> None:
        """What was logged so far outlives this machine, as a checkpoint that follows will."""
        if self.board is not None:
            self.board.flush()
            self._send()

    def _send(self) -> None:
        buckets.keep(self.path, now=True)
        buckets.keep(self.tensorboard, now=True)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()
            self._send()


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
