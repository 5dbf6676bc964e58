"""DPO's loss and gradients.

Real weights: on eight real preference pairs, with SmolLM2 and an adapter whose A and B are both random, log-probs,
losses and gradients agree with TRL's DPOTrainer (its tokenisation, collator, forward pass, loss) before the first step.

Tiny model: label smoothing, length normalisation and the added NLL against their formulas written in torch; packing and
shared trunks against one row a pair; accumulation over micro-batches against the whole batch; and the check that every
round's DPO starts at its reference, on a finished run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from conftest import chat, sample_texts
from datasets import Dataset
from definition import remasked
from flax import nnx
from oracles import random_adapter, real_dialogues, torch_logprobs, torch_model, worst
from peft import PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from esjax.errors import RunError
from esjax.evolve import phases, references
from esjax.evolve.experiment import Experiment, adapter_folder, open_model
from esjax.evolve.pairs import trunks
from esjax.model.decoder import Execution, token_logprobs
from esjax.model.linear import Lora
from esjax.model.lora import Adapter, peft_tensors, save_adapter
from esjax.model.weights import Backbone, bind, load_backbone
from esjax.rows import Rows, check, pack, prompt_with_replies, stack, trunk, trunk_with_replies
from esjax.run.directory import RunDir
from esjax.run.files import write_jsonl
from esjax.run.jsonl import read_jsonl
from esjax.sample.score import Scorer
from esjax.settings.files import load
from esjax.settings.schema import DpoSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer
from esjax.train.losses import Loss, Pairs, dpo_loss, sft_loss
from esjax.train.step import Objective, gradients, make_step

FLOAT32 = jnp.dtype("float32")
BETA = 0.1


class Gradient:
    """Loss, metrics and gradient of a batch, as means: what a training step of one micro-batch computes."""

    def __init__(self, backbone: Backbone, loss: Loss, targets: int, **how: Any) -> None:
        def program(adapter: Adapter, base: nnx.State, rows: Rows, extra: Any) -> Any:
            execution = backbone.execution._replace(**how)
            return gradients(Objective(backbone.definition, loss, targets, execution), adapter, base, rows, extra)

        self.backbone, self._program = backbone, jax.jit(program)

    def __call__(self, adapter: Adapter, rows: Rows, extra: Any) -> tuple[dict[str, float], Adapter]:
        totals, grads = self._program(adapter, self.backbone.base, rows, extra)
        values = {"loss": totals.loss, **totals.metrics}
        mean = {k: float(v / totals.weight) for k, v in values.items()}
        return mean, jax.tree.map(lambda g: g / totals.weight, grads)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def copied(adapter: Adapter) -> Adapter:
    """A copy to train from: a training step takes the memory of the adapter that it is given."""
    return jax.tree.map(jnp.array, adapter)


def relative(ours: Any, theirs: Any) -> float:
    """Norm of the difference over the norm of the second."""
    return float(np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) / np.linalg.norm(np.asarray(theirs)))


# --- TRL, real weights and real pairs ---------------------------------------------------------------------------------

NAMED = {  # adapter matrices whose gradients are compared: ours -> (layer, PEFT's name)
    ("q_proj", "lora_a"): (0, "layers.0.self_attn.q_proj.lora_A"),
    ("down_proj", "lora_b"): (14, "layers.14.mlp.down_proj.lora_B"),
    ("v_proj", "lora_a"): (29, "layers.29.self_attn.v_proj.lora_A"),
}


@pytest.fixture(scope="module")
def real_pairs(esconv: Path) -> list[dict[str, Any]]:
    """Prompt: the first turns of a real dialogue; chosen: its supporter's reply; rejected: another dialogue's."""
    turns = [d for d in real_dialogues(esconv) if 40 < len(d.turns[d.supporter_turns()[0]].text) < 140][:9]
    replies = [d.turns[d.supporter_turns()[0]].text for d in turns]
    return [
        {
            "prompt": d.messages(d.supporter_turns()[0]),
            "chosen": chat(replies[i], first=1),
            "rejected": chat(replies[i + 1], first=1),
        }
        for i, d in enumerate(turns[:8])
    ]


@dataclass(frozen=True)
class Smol:
    """SmolLM2 with a non-trivial adapter, and the same adapter as a PEFT folder."""

    backbone: Backbone
    adapter: Adapter
    folder: Path
    peft: Path


@pytest.fixture(scope="module")
def smol(smollm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Smol:
    lora = Lora(("q_proj", "v_proj", "down_proj"), 8, 2.0)
    backbone = load_backbone(smollm_folder, lora, FLOAT32)
    adapter = random_adapter(backbone, seed=5, size=0.04)
    peft = tmp_path_factory.mktemp("peft") / "adapter"
    save_adapter(peft, peft_tensors(adapter, backbone.arch), lora, str(smollm_folder))
    return Smol(backbone, adapter, smollm_folder, peft)


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """Arbitrary log-probs of chosen and rejected under a reference, [pairs, 2]: the loss is then far from ln 2."""
    return np.random.default_rng(6).uniform(-160, -60, (8, 2)).astype(np.float32)


@dataclass(frozen=True)
class Theirs:
    """What TRL computes before the first step: one entry a pair; gradients of the mean loss by PEFT's names."""

    logprobs: np.ndarray
    losses: np.ndarray
    gradients: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trl(
    smol: Smol, real_pairs: list[dict[str, Any]], reference: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Theirs:
    folder = tmp_path_factory.mktemp("trl")
    tokenizer: Any = AutoTokenizer.from_pretrained(smol.folder)
    quiet: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    args = DPOConfig(output_dir=str(folder), per_device_train_batch_size=1, beta=BETA, **quiet)
    model = PeftModel.from_pretrained(torch_model(smol.folder), smol.peft, is_trainable=True)
    columns = {"ref_chosen_logps": reference[:, 0].tolist(), "ref_rejected_logps": reference[:, 1].tolist()}
    rows = [p | {k: v[i] for k, v in columns.items()} for i, p in enumerate(real_pairs)]
    trainer: Any = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.precompute_ref_logps = True  # take the reference from the columns
    newline = tokenizer.encode("\n", add_special_tokens=False)
    logprobs, losses = [], []
    for example in trainer.train_dataset:
        # TRL also trains on what the template writes after the end-of-turn token; esjax's replies end with that token.
        for side in ("chosen_ids", "rejected_ids"):
            end = example[side].index(tokenizer.eos_token_id) + 1
            assert example[side][end:] == newline
            example[side] = example[side][:end]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([example]))
        (loss / len(rows)).backward()
        losses.append(float(loss.detach()))
        logprobs.append([trainer._metrics["train"][f"logps/{side}"][-1] for side in ("chosen", "rejected")])
    found: dict[str, np.ndarray] = {}
    for name, p in trainer.model.named_parameters():
        key = next((key for _, key in NAMED.values() if f"{key}.default" in name), None)
        if key is not None and p.grad is not None:
            found[key] = np.asarray(p.grad)
    assert set(found) == {key for _, key in NAMED.values()}
    return Theirs(np.asarray(logprobs), np.asarray(losses), found)


