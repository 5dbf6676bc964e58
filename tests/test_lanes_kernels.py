"""The kernels of a decoding step, interpreted on the host, against attention written out densely in float64."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

from esjax.errors import InputError
from esjax.model import lanes_mosaic
from esjax.model.attention import choose_decoding
from esjax.model.cache import attend_lanes
from esjax.model.decoder import Execution
from esjax.model.families import Architecture, architecture
from esjax.model.lanes_triton import KEYS, lanes_attention, takes
from esjax.plan.topology import topology_devices
from esjax.runtime.mesh import make_mesh

KERNELS = [Execution(decoding=name, interpret=True) for name in ("triton", "mosaic")]
EACH = pytest.mark.parametrize("kernel", KERNELS, ids=["triton", "mosaic"])


class Case:
    """Random queries of R rows with M lanes, and what they see of S slots: a trunk, a branch, and the end of a ring."""

    def __init__(self, rows: int, lanes: int, kv: int, group: int, h: int, slots: int) -> None:
        random = np.random.default_rng(slots)
        self.q = random.standard_normal((rows * lanes, 1, kv * group, h))
        self.keys, self.values = (
            random.standard_normal((rows, kv, h, slots)),
            random.standard_normal((rows, kv, slots, h)),
        )
        self.seen = np.zeros((rows, lanes, slots), bool)
        for row in range(rows):
            self.seen[row, :, : slots // (3 + row)] = True
            for lane in range(lanes):
                self.seen[row, lane, slots // 2 + 5 * lane : slots // 2 + 5 * lane + 4] = True
                self.seen[row, lane, slots - 1 - 3 * lane :: 3 * lanes] = True

    def arrays(self, dtype: jnp.dtype = jnp.float32, cache: jnp.dtype | None = None) -> tuple[Array, Array, Array]:
        return (
            jnp.asarray(self.q, dtype),
            *(jnp.asarray(x, dtype).astype(cache or dtype) for x in (self.keys, self.values)),
        )

    def dense(self, q: Array, keys: Array, values: Array) -> np.ndarray:
        """[R M, 1, N, H] by the textbook."""
        q, keys, values = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, keys, values))
        (r, m, _), (kv, h) = self.seen.shape, keys.shape[1:3]
        grouped = q.reshape(r, m, kv, -1, h)
        s = np.einsum("rmkgh,rkhs->rmkgs", grouped, keys) * h**-0.5
        s = np.where(self.seen[:, :, None, None], s, -np.inf)
        p = np.exp(s - s.max(axis=-1, keepdims=True))
        return np.einsum("rmkgs,rksh->rmkgh", p / p.sum(axis=-1, keepdims=True), values).reshape(q.shape)


CASES = {
    "one block": Case(2, 1, 1, 4, 16, KEYS),
    "a last block that reaches back": Case(3, 2, 2, 4, 16, 3 * KEYS + 17),
    "queries that are no power of two": Case(2, 3, 2, 3, 32, 2 * KEYS),
    "many blocks for each program": Case(1, 2, 1, 8, 64, 1400),
}


def error(got: Array, want: np.ndarray) -> float:
    return float(np.abs(np.asarray(got.astype(jnp.float32)) - want).max() / np.abs(want).max())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fewest slots that a kernel takes, so that tests need not be large."""
    monkeypatch.setattr(lanes_mosaic, "BLOCK_BYTES", 1)


@EACH
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_is_dense_attention(case: Case, kernel: Execution) -> None:
    arrays = case.arrays()
    got = attend_lanes(*arrays, jnp.asarray(case.seen), kernel)
    assert error(got, case.dense(*arrays)) < 1e-5
    shifted = jnp.roll(jnp.asarray(case.seen), 1, axis=-1).at[..., 0].set(True)  # a mask off by one is another result
    assert error(attend_lanes(*arrays, shifted, kernel), case.dense(*arrays)) > 1e-3


