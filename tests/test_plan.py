"""``esjax plan``: its numbers are those of formulas, on simulated devices, for TPUs and for GPUs; bad input."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_overrides
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from esjax.cli import main
from esjax.errors import InputError
from esjax.model.decoder import Decoder
from esjax.model.families import Architecture, architecture, key_table, read_architecture
from esjax.model.linear import linear_sizes
from esjax.plan.chips import CHIPS, GIB
from esjax.plan.jobs import Job, sampler_shapes
from esjax.plan.measure import Needs, measure
from esjax.plan.needed import Needed
from esjax.plan.shape import shape_of
from esjax.plan.topology import topology_devices
from esjax.runtime.mesh import make_mesh
from esjax.settings.files import bundled, load
from esjax.settings.schema import Config

Mesh = tuple[int, int, int]  # data, fsdp, tensor
PROGRAMS = ["prefill", "decode", "score", "sft", "dpo"]

# --- numbers are those of formulas ------------------------------------------------------------------------------------

SMALL = {
    "data.window": 256,
    "sft.row_length": 256,
    "dpo.row_length": 192,
    "evolve.context_tokens": 96,
    "evolve.draft.max_tokens": 32,
    "evolve.refinement.max_tokens": 32,
    "reply.max_tokens": 32,
    "sft.batch_rows": 8,
    "sft.micro_rows": 8,
    "dpo.batch_rows": 8,
    "dpo.micro_rows": 8,
    "evolve.batch": 16,
    "model.remat": "full",
}
SETTINGS = [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]
RANK, LANES = 4, 16
SCRIPT = """
import contextlib, io, json, sys
from esjax.cli import main
for line in sys.argv[1:]:
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(json.loads(line))
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, out.getvalue(), error.getvalue()]), flush=True)
"""


class Told(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    error: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.error
        return dict(json.loads(self.out))


def told(devices: int, commands: dict[str, list[str]]) -> dict[str, Told]:
    """Commands in one other process with so many simulated devices, for their number is fixed when JAX starts."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(json.dumps, commands.values())],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {k: Told(*json.loads(line)) for k, line in zip(commands, done.stdout.splitlines(), strict=True)}


def on(mesh: Mesh) -> list[str]:
    return [
        part for axis, n in zip(("data", "fsdp", "tensor"), mesh, strict=True) for part in (f"--mesh.{axis}", str(n))
    ]


MESHES: dict[str, Mesh] = {"fsdp": (1, 8, 1), "cube": (2, 2, 2)}


@pytest.fixture(scope="module")
def eight(tiny_folder: Path) -> dict[str, Told]:
    """On eight simulated devices. Dense attention: the CPU's own goes through the rows of all devices on each."""
    plan = ["plan", *tiny_overrides(tiny_folder), *SETTINGS, "--model.attention", "dense"]
    return told(
        8,
        {
            "fsdp": [*plan, "--json", *on(MESHES["fsdp"])],
            "cube": [*plan, "--json", "--programs", "decode,sft", *on(MESHES["cube"])],
            "heads": [*plan, *on((1, 2, 4))],
            "rows": [*plan, *on(MESHES["fsdp"]), "--sft.micro_rows", "4", "--sft.batch_rows", "8"],
            "lanes": [*plan, *on(MESHES["fsdp"]), "--evolve.batch", "12"],
            "devices": [*plan, *on((1, 16, 1))],
            "uneven": [*plan, "--mesh.data", "3", "--mesh.fsdp", "-1"],
        },
    )


