"""Replay in DPO's rounds: which rows a step holds, and that its term is the weight times the mean NLL of those rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Refused, tiny_overrides

from esjax.cli import main
from esjax.evolve import phases, references
from esjax.evolve.experiment import open_model
from esjax.run.jsonl import read_jsonl
from esjax.sample.score import Scorer
from esjax.settings.files import load
from esjax.tokens.batches import beside, schedule

OPTIONS = {"dpo.replay_weight": 0.5, "dpo.row_length": 768, "data.replay_share": 0.25, "dpo.batch_rows": 4}


def test_every_step_keeps_its_pairs_and_gets_rows_of_replay() -> None:
    own, more = [10, 7, 9, 4, 6], [5, 3, 8, 2, 6, 4, 7]
    steps = schedule(own, 12, 2, 3, seed=1)
    mixed = beside(steps, more, 12, 2, len(own), seed=1)
    assert [step[:-2] for step in mixed] == steps
    taken = [i - len(own) for step in mixed for row in step[-2:] for i in row]
    assert set(taken[: len(more)]) == set(range(len(more)))  # all of them, before any comes again
    assert len(taken) > len(more)
    assert all(sum(more[i - len(own)] for i in row) <= 12 for step in mixed for row in step[-2:])
    assert beside(steps, more, 12, 2, len(own), seed=1) == mixed
    assert beside(steps, more, 12, 2, len(own), seed=2) != mixed


def dpo(tiny_run: Path, tiny_folder: Path, run: Path, **settings: object) -> list[dict[str, float]]:
    """The metrics of `esjax dpo` on a round's pairs, with replay."""
    pairs = str(tiny_run / "round1" / "pairs.jsonl")
    given = [part for k, v in (OPTIONS | settings).items() for part in (f"--{k}", str(v))]
    main(
        [
            "dpo",
            "--run-dir",
            str(run),
            "--pairs",
            pairs,
            "--model",
            f"{tiny_run}:m0",
            *tiny_overrides(tiny_folder),
            *given,
        ]
    )
    return read_jsonl(run / "dpo" / "metrics.jsonl")


def test_the_term_is_the_mean_nll_of_the_rows(tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Of the first step, with M_0: its replay is scored apart. Control: the mean over all replay is another number."""
    run = tmp_path / "run"
    first, *rest = dpo(tiny_run, tiny_folder, run)
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["loss"] == pytest.approx(first["preference_loss"] + 0.5 * first["replay_nll"], abs=1e-5)

    experiment, m0 = open_model(f"{tiny_run}:m0", load(str(run / "config.yaml")))
    c = experiment.config
    assert c.dpo.replay_rows(c.data.replay_share) == 1
    found = phases.replay(experiment)
    assert found is not None
    shared = phases.trunks(phases.read_pairs(tiny_run / "round1" / "pairs.jsonl"), experiment.encoder, c.dpo)
    lengths = [len(t.rows.tokens) for t in shared]
    steps = schedule(
        lengths, c.dpo.row_length, c.dpo.batch_rows - 1, c.dpo.epochs, references.order_seed(experiment, "dpo")
    )
    sizes = [len(e.tokens) for e in found.examples]
    (row,) = beside(steps, sizes, c.dpo.row_length, 1, 0, references.order_seed(experiment, "dpo"))[0][-1:]
    scored = Scorer(experiment.backbone, c.dpo.row_length, 1).score(m0, found.examples)
    every = [-np.concatenate(branches) for branches in scored]
    assert first["replay_nll"] == pytest.approx(np.concatenate([every[i] for i in row]).mean(), abs=1e-4)
    assert abs(first["replay_nll"] - np.concatenate(every).mean()) > 1e-2
    assert len(rest) + 1 == len(steps)


def test_micro_batches_change_nothing(tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The rows of replay fall into other micro-batches than the pairs. Control: the term is large."""
    whole = dpo(tiny_run, tiny_folder, tmp_path / "a", **{"dpo.micro_rows": 4})
    parts = dpo(tiny_run, tiny_folder, tmp_path / "b", **{"dpo.micro_rows": 1})
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], abs=1e-4)
    assert abs(whole[0]["loss"] - whole[0]["preference_loss"]) > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data.replay_share": 0.0},
            "data.replay_share=0.0 is too small for dpo.replay_weight=0.5: it must be above 0",
        ),
        (
            {"dpo.batch_rows": 1, "dpo.micro_rows": 1},
            "dpo.batch_rows=1 is too small for dpo.replay_weight=0.5: it must be at least 2",
        ),
        ({"dpo.row_length": 640}, "dpo.row_length=640 is too small for dpo.replay_weight=0.5: it must be at least 768"),
    ],
)
def test_what_leaves_no_room_is_refused(
    changes: dict[str, object], message: str, tiny_folder: Path, refused: Refused, tmp_path: Path
) -> None:
    given = [part for k, v in (OPTIONS | changes).items() for part in (f"--{k}", str(v))]
    assert message in refused("evolve", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder), *given)
    assert not (tmp_path / "run").exists()
