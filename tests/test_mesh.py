"""Meshes: 8 simulated devices compute what one does, every array lies where it should, and what does not divide is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import save_tiny_model, tiny_overrides

from esjax.errors import InputError
from esjax.plan.topology import topology_devices
from esjax.runtime.mesh import AXES, make_mesh, mesh_shape, spec
from esjax.settings.schema import MeshSettings

Mesh = tuple[int, int, int]  # data, fsdp, tensor
MESHES: list[Mesh] = [(2, 2, 2), (1, 8, 1), (1, 1, 4)]
EACH = [MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])]  # the first has all axes
Numbers = dict[str, Any]


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with as many key/value heads as a mesh with tensor 4 wants."""
    folder = tmp_path_factory.mktemp("four-heads")
    save_tiny_model(folder, kv_heads=4)
    return folder


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


@pytest.fixture(scope="module")
def numbers(four_heads: Path, request: pytest.FixtureRequest) -> dict[str, Numbers]:
    """What mesh_numbers.py finds: on one device, by wrong rows on one device, and on each mesh that is tested."""
    # Which of the slow ones were asked for.
    wanted = {str(_parameters(i)["mesh"]) for i in request.session.items if "mesh" in _parameters(i)}
    jobs: dict[str, tuple[list[int], dict[str, Any]]] = {
        "one": ([], {}),
        "broken": ([], {"broken": True, "what": ["sft", "dpo", "score"]}),
        **{str(m): (list(m), {"weights": "shared"}) for m in MESHES if m == MESHES[0] or str(m) in wanted},
        "apart": ([2, 2, 2], {"what": ["sample"]}),
        "shared": ([], {"what": ["sample"], "weights": "shared"}),
        "triton": ([2, 2, 2], {"what": ["sample"], "decoding": "triton"}),
        "mosaic": ([2, 2, 2], {"what": ["sample"], "decoding": "mosaic"}),
        "timed": ([2, 2, 2], {"what": ["sample"], "decoding": "auto"}),
        "splash": ([2, 2, 2], {"what": ["dpo"], "attention": "splash"}),
        "unrolled": ([2, 2, 2], {"what": ["dpo"], "unroll": True}),
    }
    command = [sys.executable, str(Path(__file__).with_name("mesh_numbers.py")), str(four_heads)]
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiled fast rather than well
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [*command, *(json.dumps(j) for j in jobs.values())],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


def apart(a: Any, b: Any) -> float:
    """How far two arrays are apart, relative to their size."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def flat(lists: list[list[float]]) -> list[float]:
    return [x for values in lists for x in values]


@pytest.mark.parametrize("mesh", EACH, ids=str)
def test_training_and_scoring_agree_with_one_device(numbers: dict[str, Numbers], mesh: Mesh) -> None:
    got, expected, broken = numbers[str(mesh)], numbers["one"], numbers["broken"]
    for task in ("sft", "dpo"):
        for mine, theirs in zip(got[task]["metrics"], expected[task]["metrics"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        assert apart(got[task]["adapter"], expected[task]["adapter"]) < 1e-5
        assert apart(broken[task]["adapter"], expected[task]["adapter"]) > 1e-4
        assert broken[task]["metrics"][0]["loss"] != pytest.approx(expected[task]["metrics"][0]["loss"], rel=5e-5)
    assert apart(flat(got["score"]), flat(expected["score"])) < 1e-5
    assert apart(flat(broken["score"]), flat(expected["score"])) > 1e-3


@pytest.mark.parametrize("way", ["splash", "unrolled"])
def test_other_ways_to_train_on_a_mesh_train_alike(numbers: dict[str, Numbers], way: str) -> None:
    """A TPU's kernel; and layers without a loop, whose last one computes targets alone, as on a GPU."""
    assert apart(numbers[way]["dpo"]["adapter"], numbers["one"]["dpo"]["adapter"]) < 1e-5
    assert apart(numbers["broken"]["dpo"]["adapter"], numbers["one"]["dpo"]["adapter"]) > 1e-4


@pytest.mark.parametrize("which", [str(MESHES[0]), "apart", "shared", "triton", "mosaic", "timed"])
def test_greedy_replies_are_those_of_one_device(numbers: dict[str, Numbers], which: str) -> None:
    """Forty prompts in sixteen lanes, with shared beginnings; training's arrays read in place, or layers of their own; by a GPU's
    or TPU's kernel, interpreted, and by the faster of one and XLA's products, which every device of a mesh takes."""
    got, expected = numbers[which]["sample"], numbers["one"]["sample"]
    assert got["attends"] == (which if which in ("triton", "mosaic") else "plain")  # interpreted, it is slower
    assert got["tokens"] == expected["tokens"]
    assert len({tuple(t) for t in expected["tokens"]}) > 20
    assert apart(flat(got["logprobs"]), flat(expected["logprobs"])) < 1e-5


