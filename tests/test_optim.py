"""The learning-rate schedule by its formula, and AdamW with clipping against torch on the same gradients."""

from __future__ import annotations

import math

import jax
import numpy as np
import optax
import pytest
import torch

from esjax.settings.schema import OptimSettings
from esjax.train.optim import learning_rate, optimiser


def settings(**changes: float) -> OptimSettings:
    return OptimSettings(**{"learning_rate": 0.01, "warmup_fraction": 0.2, "final_fraction": 0.1} | changes)


def rates(s: OptimSettings, steps: int) -> np.ndarray:
    rate = learning_rate(s, steps)
    return np.asarray([float(rate(i)) for i in range(steps)])


def oracle(s: OptimSettings, steps: int) -> np.ndarray:
    """From 0 linearly to the peak, then half a cosine to final_fraction of the peak at the last step."""
    warmup = math.floor(steps * s.warmup_fraction)
    out = []
    for i in range(steps):
        if i < warmup:
            out.append(s.learning_rate * i / warmup)
            continue
        done = (i - warmup) / max(steps - 1 - warmup, 1)
        share = s.final_fraction + (1 - s.final_fraction) * (1 + math.cos(math.pi * done)) / 2
        out.append(s.learning_rate * share)
    return np.asarray(out)


CASES = [(30, 0.1, 0.1), (30, 0.0, 0.0), (101, 0.25, 0.5), (7, 0.5, 1.0), (2, 0.0, 0.5), (9, 0.1, 0.0), (1, 0.0, 1.0)]


@pytest.mark.parametrize(("steps", "warmup", "final"), CASES)
def test_the_schedule_is_its_formula(steps: int, warmup: float, final: float) -> None:
    s = settings(warmup_fraction=warmup, final_fraction=final)
    got = rates(s, steps)
    assert got == pytest.approx(oracle(s, steps), abs=1e-7)
    if steps > 1:  # OptimSettings.final_fraction: "learning rate at the last step, as a share of the peak"
        assert got[-1] == pytest.approx(0.01 * final, abs=1e-7)
    if steps > 6:
        other = settings(warmup_fraction=warmup + 0.3, final_fraction=final)
        assert np.abs(got - oracle(other, steps)).max() > 1e-4


def test_few_steps_do_not_break_it() -> None:
    for steps in range(1, 12):
        for warmup in (0.0, 0.1, 0.5, 0.99):
            got = rates(settings(warmup_fraction=warmup), steps)
            assert (got >= 0).all()  # not NaN either
            assert 0 < got.max() <= 0.01 * (1 + 1e-6)


# --- against torch ---------------------------------------------------------------------------------------------------

SHAPES = {"a": (3, 4), "b": (5,)}
STEPS = 12


def draws(seed: int) -> list[dict[str, np.ndarray]]:
    """Gradients of a few steps; some norms lie below the clipping limit and some above."""
    rng = np.random.default_rng(seed)
    sizes = np.geomspace(0.01, 30, STEPS)
    return [{k: (rng.normal(size=s) * size).astype(np.float32) for k, s in SHAPES.items()} for size in sizes]


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def ours(s: OptimSettings, gradients: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """Parameters after every step."""
    tx = optimiser(s, STEPS)
    params = jax.tree.map(jax.numpy.asarray, start())
    state = tx.init(params)
    out = []
    for g in gradients:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        out.append(jax.tree.map(np.asarray, params))
    return out


def torchs(s: OptimSettings, gradients: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The same with torch.optim.AdamW, clip_grad_norm_ and the learning rate set by hand."""
    params = {k: torch.nn.Parameter(torch.from_numpy(v.copy())) for k, v in start().items()}
    adamw = torch.optim.AdamW(params.values(), lr=1.0, weight_decay=s.weight_decay)
    rate = learning_rate(s, STEPS)
    out = []
    for i, g in enumerate(gradients):
        for k, p in params.items():
            p.grad = torch.from_numpy(g[k].copy())
        torch.nn.utils.clip_grad_norm_(params.values(), s.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = float(rate(i))
        adamw.step()
        out.append({k: p.detach().numpy().copy() for k, p in params.items()})
    return out


def furthest(a: list[dict[str, np.ndarray]], b: list[dict[str, np.ndarray]]) -> float:
    return max(float(np.abs(x[k] - y[k]).max()) for x, y in zip(a, b, strict=True) for k in SHAPES)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.5, 1e9])
def test_adamw_with_clipping_is_torchs(decay: float, clip: float) -> None:
    s = settings(weight_decay=decay, clip_norm=clip)
    norms = [math.sqrt(sum(float((x**2).sum()) for x in g.values())) for g in draws(0)]
    assert min(norms) < 0.5 < max(norms)
    assert furthest(ours(s, draws(0)), torchs(s, draws(0))) < 1e-6


def test_clipping_decay_and_gradients_matter() -> None:
    """Controls of the comparison above: each difference is seen at once."""
    s = settings(weight_decay=0.1, clip_norm=0.5)
    reference = ours(s, draws(0))
    for change in ({"clip_norm": 1e9}, {"weight_decay": 0.0}, {"learning_rate": 0.011}):
        assert furthest(reference, torchs(s.model_copy(update=change), draws(0))) > 1e-3
    assert furthest(reference, torchs(s, draws(1))) > 1e-3