def by_name(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {p["name"]: p for p in made["programs"]}


def base_bytes(arch: Architecture, mesh: Mesh, size: int) -> int:
    """Of the backbone on one device: norms are split over fsdp, all else over fsdp and tensor."""
    _, fsdp, tensor = mesh
    matrices = arch.layers * sum(i * o for i, o in linear_sizes(arch).values()) + 2 * arch.vocab * arch.width
    return size * (matrices // (fsdp * tensor) + (2 * arch.layers + 1) * arch.width // fsdp)


def copied_bytes(arch: Architecture, mesh: Mesh, size: int) -> int:
    """Of the layers alone, which are all that sampling copies."""
    _, fsdp, tensor = mesh
    return size * arch.layers * (sum(i * o for i, o in linear_sizes(arch).values()) // tensor + 2 * arch.width) // fsdp


def adapter_bytes(arch: Architecture, mesh: Mesh) -> int:
    """Of A [L, R, in] and B [L, R, out]: what is as wide as the model is split over fsdp, the others over tensor."""
    _, fsdp, tensor = mesh
    wide = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}  # their inputs are
    return sum(
        4 * arch.layers * RANK * (i // (fsdp if name in wide else tensor) + o // (tensor if name in wide else fsdp))
        for name, (i, o) in linear_sizes(arch).items()
    )


def joined_adapter_bytes(arch: Architecture, mesh: Mesh) -> int:
    """The same in bfloat16, of layers that read one input joined: B of each is as wide as all of them; tensor is 1."""
    (_, fsdp, _), sizes = mesh, linear_sizes(arch)

    def of(*names: str) -> int:
        (i, *_), outputs = zip(*(sizes[name] for name in names), strict=True)
        wide = names[0] not in ("o_proj", "down_proj")
        return len(names) * RANK * (i // (fsdp if wide else 1) + sum(outputs) // (1 if wide else fsdp))

    parts = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    return 2 * arch.layers * sum(of(*names) for names in parts)


def memory(
    arch: Architecture, mesh: Mesh, config: Config, size: int, apart: bool, platform: str = "cpu"
) -> dict[str, dict[str, int]]:
    """Bytes that one device keeps, by program and kind."""
    base, adapter = base_bytes(arch, mesh, size), adapter_bytes(arch, mesh)
    _, _, slots, new, *_ = sampler_shapes(config, platform)
    numbers = arch.layers * arch.kv_heads * arch.head_size * 2 * (LANES // 2 * slots + LANES * new)
    cache = numbers * size // math.prod(mesh)
    groups = mesh[0] * mesh[1]

    def rows(s: Any, count: int) -> int:
        return 4 * 6 * s.row_length * count // groups  # six fields of a token

    sft, dpo = config.sft, config.dpo
    pairs = dpo.batch_rows // groups * (dpo.row_length // 32) * (dpo.row_length // 16) * 3 * 4
    trained = {"base": base, "adapter": adapter, "optimiser": 2 * adapter + 2 * 4}  # two moments, two counters
    sampled = {"base": base + copied_bytes(arch, mesh, size)} if apart else {"base": base, "adapter": adapter}
    sampled["cache"] = cache
    return {
        "prefill": sampled,
        "decode": sampled | {"constraint": 128 * (2 * arch.vocab * 2 + 3 * 4)},
        "score": {"base": base, "adapter": adapter, "rows": rows(sft, sft.micro_rows)},
        "sft": trained | {"rows": rows(sft, sft.batch_rows)},
        "dpo": trained | {"rows": rows(dpo, dpo.batch_rows) + pairs},
    }


@pytest.mark.parametrize("name", MESHES)
def test_memory_is_what_the_arrays_take(eight: dict[str, Told], tiny_folder: Path, name: str) -> None:
    arch, made = read_architecture(tiny_folder), eight[name].json
    config = load(None, [*tiny_overrides(tiny_folder), *SETTINGS])
    assert made["hardware"] == "8 x cpu"
    assert made["devices"] == 8
    assert tuple(made["mesh"].values()) == MESHES[name]
    assert made["fits"]
    expected = memory(arch, MESHES[name], config, 4, apart=True)
    (other,) = (memory(arch, m, config, 4, apart=True) for key, m in MESHES.items() if key != name)
    programs = by_name(made)
    assert list(programs) == (PROGRAMS if name == "fsdp" else ["decode", "sft"])
    for program, found in programs.items():
        for kind, size in expected[program].items():
            assert round(found["memory"][kind] * GIB) == size, (program, kind)
            if kind not in ("constraint", "cache"):  # the one is repeated, the other split over all, on every mesh
                assert round(found["memory"][kind] * GIB) != other[program][kind], (program, kind)
        assert found["total"] == pytest.approx(sum(found["memory"].values()))
        assert 0 < found["memory"]["work"] < found["total"] < found["limit"]


def step_flops(arch: Architecture, rows: int, length: int, attention: str, again: int = 1) -> float:
    """FLOPs of a step with a frozen backbone that makes its layers ``again``, every token a target.

    Layers' products run forward, again and backward, where only inputs have derivatives; the last of a layer is not
    wanted again. Of an adapter, both factors have derivatives too. The head makes logits once, and their derivative.
    """
    sizes = linear_sizes(arch)
    tokens, (_, down) = rows * length, sizes["down_proj"]
    linear = sum((2 + again) * i * o for i, o in sizes.values()) - again * math.prod(sizes["down_proj"])
    adapter = RANK * (sum((3 + again) * (i + o) for i, o in sizes.values()) - again * down)
    head = 2 * arch.vocab * arch.width
    width = arch.heads * arch.head_size
    if attention == "dense":  # 2 products forward, 4 backward
        seen = (2 + 2 * again + 4) * length**2
    elif attention == "chunked":  # chunks of 128 queries, which make their scores once more
        chunks = [(min(128, length - start), min(start + 128, length)) for start in range(0, length, 128)]
        seen = (2 + 2 * again + 4 + 1) * sum(c * end for c, end in chunks)
    else:  # splash: half of all, and 5 products backward
        seen = (2 + 2 * again + 5) * length**2 // 2
    return 2.0 * (tokens * (arch.layers * (linear + adapter) + head) + rows * arch.layers * width * seen)


def scoring_flops(arch: Architecture, rows: int, length: int) -> float:
    """FLOPs of one pass over rows, every token a target, half of all pairs of tokens seen."""
    sizes = linear_sizes(arch).values()
    weights = arch.layers * sum(i * o + RANK * (i + o) for i, o in sizes) + arch.vocab * arch.width
    return 2.0 * rows * (length * weights + arch.layers * arch.heads * arch.head_size * length**2)


def test_flops_of_a_step_on_one_device(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "--json", "--programs", "sft,dpo", *tiny_overrides(tiny_folder), *SETTINGS])
    made = json.loads(capsys.readouterr().out)
    arch = read_architecture(tiny_folder)
    assert (made["hardware"], made["devices"], made["fits"], made["change"]) == ("1 x cpu", 1, True, None)
    for p, length in zip(made["programs"], (256, 192), strict=True):
        assert p["flops"] == pytest.approx(step_flops(arch, 8, length, "chunked"), rel=1e-3)
        assert p["flops"] != pytest.approx(step_flops(arch, 8, length, "chunked", again=0), rel=0.1)
        assert p["flops"] != pytest.approx(step_flops(arch, 8, length, "dense"), rel=0.03)
        assert p["collectives"] == {}


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_do_an_eighth_each(eight: dict[str, Told], tiny_folder: Path, name: str) -> None:
    arch, programs = read_architecture(tiny_folder), by_name(eight[name].json)
    for task, length in (("sft", 256), ("dpo", 192)):
        if task not in programs:
            continue
        share = step_flops(arch, 8, length, "dense") / 8
        assert programs[task]["flops"] == pytest.approx(share, rel=1e-3)
        assert programs[task]["flops"] != pytest.approx(step_flops(arch, 8, length, "dense", again=0) / 8, rel=0.1)
    for p in programs.values():  # a CPU's rates are not known
        assert p["seconds"] is None
        assert p["bound"] == ""
        assert p["traffic"] > 0


def step_of_decoding(arch: Architecture, config: Config) -> float:
    """FLOPs of one token for all lanes, adapters merged: every weight once, and all slots of a row and of its lanes' rings."""
    weights = arch.layers * sum(i * o for i, o in linear_sizes(arch).values()) + arch.vocab * arch.width
    made = sampler_shapes(config, "cpu")
    slots = made.slots + made.lanes * made.new
    return 2.0 * LANES * (weights + 2 * arch.layers * arch.heads * arch.head_size * slots)


@pytest.mark.parametrize("name", MESHES)
def test_flops_of_a_step_of_decoding(eight: dict[str, Told], tiny_folder: Path, name: str) -> None:
    arch, config = read_architecture(tiny_folder), load(None, [*tiny_overrides(tiny_folder), *SETTINGS])
    found = by_name(eight[name].json)["decode"]["flops"]
    assert found == pytest.approx(step_of_decoding(arch, config) / 8, rel=0.01)
    assert found != pytest.approx(step_of_decoding(replace(arch, layers=3), config) / 8, rel=0.1)


# --- what the work needs, beside what programs do ---------------------------------------------------------------------


# Traffic by needed bytes on eight CPU devices (fsdp), dense attention, tiny layers: what grows by a tenth shows here.
TIMES = {"prefill": 27.2, "decode": 5.2, "score": 55.2, "sft": 75.6, "dpo": 50.3}


def test_programs_move_no_more_than_they_did(eight: dict[str, Told]) -> None:
    for name, p in by_name(eight["fsdp"].json).items():
        assert 1 < p["traffic"] / p["needed"]["bytes"] < 1.1 * TIMES[name], name
        assert len(p["largest"]) == 5
        assert 0.5 * p["traffic"] < sum(p["largest"].values()) <= p["traffic"]
        assert "other" not in {part.partition(":")[0] for part in p["largest"]}, name


@pytest.mark.parametrize("name", MESHES)
def test_a_step_of_decoding_needs_its_weights_and_its_cache(
    eight: dict[str, Told], tiny_folder: Path, name: str
) -> None:
    arch, found = read_architecture(tiny_folder), by_name(eight[name].json)["decode"]
    config = load(None, [*tiny_overrides(tiny_folder), *SETTINGS])
    head = arch.vocab * arch.width * 4 // math.prod(MESHES[name][1:])
    held = memory(arch, MESHES[name], config, 4, apart=True)["decode"]
    assert found["needed"]["bytes"] == copied_bytes(arch, MESHES[name], 4) + head + held["cache"]
    assert found["needed"]["bytes"] != copied_bytes(arch, MESHES[name], 4) + held["cache"]


def test_training_needs_what_is_asked_for_without_what_is_recomputed(eight: dict[str, Told], tiny_folder: Path) -> None:
    arch, programs = read_architecture(tiny_folder), by_name(eight["fsdp"].json)
    for task, length in (("sft", 256), ("dpo", 192)):
        sizes, tokens = linear_sizes(arch), 8 * length
        layers = sum(2 * i * o + 3 * RANK * (i + o) for i, o in sizes.values())  # forward and backward
        head, attention = 2 * arch.vocab * arch.width, 3 * 2 * arch.heads * arch.head_size * length / 2
        needed = 2.0 * tokens * (arch.layers * (layers + attention) + head) / 8
        assert programs[task]["needed"]["flops"] == pytest.approx(needed, rel=1e-6)
        assert needed < programs[task]["flops"]  # which makes its layers again


# --- no weight moves while decoding -----------------------------------------------------------------------------------


def sent(program: dict[str, Any]) -> float:
    return float(sum(c["bytes"] for c in program["collectives"].values()))


def between(program: dict[str, Any]) -> float:
    return float(sum(c["bytes"] for kind, c in program["collectives"].items() if " between " in kind))


def most_sent(arch: Architecture, lanes: int) -> float:
    """Bytes that decoding may send in a step: partial sums of all activations and logits, each twice."""
    d, f, q, kv = arch.width, arch.hidden, arch.heads * arch.head_size, arch.kv_heads * arch.head_size
    return 2.0 * 4 * lanes * (arch.layers * (2 * d + 2 * f + q + 2 * kv) + arch.vocab)


def layers_bytes(arch: Architecture, size: int) -> int:
    return size * arch.layers * sum(i * o for i, o in linear_sizes(arch).values())


def test_decoding_sends_activations_alone(eight: dict[str, Told], tiny_folder: Path) -> None:
    arch, programs = read_architecture(tiny_folder), by_name(eight["fsdp"].json)
    assert 0 < sent(programs["decode"]) < most_sent(arch, LANES) < base_bytes(arch, (1, 1, 1), 4) / 3
    # Training does gather its layers, forward and again.
    gathered = programs["sft"]["collectives"]["all-gather"]["bytes"]
    assert 2 * layers_bytes(arch, 4) * 7 / 8 < gathered
    assert gathered > most_sent(arch, LANES)


# --- TPUs -------------------------------------------------------------------------------------------------------------


TPU_SHAPE = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json alone: a tiny model whose heads are as wide as a TPU's kernels want."""
    file = tmp_path_factory.mktemp("wide") / "config.json"
    file.write_text(json.dumps(TPU_SHAPE))
    return file


def for_tpus(tiny_folder: Path, wide: Path, *more: str) -> list[str]:
    return ["plan", *tiny_overrides(tiny_folder), *SETTINGS, "--topology", "v5e:2x2", "--shape", str(wide), *more]


@pytest.fixture(scope="module")
def tpus(tiny_folder: Path, wide: Path) -> dict[str, Told]:
    pytest.importorskip("libtpu")
    slices = ("--slices", "2", *on((2, -1, 1)))
    return told(
        1,
        {
            "one": for_tpus(tiny_folder, wide, "--json", *on((1, 4, 1))),
            "two": for_tpus(tiny_folder, wide, "--programs", "decode", *slices),
            "heads": for_tpus(tiny_folder, wide, *on((1, 1, 4))),
            "slices": for_tpus(tiny_folder, wide, "--slices", "2", *on((1, 1, 2))),
        },
    )


def check_tpus(made: dict[str, Any], config: Config, mesh: Mesh) -> None:
    """All five programs, with all that is known of them."""
    arch = architecture(TPU_SHAPE, "TPU_SHAPE")
    assert (tuple(made["mesh"].values()), made["devices"]) == (mesh, math.prod(mesh))
    assert (made["fits"], made["change"], made["changed"]) == (True, None, [])
    programs = by_name(made)
    assert list(programs) == PROGRAMS
    for name, p in programs.items():
        assert set(p) == set(Needs.__dataclass_fields__) | {"total", "fits"}
        assert p["limit"] == 16
        assert p["refused"] == ""
        assert p["compile_seconds"] > 0
        for kind, size in memory(arch, mesh, config, 2, apart=False, platform="tpu")[name].items():
            if kind == "rows":  # padded to the tiles of a TPU
                assert size <= round(p["memory"][kind] * GIB) < size + 2**20
            else:
                assert round(p["memory"][kind] * GIB) == size, (name, kind)
        chip = CHIPS["v5e"]
        times = {
            "FLOPs": p["flops"] / chip.flops,
            "memory": p["traffic"] / chip.hbm_bandwidth,
            "network": (sent(p) - between(p)) / chip.interconnect,
            "network between": between(p) / 3.125e9,  # 6.4 Tb/s for 256 chips
        }
        assert p["seconds"] == times[p["bound"]] == max(times.values()) > min(times.values())
    rows = 8 // (mesh[0] * mesh[1])
    assert rows * mesh[0] * mesh[1] == 8
    for task, length in (("sft", 256), ("dpo", 192)):
        found, full = programs[task]["flops"], step_flops(arch, rows, length, "splash")
        # The kernels state no FLOPs; without theirs a tenth would be missing. A loop over few layers may be taken
        # apart, and what nobody wants of its first layer left out.
        assert full * 0.97 < found < full * 1.01
        kernels = 4.5 * 2 * rows * arch.layers * arch.heads * arch.head_size * length**2
        assert found - kernels < full * 0.9
    score = programs["score"]["flops"]
    assert score == pytest.approx(scoring_flops(arch, rows, 256), rel=0.01)
    assert score != pytest.approx(scoring_flops(replace(arch, layers=2), rows, 256), rel=0.1)
    assert 0 < sent(programs["decode"]) < most_sent(arch, LANES) < base_bytes(arch, (1, 1, 1), 2) / 2
    assert sent(programs["sft"]) > 2 * layers_bytes(arch, 2) * (mesh[1] - 1) / mesh[1] > most_sent(arch, LANES)


def test_all_programs_compile_for_tpus(tpus: dict[str, Told], tiny_folder: Path) -> None:
    made = tpus["one"].json
    assert made["hardware"] == "v5e:2x2"
    check_tpus(made, load(None, [*tiny_overrides(tiny_folder), *SETTINGS]), (1, 4, 1))


def test_two_slices_as_a_table(tpus: dict[str, Told]) -> None:
    code, out, error = tpus["two"]
    assert code == 0, error
    text = " ".join(out.replace("│", " ").split())
    for part in ("llama, 3 layers of 256", "2 x v5e:2x2 as 2 x 4 x 1", "a step", "all-reduce", "16 replies at once"):
        assert part in text
    assert "prefill" not in text
    assert "does not fit" not in text


@pytest.mark.slow
def test_all_programs_compile_for_two_slices(tiny_folder: Path, wide: Path) -> None:
    pytest.importorskip("libtpu")
    (made,) = told(1, {"two": for_tpus(tiny_folder, wide, "--json", "--slices", "2", *on((2, -1, 1)))}).values()
    assert made.json["hardware"] == "2 x v5e:2x2"
    check_tpus(made.json, load(None, [*tiny_overrides(tiny_folder), *SETTINGS]), (2, 4, 1))


# --- GPUs by name -----------------------------------------------------------------------------------------------------


def needs_cuda() -> None:
    pytest.importorskip("jax_plugins.xla_cuda13", reason="esjax's cuda extra is not installed")


@pytest.fixture(scope="module")
def gpus(tiny_folder: Path, wide: Path) -> dict[str, Told]:
    needs_cuda()
    named = ("--topology", "h100:2", *on((1, -1, 1)))
    own = (*named, "--json", "--programs", "score,sft,dpo,decode", "--model.dtype", "float32")
    own = (*own, "--model.decoding_attention", "plain")
    return told(
        1,
        {
            "one": for_tpus(tiny_folder, wide, "--json", *named),
            "own": for_tpus(tiny_folder, wide, *own),  # our own kernel: cuDNN's computes in bfloat16 only
            "two": for_tpus(tiny_folder, wide, "--json", "--slices", "2", *named),
            "table": for_tpus(tiny_folder, wide, "--programs", "sft", "--slices", "2", *named),
        },
    )


def test_all_programs_compile_for_gpus(gpus: dict[str, Told], tiny_folder: Path) -> None:
    made, arch = gpus["one"].json, architecture(TPU_SHAPE, "TPU_SHAPE")
    config = load(None, [*tiny_overrides(tiny_folder), *SETTINGS])
    assert (made["hardware"], made["devices"], made["fits"]) == ("h100:2", 2, True)
    programs, mesh = by_name(made), (1, 2, 1)
    assert list(programs) == PROGRAMS
    # In bfloat16 the adapter is not merged: A and B are cut into layers, too, and joined.
    expected = memory(arch, mesh, config, 2, apart=True, platform="gpu")
    for name, p in programs.items():
        adapter = joined_adapter_bytes(arch, mesh) if name in ("prefill", "decode") else 0
        assert round(p["memory"]["base"] * GIB) == expected[name]["base"] + adapter
        assert p["limit"] == 0.9 * 80
        assert not any(" between " in kind for kind in p["collectives"])
    for task, length in (("sft", 256), ("dpo", 192)):
        full = step_flops(arch, 8 // 2, length, "cudnn")
        # Base and adapter are one product, in which B is as long as the ranks of all that read the same input.
        assert full * 0.97 < programs[task]["flops"] < full * 1.02
        assert by_name(gpus["own"].json)[task]["flops"] == pytest.approx(full, rel=0.03)
    assert 0 < sent(programs["decode"]) < most_sent(arch, LANES)
    # A run times two ways to attend in decoding and takes the faster; the one with our kernel is counted.
    plain = by_name(gpus["own"].json)["decode"]
    assert (programs["decode"]["decoding"], plain["decoding"]) == ("triton, or plain if faster", "plain")
    for p, kernel in ((programs["decode"], True), (plain, False)):
        assert any("attend: kernel" in part for part in p["largest"]) == kernel
        assert p["flops"] == pytest.approx(p["needed"]["flops"], rel=0.05)


def test_gpus_of_two_nodes(gpus: dict[str, Told]) -> None:
    """fsdp over four of them: a ring of four steps leaves a node twice."""
    made = by_name(gpus["two"].json)
    assert (gpus["two"].json["hardware"], gpus["two"].json["devices"]) == ("2 x h100:2", 4)
    chip = CHIPS["h100"]
    for p in made.values():
        assert between(p) == pytest.approx(sent(p) / 2)
        network = {"network": between(p) / chip.interconnect, "network between": between(p) / 50e9}
        other = {"FLOPs": p["flops"] / chip.flops, "memory": p["traffic"] / chip.hbm_bandwidth}
        assert p["seconds"] == pytest.approx(max((network | other).values()))
    code, out, error = gpus["table"]
    assert code == 0, error
    assert "all-gather between nodes, sent" in " ".join(out.replace("│", " ").split())


@pytest.mark.parametrize("name", ["h100", "h100:", "h100:0", "b200:4x4"])
def test_a_node_has_a_number_of_gpus(name: str, cached: None) -> None:
    with pytest.raises(InputError, match=rf"topology {name}: give a node's number of GPUs, such as {name[:4]}:8"):
        topology_devices(name)


@pytest.fixture
def cached() -> Iterator[None]:
    """Topologies switch JAX's cache of programs off, for good; other tests of this process may have theirs on."""
    before: bool = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()


def test_what_the_compiler_refuses_does_not_fit(cached: None) -> None:
    """A product of 32 GiB on a TPU with 16."""
    pytest.importorskip("libtpu")
    mesh = make_mesh(topology_devices("v5e:2x2"), (1, 4, 1))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def needs(side: int) -> Needs:
        x = jax.ShapeDtypeStruct((side, side), jnp.bfloat16, sharding=where)
        job = Job(
            "sft", lambda: jax.jit(lambda x: jnp.sort(x.T @ x, axis=0)).trace(x), {"base": x, "rows": ()}, Needed()
        )
        return measure(job, CHIPS["v5e"], 16.0)

    large, small = needs(1 << 16), needs(1 << 10)
    assert not large.fits
    assert re.fullmatch(r"the compiler wants [\d.]+G of 15.75G", large.refused)
    assert large.memory == {"base": 8.0, "rows": 0.0}
    assert large.seconds is None
    assert small.fits
    assert small.flops == 2 * 2**30


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 19.21G\n"
            "of 15.75G hbm. Exceeded hbm capacity by 3.46G.",
            "the compiler wants 19.21G of 15.75G",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte.", None),
    ],
)
def test_the_compilers_own_words(message: str, said: str | None) -> None:
    def job(text: str) -> Job:
        def trace() -> None:
            raise jax.errors.JaxRuntimeError(text)

        return Job("sft", trace, {"rows": ()}, Needed())

    assert measure(job(message), None, 16.0).refused == (said or message)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure(job("INTERNAL: something else"), None, 16.0)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--programs", "sft,dream"], "--programs sft,dream: allowed: prefill, decode, score, sft, dpo"),
        (["--programs", ""], "--programs is empty; give a value"),
        (["--slices", "0"], "--slices 0: at least 1"),
        (["--slices", "2"], "--slices 2: slices of what? give a --topology, too"),
        (["--tries", "-1"], "--tries -1: at least 0"),
        (["--shape", "llama9"], "one of llama3-70b, llama3-8b, mistral-7b, qwen2-7b"),
        (["--topology", "v9z:1x1"], "give one like v5e:4x4"),
        (["--mesh.tensor", "3"], "mesh.tensor=3"),
        (["--mesh.fsdp", "2"], "takes 2 devices of 1"),
        (["--topologie", "v5e:2x2"], "did you mean --topology?"),
    ],
)
def test_bad_options_end_the_command(
    tiny_folder: Path, cached: None, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", *tiny_overrides(tiny_folder), *options])
    line = refusal(capsys.readouterr().err)
    assert message in line


def refusal(error: str) -> str:
    """The one line of a refusal; libtpu may have said that it finds no TPU."""
    lines = [line for line in error.strip().splitlines() if "accelerator type" not in line]
    assert len(lines) == 1, error
    assert lines[0].startswith("esjax: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("heads", "mesh.tensor=4 does not divide the model's 2 key/value heads: choose a divisor of 2"),
        ("rows", "sft.micro_rows=4 cannot be split over mesh.data x mesh.fsdp = 8 devices: choose a multiple of 8"),
        ("lanes", "evolve.batch=12 cannot be split over mesh.data x mesh.fsdp = 8 devices: choose a multiple of 8"),
        ("devices", "takes 16 devices of 8; lower one of them"),
        ("uneven", "8 devices cannot be divided so"),
    ],
)
def test_meshes_that_do_not_divide_end_the_command(eight: dict[str, Told], name: str, message: str) -> None:
    assert (eight[name].code, eight[name].out) == (2, "")
    assert message in refusal(eight[name].error)


@pytest.mark.parametrize(
    ("name", "message"), [("heads", "does not divide the model's 2 key/value heads"), ("slices", "set mesh.fsdp=-1")]
)
def test_meshes_of_tpus_that_do_not_divide(tpus: dict[str, Told], name: str, message: str) -> None:
    assert (tpus[name].code, tpus[name].out) == (2, "")
    assert message in refusal(tpus[name].error)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type=None is not supported; allowed: llama, mistral, qwen2"),
        (json.dumps({k: v for k, v in TPU_SHAPE.items() if k != "vocab_size"}), "the key vocab_size is missing"),
    ],
)
def test_shapes_that_cannot_be_read(tmp_path: Path, tiny_config: Config, text: str | None, message: str) -> None:
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        shape_of(str(file), tiny_config)
    assert str(file) in str(raised.value)


