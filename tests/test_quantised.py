"""A base in few bits: the numbers by their definition, the model by its dequantised weights, a run, and what it costs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Refused, tiny_overrides
from oracles import Ours, random_adapter, torch_logits, torch_model, worst

from esjax.cli import main
from esjax.evolve.experiment import open_model
from esjax.model.linear import Lora
from esjax.model.lora import flatten, unflatten
from esjax.model.quantised import BLOCK, FACTORS, dequantise, quantise
from esjax.model.weights import Backbone, Choice, load_backbone
from esjax.rows import stack, trunk
from esjax.run.jsonl import read_jsonl
from esjax.sample.generate import Generator
from esjax.settings.files import load
from esjax.settings.schema import SamplingSettings
from esjax.train.losses import sft_loss
from esjax.train.step import Objective, gradients

FLOAT32 = jnp.dtype("float32")
LORA = Lora(("q_proj", "o_proj", "down_proj"), 4, 2.0)
KINDS: tuple[Any, ...] = ("int8", "nf4")
# Dettmers et al. 2023 (QLoRA), appendix E: quantiles of a normal distribution, 0 among them, from -1 to 1.
NF4 = np.asarray(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def restored(kernels: Any, kind: Any) -> np.ndarray:
    (numbers, scales), size = quantise(jnp.asarray(kernels), kind), kernels.shape[1]
    return np.stack([np.asarray(dequantise(n, s, kind, size)) for n, s in zip(numbers, scales, strict=True)])


def test_int8_is_the_nearest_step_of_a_column() -> None:
    w = np.random.default_rng(0).normal(size=(2, 96, 40)).astype(np.float32)
    step = np.abs(w).max(1, keepdims=True) / 127.5  # as qwix divides the range
    numbers = restored(w, "int8") / step
    assert worst(numbers, np.round(numbers)) <= 1e-3
    assert (np.abs(numbers - w / step) <= 0.5 + 1e-3).all()
    assert np.abs(restored(w, "int8") - w).max() > 1e-3


@pytest.mark.parametrize("size", [128, 96, 40, 33])
def test_nf4_is_the_nearest_level_of_a_block(size: int) -> None:
    """Blocks of 32 numbers of a column, or of as many as divide its length; the column where these would be under 16.

    Of the scales that are tried each block has the one with the least squared error, found here one after the other.
    """
    w = np.random.default_rng(0).normal(size=(2, size, 24)).astype(np.float32)
    block = {33: 33, 40: 40}.get(size, math.gcd(size, BLOCK))
    blocks = w.reshape(2, size // block, block, 24)
    top = np.abs(blocks).max(2, keepdims=True)
    best, least = np.zeros_like(blocks), np.full_like(top, np.inf)
    for factor in FACTORS:
        scale = np.asarray(jnp.asarray(top * np.float32(factor), jnp.bfloat16), np.float32)
        made = NF4[np.abs((blocks / scale)[..., None] - NF4).argmin(-1)] * scale
        error = np.square(made - blocks).sum(2, keepdims=True)
        best, least = np.where(error < least, made, best), np.minimum(error, least)
    ours = restored(w, "nf4")
    off = np.square(ours - w).reshape(blocks.shape).sum(2, keepdims=True)
    assert np.abs(off - least).max() <= 1e-4 * least.max()  # two scales may err by the same
    assert (np.abs(ours - best.reshape(w.shape)) > 1e-5).mean() < 0.01
    plain = np.square(NF4[np.abs((blocks / top)[..., None] - NF4).argmin(-1)] * top - blocks).sum()
    assert least.sum() < 0.9 * plain


def pair(folder: Path, kind: Any) -> tuple[Backbone, Backbone]:
    """A base in few bits, and a plain one that holds its dequantised weights."""
    small = load_backbone(folder, LORA, FLOAT32, Choice(kernels=kind))
    plain = load_backbone(folder, LORA, FLOAT32)
    found, flat = flatten(small.base), flatten(plain.base)
    for path, value in flat.items():
        if path[-1] == "kernel":
            numbers, scales = (found[(*path[:-1], name)][...] for name in ("numbers", "scales"))
            size = value[...].shape[1]
            layers = [dequantise(n, s, kind, size) for n, s in zip(numbers, scales, strict=True)]
            flat[path] = value.replace(jnp.stack(layers))
        else:
            assert np.array_equal(value[...], found[path][...])  # embedding and norms stay
    return small, replace(plain, base=unflatten(flat))


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_the_model_is_that_of_the_dequantised_weights(kind: Any, tiny_folder: Path) -> None:
    small, plain = pair(tiny_folder, kind)
    original = load_backbone(tiny_folder, LORA, FLOAT32)
    adapter = random_adapter(small, 3)
    tokens = np.random.default_rng(1).integers(2, 900, 60).tolist()
    logits = Ours(small).sequence(tokens, 60, adapter)
    assert worst(logits, Ours(plain).sequence(tokens, 60, adapter)) <= 1e-4
    assert worst(logits, Ours(original).sequence(tokens, 60, adapter)) > 1e-3

    rows = stack([trunk(tokens, [1.0] * 59 + [0.0])])

    def gradient(backbone: Backbone) -> np.ndarray:
        objective = Objective(backbone.definition, sft_loss, 60, backbone.execution)
        _, grads = jax.jit(lambda a: gradients(objective, a, backbone.base, rows, None))(adapter)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(grads)])

    mine, theirs = gradient(small), gradient(plain)
    assert np.linalg.norm(mine - theirs) <= 1e-4 * np.linalg.norm(theirs)

    greedy = SamplingSettings(temperature=0)
    prompts = [tokens[:20], tokens[5:40]]

    def drawn(backbone: Backbone) -> list[list[int]]:
        made = Generator(backbone, 2, end_of_turn=1).generate(adapter, prompts, [0, 1], greedy, 24)
        return [m.token_ids for m in made]

    assert drawn(small) == drawn(plain)


def held(backbone: Backbone) -> dict[str, int]:
    """Bytes of the linear layers on the device, and of all the rest."""
    out = {"linear": 0, "rest": 0}
    for path, value in flatten(backbone.base).items():
        out["linear" if path[-1] in ("kernel", "numbers", "scales") else "rest"] += value[...].on_device_size_in_bytes()
    return out


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.55), ("nf4", 0.35)])
def test_it_takes_less_memory(kind: Any, share: float, tiny_folder: Path) -> None:
    """Of bfloat16's: a half and the scales; a quarter and the scales, a thirty-second of float32 each."""
    plain = held(load_backbone(tiny_folder, None, jnp.dtype("bfloat16")))
    small = held(load_backbone(tiny_folder, None, jnp.dtype("bfloat16"), Choice(kernels=kind)))
    print(kind, small, plain)
    assert small["linear"] <= share * plain["linear"]
    assert small["rest"] == plain["rest"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_it_and_its_export(kind: Any, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    run, base = tmp_path / "run", ["--model.base", kind]
    main(["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), *base, "--evolve.rounds", "1"])
    first = read_jsonl(run / "round1" / "dpo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    main(["export", "--run-dir", str(run), "--model", "m1", "--format", "merged", "--out", str(tmp_path / "out")])
    assert (
        f"trained on a base kept in {kind}; it is written with, or into, the original weights"
        in capsys.readouterr().err
    )
    tokens = np.random.default_rng(2).integers(2, 900, 40).tolist()
    experiment, adapter = open_model(f"{run}:m1", load(str(run / "config.yaml")))
    assert experiment.backbone.arch.kernels == kind
    original = load_backbone(tiny_folder, experiment.backbone.lora, FLOAT32)
    theirs = torch_logits(torch_model(tmp_path / "out"), tokens)
    assert worst(Ours(original).sequence(tokens, 40, adapter), theirs) <= 1e-3
    assert worst(Ours(experiment.backbone).sequence(tokens, 40, adapter), theirs) > 1e-3


def test_all_parameters_cannot_be_kept_in_few_bits(tiny_folder: Path, tmp_path: Path, refused: Refused) -> None:
    more = ["--model.base", "int8", "--train.what", "all"]
    line = refused("evolve", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder), *more)
    assert "model.base=int8 keeps frozen layers" in line


@pytest.mark.slow
def test_fifty_steps_end_within_two_percent(smollm_folder: Path, tmp_path: Path) -> None:
    """SFT of the quickstart's model on its own corpus; bfloat16 beside both."""
    losses = {}
    for kind in ("plain", *KINDS):
        run = tmp_path / kind
        more = ["--model.base", kind, "--model.dtype", "bfloat16", "--sft.batch_rows", "2", "--sft.micro_rows", "2"]
        main(["sft", "--run-dir", str(run), *more, "--sft.epochs", "4", "--sft.validate_every", "1000"])
        steps = read_jsonl(run / "sft" / "metrics.jsonl")
        assert len(steps) >= 50
        losses[kind] = (float(np.mean([m["loss"] for m in steps[45:50]])), steps[-1]["valid_loss"])
    print(losses)
    for kind in KINDS:
        for mine, theirs in zip(losses[kind], losses["plain"], strict=True):
            assert mine == pytest.approx(theirs, rel=0.02)
