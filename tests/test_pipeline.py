"""The whole run, tiny: both phases, two rounds, the table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides

from esjax.cli import main
from esjax.run.jsonl import read_jsonl

FILES = ("drafts", "reflections", "refinements", "pairs", "dropped")


def test_run_directory_is_complete(tiny_run: Path) -> None:
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    rounds = [f"round{t}/{s}" for t in (1, 2) for s in ("replies", "pairs", "dpo")]
    assert list(manifest["stages"]) == [
        "sft",
        *rounds,
        "eval/backbone",
        "eval/m0",
        "eval/m1",
        "eval/m2",
        "eval/results",
    ]
    for t in (1, 2):
        folder = tiny_run / f"round{t}"
        assert {p.name for p in folder.glob("*.jsonl*")} == {f"{n}.jsonl" for n in FILES}  # and no .part of any
        drafts, *others = (read_jsonl(folder / f"{n}.jsonl") for n in FILES[:3])
        assert len(drafts) == 16
        assert all([r["id"] for r in rows] == [r["id"] for r in drafts] for rows in others)
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


def test_a_whole_run_compiles_nine_programs_at_most(tiny_run: Path) -> None:
    """Both phases, two rounds and the closing table; the run itself says so."""
    said = tiny_run.with_suffix(".err").read_text()
    match = re.search(r"^(\d+) programs compiled: (.*)$", said, re.MULTILINE)
    assert match is not None
    assert int(match[1]) == sum(int(part.split()[0]) for part in match[2].split(", ")) <= 9
    assert "1 decode, 1 prefill, 3 score, 3 train, 1 weights" in said


def sampled(tmp_path: Path, run: Path, name: str, *more: str) -> list[dict[str, Any]]:
    """The answers of M_2 to three prompts."""
    prompts = [{"id": f"p{i}", "messages": [{"role": "user", "content": "I am tired. " * i}]} for i in range(1, 4)]
    (tmp_path / f"{name}.in").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    files = ["--prompts", str(tmp_path / f"{name}.in"), "--out", str(tmp_path / f"{name}.jsonl")]
    main(["sample", "--model", f"{run}:m2", *files, "--reply.max_tokens", "24", *more])
    return read_jsonl(tmp_path / f"{name}.jsonl", ("id", "text", "token_ids", "logprobs", "finish_reason"))


def test_several_samples_of_a_prompt(tiny_run: Path, tmp_path: Path) -> None:
    one, four = (sampled(tmp_path, tiny_run, str(n), "--num-samples", str(n)) for n in (1, 4))
    assert [(r["id"], r["sample"]) for r in four] == [(f"p{i}", k) for i in (1, 2, 3) for k in range(4)]
    assert [r["text"] for r in four[::4]] == [r["text"] for r in one]  # the first is that of a prompt asked once
    assert "sample" not in one[0]
    assert len({r["text"] for r in four[:4]}) > 1


def test_answers_obey_a_regular_expression_or_a_schema(tiny_run: Path, tmp_path: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["low", "fair"]}, "since": {"type": "integer"}},
        "required": ["mood", "since"],
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    free = sampled(tmp_path, tiny_run, "free")
    pattern = r"(yes|no), [a-z ]+\."
    assert not any(re.fullmatch(pattern, r["text"]) for r in free)
    for row in sampled(tmp_path, tiny_run, "regex", "--regex", pattern):
        assert re.fullmatch(pattern, row["text"])
        assert row["finish_reason"] == "stop"
    for row in sampled(tmp_path, tiny_run, "schema", "--json-schema", str(tmp_path / "schema.json")):
        made = json.loads(row["text"])
        assert made["mood"] in ("low", "fair")
        assert isinstance(made["since"], int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: at least 1"),
        (["--regex", "("], "not a regular expression"),
        (["--regex", "a", "--json-schema", "x.json"], "--regex and --json-schema: give one of them"),
        (["--json-schema", "/absent.json"], "/absent.json: cannot be read"),
        (["--json-schema", __file__], "not a JSON schema that can be followed"),
        (["--regex", "[a-z]{400}"], "too small: its shortest text takes"),
    ],
    ids=lambda x: " ".join(x)[:24] if isinstance(x, list) else "",
)
def test_constraints_that_cannot_be_kept_are_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as e:
        sampled(tmp_path, tiny_run, "bad", *options)
    assert e.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "bad.jsonl").exists()


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
