"""The run directory: its config, its lock, and the manifest of stages that are done once.

Everything under RUN except ``manifest.json`` and ``tensorboard/`` is a function of the config and the inputs alone, so a
killed and resumed run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from esjax import storage
from esjax.config import Config
from esjax.configfile import bundled, differing, dump, load
from esjax.errors import InputError
from esjax.hosts import alike, hosts, together
from esjax.runlog import json_text, publish_text, say, sha256, write_text


class RunDir:
    """RUN/: the resolved config, the manifest, and stages that are done once. A context manager: it holds the lock.

    The directory is claimed for its config when the first stage starts, so that bad input leaves no config behind.
    """

    def __init__(self, place: str | Path, config: Config) -> None:
        """``place`` is a folder that all hosts share, or a URL such as gs://BUCKET/RUN."""
        self.path, self.config = storage.local(place), config
        self.manifest_path = self.path / "manifest.json"
        self.manifest: dict[str, Any] = {"stages": {}}
        self._lock: TextIOWrapper | storage.Lease | None = None

    def __enter__(self) -> RunDir:
        """Open or create. Raises InputError when the directory belongs to another config or is in use."""
        try:
            with together():
                self._make()
            self._check_shared()
            with together():
                self._check_config()
                if self.manifest_path.exists():
                    self.manifest = json.loads(self.manifest_path.read_text())
        except BaseException:
            self.__exit__()
            raise
        hosts.wait("run directory read")
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            raise InputError(f"{self.path}: not a folder; choose another --run-dir") from e
        if hosts.writer:
            self._take_lock()

    def _take_lock(self) -> None:
        if storage.in_bucket(self.path):
            self._lock = storage.Lease(self.path, say)
            return
        lock = open(self.path / ".lock", "a+")  # noqa: SIM115  closed in __exit__, or by the end of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock = lock
        except BlockingIOError as e:
            lock.close()
            raise InputError(f"{self.path}: in use by another process; wait for it or choose another --run-dir") from e

    def _check_shared(self) -> None:
        """All processes must see one directory."""
        if hosts.count == 1 or storage.in_bucket(self.path):
            return
        token = hosts.share(int.from_bytes(os.urandom(4), "big") >> 1)
        if isinstance(self._lock, TextIOWrapper):
            self._lock.truncate(0)
            self._lock.write(str(token))
            self._lock.flush()
            os.fsync(self._lock.fileno())
        hosts.wait("lock written")
        file = self.path / ".lock"
        seen = file.exists() and file.read_text() == str(token)
        if not hosts.all(seen):
            raise InputError(
                f"{self.path}: not the same folder on all hosts; choose a --run-dir on storage that they share"
            )

    def _check_config(self) -> None:
        saved = self.path / "config.yaml"
        changed = differing(load(str(saved), []), self.config) if saved.exists() else []
        if changed:
            raise InputError(
                f"{self.path}: this run directory was made with another config; differing: {', '.join(changed)}; "
                "give the old values or another --run-dir"
            )

    def stage(
        self, name: str, outputs: list[Path], inputs: dict[str, str], work: Callable[[], dict[str, Any] | None]
    ) -> None:
        """Do ``work`` unless the manifest says it is done; then record inputs, seconds, versions and what work returned.

        ``inputs`` maps a name to a hash. A stage that was begun or finished with other inputs is refused by name (what it
        left behind would mix with the new), and so is a finished one whose outputs are gone, or one whose inputs are not the
        same on all hosts.
        """
        entry = self.manifest["stages"].get(name)
        same = alike(inputs)
        with together():
            if not same:
                raise InputError(f"stage {name}: not the same on all hosts: one of {', '.join(inputs)}")
            self._check_inputs(name, outputs, inputs)
        if entry is not None and entry["status"] == "done":
            say(f"{name}: done before, {entry['seconds']:.0f} s then")
            return
        if hosts.writer and not (self.path / "config.yaml").exists():
            write_text(self.path / "config.yaml", dump(self.config))
            storage.keep(self.path / "config.yaml", now=True)
        say(f"{name}: started")
        self._record(name, {"status": "started", "inputs": inputs})
        start = time.monotonic()
        facts = work() or {}
        for output in outputs:
            storage.publish(output)
        absent = [str(p) for p in outputs if not p.exists()]
        if absent:
            raise AssertionError(f"stage {name} did not make {absent[0]}")
        seconds = round(time.monotonic() - start, 2)
        self._record(name, {"status": "done", "inputs": inputs, "seconds": seconds, "versions": versions(), **facts})

    def _check_inputs(self, name: str, outputs: list[Path], inputs: dict[str, str]) -> None:
        entry = self.manifest["stages"].get(name)
        if entry is None:
            return
        begun = "is done" if entry["status"] == "done" else "was begun"
        changed = [key for key, value in inputs.items() if entry["inputs"].get(key) != value]
        lost = [str(p) for p in outputs if not p.exists()] if entry["status"] == "done" else []
        if changed or lost:
            what = f"{', '.join(changed)} changed since" if changed else f"{lost[0]} is gone"
            raise InputError(f"{self.path}: stage {name} {begun}, but {what}; restore it or choose another --run-dir")

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        self.manifest["stages"][name] = entry
        publish_text(self.manifest_path, json_text(self.manifest, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version()} | {
        p: version(p) for p in ("esjax", "jax", "flax", "optax", "transformers")
    }


def bundled_hash(path: str) -> str:
    """SHA-256 of a file named in a setting. Raises InputError when it is not there."""
    file = bundled(path)
    if not file.is_file():
        raise InputError(f"{path}: no such file")
    return sha256(file)
