"""The GPU kernel of the token row, interpreted on the host, against attention written out densely from the definition."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definition import remasked, visible
from jax import Array
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from esjax import rows
from esjax.model.row_kernel import Blocks, Lists, block_lists, row_attention
from esjax.rows import Rows

N, K, H = 4, 2, 16


def packed_batch(t: int) -> Rows:
    """Two rows [2, T] for T >= 60: segments with sibling branches, trunks, and padding at the end of the first."""

    def replies(prompt: int, *lengths: int) -> Rows:
        return rows.trunk_with_replies(
            list(range(prompt)), [(max(2, prompt - i), [7] * n) for i, n in enumerate(lengths)]
        )

    branched = rows.pack([replies(t // 4, t // 8, t // 6), replies(5, 3, 4, 2)], t)
    plain = rows.pack(
        [rows.trunk(list(range(t // 3))), replies(t // 5, t // 4), replies(2, t - t // 3 - t // 4 - t // 5 - 6, 1)], t
    )
    return rows.stack([branched, plain])


def arrays(b: int, t: int, dtype: jnp.dtype = jnp.float32, h: int = H) -> tuple[Array, Array, Array, Array]:
    """q, k, v and a cotangent of the output."""
    shapes = [(b, t, N, h), (b, t, K, h), (b, t, K, h), (b, t, N, h)]
    random = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(random.standard_normal(s), dtype) for s in shapes)
    return q, k, v, dout


def dense(mask: np.ndarray, *args: Array) -> list[np.ndarray]:
    """Output and gradients of q, k, v by the textbook's formulas in float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in args)
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    wide_k, wide_v = (np.repeat(x, group, axis=2) for x in (k, v))
    s = np.where(mask[:, None], np.einsum("binh,bjnh->bnij", q, wide_k) * scale, -np.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    dp = np.einsum("binh,bjnh->bnij", dout, wide_v)
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True)) * scale
    per_head = np.einsum("bnij,binh->bjnh", ds, q), np.einsum("bnij,binh->bjnh", p, dout)
    dk, dv = (x.reshape(*k.shape[:3], group, -1).sum(axis=3) for x in per_head)
    return [np.einsum("bnij,bjnh->binh", p, wide_v), np.einsum("bnij,bjnh->binh", ds, wide_k), dk, dv]


def kernel(batch: Rows, *args: Array) -> list[Array]:
    """Output and gradients of q, k, v by the kernels."""
    q, k, v, dout = args
    out, back = jax.vjp(lambda q, k, v: row_attention(q, k, v, jnp.asarray(batch.until), interpret=True), q, k, v)
    return [out, *back(dout)]


