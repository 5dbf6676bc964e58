"""JSON Lines files whose rows are kept one by one as they are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from esjax.errors import InputError
from esjax.run import buckets
from esjax.run.files import write_jsonl
from esjax.run.jsonl import json_text, read_jsonl
from esjax.run.progress import progress, say
from esjax.runtime.context import current


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
            if current().processes.writer:
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
        current().processes.wait(f"{self.path.name} read")
        if current().processes.writer:
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
