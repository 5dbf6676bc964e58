"""The faster of two ways to attend in decoding: timed, compared, and never taken unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest
from jax import Array

from esjax.model import lanes_kernel
from esjax.model.decoder import Execution
from esjax.model.families import Architecture, architecture
from esjax.sample import faster
from esjax.sample.faster import settled
from esjax.sample.shapes import Shapes

FLOAT32 = jnp.dtype("float32")
AUTOMATIC = Execution(decoding="auto", interpret=True)
SHAPES = Shapes(rows=2, lanes=2, slots=128, new=16, windows=1, few=1, width=64)


@pytest.fixture(scope="module")
def arch() -> Architecture:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    return architecture({"model_type": "llama", **sizes, **heads}, "a test's model")


def slower_by(factor: float, way: str) -> Callable[..., Any]:
    """The clock, by which one way takes so many times what the other does."""
    timed = faster._timed

    def told(execution: Execution, trial: Any) -> tuple[float, Array]:
        return (factor if execution.decoding == way else 1.0) * 1e-5, timed(execution, trial)[1]

    return told


@pytest.mark.parametrize(("slow", "taken"), [("plain", "pallas"), ("pallas", "plain")])
def test_the_faster_is_taken(
    arch: Architecture, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], slow: str, taken: str
) -> None:
    """Both are computed, and their results agree."""
    monkeypatch.setattr(faster, "_timed", slower_by(3.0, slow))
    assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == taken
    plain, pallas = ("30", "10") if slow == "plain" else ("10", "30")
    assert f"decoding attends in {plain} us a layer plainly, in {pallas} with pallas" in capfd.readouterr().err


def test_what_is_said_is_not_timed(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "_timed", None)
    for way in ("plain", "pallas"):
        assert settled(AUTOMATIC._replace(decoding=way), arch, SHAPES, FLOAT32, FLOAT32) == way
    with pytest.raises(TypeError):
        settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32)


def wrong(*arguments: Any) -> Array:
    return KERNEL(*arguments) * 1.1


def not_a_number(*arguments: Any) -> Array:
    return KERNEL(*arguments) * jnp.nan


def refused(*arguments: Any) -> Array:
    raise NotImplementedError("no such instruction\non this chip")


KERNEL = lanes_kernel.lanes_attention


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(wrong, "is wrong here by 0.1\n"), (not_a_number, "is wrong here by nan\n"), (refused, "no such instruction\n")],
)
def test_a_kernel_that_fails_is_not_taken(
    arch: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kernel: Callable[..., Array],
    said: str,
) -> None:
    """However fast it is."""
    monkeypatch.setattr(lanes_kernel, "lanes_attention", kernel)
    monkeypatch.setattr(faster, "_timed", slower_by(3.0, "plain"))
    assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == "plain"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")]
)
def test_real_times_of_narrow_types(
    arch: Architecture, capfd: pytest.CaptureFixture[str], dtype: str, kept: str
) -> None:
    """The trial itself, on the host: its times are of two interpreted ways, and rounding is no difference."""
    way = settled(AUTOMATIC, arch, SHAPES, jnp.dtype(dtype), jnp.dtype(kept))
    assert way in ("plain", "pallas")
    assert "us a layer plainly" in capfd.readouterr().err


def test_every_process_takes_what_all_would(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of them finds the kernel slower, none takes it."""
    from esjax.runtime.context import open_runtime
    from esjax.runtime.processes import Processes

    monkeypatch.setattr(faster, "_timed", slower_by(3.0, "plain"))
    with open_runtime() as runtime:
        runtime.join(Processes(count=2, all=lambda value: False))
        assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == "plain"
        runtime.join(Processes(count=2, all=lambda value: value))
        assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == "pallas"
