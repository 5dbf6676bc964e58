"""Checkpoints of a training phase: adapter and optimiser state, by orbax, under their own names."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

T = TypeVar("T")
MARGIN = 1 << 18  # bytes of a checkpoint beside its arrays


class Checkpoints:
    """Numbered checkpoints in a folder; the newest two are kept. A half-written one is never seen (orbax renames)."""

    def __init__(self, folder: Path) -> None:
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what orbax logs as an error, it raises as well
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The newest step, or None."""
        step = self.manager.latest_step()
        return None if step is None else int(step)

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays; returns before the files are written. Raises OSError when the disk has no room for them.

        That is asked beforehand: a write that fails inside orbax leaves its threads' tracebacks on the screen.
        """
        folder, need = self.manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)) + MARGIN
        if shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, f"a checkpoint needs {need} bytes", str(folder))
        self.manager.save(step, args=ocp.args.StandardSave(_named(state)))

    def restore(self, step: int, like: T) -> T:
        """Load a step into the structure, dtypes and shardings of ``like``."""
        saved = self.manager.restore(step, args=ocp.args.StandardRestore(_named(like)))
        return jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in _named(like)])

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
