"""Killed with SIGKILL in the middle of every stage and started again, a run ends with an undisturbed run's bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_overrides

# Runs esjax with one function replaced: its n-th call sends this process a signal, or raises.
SIGNALLER = """
import importlib, os, signal, sys
what, module, owner, name, nth, *arguments = sys.argv[1:]
place = importlib.import_module(module)
place = getattr(place, owner) if owner else place
original, calls = getattr(place, name), 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(nth):
        if what == "raise":
            raise ValueError("this process alone fails")
        os.kill(os.getpid(), getattr(signal, what))
    return original(*args, **kwargs)
setattr(place, name, counted)
from esjax.cli import main
main(arguments)
"""
# stage in which the process dies -> (module, class, function, call). Calls count from the restart after the kill before.
KILLS = {
    "sft": ("esjax.run.metrics", "Metrics", "log", 4),
    "round1/replies (at the start)": ("esjax.run.journal", "Journal", "add", 3),
    "round1/replies (reflecting)": ("esjax.evolve.experiment", "", "parse", 7),
    "round1/replies (refining)": ("esjax.run.journal", "Journal", "add", 20),
    "round1/replies (naming the files)": ("esjax.run.journal", "Journal", "finish", 2),
    "round1/pairs": ("esjax.run.journal", "Journal", "add", 3),
    "round1/dpo": ("esjax.run.metrics", "Metrics", "log", 3),
    "round2/replies": ("esjax.run.journal", "Journal", "add", 25),
    "eval/m1": ("esjax.eval.compare", "", "publish_text", 3),
    "eval/results": ("esjax.eval.measure", "", "specificity", 1),
}
FEW = ("round1/replies (reflecting)", "round1/dpo", "eval/m1")


def files(run: Path) -> dict[str, bytes]:
    """Everything that must not depend on how often a run was killed."""
    kept = [p for p in run.rglob("*") if p.is_file() and (p.suffix in (".jsonl", ".yaml") or "adapter" in p.parts)]
    return {
        str(p.relative_to(run)): p.read_bytes() for p in [*kept, *run.glob("eval/*.json"), *run.glob("eval/*.parquet")]
    }


def stages(run: Path) -> dict[str, dict[str, object]]:
    """The finished stages."""
    file = run / "manifest.json"
    entries = json.loads(file.read_text())["stages"] if file.exists() else {}
    return {name: entry for name, entry in entries.items() if entry["status"] == "done"}


@pytest.fixture(scope="module", params=[FEW, pytest.param(tuple(KILLS), marks=pytest.mark.slow)], ids=["few", "all"])
def killed_run(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("killed") / "run"
    command = ["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder)]
    for where in request.param:
        module, owner, name, nth = KILLS[where]
        stage, before = where.split()[0], stages(run)
        done = subprocess.run(
            [sys.executable, "-c", SIGNALLER, "SIGKILL", module, owner, name, str(nth), *command],
            capture_output=True,
            text=True,
        )
        assert done.returncode == -signal.SIGKILL, f"{where}: exit {done.returncode}\n{done.stderr[-2000:]}"
        after = stages(run)
        assert stage not in after, f"{stage} was finished before the kill"
        assert {k: after[k] for k in before} == before, "a finished stage was done again"
        assert f"{stage}: started" in done.stderr, f"the kill hit another stage than {stage}:\n{done.stderr[-2000:]}"
    last = subprocess.run([sys.executable, "-m", "esjax", *command], capture_output=True, text=True)
    assert last.returncode == 0, last.stderr[-2000:]
    assert "round1/replies: done before" in last.stderr
    return run


def test_killed_run_equals_undisturbed_run(tiny_run: Path, killed_run: Path) -> None:
    expected, found = files(tiny_run), files(killed_run)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []
    assert any("adapter_model.safetensors" in name for name in expected)


@pytest.mark.slow
def test_another_seed_gives_other_bytes(tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Negative control: the comparison above can fail."""
    command = ["sft", "--run-dir", str(tmp_path / "other"), *tiny_overrides(tiny_folder), "--seed", "1"]
    subprocess.run([sys.executable, "-m", "esjax", *command], check=True, capture_output=True)
    name = "sft/adapter/adapter_model.safetensors"
    assert files(tmp_path / "other")[name] != files(tiny_run)[name]
