"""``esjax plan``: does a run fit the hardware, before anybody pays for it; and if not, which change would make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.table import Table

from esjax.errors import InputError
from esjax.model.decoder import Execution
from esjax.model.families import Architecture
from esjax.model.weights import Choice, check_divisible, choose_execution, compute_dtype
from esjax.plan.chips import GIB, Chip, chip_of, gpu_share
from esjax.plan.jobs import Name, jobs
from esjax.plan.measure import Needs, measure
from esjax.plan.topology import topology_devices
from esjax.run.progress import say
from esjax.runtime.mesh import check_batches, make_mesh, mesh_shape
from esjax.settings.schema import Config

Change = dict[str, Any]  # settings, by dotted name


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for."""

    name: str
    devices: Sequence[Any]
    platform: str
    chip: Chip | None  # None: rates unknown, as of a CPU
    memory: float | None  # GiB a device

    @classmethod
    def of(cls, topology: str | None, slices: int) -> Hardware:
        """Devices by the topology's name, or those at hand. Raises InputError."""
        if topology is not None:
            devices = topology_devices(topology, slices)
            platform = devices[0].platform
            name = topology if slices == 1 else f"{slices} x {topology}"
        else:
            devices, platform = jax.devices(), jax.default_backend()
            name = f"{len(devices)} x {devices[0].device_kind}"
        if platform == "cpu":  # all devices share the machine's memory
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
            return cls(name, devices, platform, None, whole / len(devices))
        chip = chip_of(devices[0].device_kind)
        share = gpu_share() if platform == "gpu" else 1.0
        return cls(name, devices, platform, chip, share * chip.hbm / GIB)

    def nodes(self, mesh: Mesh) -> list[int]:
        """Each partition's node, where GPUs are on several; of TPUs the compiled text tells."""
        found = [d.process_index for d in mesh.devices.flat]
        return found if self.platform == "gpu" and len(set(found)) > 1 else []


def plan(config: Config, arch: Architecture, hardware: Hardware, names: Sequence[Name]) -> Iterator[Needs]:
    """What each of the named programs of a run needs. Raises InputError where the mesh does not divide the sizes."""
    arch = replace(arch, kernels=config.model.base)
    dtype, how = _execution(config, hardware, arch)
    mesh = make_mesh(hardware.devices, mesh_shape(config.mesh, len(hardware.devices)))
    with jax.set_mesh(mesh):
        check_divisible(arch)
        check_batches(config)
        for job in jobs(config, arch, how, dtype, hardware.platform):
            if job.name in names:
                yield measure(job, hardware.chip, hardware.memory, hardware.nodes(mesh))


def _execution(config: Config, hardware: Hardware, arch: Architecture) -> tuple[jnp.dtype, Execution]:
    dtype = compute_dtype(config.model.dtype, hardware.platform)
    return dtype, choose_execution(Choice.of(config.model), dtype, arch, hardware.platform)


# --- what would make it fit ------------------------------------------------------------------------------------------


def remedies(
    config: Config, arch: Architecture, hardware: Hardware, names: Sequence[Name], failed: Sequence[Name], most: int
) -> Iterator[tuple[Change, list[Needs]]]:
    """The nearest change under which the programs ``failed`` fit, and the other ``names`` still do; ``most`` are tried."""
    single = list(_changes(config, arch, hardware, failed))
    tried = 0
    for size in (1, 2, 3):
        for parts in combinations(single, size):
            change: Change = {k: v for part in parts for k, v in part.items()}
            if len(change) < sum(map(len, parts)):
                continue  # two of them change the same setting
            if tried == most:
                return
            tried += 1
            say(f"  trying {words(change)}")
            # Another mesh is another program for all; any other change makes no program larger.
            others = [n for n in names if n not in failed and any(k.startswith("mesh.") for k in change)]
            try:
                now, found = changed(config, change), []
                rest = plan(now, arch, hardware, others) if others else ()
                for needs in chain(plan(now, arch, hardware, failed), rest):
                    found.append(needs)
                    if not needs.fits:
                        break
            except InputError as e:
                say(f"    not possible: {e}")
                continue
            if all(n.fits for n in found):
                yield change, found
                return


