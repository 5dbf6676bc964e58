"""Several processes become one run: jax.distributed, started from what the environment says or from explicit addresses."""

from __future__ import annotations

from itertools import count
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from esjax.errors import InputError, RunError
from esjax.hosts import hosts

HEARTBEAT = 30  # seconds without a sign of life after which the others give up
PARTING = 60  # seconds that a process which ends, by an error perhaps, waits for the others; then it takes them along
PATIENCE = 1800  # seconds that a process waits for the slowest


def start(coordinator: str | None, processes: int | None, index: int | None) -> None:
    """Join the other processes. Without an address, Cloud TPU's metadata, Slurm, GKE's JobSet or Open MPI must tell it.

    Raises InputError where they do not, RunError where not all processes come in time.
    """
    try:
        jax.distributed.initialize(
            coordinator, processes, index, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=PARTING
        )
    except (ValueError, KeyError) as e:
        raise InputError(
            f"--distributed: nothing here says where the other processes are ({_line(e)}); run on a TPU slice, under Slurm or a "
            "JobSet, or give --coordinator HOST:PORT --num-processes N --process-id I"
        ) from e
    except (RuntimeError, OSError) as e:
        raise RunError(f"the processes of this run did not find one another ({_line(e)}); start them all again") from e
    hosts.index, hosts.count = jax.process_index(), jax.process_count()
    numbers, points = count(), count()
    client: Any = jax._src.distributed.global_state.client
    stopping = False

    def wait(name: str) -> None:
        client.wait_at_barrier(f"esjax:{next(numbers)}:{name}", timeout_in_ms=PATIENCE * 1000)

    def share(value: int) -> int:
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def all_of(value: bool) -> bool:
        return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))

    def told() -> bool:
        nonlocal stopping
        stopping = stopping or multihost_utils.reached_preemption_sync_point(next(points))
        return stopping

    if hosts.count > 1:
        hosts.wait, hosts.share, hosts.all, hosts.told = wait, share, all_of, told


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
