"""Studies: what varies becomes runs that share stages; a kill loses nothing; one table, curves, jobs for elsewhere, a page."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY, Refused, save_tiny_model, tiny_overrides
from pyarrow import parquet
from scipy import optimize

from esjax.cli import main
from esjax.errors import InputError
from esjax.eval.results import Value, write_parquet
from esjax.plan.measure import Needs
from esjax.plan.report import Hardware
from esjax.plan.stages import BUSY, counted
from esjax.run.manifest import read_manifest
from esjax.settings.files import dump, load
from esjax.study import curves
from esjax.study.collect import FACTS, RESULTS
from esjax.study.cost import cost
from esjax.study.curves import Results, check_reach, fit
from esjax.study.emit import leaders
from esjax.study.make import made
from esjax.study.spec import Study, read_study
from esjax.study.summary import records

SMALL = {
    "evolve.contexts_per_round": 6,
    "evolve.rounds": 1,
    "eval.backbone": False,
    "eval.resamples": 200,
    "reply.max_contexts": 4,
    "reply.max_tokens": 24,
    "evolve.draft.max_tokens": 32,
    "evolve.refinement.max_tokens": 32,
}


def tiny_settings(folder: Path) -> dict[str, Any]:
    words = tiny_overrides(folder)
    given = {k.removeprefix("--"): yaml.safe_load(v) for k, v in zip(words[::2], words[1::2], strict=True)}
    return given | SMALL


def write_study(file: Path, **parts: Any) -> Path:
    file.write_text(yaml.safe_dump({"config": "bundled:configs/quickstart.yaml"} | parts))
    return file


@pytest.fixture(scope="module")
def study_file(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two switches, one seed: the runs have M_0 and its evaluation in common."""
    grid = {"reflection": {"with": {}, "without": {"evolve.reflect": False}}}
    file = tmp_path_factory.mktemp("study") / "switches.yaml"
    return write_study(file, settings=tiny_settings(tiny_folder), grid=grid, metrics=["words", "specificity"])


@pytest.fixture(scope="module")
def finished(study_file: Path) -> Study:
    study = read_study(study_file, study_file.parent / "runs")
    main(["study", "run", str(study_file), "--folder", str(study.folder)])
    return study


def test_runs_share_what_they_have_in_common(finished: Study) -> None:
    one, two = (read_manifest(finished.folder / cell.name)["stages"] for cell in finished.cells)
    taken = {name for name, entry in two.items() if entry.get("shared")}
    assert taken == {"sft", "eval/m0"}
    assert not any(entry.get("shared") for entry in one.values())
    assert made(finished) == "2 of 2 runs are done: 12 stages made, 2 taken from another run"
    for cell in finished.cells:
        assert (finished.folder / cell.name / "sft" / "metrics.jsonl").exists()
    first, second = (finished.folder / c.name / "round1" for c in finished.cells)
    assert (first / "drafts.jsonl").read_bytes() == (second / "drafts.jsonl").read_bytes()
    assert not (second / "reflections.jsonl").exists()
    assert (finished.folder / finished.cells[1].name / "screened.jsonl").exists()


