"""The training step on a mesh: the same numbers on four simulated devices, and programs compiled for TPUs not at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esjax.config import InputError
from esjax.mesh import RULES, spec, topology_mesh

# A process of its own, for the number of devices is fixed when JAX starts. Prints, for each mesh, the first step's metrics
# and the trained adapter's values.
STEP = """
import contextlib, json, sys
import jax, numpy as np, optax
from esjax import rows
from esjax.bench.workload import parts
from esjax.config import DpoSettings
from esjax.mesh import batch_groups, make_mesh, placed
from esjax.model.decoder import Execution
from esjax.model.families import Architecture
from esjax.model.layers import LINEARS, Lora
from esjax.train.losses import Pairs, dpo_loss
from esjax.train.step import make_step

arch = Architecture("llama", 96, 64, 2, 4, 2, 16, 96, 1e-5, 1e4, None, False, False, 512)
lora = Lora(LINEARS, 4, 2.0)
rng = np.random.default_rng(0)
ids = lambda n: [int(i) for i in rng.integers(0, 96, n)]
def row():
    d = ids(int(rng.integers(8, 24)))
    return rows.pack([rows.trunk_with_replies(d, [(n, ids(int(rng.integers(1, 7)))) for n in (5, 5, len(d), len(d))])], 64)
batch = rows.stack([row() for _ in range(8)])
if sys.argv[2] == "broken":
    batch = batch._replace(limit=batch.limit - (batch.limit > 0))
extra = Pairs(rng.normal(size=(8, 1, 2, 2)).astype(np.float32), np.ones((8, 1, 2), bool))
definition, make = parts(arch, lora, np.dtype("float32"))
out = []
for shape in json.loads(sys.argv[1]):
    trained, frozen = make()
    leaves, tree = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    trained = jax.tree.unflatten(tree, [0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])
    mesh = make_mesh(jax.devices()[: np.prod(shape)], *shape) if shape else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        share = 4 // batch_groups()
        targets = max(int((w != 0).sum()) for w in np.split(batch.weight, 8 // share))
        how = Execution(sys.argv[3], "branched", "full", interpret=True)
        tx = optax.sgd(1.0)
        step = make_step(definition, dpo_loss(DpoSettings()), tx, 4, targets, how)
        if mesh:
            where = lambda t: jax.tree.map(lambda s: s.sharding, placed(jax.eval_shape(lambda: t), mesh))
            trained, frozen = (jax.device_put(t, where(t)) for t in (trained, frozen))
        trained, _, metrics = step(trained, tx.init(trained), frozen, batch, extra)
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(trained)])
    out.append([float(metrics["loss"]), float(metrics["grad_norm"]), values.tolist()])
