"""Run directories in Google Cloud Storage: each process works on a copy on its own disk, and the bucket holds what is done.

gs://BUCKET/RUN names one (with esjax's gcs extra). Objects appear whole or not at all, as renamed files do. Checkpoints do
not pass through here: orbax writes them into the bucket itself.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from esjax.errors import InputError, TransientError
from esjax.run.progress import say
from esjax.runtime.context import current

UPLOAD_EVERY = 30.0  # seconds between two uploads of a file that grows
HEARTBEAT = 15.0  # seconds between two signs of life of whoever holds a bucket's lock
DEAD_AFTER = 60.0  # seconds without one after which its holder is taken for dead
NOT_COPIED = {"checkpoint", "checkpoint.damaged", "tensorboard", ".lock"}


class Bucket:
    """A run directory behind a gs:// address, and this process' copy of it."""

    def __init__(self, url: str) -> None:
        """Copies nothing yet. Raises InputError where the address cannot be used, TransientError where nothing answers."""
        self.url = url.rstrip("/")
        with reaching(url):
            self.files, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self._folder = tempfile.TemporaryDirectory(prefix="esjax-")  # deleted at the interpreter's end
        current().at_exit.append(self._folder.cleanup)
        self.local = Path(self._folder.name)
        self.copied = False
        self.lost = False  # to another run, see Lock
        self._sent: dict[Path, float] = {}

    def push(self, path: Path, every: float = 0.0) -> None:
        """Send a file or a folder, unless it was sent less than ``every`` seconds ago; a file that is gone here goes there, too.

        Raises TransientError where the lock is lost.
        """
        if self.lost:
            raise TransientError(f"{self.url}: another run writes here now; nothing more was sent")
        if time.monotonic() - self._sent.get(path, -every) < every:
            return
        self._sent[path] = time.monotonic()
        with reaching(self.url):
            for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
                if file.exists():
                    self.files.put_file(str(file), self._object(file))
                elif self.files.exists(self._object(file)):
                    self.files.rm_file(self._object(file))

    def pull(self, path: Path) -> None:
        """Fetch a file or a folder. Raises InputError, before anything is fetched, for an object that no file here can be."""
        with reaching(self.url):
            found = {name: self._file(name) for name in self.files.find(self._object(path)) if name[-1] != "/"}
            for name, file in found.items():
                if not NOT_COPIED & set(file.relative_to(self.local).parts):
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self.files.get_file(name, str(file))
        self.copied |= path == self.local

    def _object(self, path: Path) -> str:
        return "/".join((self.root, *path.relative_to(self.local).parts))

    def _file(self, name: str) -> Path:
        parts = name.removeprefix(f"{self.root}/").split("/")
        if {"", ".", ".."} & set(parts):
            raise InputError(
                f"{self.url}: the object {name} cannot be a file here; rename or delete it, or choose another --run-dir"
            )
        return self.local.joinpath(*parts)


class Lock:
    """The right to write a bucket, while this process lives: one object, which its holder replaces again and again.

    It is created only if it is absent, and replaced or deleted only in the generation that was seen, so that one of several
    processes succeeds. Clocks are not compared: whoever finds it there watches whether it still changes.
    """

    def __init__(self, bucket: Bucket) -> None:
        """Raises TransientError while another process has it."""
        self._bucket, self._token = bucket, secrets.token_hex(8)
        with reaching(bucket.url):
            from google.cloud import storage

            name, _, folder = bucket.root.partition("/")
            self._object = storage.Client().bucket(name).blob(f"{folder}/.lock".removeprefix("/"))
            before = now = self._generation()
            if before:
                say(
                    f"{bucket.url}/.lock: a run was not ended here; waiting {DEAD_AFTER:.0f} s to see whether it still goes on"
                )
            end = time.monotonic() + DEAD_AFTER
            while now and now == before and time.monotonic() < end:
                time.sleep(min(1.0, DEAD_AFTER / 8))
                now = self._generation()
            if now not in (0, before) or not self._replace(now):
                raise TransientError(
                    f"{bucket.url}: in use by another process; wait for it or choose another --run-dir"
                )
        self._ended = threading.Event()
        current().at_exit.insert(0, self.close)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give it back."""
        self._ended.set()
        self._thread.join(HEARTBEAT)  # else it may write once more, after the object is gone
        with contextlib.suppress(Exception):  # then the next run waits, no more
            self._object.delete(if_generation_match=self._object.generation)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT) and not self._bucket.lost:
            with contextlib.suppress(Exception):  # a network's hiccup; several beats fit into DEAD_AFTER
                self._bucket.lost = not self._replace(self._object.generation)

    def _generation(self) -> int:
        """Which version of the object is there; 0 for none."""
        found = self._object.bucket.get_blob(self._object.name)
        return found.generation if found else 0

    def _replace(self, generation: int) -> bool:
        """Write the object over one version of it, or over none (0). False where another process was faster."""
        from google.api_core.exceptions import PreconditionFailed

        try:
            self._object.upload_from_string(self._token, if_generation_match=generation)
        except PreconditionFailed:
            found = self._object.bucket.get_blob(self._object.name)
            if found is None or found.download_as_text() != self._token:
                return False
            self._object = found  # written before by this process, whom only the answer did not reach
        return True


@contextlib.contextmanager
def reaching(url: str) -> Iterator[None]:
    """Raises InputError for what a driver says of an address or of rights, TransientError for everything else it says.

    Errors of the operating system stay what they are.
    """
    try:
        yield
    except (InputError, TransientError):
        raise
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
    """Where this process finds a run directory: a path itself, or its copy of a bucket. Raises InputError."""
    place = str(place).removeprefix("file://")
    if "://" not in place:
        if "\\" in place:
            raise InputError(
                f"{place}: checkpoints cannot be read back where a name has a backslash; choose another name"
            )
        return Path(place)
    if not place.startswith("gs://"):
        raise InputError(f"{place}: not a place for runs; give a folder or an address that begins with gs://")
    if set("*?[]#") & set(place) or {"", ".", ".."} & set(place.removeprefix("gs://").rstrip("/").split("/")):
        raise InputError(f"{place}: an address with one of * ? [ ] # .. // names no one place; choose another name")
    if place not in _buckets:
        _buckets[place] = Bucket(place)
    return _buckets[place].local


def copied(place: str | Path) -> Path:
    """The same, with what was in the bucket when this process first asked. Raises InputError, TransientError."""
    bucket = of(path := local(place))
    if bucket is not None and not bucket.copied:
        bucket.pull(path)
    return path


def of(path: Path) -> Bucket | None:
    """The bucket of whose copy a path is a part."""
    return next((b for b in _buckets.values() if path.is_relative_to(b.local)), None)


def publish(path: Path) -> None:
    """What the first process wrote is now for all to read; every process calls this."""
    bucket = of(path)
    if bucket is not None and current().processes.writer:
        bucket.push(path)
    current().processes.wait(path.name)
    if bucket is not None and not current().processes.writer:
        bucket.pull(path)


def keep(path: Path, now: bool = False) -> None:
    """Send a file that grows, now or if it was not sent lately; the first process calls this."""
    if bucket := of(path):
        bucket.push(path, 0.0 if now else UPLOAD_EVERY)


def checkpoints(folder: Path) -> Any:
    """Where orbax finds a folder: in the bucket itself, or on the disk."""
    bucket = of(folder)
    if bucket is None:
        return folder.absolute()
    from etils import epath

    return epath.Path(f"{bucket.url}/{folder.relative_to(bucket.local).as_posix()}")