def test_a_damaged_stage_is_not_taken(finished: Study, study_file: Path, tmp_path: Path, refused: Refused) -> None:
    stages = tmp_path / "runs" / "stages"
    shutil.copytree(finished.folder / "stages", stages)
    (adapter,) = stages.glob("*/files/sft/adapter/adapter_model.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"x")
    line = refused("evolve", "--config", emitted(finished, tmp_path), "--run-dir", tmp_path / "run", "--shared", stages)
    assert "not what was kept there (sft/adapter differs); delete this folder" in line
    config = ["--config", emitted(finished, tmp_path), "--run-dir", tmp_path / "x", "--shared"]
    assert "--shared gs://b/c: give a folder" in refused("evolve", *config, "gs://b/c")
    assert "cannot be written (File exists); give another --shared" in refused(
        "evolve", *config, tmp_path / "cell.yaml"
    )
    assert not (tmp_path / "x").exists()


def emitted(study: Study, folder: Path) -> Path:
    """A config file of the study's first run."""
    (folder / "cell.yaml").write_text(dump(study.cells[0].config))
    return folder / "cell.yaml"


def test_one_table_holds_what_runs_measured_and_cost(finished: Study) -> None:
    table = parquet.read_table(finished.folder / RESULTS).to_pylist()
    assert {r["reflection"] for r in table} == {"with", "without"}
    for cell in finished.cells:
        folder = finished.folder / cell.name
        mine = {(r["metric"], r["model"]): r for r in table if r["run"] == cell.name}
        for record in json.loads((folder / "eval" / "results.json").read_text()):
            row = mine[record["metric"], record["model"]]
            wanted = [np.nan if record[k] is None else record[k] for k in ("value", "low", "high")]
            assert [row[k] for k in ("value", "low", "high")] == pytest.approx(wanted, nan_ok=True)
        stages = read_manifest(folder)["stages"]
        tokens = stages["sft"]["tokens"] + stages["round1/dpo"]["tokens"]
        assert mine["tokens", "m1"]["value"] == tokens
        assert mine["tokens", "m0"]["value"] == stages["sft"]["tokens"]
        size = stages["sft"]["parameters"]
        assert mine["train_flops", "m1"]["value"] == 4 * size * tokens
        used = stages["round1/replies"]["usage"]
        assert mine["sample_flops", "m1"]["value"] == 2 * size * (used["tokens"] + used["computed_tokens"])
        assert mine["pairs_kept", "m1"]["value"] == stages["round1/pairs"]["kept"]
        assert {metric for metric, _ in mine} > {*FACTS} - {"kl"}
    times = parquet.read_table(finished.folder / "times.parquet").to_pylist()
    assert {t["stage"] for t in times if t["shared"]} == {"sft", "eval/m0"}


def test_parameters_are_counted(finished: Study, tiny_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny_folder).parameters())
    stage = read_manifest(finished.folder / finished.cells[0].name)["stages"]["sft"]
    assert stage["parameters"] == whole
    adapter = finished.folder / finished.cells[0].name / "sft" / "adapter" / "adapter_model.safetensors"
    from safetensors.numpy import load_file

    assert stage["trained"] == sum(x.size for x in load_file(adapter).values())


