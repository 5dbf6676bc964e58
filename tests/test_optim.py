"""The learning-rate schedule by its formula, and AdamW with clipping against torch on the same gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch

from esjax.model.families import LINEARS
from esjax.model.linear import Lora
from esjax.model.weights import load_backbone
from esjax.rows import stack, trunk
from esjax.runtime.mesh import with_shardings
from esjax.settings.schema import OptimSettings
from esjax.train.losses import sft_loss
from esjax.train.optim import init_optimiser, learning_rate, optimiser
from esjax.train.step import Objective, make_step


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


# --- the other optimisers: each has a property that its rule promises ------------------------------------------------------


def update(name: str, params: dict[str, np.ndarray], grads: dict[str, np.ndarray], **changes: float) -> Any:
    """The first step's change of stacked matrices and a vector, and the state after it."""
    s = settings(warmup_fraction=0.0, clip_norm=1e9, **changes).model_copy(update={"optimiser": name})
    tx = optimiser(s, 10)
    made, state = tx.update(grads, tx.init(params), params)
    return made, state


def arrays(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "matrix": draw.normal(size=(3, 200, 150)).astype(np.float32),
        "vector": draw.normal(size=7).astype(np.float32),
    }


def test_lion_steps_by_the_sign() -> None:
    params, grads = arrays(0), arrays(1)
    made, _ = update("lion", params, grads, weight_decay=0.5)
    for key in params:
        assert np.asarray(made[key]) == pytest.approx(-0.01 * (np.sign(grads[key]) + 0.5 * params[key]), abs=1e-6)
    assert np.abs(np.asarray(update("adamw", params, grads)[0]["vector"])) == pytest.approx(0.01, rel=1e-3)


def test_muon_makes_each_layer_s_matrix_orthogonal_and_leaves_vectors_to_adam() -> None:
    """Newton and Schulz's five steps bring singular values near 1 (Jordan et al. 2024), layer by layer."""
    params, grads = arrays(0), arrays(1)
    grads["matrix"][1] *= 100  # another layer's size does not matter
    made, _ = update("muon", params, grads)
    values = np.linalg.svd(np.asarray(made["matrix"]), compute_uv=False) / 0.01
    scale = math.sqrt(max(1.0, 150 / 200))
    assert values.min() > 0.5 * scale
    assert values.max() < 1.4 * scale
    raw = np.linalg.svd(grads["matrix"], compute_uv=False)
    assert raw.max() / raw.min() > 100  # what it was made of
    adam, _ = update("adamw", params, grads)
    assert np.sign(made["vector"]).tolist() == np.sign(adam["vector"]).tolist()
    assert np.abs(np.asarray(made["vector"])).max() <= 0.015  # with Nesterov momentum


def test_adafactor_keeps_rows_and_columns_alone() -> None:
    params, grads = arrays(0), arrays(1)
    made, state = update("adafactor", params, grads)
    kept = sum(x.size for x in jax.tree.leaves(state) if hasattr(x, "size"))
    assert kept < 0.05 * params["matrix"].size
    _, adam = update("adamw", params, grads)
    assert sum(x.size for x in jax.tree.leaves(adam)) > 2 * params["matrix"].size
    # After one step the factored second moment is the mean of squares by rows and columns over that of all.
    g = grads["matrix"].astype(np.float64) ** 2 + 1e-30
    v = g.mean(2, keepdims=True) * g.mean(1, keepdims=True) / g.mean((1, 2), keepdims=True)
    expected = grads["matrix"] / np.sqrt(v)
    expected /= max(1.0, float(np.sqrt((expected**2).mean())))
    assert np.asarray(made["matrix"]) == pytest.approx(-0.01 * expected, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("what", ["lora", "all"])
def test_each_trains_and_lies_where_its_parameters_do(name: str, what: Any, tiny_folder: Path) -> None:
    """On the state of a model, with its names: the loss of a few rows falls. Also planned for eight devices."""
    backbone = load_backbone(tiny_folder, Lora(LINEARS, 4, 2.0) if what == "lora" else "all", np.dtype("float32"))
    s = settings(warmup_fraction=0.0, learning_rate=0.003).model_copy(update={"optimiser": name})
    tx = optimiser(s, 8)
    rows = stack([trunk(np.random.default_rng(0).integers(2, 900, 48), [1.0] * 47 + [0.0])])
    step = make_step(Objective(backbone.definition, sft_loss, 48, backbone.execution), tx, 1)
    trained = backbone.fresh_adapter(0)
    state, losses = init_optimiser(tx, trained), []
    for _ in range(8):
        trained, state, metrics = step(trained, state, backbone.base, rows, None)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    mesh = jax.sharding.AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    assert jax.tree.leaves(with_shardings(jax.eval_shape(tx.init, trained), mesh))
