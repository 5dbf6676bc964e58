"""Checkpoints of a training phase: what is trained and the optimiser's state, by orbax, under their own names.

Every process writes what its devices hold; a checkpoint restores onto any mesh and any number of processes.
"""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from esjax.errors import RunError
from esjax.hosts import hosts
from esjax.runlog import say

T = TypeVar("T")
MARGIN = 1 << 18  # bytes of a checkpoint beside its arrays


class Checkpoints:
    """Numbered checkpoints in a folder, of which the newest ``keep`` stay. A half-written one is never seen (orbax renames)."""

    def __init__(self, folder: Path, keep: int) -> None:
        """``folder`` is an absolute path, or orbax's form of one in a bucket."""
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # what orbax logs as an error, it raises as well
        # Without several to fall back on, a damaged checkpoint would cost the whole phase.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self.manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Save a pytree of arrays; returns before the files are written. Raises OSError when the disk has no room for them.

        That is asked beforehand: a write that fails inside orbax leaves its threads' tracebacks on the screen.
        """
        folder, need = self.manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)) + MARGIN
        if "://" not in str(folder) and shutil.disk_usage(folder).free < need:
            raise OSError(errno.ENOSPC, f"a checkpoint needs {need} bytes", str(folder))
        self.manager.save(step, args=ocp.args.StandardSave(_named(state)))

    def restore(self, like: T) -> tuple[int, T]:
        """The newest checkpoint that can be read, and its step, in the structure, dtypes and shardings of ``like``.

        A damaged one is said, and deleted where one before it can be read. Without any: step 0 and ``like`` itself. Raises
        RunError when none can be read; then all stay, for the fault may lie elsewhere.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            state, reason = self._read(step, like)
            if hosts.all(state is not None):
                for damaged in steps[:number]:
                    self.manager.delete(damaged)
                return step, state  # type: ignore[return-value]
            say(f"  checkpoint {step} is damaged ({reason or 'on another host'}); taking the one before")
        if steps:
            raise RunError(
                f"{self.manager.directory}: no checkpoint can be read; delete the folder to begin the phase anew"
            )
        return 0, like

    def _read(self, step: int, like: T) -> tuple[T | None, str]:
        """This process' part. The manager would wait for the others, who may find their part in order, or not."""
        folder = self.manager.directory / str(step) / ocp.checkpoint_manager.DEFAULT_ITEM_NAME
        try:
            saved = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(_named(like)))
            state = jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in _named(like)])
            return jax.block_until_ready(state), ""
        except Exception as e:  # whatever a truncated or missing file makes of it
            return None, " ".join(str(e).split())[:120]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
