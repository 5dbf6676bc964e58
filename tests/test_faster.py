"""The faster of two ways to attend in decoding: timed, compared, and never taken unseen. The kernels are interpreted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from esjax.model import lanes_mosaic, lanes_triton
from esjax.model.attention import KERNELS
from esjax.model.decoder import Execution
from esjax.model.families import Architecture, architecture
from esjax.sample import faster
from esjax.sample.faster import settled
from esjax.sample.shapes import Shapes

Kernel = Callable[..., Array]
FLOAT32 = jnp.dtype("float32")
AUTOMATIC = Execution(decoding="auto", interpret=True)
SHAPES = Shapes(rows=2, lanes=2, slots=128, new=16, windows=1, few=1, width=64)


@pytest.fixture(scope="module")
def arch() -> Architecture:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    return architecture({"model_type": "llama", **sizes, **heads}, "a test's model")


@pytest.fixture(autouse=True, params=["triton", "mosaic"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As if this platform had it."""
    monkeypatch.setitem(KERNELS, "cpu", request.param)
    return str(request.param)


def slower_by(factor: float, way: str) -> Callable[..., Any]:
    """The clock, by which one way takes so many times what the other does."""
    timed = faster._timed

    def told(execution: Execution, trial: Any) -> tuple[float, Array]:
        return (factor if execution.decoding == way else 1.0) * 1e-5, timed(execution, trial)[1]

    return told


@pytest.mark.parametrize("kernel_is_slow", [False, True])
def test_the_faster_is_taken(
    arch: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kernel: str,
    kernel_is_slow: bool,
) -> None:
    """Both are computed, and their results agree."""
    monkeypatch.setattr(faster, "_timed", slower_by(3.0, kernel if kernel_is_slow else "plain"))
    assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == ("plain" if kernel_is_slow else kernel)
    plain, ours = (10, 30) if kernel_is_slow else (30, 10)
    assert f"decoding attends in {plain} us a layer plainly, in {ours} with {kernel}" in capfd.readouterr().err


def test_what_is_said_is_not_timed(arch: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faster, "_timed", None)
    for way in ("plain", "triton", "mosaic"):
        assert settled(AUTOMATIC._replace(decoding=way), arch, SHAPES, FLOAT32, FLOAT32) == way
    with pytest.raises(TypeError):
        settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32)


def wrong(kernel: Kernel, *arguments: Any) -> Array:
    return kernel(*arguments) * 1.1


def not_a_number(kernel: Kernel, *arguments: Any) -> Array:
    return kernel(*arguments) * jnp.nan


def refused(kernel: Kernel, *arguments: Any) -> Array:
    raise NotImplementedError("no such instruction\non this chip")


@pytest.mark.parametrize(
    ("fault", "said"),
    [(wrong, "is wrong here by 0.1\n"), (not_a_number, "is wrong here by nan\n"), (refused, "no such instruction\n")],
)
def test_a_kernel_that_fails_is_not_taken(
    arch: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    kernel: str,
    fault: Kernel,
    said: str,
) -> None:
    """However fast it is."""
    module = {"triton": lanes_triton, "mosaic": lanes_mosaic}[kernel]
    monkeypatch.setattr(module, "lanes_attention", partial(fault, module.lanes_attention))
    monkeypatch.setattr(faster, "_timed", slower_by(3.0, "plain"))
    jax.clear_caches()  # in which the kernel is that of another test
    assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == "plain"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")]
)
def test_real_times_of_narrow_types(
    arch: Architecture, capfd: pytest.CaptureFixture[str], kernel: str, dtype: str, kept: str
) -> None:
    """The trial itself, on the host: its times are of two interpreted ways, and rounding is no difference."""
    way = settled(AUTOMATIC, arch, SHAPES, jnp.dtype(dtype), jnp.dtype(kept))
    assert way in ("plain", kernel)
    assert "us a layer plainly" in capfd.readouterr().err


def test_every_process_takes_what_all_would(arch: Architecture, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Where one of them finds the kernel slower, none takes it."""
    from esjax.runtime.context import open_runtime
    from esjax.runtime.processes import Processes

    monkeypatch.setattr(faster, "_timed", slower_by(3.0, "plain"))
    with open_runtime() as runtime:
        runtime.join(Processes(count=2, all=lambda value: False))
        assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == "plain"
        runtime.join(Processes(count=2, all=lambda value: value))
        assert settled(AUTOMATIC, arch, SHAPES, FLOAT32, FLOAT32) == kernel
