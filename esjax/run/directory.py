"""The run directory: its config, its lock, and the manifest of stages that are done once.

Everything under RUN except ``manifest.json``, ``tensorboard/`` and ``report.html`` is a function of the config and the inputs
alone, so a killed and resumed run ends with the same bytes as an undisturbed one.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from functools import reduce
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from esjax.errors import InputError, TransientError
from esjax.run import buckets
from esjax.run.files import publish_text, sha256, write_text
from esjax.run.jsonl import json_text
from esjax.run.manifest import check_base, check_made, peak_memory, read_manifest, versions
from esjax.run.progress import say
from esjax.run.shared import Shared
from esjax.runtime.context import current
from esjax.settings.files import bundled, dump, flat, load
from esjax.settings.identity import changes, differing, marked
from esjax.settings.schema import CONTENT, EXECUTION, Config


class RunDir:
    """RUN/: the resolved config, the manifest, and stages that are done once. A context manager: it holds the lock.

    The directory is claimed for its config when the first stage starts, so that bad input leaves no config behind. From
    then on it keeps what defines the result of whatever was made in it, see ``_check_config``.
    """

    def __init__(
        self,
        place: str | Path,
        config: Config,
        content: Callable[[Config, str], str] | None = None,
        shared: Shared | None = None,
    ) -> None:
        """``place`` is a folder that all hosts share, or an address such as gs://BUCKET/RUN; ``content`` hashes what a setting
        names; ``shared`` keeps stages that other runs have in common with this one."""
        self.shared = shared
        self.path, self.config, self._content = buckets.local(place), config, content or setting_hash
        self.manifest_path = self.path / "manifest.json"
        self.manifest: dict[str, Any] = {"stages": {}}
        self._used = self._claimed = self._new = False
        self._lock: TextIOWrapper | buckets.Lock | None = None

    def __enter__(self) -> RunDir:
        """Open or create. Raises InputError when the directory belongs to another config, TransientError when it is in use."""
        try:
            with current().processes.in_step():
                self._make()
            self._check_shared()
            with current().processes.in_step():
                if bucket := buckets.of(self.path):
                    bucket.pull(self.path)
                self.manifest = read_manifest(self.path)
                self._check_config()
                self._check_files()
        except BaseException:
            self.__exit__()
            raise
        current().processes.wait("run directory read")
        return self

    def __exit__(self, error: object = None, *_: object) -> None:
        if error is None and self._used:
            self._claim()
        if (
            isinstance(self._lock, TextIOWrapper)
            and not self._claimed
            and [p.name for p in self.path.glob("*")] == [".lock"]
        ):
            Path(self._lock.name).unlink()  # refused before anything was made
            if self._new:
                self.path.rmdir()
        if self._lock is not None:
            self._lock.close()

    def _make(self) -> None:
        self._new = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as e:
            raise InputError(f"{self.path}: not a folder; choose another --run-dir") from e
        if current().processes.writer:
            self._take_lock()

    def _take_lock(self) -> None:
        if bucket := buckets.of(self.path):
            self._lock = buckets.Lock(bucket)
            return
        place = self.path / ".lock"
        lock = open(place, "a+")  # noqa: SIM115  closed in __exit__, or by the end of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = place.exists() and os.path.samestat(os.fstat(lock.fileno()), place.stat())
        except BlockingIOError:
            free = False
        if not free:  # held, or deleted just now by a command that was refused
            lock.close()
            raise TransientError(f"{self.path}: in use by another process; wait for it or choose another --run-dir")
        self._lock = lock

    def _check_shared(self) -> None:
        """All processes must see one directory."""
        if current().processes.count == 1 or buckets.of(self.path):
            return
        token = current().processes.share(int.from_bytes(os.urandom(4), "big") >> 1)
        if isinstance(self._lock, TextIOWrapper):
            self._lock.truncate(0)
            self._lock.write(str(token))
            self._lock.flush()
            os.fsync(self._lock.fileno())
        current().processes.wait("lock written")
        file = self.path / ".lock"
        seen = file.exists() and file.read_text() == str(token)
        if not current().processes.all(seen):
            raise InputError(
                f"{self.path}: not the same folder on all hosts; choose a --run-dir on storage that they share"
            )

    def _check_config(self) -> None:
        """Refuse a setting that differs from what something was made with: a stage's ``settings`` name what it hangs on."""
        saved = self.path / "config.yaml"
        if not saved.exists():
            if lost := next(filter(self.made, self.manifest["stages"]), None):
                raise InputError(f"{saved} is gone, but stage {lost} was begun; restore it or choose another --run-dir")
            return
        changed = []
        for key in differing(load(str(saved), [], together=False), self.config):
            for name, entry in self.manifest["stages"].items():
                sections = entry.get("settings") or [key]
                if self.made(name) and any(key == s or key.startswith(f"{s}.") for s in sections):
                    changed.append(key)
                    break
        if changed:
            raise InputError(
                f"{self.path}: this run directory was made with another config; differing: {', '.join(changed)}; "
                "give the old values or another --run-dir"
            )

    def _check_files(self) -> None:
        """Refuse a file that a setting names and that is not what something was made from, before more is made."""
        for name, entry in self.manifest["stages"].items():
            for key in entry["inputs"].keys() & marked(Config, CONTENT) if self.made(name) else ():
                file = reduce(getattr, key.split("."), self.config)
                if file is not None and self._content(self.config, key) != entry["inputs"][key]:
                    begun = "is done" if entry["status"] == "done" else "was begun"
                    raise InputError(
                        f"{self.path}: stage {name} {begun}, but {key} changed since ({file}); restore it or choose another "
                        "--run-dir"
                    )

    def made(self, name: str) -> bool:
        """Whether something is there that a stage made: its first output, the rows of one, or a checkpoint."""
        entry = self.manifest["stages"].get(name)
        if entry is None or entry["status"] == "done" or "makes" not in entry:
            return entry is not None
        places = [self.path / place for place in entry["makes"]]
        parts = [p.with_name(p.name + ".part") for p in places]
        steps = buckets.checkpoints(places[0].parent / "checkpoint")
        return (
            places[0].exists()
            or any(p.exists() and p.stat().st_size for p in parts)
            or (steps.exists() and any(p.name.isdigit() for p in steps.iterdir()))
        )

    def check_base(self, base: dict[str, str], revision: str | None = None) -> None:
        """Remember the backbone: the hashes of its files, by name, and its commit where a hub named one.

        Raises InputError when something was made with another.
        """
        same = current().processes.same_in_all(base)
        with current().processes.in_step():
            if not same:
                raise InputError("the backbone's files are not the same on all hosts")
            if any(map(self.made, self.manifest["stages"])):
                check_base(self.path, self.manifest, base)
            self.manifest["base"] = base
            if revision is not None:
                self.manifest["revision"] = revision

    def stage(
        self,
        name: str,
        outputs: list[Path],
        inputs: dict[str, str],
        work: Callable[[], dict[str, Any] | None],
        settings: tuple[str, ...] = (),
    ) -> None:
        """Do ``work`` unless the manifest says it is done; then record inputs, seconds, versions and what work returned.

        ``inputs`` maps a name to a hash, ``settings`` names the sections (or single settings) that define the result; without
        any, all do. The first of ``outputs`` is made first. A stage that made something from other inputs is refused by name
        (that would mix with the new), and so is a finished one whose outputs are gone or changed, or one whose inputs are not
        the same on all hosts.
        """
        entry = self.manifest["stages"].get(name)
        same = current().processes.same_in_all(inputs)
        with current().processes.in_step():
            if not same:
                raise InputError(f"stage {name}: not the same on all hosts: one of {', '.join(inputs)}")
            self._check_inputs(name, outputs, inputs)
        self._used = True
        if entry is not None and entry["status"] == "done":
            say(f"{name}: done before, {entry['seconds']:.0f} s then")
            return
        self._claim()
        kept = self._kept_as(name, inputs, settings)
        if kept is not None and self.shared is not None and (found := self.shared.take(kept, self.path)):
            self._record(name, found | {"shared": True})
            say(f"{name}: taken from another run that made the same")
            return
        say(f"{name}: started")
        places = [p.relative_to(self.path).as_posix() for p in outputs]
        facts: dict[str, Any] = {"inputs": inputs, "settings": list(settings)}
        self._record(name, {"status": "started", **facts, "makes": places})
        start = time.monotonic()
        facts |= work() or {}
        for output in outputs:
            buckets.publish(output)
        absent = [str(p) for p in outputs if not p.exists()]
        if absent:
            raise AssertionError(f"stage {name} did not make {absent[0]}")
        seconds = round(time.monotonic() - start, 2)
        hashes = {place: sha256(output) for place, output in zip(places, outputs, strict=True)}
        spent = {"seconds": seconds, "peak_gib": peak_memory(), "versions": versions()}
        self._record(name, {"status": "done", **spent, **facts, "outputs": hashes})
        if kept is not None and self.shared is not None:
            self.shared.keep(kept, self.path, outputs, self.manifest["stages"][name])

    def _kept_as(self, name: str, inputs: dict[str, str], settings: tuple[str, ...]) -> str | None:
        """What a stage is shared under; None where it is not: nothing is shared, or this run has begun it already."""
        if self.shared is None or self.made(name):
            return None
        execution, content = marked(Config, EXECUTION), marked(Config, CONTENT)
        asked = {
            key: value
            for key, value in flat(self.config.model_dump(mode="json"))
            if (not settings or any(key == s or key.startswith(f"{s}.") for s in settings))
            and key not in execution | content
        }
        return self.shared.key(name, inputs, asked, self.manifest.get("base", {}))

    def _claim(self) -> None:
        """Write down the config as it is now; later commands take the run's settings from there."""
        saved = self.path / "config.yaml"
        if self._claimed or not current().processes.writer:
            return
        self._claimed = True
        text = dump(self.config)
        if saved.exists() and saved.read_text(encoding="utf-8") == text:
            return
        if saved.exists():
            now = changes(load(str(saved), [], together=False), self.config).items()
            say(f"settings from here on: {', '.join(f'{key}={new} (was {old})' for key, (old, new) in now)}")
        write_text(saved, text)
        buckets.keep(saved, now=True)

    def _check_inputs(self, name: str, outputs: list[Path], inputs: dict[str, str]) -> None:
        entry = self.manifest["stages"].get(name)
        if entry is None or not self.made(name):
            return
        begun, then = "is done" if entry["status"] == "done" else "was begun", entry["inputs"]
        if "settings" in entry:
            changed = [key for key in {**then, **inputs} if then.get(key) != inputs.get(key)]
        else:  # made by an esjax that named the inputs otherwise
            changed = [key for key, value in inputs.items() if value not in then.values()]
        lost = [str(p) for p in outputs if not p.exists()] if entry["status"] == "done" else []
        if changed or lost:
            what = f"{', '.join(changed)} changed since" if changed else f"{lost[0]} is gone"
            raise InputError(f"{self.path}: stage {name} {begun}, but {what}; restore it or choose another --run-dir")
        check_made(self.path, name, entry)

    def _record(self, name: str, entry: dict[str, Any]) -> None:
        self.manifest["stages"][name] = entry
        publish_text(self.manifest_path, json_text(self.manifest, indent=1) + "\n")


def setting_hash(config: Config, key: str) -> str:
    """SHA-256 of the file that a setting names. Raises InputError when it is not there."""
    return bundled_hash(str(reduce(getattr, key.split("."), config)))


def bundled_hash(path: str) -> str:
    """SHA-256 of a file (or a folder of them) named in a setting. Raises InputError when it is not there."""
    file = bundled(path)
    if not file.exists():
        raise InputError(f"{path}: no such file")
    return sha256(file)
