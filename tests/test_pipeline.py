"""The whole run, tiny: both phases, two rounds, the table."""

from __future__ import annotations

import json
from pathlib import Path

from esjax.runlog import read_jsonl


def test_run_directory_is_complete(tiny_run: Path) -> None:
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    rounds = [f"round{t}/{s}" for t in (1, 2) for s in ("drafts", "reflections", "refinements", "pairs", "dpo")]
    assert list(manifest["stages"]) == ["sft", *rounds, "eval/m0", "eval/m1", "eval/m2"]
    for t in (1, 2):
        folder = tiny_run / f"round{t}"
        kept, dropped = read_jsonl(folder / "pairs.jsonl"), read_jsonl(folder / "dropped.jsonl")
        assert len(kept) + len(dropped) == 16
        assert kept
        first = read_jsonl(folder / "dpo" / "metrics.jsonl")[0]
        assert abs(first["loss"] - 0.693147) < 1e-3
        assert abs(first["margin"]) < 1e-3
