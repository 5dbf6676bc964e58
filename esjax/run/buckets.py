"""Run directories in a bucket: each process works on a copy on its own disk, and the bucket holds what is done.

A URL such as gs://BUCKET/RUN names one; fsspec reads and writes it (gs:// needs gcsfs, esjax's gcs extra). Objects appear
whole or not at all, as renamed files do. Checkpoints do not pass through here: orbax writes them into the bucket itself.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from esjax.errors import InputError, TransientError
from esjax.runtime.processes import goodbyes, hosts

EVERY = 30.0  # seconds between two uploads of a file that grows
BEAT = 15.0  # seconds between two signs of life of whoever writes a bucket
SILENCE = 60.0  # seconds without one after which it is taken for dead
SCHEMES = ("gs://", "file://")  # what fsspec and orbax both write
LEFT = ("checkpoint", "checkpoint.damaged", "tensorboard", ".lease")  # what nobody needs a copy of


class Bucket:
    """A run directory behind a URL, and this process' copy of it."""

    def __init__(self, url: str) -> None:
        """Copy what is there. Raises InputError where the URL cannot be used, TransientError where it cannot be reached."""
        self.url = url.rstrip("/")
        self.local = (
            Path(tempfile.gettempdir()) / "esjax" / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{os.getpid()}"
        )
        with reaching(url):
            options = {"auto_mkdir": True} if url.startswith("file://") else {}
            self.files, self.root = fsspec.core.url_to_fs(self.url, **options)
            found = self.files.find(self.root)
        self.local.mkdir(parents=True, exist_ok=True)
        self.lost = False  # to another run, see Lease
        self._sent: dict[Path, float] = {}
        for name in found:
            path = self.local / Path(name).relative_to(self.root)
            if not set(LEFT) & set(path.relative_to(self.local).parts):
                self.pull(path)

    def push(self, path: Path) -> None:
        """Send a file or a folder; a file that is gone here goes there, too. Raises TransientError where the lease is lost."""
        if self.lost:
            raise TransientError(f"{self.url}: another run writes here now; nothing more was sent")
        where = self._there(path)
        if path.is_dir():
            for file in (p for p in path.rglob("*") if p.is_file()):
                self.push(file)
            return
        with reaching(self.url):
            if path.exists():
                self.files.put_file(str(path), where)
            elif self.files.exists(where):
                self.files.rm_file(where)

    def push_now_and_then(self, path: Path) -> None:
        """Send a file that grows, if it was not sent lately."""
        if time.monotonic() - self._sent.get(path, 0.0) > EVERY:
            self._sent[path] = time.monotonic()
            self.push(path)

    def pull(self, path: Path) -> None:
        """Fetch a file or a folder."""
        where = self._there(path)
        with reaching(self.url):
            for name in [where] if self.files.isfile(where) else self.files.find(where):
                file = self.local / Path(name).relative_to(self.root)
                file.parent.mkdir(parents=True, exist_ok=True)
                self.files.get_file(name, str(file))

    def _there(self, path: Path) -> str:
        return f"{self.root}/{path.relative_to(self.local).as_posix()}"


