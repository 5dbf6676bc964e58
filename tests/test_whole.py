"""``train.what=all``: every parameter is trained, kept, resumed, sampled from and exported, on one device and on several."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import Refused, chat, sample_texts, tiny_overrides
from datasets import Dataset
from flax import nnx
from oracles import Ours, torch_logits, torch_model, worst
from safetensors.numpy import load_file
from test_hosts import Job, texts
from test_resume import SIGNALLER, files
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from esjax.cli import main
from esjax.evolve.experiment import open_model
from esjax.evolve.pairs import trunks
from esjax.model.families import key_table
from esjax.model.weights import load_backbone
from esjax.rows import pack, stack
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import load
from esjax.settings.schema import DpoSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer
from esjax.train.losses import Pairs, dpo_loss
from esjax.train.step import Objective, gradients

ALL = ["--train.what", "all"]
SINGLE = "model.safetensors"
FLOAT32 = np.dtype("float32")


@pytest.fixture(scope="module")
def whole_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    main(["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), *ALL])
    return run


def test_each_model_is_a_whole_folder_that_transformers_opens(whole_run: Path, tiny_folder: Path) -> None:
    before = load_file(tiny_folder / SINGLE)
    tokens = np.random.default_rng(0).integers(2, 900, 60).tolist()
    for t, place in enumerate(("sft/model", "round1/dpo/model", "round2/dpo/model")):
        after = load_file(whole_run / place / SINGLE)
        assert after.keys() == before.keys()
        unmoved = [key for key in before if np.array_equal(before[key], after[key])]
        assert unmoved == []  # embeddings, norms and head are trained, too
        experiment, model = open_model(f"{whole_run}:m{t}", load(str(whole_run / "config.yaml")))
        ours = Ours(experiment.backbone).sequence(tokens, 60, model)
        assert worst(ours, torch_logits(torch_model(whole_run / place), tokens)) <= 1e-3
        assert worst(ours, torch_logits(torch_model(tiny_folder), tokens)) > 1e-2
        assert AutoTokenizer.from_pretrained(whole_run / place).chat_template
        before = after


def test_every_round_starts_at_its_reference(whole_run: Path) -> None:
    for t in (1, 2):
        first, *rest = read_jsonl(whole_run / f"round{t}" / "dpo" / "metrics.jsonl")
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert abs(rest[-1]["loss"] - math.log(2)) > 1e-3


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(whole_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    command = ["evolve", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder), *ALL]
    for nth in (4, 6):  # in SFT, and in the first round's DPO
        where = ["SIGKILL", "esjax.run.metrics", "Metrics", "log", str(nth)]
        done = subprocess.run([sys.executable, "-c", SIGNALLER, *where, *command], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    last = subprocess.run([sys.executable, "-m", "esjax", *command], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr[-2000:]
    assert "continuing after step" in last.stderr
    expected, found = files(whole_run), files(tmp_path / "run")
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    for place in ("sft/model", "round2/dpo/model"):
        both = [load_file(run / place / SINGLE) for run in (whole_run, tmp_path / "run")]
        assert all(np.array_equal(both[0][key], both[1][key]) for key in both[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2,2,2", "1,8,1"])
def test_several_devices_do_what_one_does(mesh: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Sharded, checkpointed and written as on one device: the same texts, and weights to rounding."""
    runs = []
    for name, sizes in (("one", "1,1,1"), ("several", mesh)):
        (tmp_path / name).mkdir()
        job = Job(tiny_folder, tmp_path / name, mesh=sizes, rows=8)
        job.words += ALL
        job.finish()
        runs.append(job.run)
    assert texts(runs[0]) == texts(runs[1])
    for place in ("sft/model", "round2/dpo/model"):
        one, several = (load_file(run / place / SINGLE) for run in runs)
        assert max(worst(one[key], several[key]) for key in one) <= 3e-5
    start = load_file(tiny_folder / SINGLE)
    assert max(worst(one[key], start[key]) for key in one) > 3e-4