print(json.dumps(out))
"""


def steps(shapes: list[list[int]], path: str, batch: str = "good") -> list[Any]:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", STEP, json.dumps(shapes), batch, path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("path", ["chunked", "splash"])
def test_a_step_on_four_devices_is_that_on_one(path: str) -> None:
    """Two micro-batches of four rows; the reference is the dense path on one device."""
    (expected,) = steps([[]], "dense")
    (broken,) = steps([[]], "dense", "broken")

    def apart(a: Any, b: Any) -> float:
        loss, norm = (abs(x - y) / abs(y) for x, y in zip(a[:2], b[:2], strict=True))
        moved = np.linalg.norm(np.subtract(a[2], b[2])) / np.linalg.norm(b[2])
        return float(max(loss, norm, moved))

    for got in steps([[1, 4, 1], [2, 2, 1], [1, 2, 2], [4, 1, 1]], path):
        assert apart(got, expected) <= 1e-5
    assert apart(broken, expected) > 1e-3


def test_every_axis_has_one_rule() -> None:
    assert tuple(spec(("layers", "embed", "mlp"))) == (None, "fsdp", "tensor")
    assert tuple(spec(("batch", None, "heads"))) == (("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError):
        spec(("width",))
    # No parameter's two axes may want the same devices.
    for axes in (("embed", "heads"), ("embed", "mlp"), ("vocab", "embed"), ("embed", "lora"), ("lora", "mlp")):
        wanted = [RULES[a] for a in axes if RULES[a] is not None]
        assert len(set(wanted)) == len(wanted)


# --- programs for TPUs ------------------------------------------------------------------------------------------------


def bench(*options: str) -> list[dict[str, Any]]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "esjax", "bench", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_the_steps_compile_for_a_tpu(tmp_path: Path) -> None:
    """A small model with heads of 128, DPO and SFT, LoRA and all parameters; splash is in the programs."""
    pytest.importorskip("libtpu")
    file = Path(__file__).parent.parent / "configs" / "workload.json"
    work = json.loads(file.read_text())["tiny"]
    work["dtype"] = "bfloat16"
    work["model"] |= {"head_dim": 128, "hidden_size": 256, "vocab_size": 1024}
    work["dpo"]["pairs"] = work["sft"]["batch"] = 8
    (tmp_path / "workload.json").write_text(json.dumps({"small": work}))
    options = ("--workload", str(tmp_path / "workload.json"), "--profile", "small", "--topology", "v5e:2x2")
    made = bench(*options, "--tasks", "dpo,sft")
    assert [(m["task"], m["variant"]) for m in made] == [("dpo", "lora"), ("sft", "lora"), ("sft", "full")]
    assert all(m["kernels"] >= 3 and 0 < m["mem_gib"] < 1 for m in made)  # forward, dq, dkv


def test_the_sampler_compiles_for_a_tpu(tmp_path: Path) -> None:
    """Both programs, with two devices to a layer; a number that does not divide the heads is refused."""
    pytest.importorskip("libtpu")
    file = Path(__file__).parent.parent / "configs" / "workload.json"
    work = json.loads(file.read_text())["tiny"]
    work["dtype"] = "bfloat16"
    work["model"] |= {"head_dim": 128, "hidden_size": 256, "vocab_size": 1024}
    (tmp_path / "workload.json").write_text(json.dumps({"small": work}))
    options = ("--workload", str(tmp_path / "workload.json"), "--profile", "small", "--topology", "v5e:2x2")
    made = bench(*options, "--tasks", "sample,round", "--tensor", "2")
    assert [m["task"] for m in made] == ["sample", "round"]
    for m in made:
        assert m["mesh"] == {"data": 2, "fsdp": 1, "tensor": 2}
        assert all(
            0 <= m[f"{program}_mem_gib"] < 1 and m[f"{program}_compile_s"] > 0 for program in ("prefill", "decode")
        )
    with pytest.raises(AssertionError, match="--tensor 4: it must divide the 4 devices and the 2 key/value heads"):
        bench(*options, "--tasks", "sample")


@pytest.mark.slow
def test_the_sampler_of_an_8b_model_fits_four_small_chips() -> None:
    pytest.importorskip("libtpu")
    for made in bench("--profile", "8b", "--tasks", "sample,round", "--topology", "v5e:2x2"):
        print(made)
        assert max(made["prefill_mem_gib"], made["decode_mem_gib"]) < 16


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "hbm"), [("v5e:4x4", 16), ("v5p:2x2x2", 95)])
def test_the_steps_of_an_8b_model_compile(topology: str, hbm: int) -> None:
    pytest.importorskip("libtpu")
    for task in ("dpo", "sft"):
        for made in bench("--profile", "8b", "--tasks", task, "--topology", topology):
            print(made)
            assert made["kernels"] >= 3
            assert made["variant"] == "full" or made["mem_gib"] < hbm


def test_an_unknown_topology_is_refused() -> None:
    with pytest.raises(InputError, match=r"topology v9z:1x1: .*give one like v5e:4x4"):
        topology_mesh("v9z:1x1", 1)
