"""The whole run, tiny: both phases, two rounds, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import tiny_overrides

from esjax.cli import main
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


def test_sample_answers_every_prompt_by_its_own_seed(tiny_run: Path, tmp_path: Path) -> None:
    """`esjax sample`: every prompt answered in order; the text hangs on seed and id, not on the neighbours."""
    prompts = [{"id": f"p{i}", "messages": [{"role": "user", "content": "I am tired. " * i}]} for i in range(1, 6)]
    outs = {}
    for name, rows, more in (("all", prompts, []), ("two", prompts[3:], []), ("other", prompts, ["--seed", "1"])):
        (tmp_path / f"{name}.in").write_text("".join(json.dumps(p) + "\n" for p in rows))
        files = ["--prompts", str(tmp_path / f"{name}.in"), "--out", str(tmp_path / f"{name}.jsonl")]
        main(["sample", "--model", f"{tiny_run}:m2", *files, "--reply.max_tokens", "24", "--reply.batch", "3", *more])
        outs[name] = read_jsonl(tmp_path / f"{name}.jsonl", ("id", "text", "token_ids", "logprobs", "finish_reason"))
    assert [r["id"] for r in outs["all"]] == [p["id"] for p in prompts]
    assert all(len(r["token_ids"]) == len(r["logprobs"]) <= 24 for r in outs["all"])
    assert [r["text"] for r in outs["two"]] == [r["text"] for r in outs["all"][3:]]
    assert [r["text"] for r in outs["other"]] != [r["text"] for r in outs["all"]]


def test_dpo_alone_on_the_pairs_of_a_run(tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """`esjax dpo` on a round's pairs, from the model that made them, trains the round's own adapter again."""
    pairs = tiny_run / "round1" / "pairs.jsonl"
    bare = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read_jsonl(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bare))
    arguments = ["--pairs", str(tmp_path / "pairs.jsonl"), *tiny_overrides(tiny_folder)]
    main(["dpo", "--run-dir", str(tmp_path / "a"), "--model", f"{tiny_run}:m0", *arguments])
    main(["dpo", "--run-dir", str(tmp_path / "b"), *arguments])
    for name in "ab":
        first = read_jsonl(tmp_path / name / "dpo" / "metrics.jsonl")[0]
        assert abs(first["loss"] - 0.693147) < 1e-3
    rescored, stored = read_jsonl(tmp_path / "a" / "pairs.jsonl"), read_jsonl(pairs)
    for a, b in zip(rescored, stored, strict=True):
        assert a["reference"]["chosen"] == pytest.approx(b["reference"]["chosen"], abs=1e-4)
    from_backbone = read_jsonl(tmp_path / "b" / "pairs.jsonl")
    assert any(
        abs(a["reference"]["chosen"] - b["reference"]["chosen"]) > 1e-2
        for a, b in zip(from_backbone, stored, strict=True)
    )