def test_the_page_shows_variants_beside_each_other(finished: Study, study_file: Path) -> None:
    main(["study", "report", str(study_file), "--folder", str(finished.folder)])
    text = (finished.folder / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    page = json.loads(found[1])
    assert [f["id"] for f in page["figures"]] == ["metrics", "frontier-flops", "frontier-time"]
    shown = records(finished)
    words = {r["model"]: r["value"] for r in shown if r["metric"] == "words"}
    assert list(words) == ["m0", "reflection with", "reflection without"]
    for cell, name in zip(finished.cells, list(words)[1:], strict=True):
        (own,) = (
            r["value"]
            for r in json.loads((finished.folder / cell.name / "eval" / "results.json").read_text())
            if (r["metric"], r["model"]) == ("words", "m1")
        )
        assert words[name] == pytest.approx(own)
    (difference,) = (
        r["differences"]["reflection with"]
        for r in shown
        if (r["metric"], r["model"]) == ("words", "reflection without")
    )
    assert difference["value"] == pytest.approx(words["reflection without"] - words["reflection with"])
    _, *rows = page["differences"]
    assert [r[2] for r in rows if r[1] == "reflection without" and r[0] == "words a reply"] == [
        "M_0",
        "reflection with",
    ]
    assert "One seed: intervals are over dialogues alone" in " ".join(page["notes"])
    (table,) = (t for t in page["tables"] if t["title"] == "What the variants cost")
    assert [row[0] for row in table["rows"][1:]] == ["reflection with", "reflection without"]


def synthetic(tmp_path: Path, exponent: float) -> tuple[Path, Study]:
    """A study of five sizes and three seeds whose runs' results follow a power law of the tokens, written without any run."""
    grid = {"size": {str(n): {"evolve.contexts_per_round": n, "evolve.rounds": 1} for n in (1, 4, 16, 64, 256)}}
    file = write_study(tmp_path / "law.yaml", grid=grid, seeds=[0, 1, 2], metrics=["perplexity", "words"])
    study = read_study(file, tmp_path / "law")
    rng = np.random.default_rng(3)
    for cell in study.cells:
        folder, tokens = study.folder / cell.name, 1000 * int(cell.labels["size"])
        (folder / "eval").mkdir(parents=True)
        (folder / "round1" / "dpo").mkdir(parents=True)
        (folder / "round1" / "dpo" / "metrics.jsonl").write_text('{"step": 1}\n')
        stages: dict[str, Any] = {
            "sft": {"parameters": 100, "trained": 10, "tokens": tokens},
            "round1/replies": {"contexts": 4, "usage": {"tokens": 1, "computed_tokens": 2}},
            "round1/pairs": {"kept": 3, "length_ratio": 1.0},
            "round1/dpo": {"tokens": tokens},
            "eval/results": {},
        }
        stages = {k: v | {"status": "done", "seconds": 1.0, "inputs": {"m1": ""}} for k, v in stages.items()}
        (folder / "manifest.json").write_text(json.dumps({"stages": stages}))
        value = 10 + 40 * (tokens / 1000) ** -exponent
        each = value * (1 + 0.01 * rng.standard_normal() + 0.02 * rng.standard_normal(20))
        rows = [Value("m1", "words", f"d{i}", f"d{i}/1", -1, x) for i, x in enumerate(each)]
        rows += [Value("m1", "perplexity", "", "", n, float(each.mean())) for n in range(-1, 4)]
        write_parquet(folder / "eval" / "results.parquet", rows)
        mean = {"model": "m1", "value": float(each.mean()), "low": None, "high": None}
        told = [{"metric": m} | mean for m in ("words", "perplexity")]
        (folder / "eval" / "results.json").write_text(json.dumps(told))
    return file, study


def test_a_law_in_runs_is_found(tmp_path: Path, refused: Refused) -> None:
    """From the runs' files to the exponent, with what --at reads off the curve; and no curve where none is to be had."""
    file, study = synthetic(tmp_path, 0.5)
    base = ["study", "fit", str(file), "--folder", str(study.folder)]
    assert "collect the study first" in refused(*base, "--x", "tokens", "--y", "words")
    main(["study", "collect", str(file), "--folder", str(study.folder)])
    for y in ("words", "perplexity"):
        out = tmp_path / f"{y}.json"
        main([*base, "--x", "tokens", "--y", y, "--curve", "power", "--at", "1e6", "--out", str(out)])
        (found,) = json.loads(out.read_text())
        assert found["k"]["low"] < 0.5 < found["k"]["high"]
        assert found["k"]["high"] - found["k"]["low"] < 0.3
        assert found["at"]["value"] == pytest.approx(
            10 + 40 * 500**-0.5, rel=0.05
        )  # tokens are those of SFT and of DPO
        assert len(found["points"]) == 5
        assert len(found["points"][0]["y"]) == 3
    assert "5 different x" not in refused(*base, "--x", "tokens", "--y", "words", "--at", "1e9")
    assert "more than 4 times beyond the data" in refused(*base, "--x", "tokens", "--y", "words", "--at", "1e9")
    assert "1 different x" in refused(*base, "--x", "parameters", "--y", "words")
    assert "no dialogue has specificity in all runs" in refused(*base, "--x", "tokens", "--y", "specificity")
    main(["study", "report", str(file), "--folder", str(study.folder)])
    assert '"curve-tokens"' in (study.folder / "report.html").read_text()


@pytest.mark.slow
def test_a_study_of_twelve_runs_that_is_killed_twice_ends_with_the_same_table(
    tiny_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "wide"
    save_tiny_model(other, seed=4, kv_heads=4)  # one that ends its replies
    grid = {
        "reflection": {"with": {}, "without": {"evolve.reflect": False}},
        "size": {"small": {}, "large": {"model.source": str(other)}},
    }
    file = write_study(tmp_path / "s.yaml", settings=tiny_settings(tiny_folder), grid=grid, seeds=[0, 1, 2])
    command = [sys.executable, "-m", "esjax", "study", "run", str(file), "--folder"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    study = read_study(file, tmp_path / "killed")
    for cell in (2, 7):  # killed while it is being made
        process = subprocess.Popen([*command, str(study.folder)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        place = study.folder / study.cells[cell].name / "round1"
        while not list(place.glob("drafts.jsonl*")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert "of 12 runs are done" in made(study)
        assert not made(study).startswith("12")
    subprocess.run([*command, str(study.folder)], check=True, capture_output=True)
    assert (study.folder / RESULTS).read_bytes() == (tmp_path / "whole" / RESULTS).read_bytes()
    # M_0 and its evaluation are made once for each size and seed, and taken by the other switch's run.
    entries = [read_manifest(study.folder / cell.name)["stages"] for cell in study.cells]
    taken = Counter(name for stages in entries for name, entry in stages.items() if entry.get("shared"))
    assert (taken["sft"], taken["eval/m0"]) == (6, 6)
    assert made(study).startswith("12 of 12 runs are done")


# --- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"grid": {"a": {"x": {"evolve.rouns": 1}}}}, "a x: unknown setting evolve.rouns: did you mean"),
        ({"grid": {"a": {"x": {"seed": 1}}}}, "seed is a setting of its own"),
        ({"grid": {"a": {"x": {"sft.epochs": 2}}, "b": {"y": {"sft.epochs": 3}}}}, "sft.epochs is set on two axes"),
        ({"grid": {"a": {True: {}, 2: {}}}}, "grid.a.1: a name must be a text"),
        ({"grid": {"a": {}}}, "an axis of grid has no values"),
        ({"grid": {"a": {"x": {}, "y": {}}}}, "a x, seed 0 and a y, seed 0 are the same run"),
        ({"seeds": [1, 1]}, "names one twice"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"metrics": ["wit"]}, "wit is measured by no evaluation"),
        ({"gird": {}}, "gird: Extra inputs are not permitted; a study has config, settings, grid"),
        ({"config": "absent.yaml"}, "absent.yaml"),
        (
            {"grid": {"a": {str(i): {"sft.epochs": i + 1} for i in range(200)}}, "seeds": list(range(60))},
            "12000 cells are more",
        ),
    ],
)
def test_a_study_that_cannot_be_is_refused(parts: dict[str, Any], words: str, tmp_path: Path, refused: Refused) -> None:
    file = write_study(tmp_path / "s.yaml", **parts)
    line = refused("study", "run", file, "--folder", tmp_path / "runs")
    assert words in line
    assert "s.yaml" in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "studies").glob("*.yaml")), ids=lambda f: f.stem)