def test_an_export_is_the_model_and_of_what_was_trained(whole_run: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["export", "--run-dir", str(whole_run), "--model", "m2", "--out", str(tmp_path / "out")]
    assert "give --format merged" in refused(*command, "--format", "peft")
    main([*command, "--format", "merged"])
    one, other = (load_file(f / SINGLE) for f in (tmp_path / "out", whole_run / "round2" / "dpo" / "model"))
    assert all(np.array_equal(one[key], other[key]) for key in one)
    again = load_backbone(tmp_path / "out", None, FLOAT32)
    assert again.arch == load_backbone(whole_run / "sft" / "model", None, FLOAT32).arch


def test_another_kind_of_training_is_refused_in_a_run(whole_run: Path, tiny_folder: Path, refused: Refused) -> None:
    line = refused("evolve", "--run-dir", whole_run, *tiny_overrides(tiny_folder), "--train.what", "lora")
    assert "train.what" in line


# --- the gradients of all parameters, against TRL's DPO trainer --------------------------------------------------------


@pytest.fixture(scope="module")
def preferences() -> list[dict[str, Any]]:
    said = [text for text in sample_texts() if 30 < len(text) < 120][:12]
    return [
        {"prompt": chat(said[i]), "chosen": chat(said[i + 4], first=1), "rejected": chat(said[i + 8], first=1)}
        for i in range(4)
    ]


def test_gradients_of_all_parameters_are_those_of_trl(
    tiny_folder: Path, preferences: list[dict[str, Any]], tmp_path: Path
) -> None:
    reference = np.random.default_rng(1).uniform(-300, -100, (4, 2)).astype(np.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_folder)
    quiet: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    args = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=1, beta=0.1, **quiet)
    columns = {"ref_chosen_logps": reference[:, 0].tolist(), "ref_rejected_logps": reference[:, 1].tolist()}
    rows = [p | {k: v[i] for k, v in columns.items()} for i, p in enumerate(preferences)]
    model = torch_model(tiny_folder)
    trainer: Any = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    losses = []
    for example in trainer.train_dataset:
        for side in ("chosen_ids", "rejected_ids"):  # esjax's replies end with the end-of-turn token
            example[side] = example[side][: example[side].index(tokenizer.eos_token_id) + 1]
        loss = trainer.compute_loss(trainer.model, trainer.data_collator([example]))
        (loss / len(rows)).backward()
        losses.append(float(loss.detach()))
    theirs = {name: np.asarray(p.grad) for name, p in model.named_parameters()}

    backbone = load_backbone(tiny_folder, "all", FLOAT32)
    shared = trunks(preferences, Encoder(ChatTokenizer(tiny_folder), 512, ""), DpoSettings(trunk="prompt"))
    length = sum(len(t.rows.tokens) for t in shared)
    packed = stack([pack([t.rows for t in shared], length)])
    extra = Pairs(reference.reshape(1, 4, 1, 2), np.ones((1, 4, 1), bool))
    objective = Objective(backbone.definition, dpo_loss(DpoSettings(beta=0.1)), length, backbone.execution)
    totals, grads = jax.jit(lambda w: gradients(objective, w, backbone.base, packed, extra))(backbone.fresh_adapter(0))
    assert float(totals.loss / totals.weight) == pytest.approx(np.mean(losses), abs=1e-4)
    flat: Any = dict(nnx.to_flat_state(grads))
    compared = 0
    for weight in key_table(backbone.arch):
        ours = np.asarray(flat[weight.path][...]) / float(totals.weight)
        layers = range(backbone.arch.layers) if weight.path[0] == "layers" else [None]
        for layer in layers:
            mine = ours if layer is None else ours[layer]
            expected = theirs[weight.key.format(layer)]
            mine = mine.T if weight.transpose else mine
            assert np.linalg.norm(mine - expected) <= 1e-3 * np.linalg.norm(expected), weight.key
            assert np.linalg.norm(mine + expected) > np.linalg.norm(expected)
            compared += 1
    assert compared == len(theirs)
    assert json.loads((tiny_folder / "config.json").read_text())["tie_word_embeddings"] is False
