"""Run directories for tests of the report: made by hand, with any texts, as large as asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esjax.eval.results import Value, write_parquet
from esjax.run.jsonl import json_line
from esjax.settings.files import dump
from esjax.settings.schema import Config

REASONS = ("too_similar", "too_short", "truncated")
MODELS = ("backbone", "m0", "m1")


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(map(json_line, rows)), encoding="utf-8")


def made_run(folder: Path, config: Config, count: int = 12, say: str = "I am tired") -> Path:
    """A finished run of one round with ``count`` contexts in the round and as many in the evaluation."""
    ids = [f"d{i // 5}/{2 * (i % 5) + 1}" for i in range(count)]
    chats = [[{"role": "user", "content": f"{say}, says number {i}."}] for i in range(count)]
    one = folder / "round1"
    write_rows(one / "drafts.jsonl", [{"id": n, "prompt": c, "text": f"Draft {n}: {say}"} for n, c in zip(ids, chats)])  # noqa: B905
    fields = {"profile": f"They said {say}", "emotional_state": "They feel low.", "situation": "Work."}
    write_rows(one / "reflections.jsonl", [{"id": n, "reflection": fields} for n in ids])
    write_rows(one / "refinements.jsonl", [{"id": n, "text": f"Refined {n}, with you: {say}"} for n in ids])
    kept, dropped = [n for i, n in enumerate(ids) if i % 4], [n for i, n in enumerate(ids) if not i % 4]
    sides = {side: [{"role": "assistant", "content": "Of the pair."}] for side in ("chosen", "rejected")}
    write_rows(one / "pairs.jsonl", [{"id": n, "round": 1, **sides} for n in kept])
    reasons = [REASONS[i % 3] for i in range(len(dropped))]
    write_rows(one / "dropped.jsonl", [{"id": n, "reason": r} for n, r in zip(dropped, reasons, strict=True)])
    write_rows(
        folder / "sft" / "metrics.jsonl", [{"step": i, "loss": 3 - i / 9, "grad_norm": 1.0} for i in range(1, 9)]
    )
    steps = [
        {"step": i, "loss": 0.7 / i, "margin": i / 9, "accuracy": 0.5, "chosen_reward": 0.1 * i} for i in range(1, 6)
    ]
    write_rows(one / "dpo" / "metrics.jsonl", [s | {"rejected_reward": -0.1, "drift": 0.1} for s in steps])
    names = [f"t{n}" for n in ids]
    for model in MODELS:
        rows = [
            {"id": n, "messages": c, "reference": f"Reference to {n}", "prediction": f"{model} answers {i}: {say}"}
            for i, (n, c) in enumerate(zip(names, chats, strict=True))
        ]
        write_rows(folder / "eval" / f"{model}.jsonl", rows)
    values = [
        Value(m, "words", n.split("/")[0], n, -1, float((7 * i) % 30 + k))
        for k, m in enumerate(MODELS)
        for i, n in enumerate(names)
    ]
    write_parquet(folder / "eval" / "results.parquet", values)
    difference = {
        "value": 1.0,
        "low": 0.2,
        "high": 1.8,
        "p": 0.01,
        "p_holm": 0.03,
        "verdict": "higher",
        "detectable": 1.1,
    }
    records = [
        {"metric": "words", "model": m, "value": 9.0 + k, "low": 8.0, "high": 12.0, "better": "neither", "seeds": 1}
        | {"contexts": count, "dialogues": count // 5, "differences": {MODELS[k - 1]: difference} if k else {}}
        for k, m in enumerate(MODELS)
    ]
    (folder / "eval" / "results.json").write_text(json.dumps(records), encoding="utf-8")
    talk = [("feeling", 2, None), ("reply", None, "Tell me more."), ("answer", 3, f"Well: {say}"), ("feeling", 4, None)]
    steps = [{"id": "p1", "step": i, "kind": k, "value": v, "text": t} for i, (k, v, t) in enumerate(talk)]
    steps = [{k: v for k, v in s.items() if v is not None} for s in [*steps, {"id": "p1", "kind": "grade", "value": 4}]]
    write_rows(folder / "eval" / "m1.talks.jsonl", steps)
    write_rows(
        folder / "screened.jsonl", [{"source": "train", "kind": "crisis", "action": "drop", "id": "x", "turn": 1}]
    )
    usage = {
        "replies": 36,
        "tokens": 900,
        "lanes_busy": 0.75,
        "seconds": 3.0,
        "prompt_tokens": 90,
        "computed_tokens": 40,
    }
    facts: dict[str, Any] = {
        "sft": {},
        "round1/replies": {"usage": usage},
        "round1/pairs": {"kept": len(kept), "dropped": {r: reasons.count(r) for r in REASONS}, "length_ratio": 1.2},
        "round1/dpo": {},
        "eval/results": {},
    }
    done = {"status": "done", "inputs": {}, "seconds": 12.5, "peak_gib": 1.5, "versions": {"esjax": "0"}}
    (folder / "manifest.json").write_text(
        json.dumps({"stages": {n: done | f for n, f in facts.items()}}), encoding="utf-8"
    )
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    return folder
