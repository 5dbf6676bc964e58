"""Every preference loss against TRL's: value and gradient, on pairs of real texts, one trunk a pair and one a dialogue.

The model is tiny, with an adapter whose A and B are both random. TRL tokenises, computes and sums by itself; what it has no
loss for (R-DPO's length term) is its formula in torch, from TRL's own log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ESCONV, Refused, read_dialogues, tiny_overrides
from datasets import Dataset
from flax import nnx
from oracles import random_adapter, torch_model
from peft import PeftModel
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer

from esjax.corpus.dialogue import Dialogue
from esjax.evolve.experiment import Experiment
from esjax.evolve.models import adapter_folder
from esjax.evolve.pairs import Trunk, read_pairs, trunks
from esjax.evolve.phases import held_out
from esjax.model.decoder import token_logprobs
from esjax.model.linear import Lora
from esjax.model.lora import Adapter, peft_tensors, save_adapter
from esjax.model.weights import Backbone, bind, load_backbone
from esjax.rows import Rows, pack, stack
from esjax.settings.files import load
from esjax.settings.schema import DpoSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer
from esjax.train.losses import Pairs, dpo_loss

Grads = dict[str, np.ndarray]


@dataclass
class Setup:
    """A model, eight pairs and their reference, and what TRL makes of them."""

    folder: Path
    peft: Path
    backbone: Backbone
    adapter: Adapter
    pairs: list[dict[str, Any]]
    reference: np.ndarray  # [8, 2]
    out: Path
    known: dict[str, tuple[float, Grads]] = field(default_factory=dict)

    def trl(self, name: str, beta: float, **options: Any) -> tuple[float, Grads]:
        """The loss and its gradients by DPOTrainer."""
        key = f"{name} {beta} {options}"
        if key not in self.known:
            trainer, examples = self.trainer(loss_type=[name], beta=beta, **options)
            batch = trainer.data_collator(examples)
            self.known[key] = graded(trainer.model, lambda: trainer.compute_loss(trainer.model, batch))
        return self.known[key]

    def trainer(self, **options: Any) -> tuple[Any, list[dict[str, Any]]]:
        """TRL's trainer, and its examples as esjax has them: TRL also trains on what the template writes after an end of turn."""
        model = PeftModel.from_pretrained(torch_model(self.folder), self.peft, is_trainable=True)
        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder)
        quiet: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
        args = DPOConfig(output_dir=str(self.out), per_device_train_batch_size=8, **options, **quiet)
        rows = [
            p | {"ref_chosen_logps": float(c), "ref_rejected_logps": float(r)}
            for p, (c, r) in zip(self.pairs, self.reference, strict=True)
        ]
        made: Any = DPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        made.precompute_ref_logps = True  # take the reference from the columns
        examples = list(made.train_dataset)
        for example in examples:
            for side in ("chosen_ids", "rejected_ids"):
                example[side] = example[side][: example[side].index(tokenizer.eos_token_id) + 1]
        return made, examples

    @cached_property
    def differentiated(self) -> Any:
        """(adapter, base, rows, what is given back for each log-prob) -> log-probs, gradient of the adapter; compiled."""

        def program(adapter: Adapter, base: nnx.State, rows: Rows, back: Any) -> Any:
            def logprobs(adapter: Adapter) -> jax.Array:
                model = bind(self.backbone.definition, adapter, base)
                return token_logprobs(model, rows, None, self.backbone.execution)

            made, pull = jax.vjp(logprobs, adapter)
            return made, pull(back)[0]

        return jax.jit(program)

    @cached_property
    def policy(self) -> tuple[Any, Any, Any]:
        """TRL's model, with the log-probs of chosen and rejected [8, 2] and their tokens [8, 2], to be differentiated."""
        trainer, examples = self.trainer()
        sums, counts = [], []
        for example in examples:
            for side in ("chosen_ids", "rejected_ids"):
                ids = torch.tensor([[*example["prompt_ids"], *example[side]]])
                logits = trainer.model(input_ids=ids).logits[0, :-1]
                each = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[len(example["prompt_ids"]) - 1 :, 0]
                sums.append(each.sum())
                counts.append(len(each))
        return trainer.model, torch.stack(sums).reshape(-1, 2), torch.tensor(counts).reshape(-1, 2)

    def formula(self, loss: Callable[[Any, Any], Any]) -> tuple[float, Grads]:
        """A loss by TRL's own log-probs [8, 2] and token counts [8, 2]."""
        model, sums, counts = self.policy
        return graded(model, lambda: loss(sums, counts), keep=True)


def graded(model: Any, loss: Callable[[], Any], keep: bool = False) -> tuple[float, Grads]:
    """A loss and the gradients of the adapter's matrices, by the names in a PEFT file."""
    value = loss()
    model.zero_grad()
    value.backward(retain_graph=keep)
    found = {
        n.replace(".default", ""): np.asarray(p.grad).copy() for n, p in model.named_parameters() if p.grad is not None
    }
    return float(value.detach()), found


