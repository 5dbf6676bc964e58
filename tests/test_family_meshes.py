"""What families and bases in few bits add to the decoder lies right on a mesh: eight devices compute what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import llama, save
from oracles import worst

from esjax.errors import InputError
from esjax.model import weights
from esjax.model.families import read_architecture

CASES = [  # windows, soft caps and norms after; joined layers; a norm over all heads; layers that turn nothing; few bits
    ("gemma2", "plain"),
    ("phi3-window", "plain"),
    ("olmo2", "plain"),
    ("smollm3", "plain"),
    ("qwen2", "int8"),
    ("qwen2", "nf4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kernels"), CASES)
def test_eight_devices_compute_what_one_does(name: str, kernels: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / name)
    linears = read_architecture(folder).linears
    jobs: list[Any] = [[str(folder), shape, linears, kernels] for shape in ([], [2, 2, 2])]
    jobs.append([str(folder), [], linears, "int8" if kernels != "int8" else "plain"])  # control: another model
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("family_mesh_numbers.py")), *map(json.dumps, jobs)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, eight, other = (json.loads(line) for line in done.stdout.splitlines())

    def flat(found: dict[str, Any]) -> list[float]:
        return [x for values in found["score"] for x in values]

    assert worst(flat(eight), flat(one)) <= 1e-4
    assert eight["tokens"] == one["tokens"]
    assert worst(flat(other), flat(one)) > 1e-3


def test_a_mesh_that_would_cut_a_byte_of_nf4_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 devices divide a width of 64, but not the 32 bytes in which nf4 keeps its numbers."""
    monkeypatch.setattr(weights, "mesh_sizes", lambda: {"data": 1, "fsdp": 64, "tensor": 1})
    arch = llama(1024, 64, 2, 8, 4, 16, 96)
    weights.check_divisible(arch)
    with pytest.raises(InputError, match=r"mesh\.fsdp=64 does not divide the model's 32 pairs of the width"):
        weights.check_divisible(replace(arch, kernels="nf4"))