# Parameters as the hub counts them in the published weights.
PUBLISHED = {
    "llama3-8b": (8_030_261_248, "8.03B"),
    "llama3-70b": (70_553_706_496, "70.6B"),
    "qwen2-7b": (7_615_616_512, "7.62B"),
    "mistral-7b": (7_248_023_552, "7.25B"),
    "smollm2-135m": (134_515_008, "0.135B"),
    "smollm2-360m": (361_821_120, "0.362B"),
    "smollm2-1.7b": (1_711_376_384, "1.71B"),
    "qwen2.5-0.5b": (494_032_768, "0.494B"),
    "qwen2.5-1.5b": (1_543_714_304, "1.54B"),
    "qwen2.5-3b": (3_085_938_688, "3.09B"),
}


def parameters(arch: Architecture) -> int:
    """Of every tensor of a checkpoint."""
    sizes, total = linear_sizes(arch), 0
    for weight in key_table(arch):
        if weight.path[0] in ("embed", "head"):
            total += arch.vocab * arch.width
        elif weight.path[-1] == "kernel":
            total += arch.layers * math.prod(sizes[weight.path[1]])
        elif weight.path[-1] == "bias":
            total += arch.layers * sizes[weight.path[1]][1]
        else:
            total += arch.width * (arch.layers if weight.path[0] == "layers" else 1)
    return total


