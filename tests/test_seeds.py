"""Several seeds of one experiment: intervals over seeds and dialogues, and what is no set of seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused

from esjax.cli import main
from esjax.eval.results import Value, summarise_seeds, write_parquet
from esjax.eval.statistics import crossed, mean_by_cluster
from esjax.settings.files import dump, load

SEEDS, DIALOGUES, REPETITIONS = 3, 20, 400


@pytest.mark.parametrize(("seed", "dialogue"), [(0.3, 1.0), (1.0, 0.3), (0.0, 0.0)])
def test_intervals_cover_over_seeds_and_dialogues(seed: float, dialogue: float) -> None:
    rng, covered, naive = np.random.default_rng(5), 0, 0
    for n in range(REPETITIONS):
        cells = (
            0.7
            + rng.normal(0, seed, (SEEDS, 1))
            + rng.normal(0, dialogue, DIALOGUES)
            + rng.normal(0, 1, (SEEDS, DIALOGUES))
        )
        made = crossed(cells)
        covered += made.low <= 0.7 <= made.high
        pooled = mean_by_cluster(cells.ravel(), list(range(DIALOGUES)) * SEEDS, 400, n)  # dialogues alone
        naive += pooled.low <= 0.7 <= pooled.high
    assert 0.92 <= covered / REPETITIONS <= 0.99
    assert (naive / REPETITIONS < 0.7) == (seed == 1.0)  # control: what one seed's luck does is not in it


def test_an_analysis_of_variance_by_hand() -> None:
    """Winer's way with sums of squares, on whole numbers: MS of seeds 24, of dialogues 9, of the rest 3."""
    cells = np.asarray([[1.0, 3.0, 5.0], [4.0, 6.0, 5.0], [7.0, 6.0, 11.0]])
    made = crossed(cells)
    sums = [((cells.sum(axis) ** 2).sum() / 3 - cells.sum() ** 2 / 9) / 2 for axis in (1, 0)]
    rest = ((cells**2).sum() - cells.sum() ** 2 / 9 - 2 * sum(sums)) / 4
    assert made.value == pytest.approx(cells.sum() / 9)
    assert made.error == pytest.approx(np.sqrt((sums[0] + sums[1] - rest) / 9))
    assert made.by_seed == pytest.approx((3.0, 5.0, 8.0))


def table(seed: int, gain: float, dialogues: int = 12) -> list[Value]:
    """Values of M_0 and M_1 in contexts of dialogues of unequal length, and of a number of the whole corpus."""
    out, rng = [], np.random.default_rng(seed)
    for d in range(dialogues):
        person = np.random.default_rng(d).normal()
        for i in range(1 + d % 3):
            for model, more in (("m0", 0.0), ("m1", gain)):
                out.append(Value(model, "words", f"d{d}", f"d{d}/{i}", -1, 10 + person + more + rng.normal(0, 0.1)))
    for model, more in (("m0", 0.0), ("m1", gain)):
        left = rng.normal(0, 0.001, dialogues)
        out += [Value(model, "distinct_1", "", "", n - 1, 0.5 + more + x) for n, x in enumerate([0.0, *left])]
    return out


def test_each_metric_s_difference() -> None:
    runs = [table(s, 1.0 + 0.1 * s) for s in range(3)]
    made = summarise_seeds(runs, [("m1", "m0")])
    words, distinct = (made.differences[name, "m1", "m0"] for name in ("words", "distinct_1"))
    per_seed = [
        np.mean([v.value for v in run if (v.model, v.metric) == ("m1", "words")])
        - np.mean([v.value for v in run if (v.model, v.metric) == ("m0", "words")])
        for run in runs
    ]
    assert words.by_seed == pytest.approx(per_seed)
    assert words.value == pytest.approx(np.mean(per_seed))
    assert distinct.by_seed == pytest.approx((1.0, 1.1, 1.2))
    assert distinct.value == pytest.approx(1.1)
    assert distinct.high - distinct.low > 0.2  # the seeds', which each corpus by itself knows nothing of
    assert made.verdict(("words", "m1", "m0")) == "higher"
    apart = summarise_seeds([table(s, gain) for s, gain in enumerate((2.0, -1.5, 0.2))], [("m1", "m0")])
    assert apart.verdict(("words", "m1", "m0")) == "no difference shown"
    some = [[v for v in run if v.context != "d1/0"] if n == 1 else run for n, run in enumerate(runs)]
    fewer = summarise_seeds(some, [("m1", "m0")]).differences["words", "m1", "m0"]
    assert fewer.value != words.value  # of the contexts that all seeds have
    assert fewer.value == pytest.approx(words.value, abs=0.1)


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    out = []
    for s in range(3):
        folder = tmp_path / f"run{s}"
        (folder / "eval").mkdir(parents=True)
        (folder / "config.yaml").write_text(dump(load(None, {"seed": s})))
        write_parquet(folder / "eval" / "results.parquet", table(s, 1.0))
        out.append(str(folder))
    return out


def test_the_command(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", "--seeds", *runs, "--out", str(tmp_path / "seeds.json")])
    said = " ".join(capsys.readouterr().out.split())
    assert "24 replies a model, 12 dialogues, 3 seeds" in said
    assert "over seeds and dialogues" in said
    assert "M_1 - M_0" in said
    records = {(r["metric"], r["model"]): r for r in json.loads((tmp_path / "seeds.json").read_text())}
    assert records["words", "m1"]["seeds"] == 3
    assert len(records["words", "m1"]["differences"]["m0"]["by_seed"]) == 3


def test_what_is_no_set_of_seeds(runs: list[str], tmp_path: Path, refused: Refused) -> None:
    def line(*given: Any) -> str:
        return refused("eval", "--seeds", *given, "--out", tmp_path / "out.json")

    assert "2 runs say little" in line(*runs[:2])
    assert "have the same seed, 0" in line(*runs, runs[0])
    other = tmp_path / "run2"
    (other / "config.yaml").write_text(dump(load(None, {"seed": 2, "dpo.beta": 0.3})))
    assert "differs from" in (said := line(*runs))
    assert "dpo.beta" in said
    (other / "config.yaml").write_text(dump(load(None, {"seed": 2})))
    (other / "eval" / "results.parquet").write_bytes(b"PAR1 broken")
    assert "not a table of results" in line(*runs)
    (other / "eval" / "results.parquet").unlink()
    assert "no evaluated run" in line(*runs)
    assert not (tmp_path / "out.json").exists()
    assert "--model: --seeds makes no use" in line(*runs, "--model", "m0")