@dataclass(frozen=True)
class Packed:
    """Our rows of the pairs, four in a row, and the log-probs [B, T] of their targets with the adapter and without."""

    rows: Rows
    segments: int
    logprobs: Any
    bare: Any


@pytest.fixture(scope="module")
def packed(smol: Smol, real_pairs: list[dict[str, Any]]) -> Packed:
    one_each = DpoSettings(trunk="prompt")
    examples = [t.rows for t in trunks(real_pairs, Encoder(ChatTokenizer(smol.folder), 512, ""), one_each)]
    halves = [examples[:4], examples[4:]]
    length = max(sum(len(e.tokens) for e in half) for half in halves)
    rows = stack([pack(half, length) for half in halves])
    check(rows)
    targets = int((rows.weight != 0).sum())

    @jax.jit
    def program(adapter: Adapter, base: nnx.State, rows: Rows) -> jax.Array:
        return token_logprobs(bind(smol.backbone.definition, adapter, base), rows, targets, smol.backbone.execution)

    adapters = smol.adapter, smol.backbone.fresh_adapter(0)
    return Packed(rows, 4, *(np.asarray(program(adapter, smol.backbone.base, rows)) for adapter in adapters))


def test_logprobs_are_those_of_trl(trl: Theirs, packed: Packed) -> None:
    def sums(logprobs: np.ndarray) -> np.ndarray:
        """Of the targets of each pair's chosen and rejected [pairs, 2]."""
        rows, segments = packed.rows, range(1, packed.segments + 1)
        masks = [(rows.segment[b] == s) & (rows.branch[b] == side) for b in (0, 1) for s in segments for side in (1, 2)]
        values = [logprobs[i // (2 * packed.segments)][mask].sum() for i, mask in enumerate(masks)]
        return np.reshape(values, (-1, 2))

    assert worst(sums(packed.logprobs), trl.logprobs) <= 1e-3
    assert worst(sums(packed.bare), trl.logprobs) > 1  # the adapter is not trivial
    assert worst(sums(packed.logprobs)[:, ::-1], trl.logprobs) > 1


def test_gradients_are_those_of_trl(smol: Smol, trl: Theirs, packed: Packed, reference: np.ndarray) -> None:
    extra = Pairs(reference.reshape(2, packed.segments, 1, 2), np.ones((2, packed.segments, 1), bool))
    gradient = Gradient(smol.backbone, dpo_loss(DpoSettings(beta=BETA)), int((packed.rows.weight != 0).sum()))
    ours, grads = gradient(smol.adapter, packed.rows, extra)
    assert abs(trl.losses.mean() - math.log(2)) > 0.1
    assert ours["loss"] == pytest.approx(trl.losses.mean(), abs=1e-3)
    swapped, _ = gradient(smol.adapter, packed.rows, extra._replace(reference=extra.reference[..., ::-1]))
    assert abs(swapped["loss"] - trl.losses.mean()) > 1e-3
    margin = BETA * ((trl.logprobs - reference) @ [1, -1])
    assert ours["margin"] == pytest.approx(margin.mean(), abs=1e-3)
    state: dict[Any, Any] = dict(nnx.to_flat_state(grads))
    for (linear, which), (layer, name) in NAMED.items():
        stacked = np.asarray(state["layers", linear, which][...])
        stacked = stacked.swapaxes(1, 2) if which == "lora_b" else stacked  # PEFT's orientation
        assert relative(stacked[layer], trl.gradients[name]) <= 1e-2
        assert relative(stacked[layer - 1], trl.gradients[name]) > 1e-2  # another layer's


# --- the options of the loss, by their formulas -----------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A tiny model with a random adapter; pairs of prompt, chosen, rejected; the same model in torch."""

    backbone: Backbone
    adapter: Adapter
    pairs: list[list[list[int]]]
    reference: np.ndarray  # [pairs, 2]
    policy: list[list[torch.Tensor]]  # token log-probs of chosen and rejected by torch


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    lora = Lora(("q_proj", "v_proj", "up_proj", "down_proj"), 4, 2.0)
    backbone = load_backbone(tiny_folder, lora, FLOAT32)
    adapter = random_adapter(backbone, seed=7, size=0.1)
    folder = tmp_path_factory.mktemp("tiny-peft") / "adapter"
    save_adapter(folder, peft_tensors(adapter, backbone.arch), lora, str(tiny_folder))
    model = PeftModel.from_pretrained(torch_model(tiny_folder), folder)
    draw = np.random.default_rng(8)
    sizes = ((9, 4, 7), (12, 6, 3), (5, 2, 9), (7, 8, 8))
    pairs = [[draw.integers(2, backbone.arch.vocab, n).tolist() for n in size] for size in sizes]
    reference = draw.uniform(-60, -10, (4, 2)).astype(np.float32)
    policy = [[torch.tensor(torch_logprobs(model, p[0], reply)) for reply in p[1:]] for p in pairs]
    return Tiny(backbone, adapter, pairs, reference, policy)


def pair_row(pair: Sequence[Sequence[int]]) -> Rows:
    return prompt_with_replies(pair[0], pair[1:])


def one_a_row(t: Tiny) -> tuple[Rows, Pairs]:
    """Each pair in a row of its own."""
    rows = stack([pack([pair_row(p)], 32) for p in t.pairs])
    return rows, Pairs(t.reference.reshape(4, 1, 1, 2), np.ones((4, 1, 1), bool))


def formula(t: Tiny, settings: DpoSettings) -> float:
    """The loss's definition, written once more, from torch's log-probs."""
    losses = []
    for (chosen, rejected), ref in zip(t.policy, torch.tensor(t.reference), strict=True):
        rewards = [settings.beta * (chosen.sum() - ref[0]), settings.beta * (rejected.sum() - ref[1])]
        if settings.length_normalised:
            rewards = [rewards[0] / len(chosen), rewards[1] / len(rejected)]
        margin = rewards[0] - rewards[1]
        e = settings.label_smoothing
        loss = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
        losses.append(loss + settings.nll_weight * -chosen.mean())
    return float(torch.stack(losses).mean())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing": 0.2},
    "length normalised": {"length_normalised": True},
    "nll": {"nll_weight": 0.3},
    "all": {"label_smoothing": 0.1, "length_normalised": True, "nll_weight": 1.0, "beta": 0.5},
}


def test_options_follow_their_formulas(tiny: Tiny) -> None:
    rows, extra = one_a_row(tiny)
    targets = int((rows.weight != 0).sum())
    model = bind(tiny.backbone.definition, tiny.adapter, tiny.backbone.base)
    logprobs = token_logprobs(model, rows, targets, Execution())
    for name, options in OPTIONS.items():
        totals = dpo_loss(DpoSettings(**options))(logprobs, rows, extra)
        ours = float(totals.loss / totals.weight)
        assert ours == pytest.approx(formula(tiny, DpoSettings(**options)), abs=1e-4), name
        for other, others in OPTIONS.items():  # no option is without effect
            assert other == name or abs(ours - formula(tiny, DpoSettings(**others))) > 1e-3


# --- packing, shared trunks and masks ---------------------------------------------------------------------------------


def test_packed_pairs_have_the_loss_and_gradient_of_single_ones(tiny: Tiny) -> None:
    """Packed and rematerialised, as training computes them, against one pair a row and nothing recomputed."""
    loss = dpo_loss(DpoSettings(nll_weight=0.1))
    single, extra = one_a_row(tiny)
    targets = int((single.weight != 0).sum())
    expected, gradient = Gradient(tiny.backbone, loss, targets)(tiny.adapter, single, extra)
    rows = stack([pack([pair_row(p) for p in half], 64) for half in (tiny.pairs[:2], tiny.pairs[2:])])
    check(rows)
    extra = Pairs(tiny.reference.reshape(2, 2, 1, 2), np.ones((2, 2, 1), bool))
    packed = Gradient(tiny.backbone, loss, targets, remat="full")
    got, grads = packed(tiny.adapter, rows, extra)
    assert got == pytest.approx(expected, abs=1e-5)
    assert relative(flat(grads), flat(gradient)) <= 1e-4
    # Branches that miss the last trunk token; the references of the other row's pairs.
    for wrong, reference in ((remasked(rows, -1), extra.reference), (rows, extra.reference[::-1])):
        values, moved = packed(tiny.adapter, wrong, extra._replace(reference=reference))
        assert values != pytest.approx(expected, abs=1e-5)
        assert relative(flat(moved), flat(gradient)) > 1e-4


def test_pairs_on_one_trunk_have_the_loss_and_gradient_of_single_ones(tiny: Tiny) -> None:
    """A dialogue as the trunk, a pair after its 6th token and one after its 11th: later trunk tokens are hidden."""
    dialogue = [*tiny.pairs[0][0], *tiny.pairs[1][0]]
    lone = [prompt_with_replies(dialogue[:n], p[1:]) for n, p in zip((6, 11), tiny.pairs, strict=False)]
    single = stack([pack([example], 48) for example in lone])
    reference = tiny.reference[:2]
    gradient_of = Gradient(tiny.backbone, dpo_loss(DpoSettings(nll_weight=0.1)), int((single.weight != 0).sum()))
    alone = Pairs(reference.reshape(2, 1, 1, 2), np.ones((2, 1, 1), bool))
    expected, gradient = gradient_of(tiny.adapter, single, alone)
    replies = [(n, reply) for n, p in zip((6, 11), tiny.pairs, strict=False) for reply in p[1:]]
    rows = stack([pack([trunk_with_replies(dialogue, replies)], 64)])
    check(rows)
    extra = Pairs(reference.reshape(1, 1, 2, 2), np.ones((1, 1, 2), bool))
    got, grads = gradient_of(tiny.adapter, rows, extra)
    assert got == pytest.approx(expected, abs=1e-5)
    assert relative(flat(grads), flat(gradient)) <= 1e-4
    for by in (1, -1):  # a mask off by one
        values, moved = gradient_of(tiny.adapter, remasked(rows, by), extra)
        assert values != pytest.approx(expected, abs=1e-5)
        assert relative(flat(moved), flat(gradient)) > 1e-4


# --- accumulation -----------------------------------------------------------------------------------------------------


def stepped(t: Tiny, loss: Loss, rows: Rows, extra: Any, micro_rows: int) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of one step, and its gradient: with plain gradient descent at rate 1 the adapter moves by minus that."""
    targets = int((rows.weight != 0).sum())
    step = make_step(Objective(t.backbone.definition, loss, targets, t.backbone.execution), optax.sgd(1.0), micro_rows)
    adapter = copied(t.adapter)
    moved, _, metrics = step(adapter, optax.sgd(1.0).init(adapter), t.backbone.base, rows, extra)
    return {k: float(v) for k, v in metrics.items()}, flat(t.adapter) - flat(moved)


@pytest.mark.parametrize("phase", ["sft", "dpo"])
def test_accumulation_is_the_whole_batch(tiny: Tiny, phase: str) -> None:
    """Rows with 1 to 20 targets (sft) or none to 3 pairs (dpo), one at a time or all four."""
    extra: Pairs | None
    if phase == "sft":
        tokens = np.random.default_rng(9).integers(2, tiny.backbone.arch.vocab, (4, 24)).tolist()
        weights = [[0.0] * 3 + [1.0] * n + [0.0] * (21 - n) for n in (2, 20, 7, 1)]
        chats = [pack([trunk(t, w)], 48) for t, w in zip(tokens, weights, strict=True)]
        loss: Loss = sft_loss
        rows, extra = stack(chats), None
    else:
        order: list[list[int]] = [[0], [1, 2, 3], [], [3, 0]]
        rows = stack([pack([pair_row(tiny.pairs[i]) for i in row], 96) for row in order])
        values, valid = np.zeros((4, 3, 1, 2), np.float32), np.zeros((4, 3, 1), bool)
        for b, row in enumerate(order):
            values[b, : len(row), 0], valid[b, : len(row)] = tiny.reference[row], True
        loss, extra = dpo_loss(DpoSettings(nll_weight=0.5)), Pairs(values, valid)
    whole, gradient = stepped(tiny, loss, rows, extra, 4)
    metrics, accumulated = stepped(tiny, loss, rows, extra, 1)
    assert metrics == pytest.approx(whole, rel=1e-4)
    assert relative(accumulated, gradient) <= 1e-4
    # Averaging the rows' own means would be another loss and another gradient.
    alone, gradient_of = [], Gradient(tiny.backbone, loss, int((rows.weight != 0).sum()))
    for b in range(4):
        if (rows.weight[b] != 0).any():
            one, its = jax.tree.map(lambda x, b=b: x[b : b + 1], (rows, extra))
            alone.append(gradient_of(tiny.adapter, one, its))
    mean = np.mean([flat(g) for _, g in alone], axis=0)
    assert relative(mean, gradient) > 1e-2
    assert abs(np.mean([m["loss"] for m, _ in alone]) - whole["loss"]) > 1e-2


# --- every round starts at its reference ------------------------------------------------------------------------------


Round = tuple[Experiment, Adapter, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def second_round(tiny_run: Path) -> Round:
    experiment, m1 = open_model(f"{tiny_run}:m1", load(str(tiny_run / "config.yaml")))
    return experiment, m1, read_jsonl(tiny_run / "round2" / "pairs.jsonl")


def rescored(experiment: Experiment, adapter: Adapter, pairs: list[dict[str, Any]], file: Path) -> Path:
    """The pairs with another reference: the log-probs under base + ``adapter``."""
    scorer = Scorer(experiment.backbone, experiment.config.dpo.row_length, experiment.config.dpo.micro_rows)
    rows = []
    examples = [t.rows for t in trunks(pairs, experiment.encoder, DpoSettings(trunk="prompt"))]
    for pair, (chosen, rejected) in zip(pairs, scorer.score(adapter, examples), strict=True):
        rows.append(pair | {"reference": {"chosen": float(chosen.sum()), "rejected": float(rejected.sum())}})
    write_jsonl(file, rows)
    return file


def first_step(experiment: Experiment, pairs: Path, folder: Path, start: Adapter) -> dict[str, float]:
    """Metrics of the first step of DPO on a file of pairs."""
    run = RunDir(folder, experiment.config)
    phases.dpo(experiment, run, pairs, "dpo", phases.Start(lambda: copied(start), lambda: start))
    return json.loads((run.path / "dpo" / "metrics.jsonl").read_text().splitlines()[0])


def test_adapter_off_is_no_reference(second_round: Round, tmp_path: Path) -> None:
    """Round 2 trains from M_1, and its reference is M_1: with the bare backbone as the reference the run stops."""
    experiment, m1, pairs = second_round
    bare = experiment.backbone.fresh_adapter(experiment.config.seed)  # B is zero
    wrong = rescored(experiment, bare, pairs, tmp_path / "bare.jsonl")
    with pytest.raises(RunError, match="does not start at its reference"):
        first_step(experiment, wrong, tmp_path / "wrong", m1)
    first = first_step(experiment, rescored(experiment, m1, pairs, tmp_path / "m1.jsonl"), tmp_path / "right", m1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["margin"] == pytest.approx(0, abs=1e-4)


def test_a_loss_that_stays_at_its_reference_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def said(drifts: list[float], steps: int) -> int:
        watch = phases.watch_start(FLOAT32)
        for number, drift in enumerate(drifts):
            watch(number, steps, {"drift": drift, "loss": 0.69, "preference_loss": 0.69, "margin": 0.0})
        return capsys.readouterr().err.count("the loss still is 0.6900, as at the reference")

    assert said([0.0] * 40, 40) == 1
    assert said([0.0, 1e-6, *[0.01] * 38], 40) == 0  # the first steps of a warm-up
    assert said([0.0] * 4 + [0.01] * 36, 40) == 0
    assert said([0.0, 0.01, *[0.0] * 5, 0.01], 40) == 1
    with pytest.raises(RunError, match="does not start at its reference"):
        said([0.1], 40)


def test_stored_reference_is_that_of_the_round_start(second_round: Round, tiny_run: Path, tmp_path: Path) -> None:
    """round2/pairs.jsonl holds M_1's log-probs, not M_0's, M_2's or the backbone's."""
    experiment, m1, pairs = second_round

    def references(pairs: list[dict[str, Any]]) -> list[list[float]]:
        return [[p["reference"]["chosen"], p["reference"]["rejected"]] for p in pairs]

    def difference(adapter: Adapter) -> float:
        scored = rescored(experiment, adapter, pairs, tmp_path / "scored.jsonl")
        return worst(references(read_jsonl(scored)), references(pairs))

    assert difference(m1) <= 1e-3
    others = [experiment.adapter(adapter_folder(tiny_run, t)) for t in (0, 2)]
    assert min(map(difference, [*others, experiment.backbone.fresh_adapter(0)])) > 2e-3


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "beta"), [("float32", 1.0), ("bfloat16", 5.0)])
def test_long_replies_and_large_beta_start_at_reference(
    tiny_run: Path, tmp_path: Path, dtype: str, beta: float
) -> None:
    """Replies of some 300 words, three pairs in a step: log-probs sum to more than -1,000, and beta multiplies their rounding.

    Control: of two pairs one side of the reference is moved, in opposite directions, so that the mean margin stays 0.
    """
    experiment, m1 = open_model(f"{tiny_run}:m1", load(str(tiny_run / "config.yaml")))
    changes = {"beta": beta, "row_length": 2304, "trunk": "prompt", "batch_rows": 4}
    settings = experiment.config.dpo.model_copy(update=changes)
    model = experiment.config.model.model_copy(update={"dtype": dtype})
    experiment = Experiment.open(experiment.config.model_copy(update={"dpo": settings, "model": model}))
    words = " ".join(sample_texts()).split()
    pairs = []
    for i in range(6):
        told = [" ".join(words[n : n + 300]) for n in (600 * i, 600 * i + 300)]
        sides = {k: chat(x, first=1) for k, x in zip(("chosen", "rejected"), told, strict=True)}
        pairs.append({"id": str(i), "prompt": chat(f"Number {i}."), **sides})
    file = tmp_path / "pairs.jsonl"
    references.write_references(experiment, m1, pairs, file, "dpo")
    first = first_step(experiment, file, tmp_path / "right", m1)
    stored = read_jsonl(file)
    sums = [x for p in stored for x in p["reference"].values()]
    assert max(sums) < -1000
    rounding = beta * float(np.spacing(np.float32(abs(min(sums)))))  # of one such sum
    assert first["margin"] == pytest.approx(0, abs=2 * rounding)
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=rounding)
    for number, pair in enumerate(stored):
        pair["reference"]["chosen"] += 40 * (-1) ** number
    write_jsonl(file, stored)
    with pytest.raises(RunError, match="does not start at its reference"):
        first_step(experiment, file, tmp_path / "wrong", m1)
