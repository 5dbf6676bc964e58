"""``esjax bench --suite``: what each measurement printed is kept, whatever becomes of the others; bad options."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import Refused

from esjax.bench.suite import DATA, ITEMS, PAGE
from esjax.cli import main

# In place of Python: measures nothing, fails in one task, and in another one does not come to an end after its first line.
STAND_IN = """#!{python}
import json, sys, time
words = sys.argv[4:]
task = words[words.index("--tasks") + 1]
if task == "sft":
    sys.exit("esjax: no such luck")
line = {{"task": task, "variant": "bare", "figure": 7.5, "spread": [7.0, 8.0], "device": "a stand-in", "words": words,
        "moved_most_gib": {{"head: product": 0.5}}}}
print("not a line of figures")
print(json.dumps(line), flush=True)
if task == "round":
    time.sleep(60)
"""


def test_a_suite_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    monkeypatch.setattr("esjax.bench.suite.MINUTE", 5.0)
    main(["bench", "--suite", str(tmp_path / "out"), "--profile", "gpu", "--limit", "1"])
    made = json.loads((tmp_path / "out" / DATA).read_text())
    assert [line["task"] for line in made["lines"]] == ["sample", "dpo", "round"]
    assert made["lines"][1]["words"][-2:] == ["--model.remat", "dots"]
    assert made["lines"][1]["words"][:2] == ["--profile", "gpu"]
    assert made["missing"] == {
        "sft --model.remat dots": "esjax: no such luck",
        "round --compare naive": "stopped at the limit",
        "dpo --model.remat full --compare naive": "no time was left",
        "sft --model.remat full": "no time was left",
        "sample --model.decoding_attention plain": "no time was left",
        "sample --model.decoding_attention pallas": "no time was left",
        "dpo --model.remat dots --model.attention pallas": "no time was left",
    }
    page = (tmp_path / "out" / PAGE).read_text()
    for said in ("a stand-in", "7.0 to 8.0", "0.5 head: product", "no such luck", made["versions"]["jax"]):
        assert said in page, said


def test_only_the_tasks_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    line = {"task": "dpo", "variant": "lora", "device": "none", "moved_most_gib": {}}
    monkeypatch.setattr("esjax.bench.suite._measured", lambda words, seconds: asked.append(words) or ([line], ""))
    main(["bench", "--suite", str(tmp_path), "--tasks", "dpo"])
    assert [words[words.index("--tasks") + 1 :] for words in asked] == [list(i) for i in ITEMS if i[0] == "dpo"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compare", "naive"], "--compare: a suite measures with options of its own; leave it out"),
        (["--micro-rows", "2"], "--micro-rows: a suite measures"),
        (["--model.remat", "dots"], "--model.remat: a suite measures with settings of its own; leave it out"),
        (["--limit", "0"], "--limit 0: minutes, at least 1"),
        (["--tasks", "dpo,sleep"], "--tasks sleep: no such task"),
        (["--tasks", "sample,data"], "--tasks data: a suite measures sample, dpo, sft, round; leave it out"),
        (["--profile", "tpu"], "no profile 'tpu' can be read from it"),
        (["--workload", "none.json"], "none.json"),
    ],
)
def test_bad_options_of_a_suite(options: list[str], message: str, tmp_path: Path, refused: Refused) -> None:
    assert message in refused("bench", "--suite", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_suite_that_measures_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the page says of it is text, whatever signs it holds."""
    monkeypatch.setattr("esjax.bench.suite._measured", lambda words, seconds: ([], "out of memory [/red] [bold]"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--suite", str(tmp_path), "--tasks", "round"])
    assert ended.value.code == 1
    assert "nothing could be measured; the first (round --compare naive): out of memory" in capsys.readouterr().err
    assert "out of memory [/red] [bold]" in (tmp_path / PAGE).read_text()


def test_a_limit_is_a_suite_s(refused: Refused) -> None:
    assert "--limit: only --suite makes use of it; leave it out" in refused("bench", "--limit", "3")
