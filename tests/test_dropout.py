"""LoRA dropout against PEFT's, with the same masks; and that it hangs on rows alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import Refused, tiny_overrides
from oracles import random_adapter, torch_model, worst
from peft import PeftModel

from esjax.cli import main
from esjax.model.decoder import token_logprobs
from esjax.model.dropout import Dropout
from esjax.model.families import module_name
from esjax.model.linear import KERNEL_AXES, Lora
from esjax.model.lora import Adapter, flatten, peft_tensors, save_adapter
from esjax.model.weights import Backbone, bind, load_backbone
from esjax.rows import Rows, stack, trunk
from esjax.run.jsonl import read_jsonl
from esjax.train.loop import dropout_keys
from esjax.train.losses import sft_loss
from esjax.train.step import Objective, gradients, make_step

FLOAT32, LENGTH, RATE = jnp.dtype("float32"), 24, 0.3
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
# Linear layers that read one input drop the same of it: the first with an adapter or not stands for them.
SITES = {"q_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj", "gate_proj": "gate_proj", "down_proj": "down_proj"}


class Tiny(NamedTuple):
    folder: Path
    backbone: Backbone
    adapter: Adapter
    peft: Path
    rows: Rows


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    lora = Lora(TARGETS, 4, 2.0, dropout=RATE)
    backbone = load_backbone(tiny_folder, lora, FLOAT32)
    adapter = random_adapter(backbone, seed=7, size=0.1)
    peft = tmp_path_factory.mktemp("dropout") / "adapter"
    save_adapter(peft, peft_tensors(adapter, backbone.arch), lora, str(tiny_folder))
    draw = np.random.default_rng(0)
    rows = stack([trunk(draw.integers(2, 900, LENGTH), [1.0] * (LENGTH - 1) + [0.0]) for _ in range(4)])
    return Tiny(tiny_folder, backbone, adapter, peft, rows)


class Masked(torch.nn.Module):
    """Stands for torch's own dropout, with a mask that is known."""

    def __init__(self, mask: np.ndarray) -> None:
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask / (1 - RATE)


def mask(drop: Dropout, linear: str, layer: int, size: int) -> np.ndarray:
    ones = jnp.ones((len(drop.keys), LENGTH, size))
    site = list(KERNEL_AXES).index(SITES[linear])
    return np.asarray(drop._replace(layer=layer)(ones, site) > 0).astype(np.float32)


