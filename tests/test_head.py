"""The vocabulary head's log-probs and their gradients, chunk by chunk, against torch's autograd in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from esjax.model.head import target_logprobs

TOKENS, VOCAB, WIDTH = 11, 37, 6
Made = tuple[
    np.ndarray, np.ndarray, np.ndarray | None
]  # log-probs [1, n], gradients of x [1, n, D] and of the head [V, D]


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, head, targets, and what the log-probs are weighted with; logits reach +-20, where a cap of 10 bends them."""
    draw = np.random.default_rng(3)
    x, head = draw.normal(size=(1, TOKENS, WIDTH)) * 3, draw.normal(size=(VOCAB, WIDTH))
    return x, head, draw.integers(0, VOCAB, (1, TOKENS)), draw.normal(size=(1, TOKENS))


def theirs(cap: float | None) -> Made:
    x, head, token, weight = (torch.from_numpy(a) for a in inputs())
    x.requires_grad_(), head.requires_grad_()
    logits = x @ head.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logprobs = torch.log_softmax(logits, -1).gather(-1, token[..., None])[..., 0]
    (logprobs * weight).sum().backward()
    assert x.grad is not None
    assert head.grad is not None
    return logprobs.detach().numpy(), x.grad.numpy(), head.grad.numpy()


def ours(cap: float | None, chunk: int, trained: bool) -> Made:
    """With ``chunk`` tokens' logits at once."""
    x, head, token, weight = (jnp.asarray(a, jnp.float32 if a.dtype == float else jnp.int32) for a in inputs())

    def total(x: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs = target_logprobs(x, head, token, chunk * VOCAB, cap=cap)
        return jnp.sum(logprobs * weight), logprobs

    (_, logprobs), grads = jax.value_and_grad(total, argnums=(0, 1) if trained else (0,), has_aux=True)(x, head)
    return np.asarray(logprobs), np.asarray(grads[0]), np.asarray(grads[1]) if trained else None


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("cap", [None, 10.0])
def test_log_probs_and_gradients(cap: float | None, chunk: int, trained: bool) -> None:
    expected, other = theirs(cap), theirs(10.0 if cap is None else None)
    for mine, right, wrong in zip(ours(cap, chunk, trained), expected, other, strict=True):
        if mine is not None and right is not None and wrong is not None:
            scale = np.abs(right).max()
            assert np.abs(mine - right).max() <= 1e-5 * scale
            assert np.abs(mine - wrong).max() > 1e-2 * scale  # control: with the cap, or without it


def test_a_log_prob_of_logits_far_apart() -> None:
    """Only one token is likely, and its rival by 200 is not lost to the sum of the others."""
    x, head = jnp.asarray([[[200.0]]]), jnp.asarray([[1.0], [0.0], [0.0]])
    for token, expected in ((0, 0.0), (1, -200.0)):
        value, slope = jax.value_and_grad(lambda x, t=token: target_logprobs(x, head, jnp.asarray([[t]]), 3)[0, 0])(x)
        assert float(value) == expected
        assert float(slope[0, 0, 0]) == (0.0 if token == 0 else -1.0)