def test_shipped_studies_are_studies(file: Path) -> None:
    study = read_study(file)
    small = file.stem.startswith("qwen")  # what two CPU cores can do
    assert len(study.cells) >= (2 if small else 12)
    assert len({c.seed for c in study.cells}) == (1 if small else 3)
    known = {p.stem for p in (REPOSITORY / "configs" / "shapes").glob("*.json")}
    assert {c.shape for c in study.cells} <= {None, *known}
    header = file.read_text().split("\n\n")[0]
    assert f"esjax study run configs/studies/{file.name}" in header or f"emit configs/studies/{file.name}" in header
    assert "Hardware:" in header


def test_cells_are_named_by_what_defines_their_result(tmp_path: Path) -> None:
    def names(**settings: Any) -> list[str]:
        file = write_study(
            tmp_path / "s.yaml", settings={k.replace("__", "."): v for k, v in settings.items()}, seeds=[0, 1]
        )
        return [c.name for c in read_study(file).cells]

    assert names() == names(sft__micro_rows=1) == names(mesh__tensor=1)
    assert set(names()).isdisjoint(names(sft__learning_rate=0.5))
    assert set(names()).isdisjoint(names(evolve__rounds=3))
    assert len(set(names())) == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["plan", "--out", "x"], "--out: only esjax study emit and fit and report makes use of it"),
        (["run", "--for", "slurm"], "--for: only esjax study emit makes use of it"),
        (["fit", "--x", "flops"], "needs --x and --y"),
        (["fit", "--x", "flops", "--y", "wit"], "--y wit: measured by no evaluation"),
        (["fit", "--x", "size", "--y", "words"], "--x size: allowed are parameters"),
        (["emit", "--for", "slurm"], "--for slurm writes files: give a new folder as --out"),
        (["collect"], "no run of the study is done"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], line: str, tmp_path: Path, refused: Refused
) -> None:
    file = write_study(tmp_path / "s.yaml")
    assert line in refused("study", words[0], file, "--folder", tmp_path / "runs", *words[1:])


