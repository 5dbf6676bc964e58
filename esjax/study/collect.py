"""One table of a study: a row for each run, model and metric, with intervals; what the model cost stands among the metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from esjax.errors import InputError
from esjax.eval.compare import BACKBONE
from esjax.run.files import replacing
from esjax.run.jsonl import read_jsonl
from esjax.run.manifest import read_manifest
from esjax.study.make import is_done, run_folder
from esjax.study.spec import Cell, Study

RESULTS, TIMES = "results.parquet", "times.parquet"
# Facts that stand in the table beside what evaluations measure; of M_t all are sums up to it, but for ``kl`` and the lengths.
FACTS = {
    "parameters": "numbers in the model",
    "trained_parameters": "numbers that are trained",
    "tokens": "tokens that SFT and DPO computed, in all epochs",
    "contexts": "contexts of rounds",
    "pairs_kept": "pairs that were trained on",
    "length_ratio": "words of chosen over words of rejected replies, of the last round",
    "kl": "KL(M_t || M_0) in nats a token, where it was measured",
    "train_flops": "of training: 6 times parameters and tokens (Kaplan et al. 2020), with an adapter 4 times",
    "sample_flops": "of drawing replies: 2 times parameters and tokens, drawn or of prompts",
    "flops": "both",
}


class Row(NamedTuple):
    """One row of the table. ``low`` and ``high`` are of the run's own 95% interval, NaN for facts."""

    run: str
    seed: int
    model: str
    round: int  # -1: the backbone
    metric: str
    value: float
    low: float
    high: float


class Time(NamedTuple):
    """What a stage took; clocks differ from run to run, so this is a table of its own."""

    run: str
    stage: str
    shared: bool
    seconds: float
    peak_gib: float


NAN = float("nan")


def collect(study: Study) -> tuple[Path, Path]:
    """Write both tables into the study's folder, of the runs that are done. Raises InputError where none is."""
    done = [cell for cell in study.cells if is_done(study, cell)]
    if not done:
        raise InputError(f"{study.folder}: no run of the study is done; make them first (esjax study run)")
    rows = [(cell, row) for cell in done for row in rows_of(cell, run_folder(study, cell))]
    labels = {axis: [cell.labels.get(axis, "") for cell, _ in rows] for axis in study.axes}
    versions = [_versions(run_folder(study, cell)) for cell in done]
    by_cell = dict(zip([c.name for c in done], versions, strict=True))
    told = {"versions": [by_cell[cell.name] for cell, _ in rows]}
    paths = study.folder / RESULTS, study.folder / TIMES
    _write(paths[0], labels | _columns([row for _, row in rows]) | told)
    times = [t for cell in done for t in _times(cell, run_folder(study, cell))]
    _write(paths[1], {name: [getattr(t, name) for t in times] for name in Time._fields})
    return paths


def _columns(rows: list[Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in Row._fields}


def rows_of(cell: Cell, folder: Path) -> Iterator[Row]:
    """A run's rows: what was measured of its models, then what they cost."""
    records = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))
    for r in records:
        low, high = (NAN if r[k] is None else r[k] for k in ("low", "high"))
        model, value = r["model"], NAN if r["value"] is None else r["value"]
        first = model.split(" ")[0]
        yield Row(
            cell.name, cell.seed, model, -1 if first == BACKBONE else int(first[1:]), r["metric"], value, low, high
        )
    stages = read_manifest(folder)["stages"]
    for t in range(cell.config.evolve.rounds + 1):
        for metric, value in facts(cell, folder, stages, t).items():
            yield Row(cell.name, cell.seed, f"m{t}", t, metric, float(value), NAN, NAN)


def facts(cell: Cell, folder: Path, stages: Mapping[str, Any], t: int) -> dict[str, float]:
    """What M_t is and cost, by the names of FACTS."""
    sft, rounds = stages["sft"], [f"round{n}" for n in range(1, t + 1)]
    trained = [sft, *(stages[f"{r}/dpo"] for r in rounds)]
    drawn = [stages[f"{r}/{name}"] for r in rounds for name in ("replies", "first") if f"{r}/{name}" in stages]
    if t > 0 and "warmup/sft" in stages:
        trained.append(stages["warmup/sft"])
        drawn.append(stages["warmup/replies"])
    size, tokens = sft["parameters"], sum(s["tokens"] for s in trained)
    usage = [s["usage"] for s in drawn if "usage" in s]
    made: dict[str, float] = {"parameters": size, "trained_parameters": sft["trained"], "tokens": tokens}
    made["contexts"] = sum(stages[f"{r}/replies"]["contexts"] for r in rounds)
    made["pairs_kept"] = sum(stages[f"{r}/pairs"]["kept"] for r in rounds)
    if rounds:
        made["length_ratio"] = stages[f"{rounds[-1]}/pairs"]["length_ratio"]
        measured = [s["valid_kl"] for s in read_jsonl(folder / rounds[-1] / "dpo" / "metrics.jsonl") if "valid_kl" in s]
        if measured:
            made["kl"] = measured[-1]
    made["train_flops"] = (4 if cell.config.train.what == "lora" else 6) * size * tokens
    made["sample_flops"] = 2 * size * sum(u["tokens"] + u["computed_tokens"] for u in usage)
    return made | {"flops": made["train_flops"] + made["sample_flops"]}


def _versions(folder: Path) -> str:
    stages = read_manifest(folder)["stages"].values()
    return json.dumps(next((s["versions"] for s in stages if "versions" in s), {}), sort_keys=True)


def _times(cell: Cell, folder: Path) -> Iterator[Time]:
    for name, s in read_manifest(folder)["stages"].items():
        yield Time(cell.name, name, bool(s.get("shared")), s["seconds"], s.get("peak_gib", NAN))


def _write(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    with replacing(path) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def read_results(study: Study) -> list[tuple[dict[str, str], Row]]:
    """The table's rows, each with its labels. Raises InputError where it was not collected."""
    from pyarrow import parquet

    path = study.folder / RESULTS
    if not path.is_file():
        raise InputError(f"{path} is not there; collect the study first (esjax study collect)")
    table = parquet.read_table(path).to_pylist()
    return [({axis: r[axis] for axis in study.axes}, Row(*(r[name] for name in Row._fields))) for r in table]