@EACH
@pytest.mark.parametrize(("cache", "most"), [(jnp.bfloat16, 0.01), (jnp.float8_e4m3fn, 0.01)])
def test_narrow_types(cache: jnp.dtype, most: float, kernel: Execution) -> None:
    """Against dense attention to the same narrow numbers; probabilities are rounded to bfloat16 on the way."""
    case = CASES["a last block that reaches back"]
    arrays = case.arrays(jnp.bfloat16, cache)
    got = attend_lanes(*arrays, jnp.asarray(case.seen), kernel)
    assert got.dtype == jnp.bfloat16
    assert error(got, case.dense(*arrays)) < most


@EACH
@pytest.mark.usefixtures("small_blocks")
def test_blocks_that_nobody_sees_are_not_read(kernel: Execution) -> None:
    """A product with what is not a number is none, even where it weighs nothing."""
    case = CASES["many blocks for each program"]
    q, keys, values = case.arrays()
    slots = case.seen.shape[-1]
    seen_block = np.zeros(slots, bool)
    size = KEYS if kernel.decoding == "triton" else lanes_mosaic.SLOTS
    for first in range(0, slots, size):
        if case.seen[0, :, first : first + size].any():
            # The last block reaches back on GPUs, and over the end on TPUs.
            start = min(first, slots - size) if kernel.decoding == "triton" else first
            seen_block[start : first + size] = True
    assert 0.1 < seen_block.mean() < 0.9
    bad = jnp.asarray(~seen_block)
    bad_keys, bad_values = jnp.where(bad, jnp.nan, keys), jnp.where(bad[:, None], jnp.nan, values)
    got = attend_lanes(q, bad_keys, bad_values, jnp.asarray(case.seen), kernel)
    assert error(got, case.dense(q, keys, values)) < 1e-5
    dense = attend_lanes(q, bad_keys, bad_values, jnp.asarray(case.seen), Execution("dense"))  # which reads all
    assert bool(jnp.isnan(dense).any())


def test_models_that_it_does_not_take() -> None:
    assert [h for h in (8, 16, 48, 64, 96, 128, 256) if takes(h)] == [16, 64, 128, 256]
    llama = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 512}

    def arch(**more: Any) -> Architecture:
        return architecture({"model_type": "llama", **llama, **heads, "head_dim": 64, **more}, "a test's model")

    assert [h for h in (64, 128, 192, 256) if lanes_mosaic.takes(h)] == [128, 256]
    large, small, odd, capped = (
        arch(head_dim=128),
        arch(),
        arch(head_dim=48),
        replace(arch(head_dim=128), attention_cap=50.0),
    )
    for platform, model, why in (
        ("gpu", odd, "does not take this model's heads of 48 numbers, only powers of 2 from 16 on"),
        ("gpu", capped, "has no soft cap of scores"),
        ("tpu", small, "does not take this model's heads of 64 numbers, only multiples of 128"),
        ("cpu", large, "does not run on cpu"),
    ):
        assert choose_decoding("auto", platform, model) == "plain"
        with pytest.raises(InputError, match=f"model.decoding_attention=pallas {why}.*: choose auto or plain"):
            choose_decoding("pallas", platform, model)
    for platform, model, kernel in (("gpu", small, "triton"), ("gpu", large, "triton"), ("tpu", large, "mosaic")):
        assert choose_decoding("auto", platform, model) == choose_decoding("auto", platform) == "auto"  # to be timed
        assert choose_decoding("plain", platform, model) == "plain"
        assert choose_decoding("pallas", platform, model) == kernel
    assert choose_decoding("pallas", "tpu", capped) == "mosaic"


def test_a_jax_without_the_kernels_backend_decodes_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "esjax.model.lanes_triton", None)
    assert choose_decoding("auto", "gpu") == "plain"
    with pytest.raises(InputError, match="needs Pallas' Triton backend, which JAX"):
        choose_decoding("pallas", "gpu")


