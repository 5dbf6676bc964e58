"""Held-out pairs, divergence from M_0, and which step of a round is kept."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from conftest import Refused, tiny_overrides
from oracles import torch_model
from peft import PeftModel
from test_resume import SIGNALLER, files

from esjax.cli import main
from esjax.evolve import phases, references
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.run.jsonl import read_jsonl
from esjax.sample.score import mean_divergence
from esjax.settings.files import load
from esjax.settings.schema import DpoSettings
from esjax.train.keep import Best

SPLIT = ["--dpo.valid_share", "0.4", "--dpo.validate_every", "1"]
# Steps large enough for some to be worse on held-out pairs than the ones before.
LARGE = ["--dpo.learning_rate", "0.3", "--dpo.epochs", "4", "--dpo.clip_norm", "100", "--evolve.rounds", "1"]


def pairs_of(counts: list[int]) -> list[dict[str, Any]]:
    return [{"id": f"d{d}/{t}"} for d, n in enumerate(counts) for t in range(n)]


def test_whole_dialogues_are_held_out() -> None:
    pairs = pairs_of([3, 1, 4, 2, 2, 5, 1, 1, 3, 2])
    train, held = references.apart(pairs, DpoSettings(valid_share=0.3, validate_every=1), 7)
    assert sorted([*train, *held]) == list(range(len(pairs)))
    names = [{pairs[i]["id"].split("/")[0] for i in which} for which in (train, held)]
    assert not names[0] & names[1]
    assert len(names[1]) == 3
    assert references.apart(pairs, DpoSettings(valid_share=0.3, validate_every=1), 8)[1] != held
    assert references.apart(pairs, DpoSettings(), 7) == (list(range(len(pairs))), [])


def test_the_lowest_value_is_kept(tmp_path: Path) -> None:
    stored: dict[Path, Any] = {}

    def save(place: Path, adapter: Any) -> None:
        stored[place] = adapter
        place.mkdir(parents=True)

    def best() -> Best:
        return Best(tmp_path / "best", "loss", save, stored.__getitem__)

    first = best()
    for step, value in ((2, 0.7), (4, 0.6), (6, 0.65), (8, 0.6)):
        first.offer(step, {"loss": value, "other": -value}, f"adapter {step}")
    assert first.taken() == "adapter 4"  # the first of equal ones
    first.offer(10, {"loss": 0.5}, "adapter 10")
    again = best()
    again.rewind(7)  # killed behind step 10, its checkpoint being of step 7
    assert again.taken() == "adapter 4"
    again.offer(8, {"loss": 0.55}, "adapter 8, anew")
    again.offer(10, {"loss": 0.5}, "adapter 10, anew")
    assert again.taken() == "adapter 10, anew"
    assert json.loads((tmp_path / "best" / "best.json").read_text())[-1] == [10, 0.5]


def test_divergence_is_that_of_torch(tiny_run: Path, tiny_folder: Path) -> None:
    """KL(M_2 || M_0) over the whole vocabulary at every target, with peft's models."""
    experiment = Experiment.open(load(str(tiny_run / "config.yaml")))
    rows = experiment.corpora.valid_rows[:3]
    folders = [adapter_folder(tiny_run, t) for t in (2, 0)]
    models = [PeftModel.from_pretrained(torch_model(tiny_folder), folder).eval() for folder in folders]
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row.tokens.tolist()])
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=tokens).logits[0].double(), -1) for m in models)
        each = (p.exp() * (p - q)).sum(-1).numpy()
        wanted = np.asarray(row.weight) != 0
        total, count = total + float(each[wanted].sum()), count + int(wanted.sum())
    m2, m0 = (experiment.adapter(folder) for folder in folders)
    length = max(len(r.tokens) for r in rows)
    for at_once in (1, 2):
        ours = mean_divergence(experiment.backbone, (m2, m0), rows, length, at_once)
        assert ours == pytest.approx(total / count, rel=1e-3)
    assert total / count > 1e-7
    assert mean_divergence(experiment.backbone, (m0, m0), rows, length, 2) == pytest.approx(0, abs=1e-9)
    other = mean_divergence(experiment.backbone, (m0, m2), rows, length, 2)
    assert other != pytest.approx(total / count, rel=1e-6)


