"""What ``esjax plan`` does where something does not fit: the nearest change that would make it fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import tiny_overrides
from families import llama
from test_plan import SETTINGS, Mesh

import esjax.plan.report
from esjax.cli import main
from esjax.errors import InputError
from esjax.model.families import Architecture
from esjax.plan.jobs import Name
from esjax.plan.measure import Needs
from esjax.plan.report import Change, Hardware, changed, remedies
from esjax.runtime.mesh import mesh_shape
from esjax.settings.files import load
from esjax.settings.schema import Config

Rule = Callable[[str, Config, Mesh], float]  # what a program of a config on a mesh takes, made up; 10 is there


@dataclass
class Tried:
    """What was asked of a made-up planner."""

    configs: list[Config]
    programs: list[list[str]]


def search(
    rule: Rule,
    failed: Sequence[Name],
    monkeypatch: pytest.MonkeyPatch,
    most: int = 100,
    names: Sequence[Name] | None = None,
    **settings: Any,
) -> tuple[Change | None, Tried]:
    """What ``remedies`` finds for eight devices by a rule."""
    sizes = {
        "model.remat": "full",
        "mesh.fsdp": 8,
        "sft.batch_rows": 32,
        "sft.micro_rows": 32,
        "dpo.batch_rows": 32,
        "dpo.micro_rows": 32,
    }
    config = changed(load(None, []), sizes | {k.replace("__", "."): v for k, v in settings.items()})
    tried = Tried([], [])

    def plan(config: Config, arch: Architecture, hardware: Hardware, names: Sequence[Name]) -> Iterator[Needs]:
        mesh = mesh_shape(config.mesh, len(hardware.devices))
        if config not in tried.configs:
            tried.configs.append(config)
        tried.programs.append([])
        if config.sft.micro_rows % (mesh[0] * mesh[1]):
            raise InputError("sft.micro_rows cannot be split")
        for name in names:
            tried.programs[-1].append(name)
            yield Needs(name, 0.0, {"work": rule(name, config, mesh)}, 10.0)

    monkeypatch.setattr(esjax.plan.report, "plan", plan)
    arch = llama(1024, 64, 2, 8, 4, 16, 96)
    hardware = Hardware("made up", [None] * 8, "tpu", None, 10.0)
    found = list(remedies(config, arch, hardware, names or failed, failed, most))
    assert len(found) <= 1
    if found:
        assert all(n.fits for n in found[0][1])
        assert {n.name for n in found[0][1]} >= set(failed)
    return (found[0][0] if found else None), tried


def rows_on_a_device(name: str, config: Config, mesh: Mesh) -> float:
    return getattr(config, name).micro_rows / (mesh[0] * mesh[1])


def test_the_nearest_change_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows at once and more devices to a layer would both do; the first costs less."""

    def rule(name: str, config: Config, mesh: Mesh) -> float:
        return 20 / mesh[2] if config.sft.micro_rows > 8 else 9

    change, tried = search(rule, ["sft"], monkeypatch)
    assert change == {"sft.micro_rows": 8}
    assert [c.sft.micro_rows for c in tried.configs] == [8]
    change, tried = search(lambda name, config, mesh: 20 / mesh[2], ["sft"], monkeypatch)
    assert change == {"mesh.tensor": 2, "mesh.fsdp": 4}
    assert [mesh_shape(c.mesh, 8) for c in tried.configs] == [(1, 8, 1), (1, 4, 2)]


def test_so_many_changes_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(name: str, config: Config, mesh: Mesh) -> float:
        return 5 if config.model.remat == "offload" else 11

    for most in (0, 1, 3):
        change, tried = search(rule, ["sft"], monkeypatch, most)
        assert (change, len(tried.configs)) == (None, most)
    change, tried = search(rule, ["sft"], monkeypatch, 4)
    assert (change, len(tried.configs)) == ({"model.remat": "offload"}, 4)


def test_what_auto_has_tried_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    change, tried = search(lambda *_: 11, ["sft"], monkeypatch, model__remat="auto")
    assert change is None
    assert {c.model.remat for c in tried.configs} == {"auto"}


