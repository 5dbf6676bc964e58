"""What one program needs on one device: memory, FLOPs, traffic, network, and a time at stated rates."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from esjax.errors import InputError
from esjax.plan.chips import BETWEEN as BETWEEN_WAIT
from esjax.plan.chips import GIB, Chip
from esjax.plan.jobs import Job
from esjax.plan.moved import BETWEEN, Collective, Moved, moved
from esjax.plan.needed import Needed, held_bytes
from esjax.runtime.mesh import mesh_sizes
from esjax.runtime.programs import compile_named, products, too_large, work_bytes

LARGEST = 5  # contributors that are told
WAITING = "waiting"
SIZE = r"([\d.]+[KMGT]?)"
OF_MEMORY = re.compile(rf"Used {SIZE} of {SIZE}|\({SIZE}\) exceeds available HBM \({SIZE}\)")


@dataclass(frozen=True)
class Needs:
    """One program on one device; what is done and sent in decoding is that of one step for all lanes."""

    name: str
    compile_seconds: float
    memory: dict[str, float]
    """GiB by kind: base, adapter, optimiser, cache, rows (and other small inputs), work (activations and buffers)."""
    limit: float | None
    """GiB of the device, as documented; of a GPU the part that programs get; None where that is not known."""
    refused: str = ""
    """The compiler's own words where the program is too large for it."""
    flops: float = 0.0
    """Of products, 2 per multiply-add: the device's share of what the program asks for, and of attention that a kernel does."""
    traffic: float = 0.0
    """Bytes read and written in main memory, an estimate."""
    needed: Needed = field(default_factory=Needed)
    """What the work takes by formula; of neither less can be done."""
    largest: list[tuple[str, float]] = field(default_factory=list)
    """The parts of the traffic that move most, in bytes."""
    collectives: dict[str, Collective] = field(default_factory=dict)
    seconds: float | None = None
    """The longest of FLOPs, traffic and networks at the chip's stated rates: an estimate, and a lower bound. None where a
    rate is not known."""
    bound: str = ""
    """Which of them that is."""
    times: dict[str, float] = field(default_factory=dict)
    """Each of them, in seconds; and WAITING, what beginning its collectives one after the other takes by our assumption,
    which is no stated rate and does not count in ``seconds``."""
    remat: str = ""
    """What training recomputes: ``model.remat``, settled."""
    decoding: str = ""
    """How a decoding step attends: ``model.decoding_attention``; where a run would time both ways, that with our kernel."""

    @property
    def total(self) -> float:
        """GiB, all kinds."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return not self.refused and (self.limit is None or self.total <= self.limit)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        needed = {"needed": self.needed._asdict(), "largest": dict(self.largest)}
        return asdict(self) | needed | {"total": self.total, "fits": self.fits}


def measure(job: Job, chip: Chip | None, limit: float | None, nodes: Sequence[int] = ()) -> Needs:
    """Compile one job, or the first of its lighter forms that fits, and read what it needs; ``nodes`` as in ``moved``."""
    needs = _measured(job, chip, limit, nodes)
    while job.lighter is not None and (needs.refused or (limit is not None and needs.total > job.room * limit)):
        job = job.lighter
        needs = _measured(job, chip, limit, nodes)
    return needs


def _measured(job: Job, chip: Chip | None, limit: float | None, nodes: Sequence[int]) -> Needs:
    began = time.perf_counter()
    held = {kind: held_bytes(tree) / GIB for kind, tree in job.held.items()}
    try:
        traced = job.trace()
        compiled = compile_named(traced.lower())
    except jax.errors.JaxRuntimeError as e:
        reason = " ".join(str(e).split())
        if not too_large(e):
            raise
        used = OF_MEMORY.search(reason)
        said = "the compiler wants {} of {}".format(*filter(None, used.groups())) if used else reason[:160]
        return Needs(
            job.name, time.perf_counter() - began, held, limit, refused=said, remat=job.remat, decoding=job.decoding
        )
    except RuntimeError as e:
        if "cuDNN not found" not in str(e):
            raise
        raise InputError(
            "model.attention=cudnn: cuDNN is not installed; install esjax's cuda extra, or choose pallas"
        ) from e
    seconds = time.perf_counter() - began
    m = compiled.memory_analysis()
    # Arguments may take more than their sizes where a device pads them; it is put with the small ones.
    padded = m.argument_size_in_bytes / GIB - sum(held.values())
    memory = held | {"rows": held["rows"] + max(0.0, padded), "work": work_bytes(compiled) / GIB}
    found = moved(compiled.as_text(), nodes, steps=job.name == "decode")
    flops = products(traced.jaxpr.jaxpr) / max(1, jax.sharding.get_mesh().size) + job.kernel_flops
    times = _times(flops, found, chip) if chip else {}
    bound = longest(times)
    return Needs(
        name=job.name,
        compile_seconds=seconds,
        memory=memory,
        limit=limit,
        flops=flops,
        traffic=found.bytes,
        needed=job.needed,
        largest=found.largest(LARGEST),
        collectives=found.collectives,
        seconds=times[bound] if times else None,
        bound=bound,
        times=times,
        remat=job.remat,
        decoding=job.decoding,
    )


def longest(times: dict[str, float]) -> str:
    """Which of a program's times bounds it, without waiting; none of none."""
    return max((k for k in times if k != WAITING), key=lambda k: times[k], default="")


def _times(flops: float, found: Moved, chip: Chip) -> dict[str, float]:
    """Seconds of each; nothing where something needs a rate that is not known."""
    between = sum(c.bytes for kind, c in found.collectives.items() if BETWEEN in kind)
    within = sum(c.bytes for c in found.collectives.values()) - between
    if between and chip.between is None:
        return {}
    sizes = mesh_sizes()
    near = chip.wait(sizes["fsdp"] * sizes["tensor"])
    waits = sum(
        c.count * (BETWEEN_WAIT if BETWEEN in kind else near) * (2 if kind.startswith("all-reduce") else 1)
        for kind, c in found.collectives.items()
    )
    return {
        "FLOPs": flops / chip.flops,
        "memory": found.bytes / chip.hbm_bandwidth,
        "network": within / chip.interconnect,
        "network between": between / chip.between if chip.between else 0.0,
        WAITING: waits,
    }