# --- jobs for elsewhere ------------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path) -> Path:
    grid = {
        "reflection": {"with": {}, "without": {"evolve.reflect": False}},
        "rate": {"low": {}, "high": {"sft.learning_rate": 1e-3}},
    }
    return write_study(tmp_path / "my study.yaml", grid=grid, seeds=[0, 1])


def emit(file: Path, runs: Path, kind: str, out: Path) -> None:
    main(["study", "emit", str(file), "--folder", str(runs), "--for", kind, "--out", str(out)])


def test_plain_commands_make_the_study(many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["study", "emit", str(many), "--folder", str(tmp_path / "my runs")])
    lines = capsys.readouterr().out.splitlines()
    study = read_study(many, tmp_path / "my runs")
    assert len(lines) == len(study.cells) == 8
    first, rest = leaders(study.cells)
    assert [len(first), len(rest)] == [4, 4]  # a rate and a seed each have an M_0
    for line, cell in zip(lines, [*first, *rest], strict=True):
        words = shlex.split(line)
        assert words[:2] == ["esjax", "evolve"]
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options["--run-dir"] == str(tmp_path / "my runs" / cell.name)
        assert options["--shared"] == str(tmp_path / "my runs" / "stages")
        assert load(options["--config"]) == cell.config


def test_a_slurm_array_holds_every_run(many: Path, tmp_path: Path) -> None:
    emit(many, tmp_path / "runs", "slurm", tmp_path / "jobs")
    for name in ("first", "rest"):
        script = tmp_path / "jobs" / f"{name}.sbatch"
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert "#SBATCH --array=0-3\n" in script.read_text()
    # Each task runs its own line: with an `esjax` that only tells what it was called with.
    stub = tmp_path / "bin" / "esjax"
    stub.parent.mkdir()
    stub.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$TOLD"\nexit "${CODE:-0}"\n')
    stub.chmod(0o755)
    (tmp_path / "bin" / "scontrol").write_text('#!/usr/bin/env bash\necho "$@" > "$TOLD.requeued"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    wanted = [line.split() for line in (tmp_path / "jobs" / "rest.txt").read_text().splitlines()]
    for task in range(4):
        environment = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "TOLD": str(tmp_path / "told")}
        environment |= {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_JOB_ID": "7", "CODE": "143" if task == 3 else "0"}
        ended = subprocess.run(["bash", str(tmp_path / "jobs" / "rest.sbatch")], env=environment, check=False)
        assert ended.returncode == (143 if task == 3 else 0)
        assert (tmp_path / "told").read_text().split() == wanted[task][1:]
        assert (tmp_path / "told.requeued").exists() == (task == 3)


def test_skypilot_could_not_bring_configs_from_elsewhere(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    for out in (tmp_path / "jobs", Path("../jobs")):
        said = refused("study", "emit", many, "--for", "skypilot", "--out", out)
        assert f"--out {out}: SkyPilot brings the repository's folder alone" in said
    assert not (tmp_path / "jobs").exists()


def test_skypilot_gets_every_run(many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the launch script, whose own tests hold its file against SkyPilot's schema; here what it is called with."""
    monkeypatch.chdir(tmp_path)
    study = read_study(many, Path("/runs/my study"))
    emit(many, study.folder, "skypilot", Path("jobs"))
    refused_elsewhere = subprocess.run(["bash", "jobs/submit.sh"], capture_output=True, text=True, check=False)
    assert refused_elsewhere.returncode == 2
    assert "from the root" in refused_elsewhere.stderr
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch" / "skypilot.sh"
    script.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> told; printf "\\n" >> told\n')
    script.chmod(0o755)
    subprocess.run(["bash", "jobs/submit.sh", "--nfs", "host:/path"], check=True)
    told = [line.rstrip("\0").split("\0") for line in (tmp_path / "told").read_text().splitlines()]
    first, rest = leaders(study.cells)
    assert len(told) == 8
    for words, cell in zip(told, [*first, *rest], strict=True):
        at = words.index("--")
        assert words[at - 2 : at] == ["--nfs", "host:/path"]
        assert words[:2] == ["--name", f"my-study-{cell.name}"]
        options = dict(zip(words[at + 2 :: 2], words[at + 3 :: 2], strict=True))
        assert words[at + 1] == "evolve"
        assert load(options["--config"]) == cell.config
        assert options["--run-dir"] == f"/runs/my study/{cell.name}"


def test_submitit_gets_every_run(many: Path, tmp_path: Path) -> None:
    emit(many, tmp_path / "runs", "submitit", tmp_path / "jobs")
    (tmp_path / "submitit.py").write_text(SUBMITIT)
    lines = {name: (tmp_path / "jobs" / f"{name}.txt").read_text().splitlines() for name in ("first", "rest")}
    assert [len(x) for x in lines.values()] == [4, 4]
    for cluster, dependency in (("slurm", "afterok:7"), ("local", None)):
        command = [sys.executable, str(tmp_path / "jobs" / "submit.py"), cluster]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        first, rest = map(json.loads, said.splitlines())
        assert first["commands"] == lines["first"]
        assert rest["commands"] == lines["rest"]
        assert "slurm_additional_parameters" not in first["parameters"]
        assert rest["parameters"].get("slurm_additional_parameters", {}).get("dependency") == dependency


# Stands in for submitit, which tests do not need: it tells what it is asked to submit.
SUBMITIT = """
import json
from types import SimpleNamespace

helpers = SimpleNamespace(DelayedSubmission=tuple)


class AutoExecutor:
    def __init__(self, folder, cluster):
        self.cluster, self.parameters = cluster, {}

    def update_parameters(self, **parameters):
        self.parameters |= parameters

    def map_array(self, run, commands):
        print(json.dumps({"commands": commands, "parameters": self.parameters}))
        return [SimpleNamespace(job_id=f"7_{i}", result=lambda: None) for i in range(len(commands))]
"""


# --- curves ------------------------------------------------------------------------------------------------------------


def simulated(
    seed: int, k: float, curve: str = "power", points: int = 6, seeds: int = 3, dialogues: int = 40
) -> Results:
    """Results as real runs have them: dialogues that are hard in all runs, seeds, and chance in every reply."""
    rng = np.random.default_rng([7, seed])
    x = np.geomspace(1, 100, points) * 1e6
    f = 2 + 1.5 * (curves.CURVES[curve].g(x / 1e6, np.asarray(k)))
    off = 1 + rng.normal(0, 0.15, dialogues)[None, None] + rng.normal(0, 0.02, (points, seeds))[..., None]
    return Results(x, f[:, None, None] * (off + rng.normal(0, 0.3, (points, seeds, dialogues))))


@pytest.mark.parametrize(("curve", "k"), [("power", 0.35), ("power", 0.8), ("saturating", 8.0)])
def test_planted_parameters_lie_in_their_intervals(curve: str, k: float) -> None:
    """In 93 to 97% of 200 simulations, and not in intervals that were halved."""
    hits = np.zeros((200, 2), bool)
    for n in range(200):
        value, low, high = fit(simulated(n, k, curve), curve, 300, n).interval("k")
        planted = k * (1e6 if curve == "saturating" else 1)
        near = np.sqrt(low * value), np.sqrt(high * value)  # k's interval is one of logarithms
        hits[n] = low <= planted <= high, near[0] <= planted <= near[1]
    assert 0.93 <= hits[:, 0].mean() <= 0.97
    assert hits[:, 1].mean() < 0.9


def test_a_fit_without_outliers_is_scipys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "HUBER", 1e6)  # then every residual counts as its square
    data = simulated(0, 0.5)
    lower = Results(data.x, data.y - 3)  # some below 0, so that residuals are of the numbers themselves
    found = fit(lower, "power", 50)
    assert not found.logarithmic

    def curve(x: np.ndarray, c: float, a: float, k: float) -> np.ndarray:
        return c + a * (x / 1e6) ** -k

    x, y = np.repeat(data.x, 3), lower.means.ravel()
    theirs, _ = optimize.curve_fit(curve, x, y, p0=(-1, 1, 0.5))
    mine = [found.interval(p)[0] for p in "cak"]
    assert [mine[0], mine[1] * 1e6 ** -mine[2], mine[2]] == pytest.approx(theirs.tolist(), rel=1e-3)
    assert found.at(data.x) == pytest.approx(curve(data.x, *theirs), rel=1e-4)


def test_an_outlier_hardly_moves_the_curve() -> None:
    clean = Results(
        np.geomspace(1, 1000, 9), np.ones((9, 1, 1)) * (1 + 2 * np.geomspace(1, 1000, 9) ** -0.5)[:, None, None]
    )
    noise = 1 + 0.002 * np.random.default_rng(1).standard_normal((9, 1, 1))
    spoiled = clean.y * noise
    spoiled[4] *= 1.5
    assert fit(clean, "power", 50).interval("k")[0] == pytest.approx(0.5, rel=1e-3)
    assert fit(Results(clean.x, spoiled), "power", 50).interval("k")[0] == pytest.approx(0.5, rel=0.1)


GOOD = simulated(1, 0.5)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (Results(GOOD.x[:3], GOOD.y[:3]), "3 different x"),
        (Results(np.ones(6), GOOD.y), "1 different x"),
        (Results(np.linspace(1, 2, 6), GOOD.y), "x reaches from 1 to 2, less than 4 times"),
        (Results(GOOD.x - GOOD.x[0], GOOD.y), "x=0 is among the data"),
        (Results(GOOD.x, np.ones((6, 3, 4))), "y is 1 in all runs"),
        (Results(GOOD.x, GOOD.y * np.nan), "a run has no number for y"),
    ],
)
def test_degenerate_grids_are_refused_by_name(data: Results, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        fit(data, "power")


def test_a_curve_is_not_read_far_beyond_its_data() -> None:
    found = fit(GOOD, "power", 50)
    check_reach(found, 4e8, far=False)
    with pytest.raises(InputError, match="more than 4 times beyond the data"):
        check_reach(found, 4.1e8, far=False)
    check_reach(found, 4.1e8, far=True)
    low, high = found.band(np.asarray([1e7]))
    assert low < found.at(np.asarray([1e7])) < high


# --- what it needs -----------------------------------------------------------------------------------------------------


def test_a_plan_counts_programs_and_shares_m0(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the devices at hand, whose rates nobody states; what a run needs is what its programs are run times what each does."""
    grid = {"contexts": {"few": {}, "many": {"evolve.contexts_per_round": 48}}}
    file = write_study(tmp_path / "s.yaml", settings=tiny_settings(tiny_folder), grid=grid, seeds=[0, 1])
    study = read_study(file)
    hardware = Hardware.of(None, 1)
    few, many = (counted(c.config, hardware) for c in (study.cells[0], study.cells[2]))
    assert few["sft"] == many["sft"]
    assert few["evaluation"] == many["evaluation"]
    drawn = 32 + 3 * 8 + 32  # tokens of draft, reflection and refinement
    for found, contexts in ((few, 6), (many, 48)):
        assert found["rounds"]["decode"] == math.ceil(contexts * drawn / 4 / BUSY)
    dialogues = [json.loads(line) for line in (REPOSITORY / "data/sample/train.jsonl").read_text().splitlines()]
    tokens = sum(min(768, sum(len(t["text"].encode()) // 4 + 8 for t in d["turns"])) for d in dialogues)
    assert few["sft"]["sft"] == math.ceil(tokens / 0.75 / (4 * 768 * 0.9))
    needs = [
        Needs(name, 0.0, {"base": 1.0}, 2.0, flops=10.0, seconds=0.5)
        for name in ("prefill", "decode", "score", "sft", "dpo")
    ]
    of_few = cost(few, needs, 4)
    assert of_few.flops["rounds"] == sum(few["rounds"].values()) * 40
    assert of_few.hours == pytest.approx(sum(n for phase in few.values() for n in phase.values()) * 0.5 / 3600)
    main(["study", "plan", str(file)])
    said = capsys.readouterr()
    assert said.err.count("compiling for") == 1  # both have programs of one shape
    assert "all 4 runs, with 2 M_0 made once each" in said.out
    assert "rates not known" in said.out