def test_loss_and_gradients_are_those_of_peft_with_these_masks(tiny: Tiny) -> None:
    keys = dropout_keys(3, 5, range(4))
    model: Any = PeftModel.from_pretrained(torch_model(tiny.folder), tiny.peft, is_trainable=True)
    assert model.peft_config["default"].lora_dropout == RATE
    model.train()
    modules = dict(model.base_model.model.named_modules())
    for layer in range(tiny.backbone.arch.layers):
        for linear in TARGETS:
            module = modules[f"model.layers.{layer}.{module_name(linear)}"]
            assert module.lora_dropout["default"].p == RATE
            module.lora_dropout["default"] = Masked(mask(Dropout(RATE, keys), linear, layer, module.in_features))
    tokens = torch.tensor(tiny.rows.tokens, dtype=torch.long)
    logprobs = torch.log_softmax(model(input_ids=tokens).logits[:, :-1], -1)
    loss = -logprobs.gather(-1, tokens[:, 1:, None]).sum()
    loss.backward()
    theirs = {name: np.asarray(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    def ours(rate: float) -> tuple[float, dict[str, np.ndarray]]:
        b = tiny.backbone
        objective = Objective(b.definition, sft_loss, 4 * LENGTH, b.execution, None, rate)
        totals, grads = jax.jit(lambda a: gradients(objective, a, b.base, tiny.rows, keys))(tiny.adapter)
        return float(totals.loss), peft_tensors(grads, b.arch)

    total, found = ours(RATE)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    assert len(found) == len(theirs)
    for name, gradient in found.items():
        expected = theirs[name.replace(".weight", ".default.weight")]
        assert worst(gradient, expected) <= 1e-3 * np.abs(expected).max(), name
    plain, without = ours(0.0)
    assert abs(plain - total) > 1e-2
    assert max(worst(without[n], found[n]) for n in found) > 1e-2


def test_a_share_is_dropped_and_the_mean_stays(tiny: Tiny) -> None:
    drop = Dropout(RATE, dropout_keys(0, 0, range(64)))
    x = jnp.ones((64, LENGTH, 32))
    made = np.asarray(drop(x, 0))
    n = made.size
    assert abs((made == 0).mean() - RATE) < 5 * math.sqrt(RATE * (1 - RATE) / n)
    assert set(np.unique(made).round(6)) == {0.0, np.float32(1 / (1 - RATE)).round(6)}
    assert np.array_equal(made, np.asarray(drop(x, 0)))
    for other in (drop(x, 1), drop._replace(layer=1)(x, 0), Dropout(RATE, dropout_keys(0, 1, range(64)))(x, 0)):
        agree = ((made == 0) == (np.asarray(other) == 0)).mean()
        assert abs(agree - (RATE**2 + (1 - RATE) ** 2)) < 0.02  # as independent masks agree
    rows = (made == 0).reshape(64, -1)
    assert len(np.unique(rows, axis=0)) == 64


def test_it_hangs_on_rows_and_not_on_micro_batches(tiny: Tiny) -> None:
    b, keys = tiny.backbone, dropout_keys(1, 0, range(4))

    def trained(micro_rows: int, keys: np.ndarray) -> dict[tuple[str, ...], Any]:
        tx = optax.sgd(1.0)
        objective = Objective(b.definition, sft_loss, micro_rows * LENGTH, b.execution, None, RATE)
        start = jax.tree.map(jnp.copy, tiny.adapter)
        out, _, _ = make_step(objective, tx, micro_rows)(start, tx.init(start), b.base, tiny.rows, keys)
        return flatten(out)

    whole, halves, other = trained(4, keys), trained(2, keys), trained(4, dropout_keys(1, 1, range(4)))
    assert max(worst(whole[k][...], halves[k][...]) for k in whole) < 1e-5
    assert max(worst(whole[k][...], other[k][...]) for k in whole) > 1e-3
    assert np.array_equal(dropout_keys(1, 0, range(2, 4)), keys[2:])  # as another host builds them


def test_nothing_is_dropped_without_it(tiny: Tiny) -> None:
    b = tiny.backbone

    def score(drop: Dropout | None) -> np.ndarray:
        model = bind(b.definition, tiny.adapter, b.base)
        return np.asarray(token_logprobs(model, tiny.rows, 4 * LENGTH, b.execution, drop))

    keys = dropout_keys(0, 0, range(4))
    assert worst(score(None), score(Dropout(1e-9, keys))) < 1e-5
    assert worst(score(None), score(Dropout(RATE, keys))) > 1e-2


@pytest.mark.slow
def test_a_run_drops_in_sft_alone(tiny_folder: Path, tiny_run: Path, tmp_path: Path) -> None:
    """Its losses are others, its validation drops nothing, and DPO starts at its reference."""
    run = tmp_path / "run"
    main(
        ["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), "--lora.dropout", "0.5", "--evolve.rounds", "1"]
    )
    with_it, without = (read_jsonl(r / "sft" / "metrics.jsonl") for r in (run, tiny_run))
    assert with_it[0]["loss"] == pytest.approx(without[0]["loss"], abs=1e-6)  # B is zero at first
    assert abs(with_it[-1]["loss"] - without[-1]["loss"]) > 1e-4
    first = read_jsonl(run / "round1" / "dpo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert '"lora_dropout": 0.5' in (run / "sft" / "adapter" / "adapter_config.json").read_text()


def test_it_is_an_adapter_s(tiny_folder: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["sft", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder), "--lora.dropout"]
    assert "lora.dropout=0.1" in refused(*command, "0.1", "--train.what", "all")
    assert "lora.dropout" in refused(*command, "1")
    assert not (tmp_path / "run").exists()