def _changes(config: Config, arch: Architecture, hardware: Hardware, failed: Sequence[Name]) -> Iterator[Change]:
    """Changes of one kind each, from those that cost least to those that cost most."""
    devices = len(hardware.devices)
    data, fsdp, tensor = mesh_shape(config.mesh, devices)
    trains = [n for n in ("sft", "dpo") if n in failed]
    rows = data * fsdp
    if data > 1 or data * fsdp * tensor < devices:  # every device holds a share of the weights
        yield {"mesh.data": 1, "mesh.fsdp": devices // tensor}
    if trains and config.model.remat in ("none", "dots"):
        yield {"model.remat": "full"}
    smaller: Change = {}
    for name, s in (("sft", config.sft), ("dpo", config.dpo)):
        fewer = [n for n in range(rows, max(rows, s.micro_rows // 4) + 1, rows) if s.batch_rows % n == 0]
        if (name in trains or "score" in failed) and fewer and fewer[-1] < s.micro_rows:
            smaller[f"{name}.micro_rows"] = fewer[-1]
    if smaller:
        yield smaller
    if "prefill" in failed or "decode" in failed:
        if _execution(config, hardware, arch)[1].weights == "apart":
            yield {"model.decoding_weights": "shared"}
        if config.evolve.batch > rows:
            yield {"evolve.batch": max(rows, config.evolve.batch // 4 // rows * rows)}
        if config.model.cache_dtype != "float8_e4m3fn":
            yield {"model.cache_dtype": "float8_e4m3fn"}
    wider = 2 * tensor
    while wider <= devices and arch.kv_heads % wider == 0 and fsdp % (wider // tensor) == 0:
        yield {"mesh.tensor": wider, "mesh.fsdp": fsdp * tensor // wider}
        wider *= 2
    if trains and config.model.remat == "full":
        yield {"model.remat": "offload"}


def changed(config: Config, change: Change) -> Config:
    """The config with these settings."""
    tree = config.model_dump()
    for key, value in change.items():
        *sections, last = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[last] = value
    return Config.model_validate(tree).validate_together()


def words(change: Change) -> str:
    """As on the command line."""
    return " ".join(f"--{k} {v}" for k, v in change.items())


# --- tables ----------------------------------------------------------------------------------------------------------


KINDS = ("base", "adapter", "optimiser", "cache", "constraint", "rows", "work")


def table(title: str, found: Sequence[Needs], lanes: int) -> Table:
    """All programs, a column each."""
    out = Table(title=title, title_justify="left")
    out.add_column("a device")
    for n in found:
        out.add_column(n.name + (" (a step)" if n.name == "decode" else ""), justify="right")
    for kind in (k for k in KINDS if any(k in n.memory for n in found)):
        out.add_row(f"{kind}, GiB", *(f"{n.memory[kind]:.2f}" if kind in n.memory else "" for n in found))
    limit = next((n.limit for n in found if n.limit), None)
    of = f" of {limit:.0f}" if limit else ""
    out.add_row(f"all{of}, GiB", *(f"{n.total:.2f}" if n.fits else "does not fit" for n in found))
    out.add_row("TFLOP", *("" if n.refused else f"{n.flops / 1e12:.3g}" for n in found))
    out.add_row(
        "  needed by formula", *("" if n.refused else _against(n.needed.flops / 1e12, n.flops / 1e12) for n in found)
    )
    out.add_row("memory traffic, GiB", *("" if n.refused else f"{n.traffic / GIB:.3g}" for n in found))
    out.add_row(
        "  needed by formula", *("" if n.refused else _against(n.needed.bytes / GIB, n.traffic / GIB) for n in found)
    )
    sent = list(dict.fromkeys(k for n in found for k in n.collectives))
    for kind in sent:
        cells = [n.collectives.get(kind) for n in found]
        out.add_row(f"{kind}, sent", *(f"{c.count} x, {c.bytes / 2**20:.4g} MiB" if c else "" for c in cells))
    if any(n.remat for n in found):
        out.add_row("model.remat", *(n.remat for n in found))
    if any(n.decoding not in ("", "plain") for n in found):
        out.add_row("model.decoding_attention", *(n.decoding for n in found))
    out.add_row("compiled in, s", *(f"{n.compile_seconds:.0f}" for n in found))
    out.add_row(
        "estimate by stated rates",
        *(f"{1e3 * n.seconds:.3g} ms, {n.bound}" if n.seconds is not None else "-" for n in found),
    )
    decode = next((n for n in found if n.name == "decode" and n.seconds), None)
    if decode is not None and decode.seconds is not None:
        out.caption = f"{lanes} replies at once: at most {lanes / decode.seconds:,.0f} tokens/s by that estimate"
    return out


def traffic(found: Sequence[Needs]) -> Table:
    """The parts of the model whose bytes are most of each program's memory traffic."""
    out = Table(title="most of the memory traffic, GiB a device", title_justify="left")
    for n in found:
        out.add_column(n.name + (" (a step)" if n.name == "decode" else ""))
    for rank in range(max(len(n.largest) for n in found)):
        out.add_row(*(_part(*n.largest[rank]) if rank < len(n.largest) else "" for n in found))
    return out


def _against(needed: float, done: float) -> str:
    return f"{needed:.3g} ({done / needed:.2f}x)" if needed else ""


def _part(name: str, size: float) -> str:
    return f"{size / GIB:.2g} {name}"