def errors(got: list[Array], want: list[np.ndarray]) -> list[float]:
    """The largest difference of each array, relative to its largest value."""
    return [
        float(np.abs(np.asarray(g, np.float64) - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True)
    ]


# 64: one block; 150: not whole blocks; 300: several blocks of each kind.
@pytest.mark.parametrize("t", [64, 150, 300])
def test_output_and_gradients_are_those_of_dense_attention(t: int) -> None:
    batch, args = packed_batch(t), arrays(2, t)
    assert max(errors(kernel(batch, *args), dense(visible(batch), *args))) < 1e-5


def test_a_row_shorter_than_the_smallest_block() -> None:
    batch, args = rows.stack([rows.prompt_with_replies([1, 2, 3], [[4], [5, 6]])]), arrays(1, 7)
    assert max(errors(kernel(batch, *args), dense(visible(batch), *args))) < 1e-5


def test_scores_far_from_zero_stay_finite() -> None:
    """Rows that see nothing of a visited block must not turn into NaN, however low the scores that they do see."""
    batch, (q, k, v, dout) = packed_batch(150), arrays(2, 150)
    args = (jnp.abs(q) * 100, -jnp.abs(k) * 100, v, dout)
    got = kernel(batch, *args)
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    assert errors(got, dense(visible(batch), *args))[0] < 1e-3  # scores of 1e5 carry absolute errors of 1e-2


def test_bfloat16() -> None:
    batch, args = packed_batch(150), arrays(2, 150, jnp.bfloat16)
    got = kernel(batch, *args)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert max(errors(got, dense(visible(batch), *args))) < 2e-2


@pytest.mark.parametrize("by", [-1, 1])
def test_a_mask_off_by_one_shows(by: int) -> None:
    """The negative control of the tests above: one trunk token matters, for the output and every gradient."""
    batch, args = packed_batch(150), arrays(2, 150)
    assert min(errors(kernel(remasked(batch, by), *args), dense(visible(batch), *args))) > 1e-2


def listed(lists: Lists) -> np.ndarray:
    """Bool [B, blocks, blocks of the other side]; the visible ones must come first and in order."""
    index, count = (np.asarray(x) for x in lists)
    count = count[..., 0]
    out = np.zeros(index.shape, bool)
    for b, i in np.ndindex(count.shape):
        visible = index[b, i, : count[b, i]]
        assert (np.diff(visible) > 0).all()
        out[b, i, visible] = True
    return out


@pytest.mark.parametrize(("query", "key"), [(16, 16), (32, 16), (16, 32)])
def test_block_lists_are_exact(query: int, key: int) -> None:
    batch = packed_batch(192)
    of_queries, of_keys = block_lists(jnp.asarray(batch.until), query, key)
    want = visible(batch).reshape(2, 192 // query, query, 192 // key, key).any(axis=(2, 4))
    np.testing.assert_array_equal(listed(of_queries), want)
    np.testing.assert_array_equal(listed(of_keys), want.swapaxes(1, 2))


def test_block_lists_hold_no_block_of_another_segment_or_sibling() -> None:
    """Segments and branches of whole blocks: the first segment's four blocks are trunk, trunk, branch 1, branch 2."""
    size = 16
    branched = rows.prompt_with_replies([1] * (2 * size + 1), [[2] * (size - 1), [3] * (size - 1)])
    batch = rows.stack([rows.pack([branched, rows.trunk([1] * 2 * size)], 7 * size)])
    of_queries, of_keys = block_lists(jnp.asarray(batch.until), size, size)
    sees = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [4], [4, 5], [6]]  # 4 and 5 are the second segment, 6 is padding
    assert [list(np.flatnonzero(x)) for x in listed(of_queries)[0]] == sees
    assert [list(np.flatnonzero(x)) for x in listed(of_keys)[0]] == [
        [q for q in range(7) if k in sees[q]] for k in range(7)
    ]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("h", [64, 128])
def test_kernels_lower_for_cuda(h: int, dtype: jnp.dtype) -> None:
    """Triton's lowering needs no GPU, so a host without one can tell whether the kernels are ones it takes."""
    q, k, v, _ = arrays(2, 300, dtype, h)
    until = jnp.asarray(packed_batch(300).until)

    def loss(q: Array, k: Array, v: Array) -> Array:
        return row_attention(q, k, v, until).astype(jnp.float32).sum()

    h100 = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))

    def calls(f: Callable[..., object]) -> int:
        with use_abstract_mesh(h100):  # newer JAX wants to know which GPU
            text = jax.jit(f).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @__gpu$xla.gpu.triton")

    assert calls(loss) == 1
    assert calls(jax.grad(loss, argnums=(0, 1, 2))) == 3


@pytest.mark.parametrize("h", [8, 48])
def test_a_head_size_that_the_kernel_does_not_take(h: int) -> None:
    q, k, v, _ = arrays(1, 60, h=h)
    none = jnp.zeros((1, 60), jnp.int32)
    with pytest.raises(ValueError, match=f"the head size is {h}"):
        row_attention(q, k, v, none)


def test_blocks_are_powers_of_two() -> None:
    assert all(b >= 16 and b & (b - 1) == 0 for b in Blocks())
