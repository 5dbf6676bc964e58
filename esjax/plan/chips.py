"""Stated peak rates of chips, for rooflines: what their vendors document, not what programs reach."""

from __future__ import annotations

import os
from typing import NamedTuple

from esjax.errors import InputError

GIB = 2**30
HOP, SWITCH, BETWEEN = 1e-6, 5e-6, 12e-6  # seconds: a torus' neighbour, a node's switch, another slice or node
GPU_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"


class Chip(NamedTuple):
    """One JAX device: a whole chip, but half a TPU7x, whose chips are two devices each."""

    name: str
    hbm: float
    """Bytes of main memory as documented; programs get a little less."""
    hbm_bandwidth: float
    """Bytes a second, reading and writing together."""
    flops: float
    """FLOP/s of dense bfloat16 products."""
    interconnect: float
    """Bytes a second that it can send over all its links to others in its slice (TPU) or node (GPU): one way. Vendors
    mostly state both ways together, twice this."""
    between: float | None = None
    """Bytes a second that it can send to other slices or nodes; None where that is not documented."""
    torus: int = 0
    """Dimensions of the torus that a slice is; 0 where a switch joins a node's devices."""

    def wait(self, devices: int) -> float:
        """Seconds that a small gather over so many devices of a slice or node takes: our assumption, as no vendor states it.

        A microsecond for each neighbour on the way around half of each ring of the torus, or 5 through a switch.
        """
        if devices == 1:
            return 0.0
        return HOP * self.torus * devices ** (1 / self.torus) / 2 if self.torus else SWITCH


# TPUs: Google Cloud's TPU documentation, by page. Its GB of memory are taken for GiB, as its newer pages write them. libtpu
# leaves programs 30.75 of v4's 32 GiB, 15.75 of v5e's 16, 31.25 of v6e's 32, and 94.75 of a TPU7x device's 96. The data
# centre's network: page "TPU7x" has v5p's, v6e's and its own by the chip (50, 100, 100 Gb/s); page "TPU v5e" 6.4 Tb/s for 256.
# GPUs: NVIDIA's data sheets, by product. Its GB of memory are GiB but for what is reserved; dense rates are half of those
# "with sparsity". Between nodes as in DGX systems: a ConnectX-7 of 400 Gb/s a GPU, a ConnectX-6 of 200 Gb/s an A100.
CHIPS = {
    # Page "TPU v4": memory, bandwidth, FLOP/s. Links: 6 of 50 GB/s each way, Jouppi et al. 2023 (arXiv 2304.01433).
    "v4": Chip("TPU v4", 32 * GIB, 1200e9, 275e12, 300e9, torus=3),
    # Page "TPU v5e": 819 GB/s of memory, links 400 GB/s both ways (also as 1600 Gb/s one way).
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 197e12, 200e9, 3.125e9, torus=2),
    # Page "TPU v5p": 2765 GB/s of memory, links 1200 GB/s both ways (also as 4800 Gb/s one way).
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 459e12, 600e9, 6.25e9, torus=3),
    # Pages "TPU v6e" and "TPU7x": 1638 GB/s of memory, links 800 GB/s both ways.
    "v6e": Chip("TPU v6e", 32 * GIB, 1638e9, 918e12, 400e9, 12.5e9, torus=2),
    # Page "TPU7x (Ironwood)", halved: 192 GiB, 7380 GB/s, 2307 TFLOP/s, links 1200 GB/s both ways.
    "7x": Chip("TPU7x, one of a chip's two devices", 96 * GIB, 3690e9, 1153.5e12, 300e9, 6.25e9, torus=3),
    # "A100 Tensor Core GPU", 80GB SXM: NVLink 600 GB/s both ways.
    "a100": Chip("NVIDIA A100 80GB SXM", 80 * GIB, 2039e9, 312e12, 300e9, 25e9),
    # "H100 Tensor Core GPU", SXM: 1979 TFLOP/s with sparsity, NVLink 900 GB/s both ways.
    "h100": Chip("NVIDIA H100 SXM", 80 * GIB, 3350e9, 989e12, 450e9, 50e9),
    # "H200 Tensor Core GPU", SXM: as H100 but for its memory.
    "h200": Chip("NVIDIA H200 SXM", 141 * GIB, 4800e9, 989e12, 450e9, 50e9),
    # "HGX B200", an eighth: 36 PFLOP/s with sparsity. "DGX B200", likewise: 1440 GB, 64 TB/s, NVLink 14.4 TB/s both ways.
    "b200": Chip("NVIDIA B200", 180 * GIB, 8000e9, 2250e12, 900e9, 50e9),
}
# JAX's device_kind; a TPU's comes in two spellings.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "7x",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}


def gpu_share() -> float:
    """The part of a GPU's memory that JAX takes for programs; the rest is for what CUDA's libraries and NCCL want.

    Raises InputError for what is no part.
    """
    given = os.environ.get(GPU_SHARE, "0.75")  # JAX's default
    try:
        return float(given)
    except ValueError as e:
        raise InputError(f"{GPU_SHARE}={given}: give a part of a GPU's memory, such as 0.9") from e


def chip_of(device_kind: str) -> Chip:
    """The chip behind a JAX device's ``device_kind``. Raises InputError naming those that are known."""
    if device_kind not in KINDS:
        raise InputError(f"device kind {device_kind!r}: its rates are not known; known are {', '.join(KINDS)}")
    return CHIPS[KINDS[device_kind]]