@pytest.fixture(scope="module")
def setup(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    lora = Lora(("q_proj", "v_proj", "down_proj"), 4, 2.0)
    backbone = load_backbone(tiny_folder, lora, np.dtype("float32"))
    adapter = random_adapter(backbone, seed=5, size=0.1)
    out = tmp_path_factory.mktemp("losses")
    save_adapter(out / "adapter", peft_tensors(adapter, backbone.arch), lora, str(tiny_folder))
    made = Setup(tiny_folder, out / "adapter", backbone, adapter, real_pairs(), np.zeros((8, 2)), out / "trl")
    policy = made.policy[1].detach().numpy()
    made.reference = (policy + np.random.default_rng(6).normal(0, 8, (8, 2))).astype(np.float32)
    return made


def real_pairs() -> list[dict[str, Any]]:
    """Two pairs of each of four dialogues, of ESConv where it is at hand: the supporter's answer, and one of another dialogue."""
    dialogues: list[Dialogue]
    if (ESCONV / "valid.jsonl").exists():
        dialogues = read_dialogues("esconv", str(ESCONV / "valid.jsonl"))
    else:
        sample = Path(__file__).parent.parent / "data" / "sample" / "train.jsonl"
        dialogues = read_dialogues("sample", str(sample))
    able = [d for d in dialogues if d.turns[0].role == "seeker" and len(d.supporter_turns()) > 2][:5]

    def said(d: Dialogue, n: int) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": d.turns[d.supporter_turns()[n]].text}]

    return [
        {
            "id": f"{d.id}/{n}",
            "prompt": d.messages(d.supporter_turns()[n]),
            "chosen": said(d, n),
            "rejected": said(other, n),
        }
        for d, other in pairwise(able)
        for n in (0, 1)
    ]


def ours(s: Setup, settings: DpoSettings) -> tuple[float, Grads, list[Trunk]]:
    """The loss and its gradients by esjax, a trunk a row.

    The model is compiled once for all losses: what a loss gives back for each log-prob goes through its gradient.
    """
    encoder = Encoder(ChatTokenizer(s.folder), 2048, "")
    made, plain = (trunks(s.pairs, encoder, x) for x in (settings, settings.model_copy(update={"tail_weight": 1.0})))
    rows, whole = (stack([pack([t.rows], max(len(t.rows.tokens) for t in x)) for t in x]) for x in (made, plain))
    most = max(len(t.members) for t in made)
    values, valid = np.zeros((len(made), 1, most, 2), np.float32), np.zeros((len(made), 1, most), bool)
    for b, t in enumerate(made):
        values[b, 0, : len(t.members)], valid[b, 0, : len(t.members)] = s.reference[t.members], True

    def loss(logprobs: Any) -> Any:
        totals = dpo_loss(settings)(logprobs, rows, Pairs(values, valid))
        return totals.loss / totals.weight

    logprobs, _ = s.differentiated(s.adapter, s.backbone.base, whole, np.zeros(whole.weight.shape, np.float32))
    value, back = jax.value_and_grad(loss)(logprobs)
    _, grads = s.differentiated(s.adapter, s.backbone.base, whole, back)
    return float(value), peft_tensors(grads, s.backbone.arch), made


def apart(a: Grads, b: Grads) -> float:
    """How far two gradients are apart, relative to the second."""
    assert a.keys() == b.keys()
    squares = [(float(((a[k] - b[k]) ** 2).sum()), float((b[k] ** 2).sum())) for k in a]
    return float(np.sqrt(sum(x for x, _ in squares) / sum(y for _, y in squares)))


def simpo(s: Setup, beta: float, gamma: float, e: float) -> tuple[float, Grads]:
    me = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        beta=beta,
        simpo_gamma=gamma,
        label_smoothing=e,
        alpha=0.0,
    )
    return s.formula(lambda sums, n: CPOTrainer.cpo_loss(me, *(sums / n).unbind(1))[0].mean())


