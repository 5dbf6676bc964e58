"""``model.remat: auto``: the fastest form of a step for which there is room, the same in all processes, and said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_overrides

from esjax.errors import InputError
from esjax.model.decoder import AUTO, ROOM, Execution, forms
from esjax.runtime.context import current
from esjax.train import fitting
from esjax.train.fitting import compile_fitting

AUTOMATIC = Execution(remat="auto")
NEEDED = {"none": 3.0, "full": 1.0}  # MiB that the step below works in, by form


def step_of(form: Execution) -> Any:
    """Something that works in as much memory as is said above."""
    n = int(NEEDED[form.remat] * 2**20 / 4)

    def step(x: jax.Array) -> jax.Array:
        return jnp.sort(jnp.arange(n, dtype=jnp.float32) * x)[:2]  # what is sorted has to lie somewhere

    return jax.jit(step)


def fitted(execution: Execution = AUTOMATIC) -> str:
    made = compile_fitting(step_of, execution, (jnp.float32(2.0),), lambda lowered: lowered.compile())
    assert made.step(jnp.float32(2.0)).tolist() == [0.0, 2.0]
    return made.form.remat


def with_room(monkeypatch: pytest.MonkeyPatch, mib: float) -> None:
    monkeypatch.setattr(fitting, "_memory", lambda arguments: (arguments, mib * 2**20 / ROOM["cpu"]))


def test_the_fastest_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted() == "none"  # of this machine's whole memory
    with_room(monkeypatch, 100)
    assert fitted() == "none"
    with_room(monkeypatch, 2)
    assert fitted() == "full"
    with_room(monkeypatch, 0.1)  # the last is taken, whatever it needs: the device itself says what it lacks
    assert fitted() == "full"
    for remat in ("none", "full"):  # control: what is asked for is not chosen
        assert fitted(Execution(remat=remat)) == remat  # type: ignore[arg-type]


def test_all_processes_take_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has not the room."""
    asked: list[bool] = []
    runtime = current()
    others = replace(runtime.processes, all=lambda value: bool(asked.append(value)))
    monkeypatch.setattr(runtime, "processes", others)
    assert fitted() == "full"
    assert asked == [True]


def test_what_the_compiler_refuses_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(lowered: Any) -> Any:
        raise jax.errors.JaxRuntimeError(errors.pop(0))

    errors = ["RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm", "RESOURCE_EXHAUSTED: the last"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="the last"):
        compile_fitting(step_of, AUTOMATIC, (jnp.float32(2.0),), refuses)
    errors = ["INTERNAL: something else"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_fitting(step_of, AUTOMATIC, (jnp.float32(2.0),), refuses)


def test_a_device_that_does_not_tell_its_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def memory_stats(self) -> None:
            return None

    monkeypatch.setattr(jax, "local_devices", lambda: [Silent()])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match=r"model.remat=auto: .* does not tell its memory .*; choose none, dots, full"):
        fitting._memory(0)


@pytest.mark.parametrize("platform", AUTO)
def test_each_form_may_be_asked_for_by_name(platform: str) -> None:
    found = forms(AUTOMATIC, platform)
    assert [f.remat for f in found] == list(AUTO[platform])
    assert found == [form for f in found for form in forms(Execution(remat=f.remat), platform)]
    assert {f.remat for f in found if f.unroll} == ({"dots"} if platform == "gpu" else set())


def test_a_run_says_what_was_taken(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from esjax.cli import main

    def losses(name: str, remat: str) -> list[Any]:
        from esjax.run.jsonl import read_jsonl

        given = [*tiny_overrides(tiny_folder), "--model.remat", remat]
        main(["sft", "--run-dir", str(tmp_path / name), *given])
        return [row["loss"] for row in read_jsonl(tmp_path / name / "sft" / "metrics.jsonl")]

    kept = losses("kept", "auto")
    assert "with model.remat=none" in capfd.readouterr().err
    monkeypatch.setattr(fitting, "_memory", lambda arguments: (arguments, 1.0))
    recomputed = losses("recomputed", "auto")
    assert "with model.remat=full" in capfd.readouterr().err
    assert kept == pytest.approx(recomputed, rel=1e-5)
    losses("asked", "full")
    assert "with model.remat" not in capfd.readouterr().err