class Lease:
    """The right to write a bucket, while this process lives: an object in it that changes again and again.

    Clocks are not compared: whoever wants the lease watches whether the object still changes.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Of the bucket behind a copy. Raises TransientError while another process has it."""
        bucket = _of(path)
        assert bucket is not None
        self._bucket, self._where = bucket, f"{bucket.root}/.lease"
        before = self._read()
        if before is not None:
            say(
                f"{bucket.url}/.lease: a run was not ended here; waiting {SILENCE:.0f} s to see whether it is still under way"
            )
            end = time.monotonic() + SILENCE
            while time.monotonic() < end and self._read() == before:
                time.sleep(min(1.0, SILENCE / 4))
        self._token = secrets.token_hex(8)
        if self._read() == before:
            self._write(self._token)
            time.sleep(min(2.0, BEAT / 4))  # of two that come at once, the later stays
        if not self._mine():
            raise TransientError(f"{bucket.url}: in use by another process; wait for it or choose another --run-dir")
        self._ended = threading.Event()
        goodbyes.insert(0, self.close)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it back."""
        self._ended.set()
        self._thread.join(BEAT)  # else it may write once more, after the object is gone
        with contextlib.suppress(Exception):  # then the next run waits, no more
            if self._mine():
                self._bucket.files.rm_file(self._where)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT) and not self._bucket.lost:
            count += 1
            with contextlib.suppress(Exception):  # a network's hiccup; several signs fit into the silence
                if self._read() is not None and not self._mine():
                    self._bucket.lost = True
                else:
                    self._write(f"{self._token} {count}")

    def _mine(self) -> bool:
        return (self._read() or "").startswith(self._token)

    def _read(self) -> str | None:
        with reaching(self._bucket.url):
            try:
                return str(self._bucket.files.cat_file(self._where).decode())
            except FileNotFoundError:
                return None

    def _write(self, text: str) -> None:
        with reaching(self._bucket.url):
            self._bucket.files.pipe_file(self._where, text.encode())


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Raises InputError for what a driver says of an address or of rights, TransientError for everything else it says.

    Errors of the operating system stay what they are.
    """
    try:
        yield
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        reason = " ".join(str(e).split())[:200]
        for_good = isinstance(e, ImportError | ValueError | PermissionError | FileNotFoundError)
        if for_good or re.search(r"Credentials|Forbidden|Unauthorized|Anonymous|\b40[0134]\b", f"{type(e)} {e}"):
            raise InputError(f"{url}: cannot be read ({reason}); for gs:// install esjax's gcs extra and log in") from e
        raise TransientError(f"{url}: cannot be reached ({reason}); run the same command again, it continues") from e


_buckets: dict[str, Bucket] = {}


def local(place: str | Path) -> Path:
    """Where this process finds a run directory: a path itself, or its copy of what lies behind a URL. Raises InputError."""
    if "://" not in str(place):
        if "\\" in str(place):
            raise InputError(
                f"{place}: checkpoints cannot be read back where a name has a backslash; choose another name"
            )
        return Path(place)
    if not str(place).startswith(SCHEMES):
        raise InputError(
            f"{place}: not a place for runs; give a folder or an address that begins with {' or '.join(SCHEMES)}"
        )
    if set("*?[]") & set(str(place)):
        raise InputError(f"{place}: an address with one of * ? [ ] is a pattern to its driver; choose another name")
    if str(place) not in _buckets:
        _buckets[str(place)] = bucket = Bucket(str(place))
        atexit.register(shutil.rmtree, bucket.local, ignore_errors=True)
        goodbyes.append(lambda: shutil.rmtree(bucket.local, ignore_errors=True))
    return _buckets[str(place)].local


def _of(path: Path) -> Bucket | None:
    return next((b for b in _buckets.values() if path.is_relative_to(b.local)), None)


def in_bucket(path: Path) -> bool:
    """Whether a path is a copy of something in a bucket."""
    return _of(path) is not None


def publish(path: Path) -> None:
    """What the first process wrote is now for all to read; every process calls this."""
    bucket = _of(path)
    if bucket is not None and hosts.writer:
        bucket.push(path)
    hosts.wait(path.name)
    if bucket is not None and not hosts.writer:
        bucket.pull(path)


def keep(path: Path, now: bool = False) -> None:
    """Send a file that grows, now or if it was not sent lately; the first process calls this."""
    bucket = _of(path)
    if bucket is not None:
        bucket.push(path) if now else bucket.push_now_and_then(path)


def checkpoints(folder: Path) -> Any:
    """Where orbax finds a folder: in the bucket itself, or on the disk."""
    bucket = _of(folder)
    if bucket is None:
        return folder.absolute()
    from etils import epath

    url = f"{bucket.url}/{folder.relative_to(bucket.local).as_posix()}"
    return epath.Path(url.removeprefix("file://"))
