"""Several processes become one run: jax.distributed, started from what the environment says or from explicit addresses."""

from __future__ import annotations

import re
import threading
from itertools import count
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from esjax.errors import InputError, TransientError
from esjax.runtime.context import current
from esjax.runtime.processes import ALONE, Processes

HEARTBEAT_TIMEOUT = 30  # seconds without a sign of life after which the others give up
SHUTDOWN_TIMEOUT = 60  # seconds that a process which is done waits for the others
BARRIER_TIMEOUT = 1800  # seconds that a process waits for the slowest


class KeyValues:
    """The coordination service's store of keys as the processes' board."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def post(self, key: str, value: str) -> None:
        """Write a note, over an older one."""
        self.client.key_value_set(f"esjax/{key}", value, allow_overwrite=True)

    def read(self) -> dict[str, str]:
        """All notes."""
        return {key.partition("esjax/")[2]: value for key, value in self.client.key_value_dir_get("esjax/")}


def start(coordinator: str | None, processes: int | None, index: int | None, timeout: int) -> Processes:
    """Join the other processes within so many seconds, and say who they are.

    Without an address, Cloud TPU's metadata, Slurm, GKE's JobSet or Open MPI must tell it.

    Raises InputError where they do not, TransientError where not all processes come in time.
    """
    port = re.fullmatch(r"\S+:(\d{1,5})", coordinator or "-:1")
    if port is None or not 0 < int(port[1]) < 1 << 16:
        raise InputError(f"--coordinator {coordinator}: give HOST:PORT, the first process' address")
    if processes is not None and index is not None and not 0 <= index < processes:
        raise InputError(f"--process-id {index} of --num-processes {processes}: processes are numbered from 0")
    # Ours is the one handler of SIGTERM: JAX's would replace it, and orbax ask it with step numbers of its own.
    jax.config.update("jax_enable_preemption_service", False)
    _join(coordinator, processes, index, timeout)
    if jax.process_count() == 1:
        return ALONE
    numbers = count()
    client: Any = jax._src.distributed.global_state.client

    def wait(name: str) -> None:
        try:
            client.wait_at_barrier(f"esjax:{next(numbers)}:{name}", timeout_in_ms=BARRIER_TIMEOUT * 1000)
        except jax.errors.JaxRuntimeError as e:
            raise TransientError(f"the processes of this run lost one another, waiting for: {name} ({_line(e)})") from e

    def share(value: int) -> int:
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def all_of(value: bool) -> bool:
        return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))

    return Processes(jax.process_index(), jax.process_count(), wait, share, all_of, KeyValues(client))


def _join(coordinator: str | None, processes: int | None, index: int | None, timeout: int) -> None:
    """In a thread, so that SIGTERM and the time limit end the wait; the runtime itself would end the process with a dump."""
    failed: list[Exception] = []

    def join() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                index,
                initialization_timeout=2 * timeout + 600,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
                shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
            )
        except Exception as e:
            failed.append(e)

    current().joining = True
    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        raise TransientError(
            f"not all processes of this run came within {timeout} s; see what the others say, and run all again (a longer "
            "wait: --join-timeout SECONDS)"
        )
    if failed and isinstance(failed[0], ValueError | KeyError):
        raise InputError(
            f"--distributed: nothing here says where the other processes are ({_line(failed[0])}); run on a TPU slice, under "
            "Slurm or a JobSet, or give --coordinator HOST:PORT --num-processes N --process-id I"
        ) from failed[0]
    if failed:
        raise TransientError(
            f"the processes of this run did not find one another ({_line(failed[0])}); start them all again"
        ) from failed[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
