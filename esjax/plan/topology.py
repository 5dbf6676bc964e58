"""Devices by the name of their slice or node, without one at hand: programs can be compiled for them, not run."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from esjax.errors import InputError


class Gpu(NamedTuple):
    """What the compiler asks about a GPU; figures as the OpenXLA project records them of real ones."""

    kind: str
    """JAX's device_kind."""
    capability: int
    """CUDA's compute capability, its major number."""
    cores: int
    """Streaming multiprocessors."""
    float_units: int
    """A core's, for float32."""
    shared: int
    """Bytes of a core's shared memory."""
    cache: int
    """Bytes of the second-level cache."""
    ghz: float
    memory: int
    bandwidth: int
    """Bytes a second."""


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 41943040, 1.41, 85100068864, 2039040000000),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 52428800, 1.98, 84942979072, 3352320000000),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 233472, 52428800, 1.98, 151397597184, 4800000000000),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 233472, 132644864, 1.965, 191514411008, 7672320000000),
}


def topology_devices(name: str, slices: int = 1) -> list[Any]:
    """The devices of ``slices`` slices of TPUs such as v5e:4x4, or nodes of GPUs such as h100:8.

    Raises InputError for one that is not known, or where the compiler for it is not installed.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back from it
    chip, _, count = name.partition(":")
    return _gpus(name, GPUS[chip], count, slices) if chip in GPUS else _tpus(name, slices)


def _tpus(name: str, slices: int) -> list[Any]:
    # Nothing is run, so no TPU has to be asked for or kept from others, and libtpu need not say that it finds none.
    for variable, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(variable, value)
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):
        more["chip_config_name"] = "megacore"  # one device a chip, as programs see it
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **more).devices)
    except Exception as e:  # every kind, from a missing libtpu to a name it does not know
        raise InputError(
            f"topology {name}: {_reason(e)}; give one like v5e:4x4 (esjax's tpu extra) or h100:8 (its cuda extra)"
        ) from e


def _gpus(name: str, gpu: Gpu, count: str, nodes: int) -> list[Any]:
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"topology {name}: give a node's number of GPUs, such as {name.partition(':')[0]}:8")
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{gpu.kind}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {gpu.capability} }}
          core_count: {gpu.cores} fpus_per_core: {gpu.float_units} clock_rate_ghz: {gpu.ghz}
          device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.cache}
          shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
          shared_memory_per_block: 49152
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}"""
    try:
        made = topologies.get_topology_desc(
            name, platform="cuda", target_config=target, topology=f"1x{nodes}x{int(count)}"
        )
    except Exception as e:  # every kind, most often a missing plugin
        raise InputError(f"topology {name}: {_reason(e)}; install esjax's cuda extra") from e
    return list(made.devices)


def _reason(e: Exception) -> str:
    return " ".join(str(e).split())[:200]
