"""The best of a phase's validated steps: what was trained until then, kept on disk until the phase ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from esjax.model.lora import Adapter
from esjax.run import buckets
from esjax.run.files import publish_text
from esjax.run.jsonl import json_text
from esjax.run.progress import say
from esjax.runtime.context import current


class Best:
    """Keeps what was trained at the validated step with the lowest ``metric``, through kills.

    ``save`` writes what is trained to a new folder (every process asks), ``load`` reads it. Folders are named by their steps: a
    run that goes on after step n forgets what came behind it.
    """

    def __init__(
        self,
        folder: Path,
        metric: str,
        save: Callable[[Path, Adapter], None],
        load: Callable[[Path], Adapter],
    ) -> None:
        self.folder, self.metric, self._save, self._load = folder, metric, save, load
        self._list = folder / "best.json"
        self.found: list[tuple[int, float]] = []  # each new best: its step and value

    def rewind(self, done: int) -> None:
        """Forget what came after step ``done``."""
        known = json.loads(self._list.read_text(encoding="utf-8")) if self._list.exists() else []
        self.found = [(int(step), float(value)) for step, value in known if step <= done]

    def offer(self, step: int, values: Mapping[str, float], adapter: Adapter) -> None:
        """Keep what is trained now, if nothing so far was as good."""
        value = values[self.metric]
        if self.found and not value < self.found[-1][1]:
            return
        place = self._place(step)
        if current().processes.writer and place.exists():  # of a run that was killed before it could say so
            shutil.rmtree(place)
        current().processes.wait("best step")
        self._save(place, adapter)
        buckets.publish(place)
        self.found.append((step, value))
        publish_text(self._list, json_text(self.found) + "\n")

    def taken(self) -> Adapter:
        """What was trained at the best step; the last one always is validated."""
        step, value = self.found[-1]
        say(f"  the best step is {step}, with a {self.metric} of {value:.4f}; it is kept")
        return self._load(self._place(step))

    def forget(self) -> None:
        """Delete all that was kept, here and in a bucket."""
        if current().processes.writer:
            for file in [p for p in self.folder.rglob("*") if p.is_file()]:
                file.unlink()
                buckets.keep(file, now=True)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.folder / f"step{step}"