def test_shapes_are_those_of_the_published_models(tiny_config: Config) -> None:
    known = {p.stem for p in bundled("bundled:configs/shapes").glob("*.json")}
    assert known == set(PUBLISHED)
    for name, (count, rounded) in PUBLISHED.items():
        arch = shape_of(name, tiny_config)
        assert parameters(arch) == count
        assert parameters(replace(arch, vocab=arch.vocab - 1)) != count
        made = nnx.eval_shape(lambda arch=arch: Decoder(arch, None, jnp.dtype("bfloat16"), nnx.Rngs(params=0, lora=0)))
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(made, nnx.Param))) == count
        assert f"{count / 1e9:.3g}B" == rounded


def test_the_configs_of_these_models_have_their_shapes(tiny_folder: Path) -> None:
    """A config names its model; the shape that comes with esjax is the same one, and a folder's own is read."""
    for file in bundled("bundled:configs").glob("*-*.yaml"):
        name, config = file.stem, load(str(file), [])
        assert config.model.source.startswith("hf:")
        assert shape_of(name, config) == shape_of(str(bundled(f"bundled:configs/shapes/{name}.json")), config)
    own = shape_of(None, load(None, tiny_overrides(tiny_folder)))
    assert own == read_architecture(tiny_folder)
    assert own != shape_of("llama3-8b", load(None, tiny_overrides(tiny_folder)))