def parts(described: dict[str, list[list[int]]]) -> dict[str, int]:
    """Path -> over how many devices an array is split."""
    return {path: math.prod(whole) // math.prod(part) for path, (whole, part) in described.items()}


@pytest.mark.parametrize("mesh", EACH, ids=str)
def test_every_array_lies_where_it_should(numbers: dict[str, Numbers], mesh: Mesh) -> None:
    """Parameters, adapter, optimiser state, rows, activations and cache: nothing is repeated that a rule splits."""
    data, fsdp, tensor = mesh
    got = numbers[str(mesh)]
    for path, over in parts(got["base"]).items():
        assert over == (fsdp if "norm" in path else fsdp * tensor), path
    # A [R, in] of a layer is split along its input, B [R, out] along its output; the model's width lies over fsdp.
    from_width = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    for task in ("sft", "dpo"):
        where = got[task]["placed"]
        for path, over in {**parts(where["adapter"]), **parts(where["optimiser"])}.items():
            if "lora" in path:
                wide = any(name in path for name in from_width) == ("lora_a" in path)
                assert over == (fsdp if wide else tensor), path
            else:
                assert path.endswith("count"), path  # of the optimiser's steps
        assert sum("lora" in path for path in where["optimiser"]) == 2 * len(where["adapter"])  # both moments
        assert set(parts(where["rows"]).values()) == {data * fsdp}
        if data * fsdp > 1:
            assert got[task]["activations"] == {"8": False, str(8 // (data * fsdp)): True}
    for when in ("before", "after"):
        assert set(parts(got["sample"]["cache"][when]).values()) == {data * fsdp * tensor}
    assert set(parts(numbers["one"]["base"]).values()) == {1}


def test_axes_of_one_array_may_not_want_the_same_devices() -> None:
    assert tuple(spec(("layers", "embed", "mlp"))) == (None, "fsdp", "tensor")
    assert tuple(spec(("batch", None, "heads"))) == (("data", "fsdp"), None, "tensor")
    with pytest.raises(KeyError):
        spec(("width",))
    with pytest.raises(ValueError, match=r"\('batch', 'embed'\) collide"):
        spec(("batch", "embed"))
    with pytest.raises(ValueError, match="collide"):
        spec(("heads", "mlp"))


# --- making a mesh ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "count", "shape"),
    [
        ((1, -1, 1), 8, (1, 8, 1)),
        ((2, -1, 2), 8, (2, 2, 2)),
        ((1, 1, 1), 8, (1, 1, 1)),
        ((1, -1, 1), 1, (1, 1, 1)),
        ((2, 2, 1), 8, (2, 2, 1)),
    ],
)
def test_the_rest_of_the_devices_goes_to_fsdp(settings: Mesh, count: int, shape: Mesh) -> None:
    assert mesh_shape(MeshSettings(data=settings[0], fsdp=settings[1], tensor=settings[2]), count) == shape


@pytest.mark.parametrize(
    ("settings", "count", "message"),
    [
        ((3, -1, 1), 8, "8 devices cannot be divided so"),
        ((4, -1, 4), 8, "8 devices cannot be divided so"),
        ((2, 8, 1), 8, "takes 16 devices of 8; lower one of them"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(settings: Mesh, count: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mesh_shape(MeshSettings(data=settings[0], fsdp=settings[1], tensor=settings[2]), count)


def test_data_spans_slices_else_fsdp() -> None:
    """Two slices of four TPUs: neighbours on the tensor and fsdp axes are of one slice."""
    pytest.importorskip("libtpu")
    devices = topology_devices("v5e:2x2", slices=2)

    def slices(mesh: jax.sharding.Mesh, axis: str) -> int:
        """Most slices that a line of devices along an axis touches."""
        index = np.vectorize(lambda d: d.slice_index)(mesh.devices)
        lines = np.moveaxis(index, AXES.index(axis), 0).reshape(mesh.shape[axis], -1)
        return max(len(set(line)) for line in lines.T)

    assert len(devices) == 8
    by_data = make_mesh(devices, (2, 2, 2))
    assert [slices(by_data, a) for a in AXES] == [2, 1, 1]
    by_fsdp = make_mesh(devices, (1, 4, 2))
    assert [slices(by_fsdp, a) for a in AXES] == [1, 2, 1]
    with pytest.raises(InputError, match="must be a multiple of 2"):
        make_mesh(devices, (1, 1, 8))


@dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "none"


def test_hosts_between_which_the_network_is_slow_are_spanned_by_data() -> None:
    fake = [FakeDevice(i, i // 4) for i in range(8)]
    mesh = make_mesh(fake, (2, 2, 2))
    assert [{d.process_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(InputError, match="leaves 4 idle on other hosts"):
        make_mesh(fake, (1, 2, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh.tensor", "4"], "mesh.tensor=4 does not divide the model's 2 key/value heads: choose a divisor of 2"),
        (
            ["--mesh.fsdp", "8", "--sft.micro_rows", "4", "--sft.batch_rows", "8"],
            "sft.micro_rows=4 cannot be split over mesh.data x mesh.fsdp = 8",
        ),
        (["--mesh.fsdp", "16"], "takes 16 devices of 8"),
    ],
    ids=["heads", "rows", "devices"],
)
def test_sizes_that_do_not_divide_end_the_command(
    tiny_folder: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    command = [sys.executable, "-m", "esjax", "sft", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder)]
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiled fast rather than well
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr


def test_lanes_that_do_not_divide_end_the_command(four_heads: Path, tmp_path: Path) -> None:
    """The sampler's rows are split as training's are."""
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "a", "messages": [{"role": "user", "content": "Hi."}]}))
    command = [sys.executable, "-m", "esjax", "sample", "--model", str(four_heads)]
    files = ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiled fast rather than well
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    options = ["--mesh.fsdp", "8", "--reply.batch", "4", "--reply.max_tokens", "4"]
    done = subprocess.run([*command, *files, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        "reply.batch)=4 cannot be split over mesh.data x mesh.fsdp = 8 devices: choose a multiple of 8" in done.stderr
    )


def test_an_unknown_topology_is_refused() -> None:
    with pytest.raises(InputError, match=r"topology v9z:1x1: .*give one like v5e:4x4"):
        topology_devices("v9z:1x1")