def test_a_soft_cap_of_scores() -> None:
    case = CASES["a last block that reaches back"]
    arrays = case.arrays()
    seen = jnp.asarray(case.seen)
    got, plain = (attend_lanes(*arrays, seen, how, cap=0.5) for how in (KERNELS[1], Execution("dense")))
    assert error(got, np.asarray(plain)) < 1e-5
    assert error(got, case.dense(*arrays)) > 1e-3  # which has none


def test_the_work_of_two_cores() -> None:
    """Each has the seen blocks of its own rows, in order; what lies behind the end repeats the last."""
    seen = np.zeros((4, 2, 300), bool)  # three blocks a row, the last of which is short
    seen[0, 0, :10] = seen[0, 1, 290] = seen[1, 0, 130] = seen[2, 1, 5] = seen[3, 0, 128:] = True
    work = lanes_mosaic.work_lists(jnp.asarray(seen), 128, 2)
    assert work.order.tolist() == [[0, 2, 4, 4, 4, 4], [0, 4, 5, 5, 5, 5]]
    assert work.busy.tolist() == [3, 3]
    one = lanes_mosaic.work_lists(jnp.asarray(seen), 128, 1)
    assert one.order[0, :6].tolist() == [0, 2, 4, 6, 10, 11]


def test_how_large_a_block_is() -> None:
    """A mebibyte at least, where a row has so much, in whole registers of 128 slots."""
    for slot_bytes, slots, size in ((2048, 1408, 256), (256, 5632, 1024), (2048, 200, 256), (8192, 1408, 128)):
        assert lanes_mosaic.block_slots(slot_bytes, slots) == size


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("kept", [None, jnp.float8_e4m3fn])
def test_it_lowers_for_tpus(dtype: jnp.dtype, kept: jnp.dtype | None) -> None:
    shapes = [(4, 8, 8, 128), (4, 8, 128, 1408), (4, 8, 1408, 128)]
    q, *cache = (jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (dtype, kept or dtype, kept or dtype), strict=True))
    traced = jax.jit(lanes_mosaic.lanes_attention).trace(q, *cache, jax.ShapeDtypeStruct((4, 8, 1408), jnp.bool_))
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("custom_call @tpu_custom_call") == 1


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("kept", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_tpus_take_blocks_from_where_the_cache_lies(
    name: str, kept: jnp.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No program copies keys or values as a whole for the kernel; left to itself XLA does for a v6e."""
    pytest.importorskip("libtpu")
    rows, lanes, slots = 8, 8, 2560
    place = NamedSharding(make_mesh(topology_devices(name)[:1], (1, 1, 1)), PartitionSpec())

    def of(*shape: int, dtype: jnp.dtype = kept) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def copies() -> int:
        def steps(q: Array, cache: list[tuple[Array, Array]], seen: Array) -> Array:
            def step(_: Any, q: Array) -> Array:
                for keys, values in cache:
                    q = lanes_mosaic.lanes_attention(q, keys, values, seen)
                return q

            return jax.lax.fori_loop(0, 10, step, q)

        cache = [(of(rows, 2, 128, slots), of(rows, 2, slots, 128))] * 4
        arguments = of(rows, 2, lanes, 128, dtype=jnp.bfloat16), cache, of(rows, lanes, slots, dtype=jnp.bool_)
        text = jax.jit(steps).lower(*arguments).compile().as_text()
        return len(re.findall(rf"\[{rows},2,(128,{slots}|{slots},128)\]\S+ copy(-done)?\(", text))

    assert copies() == 0
    monkeypatch.setattr(pltpu, "with_memory_space_constraint", lambda x, _: x)
    assert not name.startswith("v6e") or copies() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("h", [64, 128])
def test_it_lowers_for_cuda(h: int, dtype: jnp.dtype) -> None:
    h100 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    shapes = [(4, 8, 8, h), (4, 8, h, 1462), (4, 8, 1462, h)]
    arguments = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
    with use_abstract_mesh(h100):
        traced = jax.jit(lanes_attention).trace(*arguments, jax.ShapeDtypeStruct((4, 8, 1462), jnp.bool_))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 1