@pytest.fixture(scope="module")
def best_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("keep") / "best"
    main(["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), *SPLIT, *LARGE, "--dpo.keep", "best"])
    return run


def test_a_round_keeps_its_best_step(best_run: Path) -> None:
    steps = read_jsonl(best_run / "round1" / "dpo" / "metrics.jsonl")
    losses = [row["valid_loss"] for row in steps]
    assert all({"valid_kl", "valid_margin", "valid_accuracy", "loss"} <= row.keys() for row in steps)
    assert losses[-1] > min(losses) + 1e-4  # so that the last one is another
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert steps[-1]["valid_kl"] > steps[0]["valid_kl"] >= 0
    experiment = Experiment.open(load(str(best_run / "config.yaml")))
    name = "round1/dpo"
    pairs = phases.read_pairs(best_run / "round1" / "pairs.jsonl")
    train, held = references.apart(pairs, experiment.config.dpo, references.order_seed(experiment, name))
    facts = json.loads((best_run / "manifest.json").read_text())["stages"][name]
    assert (facts["pairs"], facts["held_out"]) == (len(train), len(held))
    m0 = experiment.adapter(adapter_folder(best_run, 0))
    measured = phases.held_out(experiment, [pairs[i] for i in held], lambda: m0)(
        experiment.adapter(adapter_folder(best_run, 1))
    )
    best = steps[int(np.argmin(losses))]
    for key in ("valid_loss", "valid_margin", "valid_accuracy", "valid_kl"):
        assert measured[key] == pytest.approx(best[key], rel=1e-4, abs=1e-7), key
    assert not (best_run / "round1" / "dpo" / "best").exists()


def test_the_last_step_is_another_model(best_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """And what is held out, or measured, does not change what is trained."""
    run = tmp_path / "last"
    main(["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), *SPLIT, *LARGE])
    name = "adapter/adapter_model.safetensors"
    assert (run / "sft" / name).read_bytes() == (best_run / "sft" / name).read_bytes()
    assert (run / "round1" / "dpo" / name).read_bytes() != (best_run / "round1" / "dpo" / name).read_bytes()
    both = [read_jsonl(r / "round1" / "dpo" / "metrics.jsonl") for r in (run, best_run)]
    assert both[0] == both[1]


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_bytes(best_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    command = ["evolve", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder), *SPLIT, *LARGE]
    command += ["--dpo.keep", "best", "--dpo.checkpoint_every", "2"]
    for owner, name, nth in (("Best", "offer", 3), ("Best", "taken", 1)):
        words = ["SIGKILL", "esjax.train.keep", owner, name, str(nth), *command]
        done = subprocess.run([sys.executable, "-c", SIGNALLER, *words], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    main(command)
    expected, found = files(best_run), files(tmp_path / "run")
    assert sorted(found) == sorted(expected)
    differing = [name for name in expected if found[name] != expected[name]]
    assert differing == ["config.yaml"]  # checkpoint_every


def test_what_cannot_be_held_out_is_said(tiny_folder: Path, tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["evolve", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder)]
    assert "dpo.keep=best needs held-out pairs" in refused(*command, "--dpo.keep", "best", "--dpo.validate_every", 1)
    assert "dpo.validate_every=0 measures nothing" in refused(*command, "--dpo.valid_share", "0.2")
    (pair, *_) = read_jsonl(tiny_run / "round1" / "pairs.jsonl")
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(pair) + "\n")
    alone = ["dpo", "--run-dir", tmp_path / "dpo", "--pairs", file, *tiny_overrides(tiny_folder), *SPLIT]
    assert "so none can be held out" in refused(*alone)
    assert not (tmp_path / "run").exists()
    assert jax.device_count() == 1
