"""pairs.jsonl is TRL's preference format as it is: datasets loads it, and TRL's DPOTrainer trains on it unchanged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from oracles import torch_model
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from esjax.run.jsonl import read_jsonl
from esjax.tokens.tokenizer import ChatTokenizer


@pytest.fixture(scope="module", params=[1, 2])
def pairs_file(request: pytest.FixtureRequest, tiny_run: Path) -> Path:
    return tiny_run / f"round{request.param}" / "pairs.jsonl"


def loaded(file: Path, cache: Path) -> Dataset:
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))


def trainer_on(data: Dataset, tiny_folder: Path, out: Path) -> DPOTrainer:
    args = DPOConfig(
        output_dir=str(out),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    model, reference = torch_model(tiny_folder), torch_model(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    return DPOTrainer(model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer)


def test_trl_trains_on_pairs_as_they_are(pairs_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    data = loaded(pairs_file, tmp_path / "cache")
    rows = read_jsonl(pairs_file)
    assert len(data) == len(rows)
    assert {"prompt", "chosen", "rejected", "reference"} <= set(data.column_names)
    trainer: Any = trainer_on(data, tiny_folder, tmp_path / "out")
    tokenizer = ChatTokenizer(tiny_folder)
    for example, row in zip(trainer.train_dataset, rows, strict=True):  # what it will train on is what we train on
        prompt = tokenizer.prompt(row["prompt"])
        assert example["prompt_ids"] == prompt
        for side in ("chosen", "rejected"):
            reply = tokenizer.reply(prompt, [*row["prompt"], *row[side]])
            assert example[f"{side}_ids"][: len(reply)] == reply
            assert tokenizer.decode(example[f"{side}_ids"][len(reply) :]).strip() == ""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train()
    assert result.global_step == 1
    logged = trainer.state.log_history[0]
    assert math.isfinite(result.training_loss)
    assert result.training_loss == pytest.approx(math.log(2), abs=1e-3)  # it starts at its reference
    assert math.isfinite(logged["grad_norm"])
    assert logged["grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_pairs_without_a_side_would_not_start(tiny_run: Path, tiny_folder: Path, tmp_path: Path, missing: str) -> None:
    """The control: TRL does look at these columns."""
    data = loaded(tiny_run / "round1" / "pairs.jsonl", tmp_path / "cache").remove_columns(missing)
    with pytest.raises(KeyError, match=missing):
        trainer_on(data, tiny_folder, tmp_path / "out")
