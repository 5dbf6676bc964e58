"""Checkpoints of a training phase: what is trained and the optimiser's state, by orbax, under their own names.

Every process writes what its devices hold; a checkpoint restores onto any mesh and any number of processes.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from esjax.errors import PASSING, InputError, TransientError
from esjax.run.progress import say
from esjax.runtime.context import current

T = TypeVar("T")
GPath: Any = type(epath.Path("/"))
_glob = GPath.glob


def _literal_glob(self: Any, pattern: str) -> Iterator[Any]:
    """epath reads a folder's own name as a part of the pattern, so that orbax finds nothing in one called ``lr=1e-4 [v2]``."""
    found = _glob(self, pattern) if "://" in str(self) else Path(self).glob(pattern)
    return map(epath.Path, found)


GPath.glob = _literal_glob
DAMAGED = "checkpoint.damaged"  # the folder beside the checkpoints'
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

        A damaged one is said, and set aside where one before it can be read. Without any: step 0 and ``like`` itself. Raises
        InputError when all are damaged, TransientError or OSError when one cannot be read for another reason; then all stay.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for number, step in enumerate(steps):
            state, reason = self._read(step, like)
            if current().processes.all(state is not None):
                if number:
                    self._set_aside(steps[:number])
                return step, state  # type: ignore[return-value]
            say(f"  checkpoint {step} is damaged ({reason or 'on another host'}); taking the one before")
        if steps:
            raise InputError(
                f"{self.manager.directory}: no checkpoint can be read, all {len(steps)} are damaged; restore the folder from a "
                "copy, or delete it to begin the phase anew"
            )
        return 0, like

    def _read(self, step: int, like: T) -> tuple[T | None, str]:
        """This process' part, or why it is damaged. The manager would wait for the others, who may find theirs in order.

        Raises TransientError, in every process, where any cannot say whether its part is.
        """
        folder = self.manager.directory / str(step) / ocp.checkpoint_manager.DEFAULT_ITEM_NAME
        state, reason, error = None, "", None
        try:
            saved = ocp.StandardCheckpointHandler().restore(folder, args=ocp.args.StandardRestore(_named(like)))
            state = jax.tree.unflatten(jax.tree.structure(like), [saved[name] for name in _named(like)])
            jax.block_until_ready(state)
        except Exception as e:
            state, reason = None, " ".join(str(e).split())[:120]
            error = None if damaged(e) else e
        with current().processes.in_step():
            if error is not None:
                raise unreadable(folder, error) from error
        return state, reason

    def _set_aside(self, steps: list[int]) -> None:
        """Rename checkpoints, so that their numbers are free and nothing is lost."""
        if current().processes.writer:
            aside = self.manager.directory.parent / DAMAGED
            aside.mkdir(exist_ok=True)
            for step in steps:
                names = (f"{step}-{n}" if n else str(step) for n in count())
                free = next(name for name in names if not (aside / name).exists())
                (self.manager.directory / str(step)).rename(aside / free)
                say(f"  it lies in {aside / free} now")
        current().processes.wait("damaged checkpoints set aside")
        self.manager.reload()

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.manager.wait_until_finished()
        self.manager.close()


def damaged(error: BaseException) -> bool:
    """Whether an error of reading proves that files are missing, cut off or changed: by its kind, or by TensorStore's word.

    Everything else (a network, a right to read, a disk that fails for the moment) says nothing about the checkpoint.
    """
    for e in _causes(error):
        code = re.search(r"os_error_code='(\d+)'", str(e))
        if code is not None or (isinstance(e, OSError) and e.errno is not None):
            return (int(code[1]) if code else e.errno) == errno.ENOENT  # type: ignore[attr-defined]
    return any(
        isinstance(e, FileNotFoundError | UnicodeDecodeError | json.JSONDecodeError)
        or str(e).startswith(("NOT_FOUND:", "DATA_LOSS:", "OUT_OF_RANGE:", "FAILED_PRECONDITION:"))
        for e in _causes(error)
    )


def unreadable(folder: Any, error: BaseException) -> Exception:
    """What to raise where a checkpoint could not be read though nothing says that it is damaged."""
    cause = list(_causes(error))[-1]
    code = re.search(r"os_error_code='(\d+)'", str(cause))
    if code is not None or isinstance(cause, OSError):
        number = int(code[1]) if code else cause.errno  # type: ignore[attr-defined]
        if number not in PASSING and not isinstance(cause, ConnectionError | TimeoutError):
            return OSError(number, os.strerror(number or errno.EIO), str(folder))
    reason = " ".join(str(cause).split())[:200]
    return TransientError(f"{folder}: cannot be read ({reason}); nothing was moved; run the same command again")


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _named(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