def test_changes_that_the_mesh_refuses_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows at once cannot be split over eight devices."""

    def rule(name: str, config: Config, mesh: Mesh) -> float:
        return 5 if mesh == (1, 8, 1) or config.model.remat == "dots" else 11

    settings: dict[str, Any] = {"mesh__fsdp": 1, "sft__micro_rows": 2, "sft__batch_rows": 32}
    change, tried = search(rule, ["sft"], monkeypatch, **settings)
    assert change is None
    assert (1, 8, 1) in [mesh_shape(c.mesh, 8) for c in tried.configs]
    change, _ = search(rule, ["sft"], monkeypatch, **(settings | {"sft__micro_rows": 8}))
    assert change == {"mesh.data": 1, "mesh.fsdp": 8}


def test_two_changes_together_where_one_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(name: str, config: Config, mesh: Mesh) -> float:
        return (1 + rows_on_a_device(name, config, mesh)) * 8 / mesh[2]  # 8 rows' worth on 8 devices: 40

    change, tried = search(rule, ["sft"], monkeypatch)
    assert change == {"sft.micro_rows": 8, "mesh.tensor": 4, "mesh.fsdp": 2}
    assert len(tried.configs) == 4 + 2  # each alone; the rows with tensor 2, then with tensor 4
    change, tried = search(lambda *_: 11, ["sft"], monkeypatch)
    assert change is None
    assert len({c.model_dump_json() for c in tried.configs}) == len(tried.configs) > 6


def test_other_programs_must_still_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that helps one program may be too small for another; other changes leave the others as they are."""

    def rule(name: str, config: Config, mesh: Mesh) -> float:
        if name == "score":
            return 12 if mesh[2] == 2 else 5
        return 20 / mesh[2]

    change, tried = search(rule, ["sft"], monkeypatch, names=["score", "sft"])
    assert change == {"mesh.tensor": 4, "mesh.fsdp": 2}
    assert tried.programs == [["sft"], ["sft"], ["score"], ["sft"], ["score"]]
    change, _ = search(rule, ["sft"], monkeypatch, names=["sft"])
    assert change == {"mesh.tensor": 2, "mesh.fsdp": 4}


@pytest.mark.parametrize(
    ("failed", "settings", "first"),
    [
        (["sft"], {"mesh__data": 2, "mesh__fsdp": 4}, {"mesh.data": 1, "mesh.fsdp": 8}),
        (["dpo"], {"model__remat": "none"}, {"model.remat": "full"}),
        (["dpo"], {}, {"dpo.micro_rows": 8}),
        (["score"], {}, {"sft.micro_rows": 8, "dpo.micro_rows": 8}),
        (["decode"], {"evolve__batch": 64}, {"evolve.batch": 16}),
        (["decode"], {"model__decoding_weights": "apart"}, {"model.decoding_weights": "shared"}),
        (["prefill"], {"evolve__batch": 8}, {"model.cache_dtype": "float8_e4m3fn"}),
        # A quarter of 24 rows would be 6, which four devices do not divide.
        (
            ["sft"],
            {"mesh__fsdp": 4, "mesh__tensor": 2, "sft__micro_rows": 24, "sft__batch_rows": 24},
            {"sft.micro_rows": 4},
        ),
    ],
)
def test_what_is_tried_first(
    monkeypatch: pytest.MonkeyPatch, failed: list[Name], settings: dict[str, Any], first: Change
) -> None:
    change, tried = search(lambda *_: 5, failed, monkeypatch, **settings)
    assert change == first
    assert len(tried.configs) == 1


LIMIT = 0.005  # GiB: to score eight rows of 256 tokens takes more, two do not


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(topology: str | None, slices: int) -> Hardware:
        return Hardware("a small CPU", jax.devices(), "cpu", None, LIMIT)

    monkeypatch.setattr(Hardware, "of", small)


def test_a_misfit_ends_the_command_with_a_remedy(
    tiny_folder: Path, small_device: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["plan", "--programs", "score", *tiny_overrides(tiny_folder), *SETTINGS]
    with pytest.raises(SystemExit, match="1"):
        main([*options, "--json"])
    said = capsys.readouterr()
    made = json.loads(said.out)
    (program,), (after,) = made["programs"], made["changed"]
    assert (made["fits"], made["change"]) == (False, {"sft.micro_rows": 2, "dpo.micro_rows": 2})
    assert program["total"] > LIMIT > after["total"] > 0
    need, remedy = f"{program['total']:.4g} GiB of 0.005", "--sft.micro_rows 2 --dpo.micro_rows 2"
    *_, last = said.err.strip().splitlines()
    assert last == f"esjax: error: does not fit a small CPU (score: {need}); it does with {remedy}"
    with pytest.raises(SystemExit, match="1"):
        main([*options, "--tries", "0"])
    said = capsys.readouterr()
    assert said.err.strip().endswith("no change tried is enough: take more devices")
    assert "does not fit" in said.out
    main([*options, *remedy.split()])  # exit code 0
    said = capsys.readouterr()
    assert "does not fit" not in said.out + said.err
    assert "on a small CPU as 1 x 1 x 1" in " ".join(said.out.split())
