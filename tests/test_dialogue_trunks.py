"""Preference pairs at every supporter turn of real ESConv dialogues, on one trunk: what that saves, and that it is the same."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import pair_ids
from definition import remasked
from oracles import random_adapter, real_dialogues

from esjax import rows
from esjax.bench.training import program_flops, unshared_pairs
from esjax.evolve.pairs import Trunk, trunks
from esjax.model.costs import training_flops
from esjax.model.decoder import Execution
from esjax.model.families import read_architecture
from esjax.model.lora import lora_from
from esjax.model.weights import Backbone, load_backbone
from esjax.rows import Rows
from esjax.settings.schema import DpoSettings, LoraSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer
from esjax.train.losses import Pairs, dpo_loss
from esjax.train.step import Objective, gradients

SETTINGS = DpoSettings(row_length=8192, trunk="dialogue")
LORA = lora_from(LoraSettings(rank=16, alpha=32))
FLOAT32 = jnp.dtype("float32")


@dataclass
class Case:
    """One dialogue in both forms."""

    trunk: Trunk
    single: Rows  # rows 2p and 2p + 1 are chosen and rejected of pair p

    @property
    def extra(self) -> tuple[Pairs, Pairs]:
        """No reference, for the shared and for the single rows."""
        n = len(self.trunk.members)
        empty = np.zeros((1, 1, n, 2), np.float32), np.ones((1, 1, n), bool)
        return Pairs(*empty), Pairs(*(x.reshape(n, 1, 1, *x.shape[3:]) for x in empty))


@pytest.fixture(scope="module")
def encoder(smollm_folder: Path) -> Encoder:
    return Encoder(ChatTokenizer(smollm_folder), 8192, "")


@pytest.fixture(scope="module")
def cases(esconv: Path, encoder: Encoder) -> list[Case]:
    """Whole dialogues: at every supporter turn the real reply is chosen, one of the dialogue before it rejected."""
    out = []
    dialogues = real_dialogues(esconv)[:6]
    for other, dialogue in pairwise(dialogues):
        elsewhere = [other.turns[i].text for i in other.supporter_turns()]
        pairs = []
        for n, turn in enumerate(dialogue.supporter_turns()):
            chosen, rejected = dialogue.turns[turn].text, elsewhere[n % len(elsewhere)]
            sides = ({"role": "assistant", "content": text} for text in (chosen, rejected))
            pairs.append({"prompt": dialogue.messages(turn)} | dict(zip(("chosen", "rejected"), ([s] for s in sides))))  # noqa: B905
        (trunk,) = trunks(pairs, encoder, SETTINGS)
        assert len(trunk.members) == len(pairs) >= 5
        made = [pair_ids(encoder, p["prompt"], p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs]
        single = [rows.prompt_with_replies(ids, [reply]) for ids, replies in made for reply in replies]
        longest = max(len(r.tokens) for r in single)
        out.append(Case(trunk, rows.stack([rows.pack([r], longest) for r in single])))
    return out


def test_every_turn_of_a_dialogue_costs_at_most_two_fifths(cases: list[Case], smollm_folder: Path) -> None:
    """FLOPs of the whole step by the compiler's count; SmolLM2's shape, with and without rematerialisation."""
    arch = read_architecture(smollm_folder)
    for case, remat in zip(cases[:3], ("none", "full", "none"), strict=True):
        shared, extra = rows.stack([case.trunk.rows]), case.extra
        rows.check(shared)
        how = Execution(remat=remat)  # type: ignore[arg-type]
        loss = dpo_loss(SETTINGS)
        ours = program_flops(arch, LORA, FLOAT32, loss, how, (shared, extra[0]))
        naive = program_flops(
            arch, LORA, FLOAT32, unshared_pairs(loss), how._replace(layout="causal"), (case.single, extra[1])
        )
        print(
            f"{len(case.trunk.members)} pairs, {shared.tokens.size} tokens: {ours / 1e12:.2f} of {naive / 1e12:.2f} TFLOP"
        )
        assert ours <= 0.4 * naive
        # Nor is it the padding of the single rows that makes the difference.
        assert training_flops(arch, LORA, shared) <= 0.4 * training_flops(arch, LORA, case.single)
        # The count itself: twice the rows are twice the FLOPs, but for the optimiser's.
        assert program_flops(
            arch, LORA, FLOAT32, loss, how, (rows.stack([case.trunk.rows] * 2), _twice(extra[0]))
        ) == pytest.approx(2 * ours, rel=0.02)


def _twice(extra: Pairs) -> Pairs:
    return Pairs(*(np.concatenate([x, x]) for x in extra))


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_one_row_a_sequence(cases: list[Case], smollm_folder: Path) -> None:
    """SmolLM2 itself; the single rows four at a time. A trunk token hidden from the branches is caught."""
    backbone = load_backbone(smollm_folder, LORA, FLOAT32)
    adapter = random_adapter(backbone, 3, size=0.01)
    case = min(cases, key=lambda c: c.single.tokens.size)
    loss = dpo_loss(SETTINGS)
    shared, (extra, single_extra) = rows.stack([case.trunk.rows]), case.extra
    expected = _Sum()
    for i in range(0, len(case.single.tokens), 4):
        part = Rows(*(x[i : i + 4] for x in case.single))
        pairs = Pairs(*(x[i // 2 : i // 2 + 2] for x in single_extra))
        expected.add(*_gradient(backbone, adapter, part, pairs, unshared_pairs(loss), "causal"))
    got = _Sum()
    got.add(*_gradient(backbone, adapter, shared, extra, loss, "branched"))
    wrong = _Sum()
    hidden = remasked(shared, -1)
    wrong.add(*_gradient(backbone, adapter, hidden, extra, loss, "branched"))
    loss_apart = abs(got.loss - expected.loss) / abs(expected.loss)
    gradient_apart = got.apart(expected)
    print(
        f"loss {got.loss:.6f}, relative {loss_apart:.1e}; gradient {gradient_apart:.1e}; control {wrong.apart(expected):.1e}"
    )
    assert loss_apart <= 1e-5
    assert gradient_apart <= 1e-5
    assert wrong.apart(expected) > 1e-2


class _Sum:
    def __init__(self) -> None:
        self.loss, self.gradient = 0.0, np.zeros(())

    def add(self, loss: float, gradient: np.ndarray) -> None:
        self.loss, self.gradient = self.loss + loss, self.gradient + gradient

    def apart(self, other: _Sum) -> float:
        return float(np.linalg.norm(self.gradient - other.gradient) / np.linalg.norm(other.gradient))


def _gradient(backbone: Backbone, adapter: Any, batch: Rows, extra: Pairs, loss: Any, layout: Any) -> Any:
    how = backbone.execution._replace(layout=layout)
    targets = int((batch.weight != 0).sum())

    @jax.jit
    def run(adapter: Any, base: Any) -> Any:
        return gradients(Objective(backbone.definition, loss, targets, how), adapter, base, batch, extra)

    totals, gradient = run(adapter, backbone.base)
    return float(totals.loss), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)]).astype(np.float64)