def r_dpo(s: Setup, beta: float, alpha: float) -> tuple[float, Grads]:
    """Park et al. 2024, eq. 9."""

    def loss(sums: Any, n: Any) -> Any:
        change = sums - torch.tensor(s.reference)
        return -F.logsigmoid(beta * (change[:, 0] - change[:, 1]) + alpha * (n[:, 0] - n[:, 1])).mean()

    return s.formula(loss)


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Setup], tuple[float, Grads]]]] = {
    "sigmoid": ({"beta": 0.2}, lambda s: s.trl("sigmoid", 0.2)),
    "a token": ({"beta": 2.0, "length_normalised": True}, lambda s: s.trl("sigmoid_norm", 2.0)),
    "robust": ({"loss": "robust", "label_smoothing": 0.2}, lambda s: s.trl("robust", 0.1, label_smoothing=0.2)),
    "hinge": ({"loss": "hinge"}, lambda s: s.trl("hinge", 0.1)),
    "ipo": ({"loss": "ipo", "beta": 0.5}, lambda s: s.trl("ipo", 0.5)),
    "apo_zero": ({"loss": "apo_zero"}, lambda s: s.trl("apo_zero", 0.1)),
    "apo_down": ({"loss": "apo_down"}, lambda s: s.trl("apo_down", 0.1)),
    "ld": ({"tail_weight": 0.3}, lambda s: s.trl("sigmoid", 0.1, ld_alpha=0.3)),
    "ld, no tail": ({"tail_weight": 0.0, "loss": "hinge"}, lambda s: s.trl("hinge", 0.1, ld_alpha=0.0)),
    "simpo": (
        {"loss": "simpo", "beta": 2.0, "target_margin": 0.5, "label_smoothing": 0.1},
        lambda s: simpo(s, 2.0, 0.5, 0.1),
    ),
    "r": ({"length_weight": 0.05}, lambda s: r_dpo(s, 0.1, 0.05)),
}


@pytest.mark.parametrize("trunk", ["prompt", "dialogue"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_trl(setup: Setup, name: str, trunk: str) -> None:
    options, theirs = LOSSES[name]
    loss, grads, made = ours(setup, DpoSettings(trunk=trunk, row_length=4096, **options))  # type: ignore[arg-type]
    assert len(made) == {"prompt": 8, "dialogue": 4}[trunk]
    value, expected = theirs(setup)
    assert loss == pytest.approx(value, abs=1e-4, rel=1e-4)
    assert apart(grads, expected) <= 1e-4
    assert (
        apart(grads, LOSSES["sigmoid" if name != "sigmoid" else "hinge"][1](setup)[1]) > 1e-2
    )  # control: another loss


def test_held_out_pairs_are_measured_by_the_loss_that_trains(tiny_run: Path) -> None:
    """Each loss of a finished round's pairs, as validation computes it and as training does."""
    opened = Experiment.open(load(str(tiny_run / "config.yaml")))
    pairs = read_pairs(tiny_run / "round1" / "pairs.jsonl")
    m0, m1 = (opened.adapter(adapter_folder(tiny_run, t)) for t in (0, 1))
    found, expected = [], []
    for options, _ in LOSSES.values():
        dpo = opened.config.dpo.model_copy(update=options)
        e = opened.again(opened.config.model_copy(update={"dpo": dpo}))
        found.append(held_out(e, pairs, lambda: m0)(m1)["valid_loss"])
        made = trunks(pairs, e.encoder, dpo)
        rows = stack([pack([t.rows], dpo.row_length) for t in made])
        most = max(len(t.members) for t in made)
        values, valid = np.zeros((len(made), 1, most, 2), np.float32), np.zeros((len(made), 1, most), bool)
        for b, t in enumerate(made):
            given = [[pairs[i]["reference"][side] for side in ("chosen", "rejected")] for i in t.members]
            values[b, 0, : len(given)], valid[b, 0, : len(given)] = given, True
        logprobs = token_logprobs(bind(e.backbone.definition, m1, e.backbone.base), rows, None, e.backbone.execution)
        totals = dpo_loss(dpo)(logprobs, rows, Pairs(values, valid))
        expected.append(float(totals.loss / totals.weight))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len({round(x, 4) for x in found}) > len(found) / 2  # control: they are not all one loss


def test_what_a_loss_makes_no_use_of_is_refused(tiny_folder: Path, tmp_path: Path, refused: Refused) -> None:
    for said, given in {
        "dpo.label_smoothing=0.1 means nothing with dpo.loss=ipo: it is for sigmoid, robust, simpo; set it to 0.0": (
            *("--dpo.loss", "ipo", "--dpo.label_smoothing", "0.1"),
        ),
        "dpo.target_margin=0.5 means nothing with dpo.loss=apo_zero": (
            *("--dpo.loss", "apo_zero", "--dpo.target_margin", "0.5"),
        ),
        "dpo.length_weight=0.1 means nothing with dpo.loss=simpo": (
            "--dpo.loss",
            "simpo",
            "--dpo.length_weight",
            "0.1",
        ),
        "dpo.length_normalised=True means nothing with dpo.loss=ipo": (
            *("--dpo.loss", "ipo", "--dpo.length_normalised", "true"),
        ),
        "dpo.length_weight and dpo.tail_weight each correct for length: use only one": (
            *("--dpo.length_weight", "0.1", "--dpo.tail_weight", "0.5"),
        ),
        "setting dpo.loss='kto': Input should be 'sigmoid'": ("--dpo.loss", "kto"),
    }.items():
        assert said in refused("evolve", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder), *given)
    assert not (tmp_path / "run").exists()
