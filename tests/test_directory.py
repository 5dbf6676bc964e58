"""The run directory: stages done once, refusals of what does not belong to it, one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esjax.errors import InputError, TransientError
from esjax.run.directory import RunDir
from esjax.run.files import write_text
from esjax.settings.files import load
from esjax.settings.schema import Config


@pytest.fixture(scope="session")
def config() -> Config:
    return load(None, [])


class Stage:
    """A stage that writes a file and counts how often it worked."""

    def __init__(self, run: RunDir, name: str = "draft", fail: bool = False) -> None:
        self.run, self.name, self.fail, self.worked = run, name, fail, 0
        self.output = run.path / f"{name}.txt"

    def work(self) -> dict[str, Any]:
        self.worked += 1
        if self.fail:
            raise KeyboardInterrupt
        write_text(self.output, "done")
        return {"rows": 3}

    def go(self, **inputs: str) -> None:
        self.run.stage(self.name, [self.output], inputs, self.work)


@pytest.fixture
def run(tmp_path: Path, config: Config) -> Iterator[RunDir]:
    """A new run directory, open."""
    with RunDir(tmp_path / "run", config) as opened:
        yield opened


def opened_with(path: Path, config: Config) -> None:
    with RunDir(path, config):
        pass


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_first_stage_claims_the_directory_for_its_config(tmp_path: Path, config: Config) -> None:
    saved = tmp_path / "config.yaml"
    with RunDir(tmp_path, config) as run:
        assert not saved.exists()  # bad input found before any work leaves nothing behind
        Stage(run).go()
        assert load(str(saved), []) == config
    before = saved.read_bytes()
    with pytest.raises(InputError) as e:
        opened_with(tmp_path, load(None, ["--dpo.beta", "0.3", "--seed", "5"]))
    assert "differing: seed, dpo.beta;" in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert saved.read_bytes() == before
    opened_with(tmp_path, config)  # the refusal did not keep the lock
    saved.unlink()
    with pytest.raises(InputError, match=r"config\.yaml is gone, but stage draft was begun"):
        opened_with(tmp_path, config)


def test_nothing_is_left_of_a_directory_where_nothing_was_made(tmp_path: Path, config: Config) -> None:
    (tmp_path / "made by hand").mkdir()
    for name in ("new", "made by hand"):
        with RunDir(tmp_path / name, config), pytest.raises(TransientError, match="in use"):
            RunDir(tmp_path / name, config).__enter__()
    assert [p.name for p in tmp_path.rglob("*")] == ["made by hand"]


def test_a_stage_keeps_the_settings_that_it_hangs_on(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        stage = Stage(run)
        run.stage("draft", [stage.output], {}, stage.work, ("seed", "sft"))
    opened_with(tmp_path, load(None, ["--dpo.beta", "0.3", "--reply.max_tokens", "9"]))
    for words in (["--sft.learning_rate", "0.1"], ["--seed", "3"]):
        with pytest.raises(InputError, match=f"differing: {words[0][2:]};"):
            opened_with(tmp_path, load(None, [*words, "--dpo.beta", "0.3"]))


def test_how_to_compute_may_change_and_is_written_down(
    tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "config.yaml"
    with RunDir(tmp_path, config) as run:
        Stage(run).go()
    other = load(None, ["--sft.micro_rows", "1", "--evolve.rounds", "5", "--data.train", "elsewhere.jsonl"])
    opened_with(tmp_path, other)
    assert load(str(saved), []) == config  # nothing was asked of it yet
    capsys.readouterr()
    with RunDir(tmp_path, other) as run:
        Stage(run).go()
    assert load(str(saved), []) == other
    assert "sft.micro_rows=1 (was 2)" in capsys.readouterr().err
    with pytest.raises(InputError, match="data changed"), RunDir(tmp_path, config) as run:
        Stage(run).go(data="2")
    assert load(str(saved), []) == other  # a refused command writes nothing down


def test_another_backbone_is_refused_once_something_was_made(run: RunDir) -> None:
    run.check_base({"config.json": "0", "model.safetensors": "1"})
    run.check_base({"config.json": "0", "model.safetensors": "2"})  # nothing was made yet
    Stage(run).go()
    run.check_base({"config.json": "0", "model.safetensors": "2"})
    with pytest.raises(InputError, match=r"another backbone; differing: chat_template\.jinja, model\.safetensors;"):
        run.check_base({"config.json": "0", "model.safetensors": "1", "chat_template.jinja": "3"})


# --- stages ----------------------------------------------------------------------------------------------------------


def test_a_stage_is_done_once_also_in_a_later_process(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        stage = Stage(run)
        stage.go(data="1", prompts="2")
        stage.go(data="1", prompts="2")
        assert stage.worked == 1
    entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["draft"]
    assert {"status": "done", "inputs": {"data": "1", "prompts": "2"}, "rows": 3}.items() <= entry.items()
    assert entry["seconds"] >= 0
    assert {"python", "esjax", "jax"} <= set(entry["versions"])
    with RunDir(tmp_path, config) as run:
        again, other = Stage(run), Stage(run, "reflect")
        again.go(data="1", prompts="2")
        other.go(data="1")
    assert (again.worked, other.worked) == (0, 1)


@pytest.mark.parametrize(
    ("inputs", "change", "named"),
    [
        ({"data": "1", "prompts": "3"}, None, r"stage draft is done, but prompts changed since"),
        ({"data": "0", "prompts": "3"}, None, r"but data, prompts changed since"),
        ({"data": "1", "prompts": "2", "more": "4"}, None, r"but more changed since"),
        ({"data": "1"}, None, r"prompts changed since"),
        ({"data": "1", "prompts": "2"}, lambda file: file.unlink(), r"draft\.txt is gone; restore it"),
        (
            {"data": "1", "prompts": "2"},
            lambda file: file.write_text("edited"),
            r"draft\.txt: changed since stage draft made it",
        ),
    ],
)
def test_what_changed_since_is_refused_by_name(
    run: RunDir, inputs: dict[str, str], change: Callable[[Path], object] | None, named: str
) -> None:
    stage = Stage(run)
    stage.go(data="1", prompts="2")
    if change is not None:
        change(stage.output)
    with pytest.raises(InputError, match=named):
        stage.go(**inputs)
    write_text(stage.output, "done")
    stage.go(data="1", prompts="2")
    assert stage.worked == 1


@pytest.mark.parametrize("left", [None, "draft.txt", "draft.txt.part", "checkpoint/7/x"])
def test_an_interrupted_stage_goes_on_with_the_same_inputs_or_with_nothing_made(run: RunDir, left: str | None) -> None:
    """Else rows or steps made from the old input mix with ones made from the new, and no manifest tells."""
    stage = Stage(run, fail=True)
    with pytest.raises(KeyboardInterrupt):
        stage.go(data="1")
    (run.path / "draft.txt.part").touch()  # opened, and nothing in it
    (run.path / "checkpoint").mkdir()
    stage.fail = False
    if left is not None:
        (run.path / left).parent.mkdir(parents=True, exist_ok=True)
        (run.path / left).write_text("made of 1")
        with pytest.raises(InputError, match="stage draft was begun, but data changed since"):
            stage.go(data="2")
    stage.go(data="2" if left is None else "1")
    assert stage.worked == 2


def test_a_stage_that_made_nothing_takes_other_settings(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run, pytest.raises(KeyboardInterrupt):
        Stage(run, fail=True).go(data="1")
    with RunDir(tmp_path, load(None, ["--seed", "5"])) as run:
        Stage(run).go(data="2")
    assert load(str(tmp_path / "config.yaml"), []).seed == 5
    with pytest.raises(InputError, match="differing: seed;"):  # control
        opened_with(tmp_path, config)


def test_a_stage_that_does_not_make_its_output_is_an_error(run: RunDir) -> None:
    with pytest.raises(AssertionError, match="did not make"):
        run.stage("lazy", [run.path / "absent.txt"], {}, lambda: None)
    assert json.loads((run.path / "manifest.json").read_text())["stages"]["lazy"]["status"] == "started"


def test_a_manifest_of_an_older_esjax_is_read(tmp_path: Path, config: Config) -> None:
    """It named inputs by their paths, and said nothing of settings, outputs and the backbone."""
    with RunDir(tmp_path, config) as run:
        Stage(run).go()
        entry = {"status": "done", "inputs": {"bundled:prompts/x.txt": "1", "weights": "2"}, "seconds": 1.0}
        (tmp_path / "manifest.json").write_text(json.dumps({"stages": {"draft": entry}}))
    with RunDir(tmp_path, config) as run:
        run.check_base({"config.json": "0"})
        stage = Stage(run)
        stage.go(**{"prompts.x": "1", "weights": "2"})
        assert stage.worked == 0
        with pytest.raises(InputError, match=r"but prompts\.x changed since"):
            stage.go(**{"prompts.x": "3", "weights": "2"})
    (tmp_path / "manifest.json").write_text('{"stages": [')
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest"):
        opened_with(tmp_path, config)


# --- one process at a time -------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from esjax.settings.files import load
from esjax.run.directory import RunDir
with RunDir(Path(sys.argv[1]), load(None, [])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config), pytest.raises(TransientError, match="another process"):
        opened_with(tmp_path, config)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(TransientError, match="another process") as e:
            opened_with(tmp_path, config)
        assert str(tmp_path) in str(e.value)
        opened_with(tmp_path / "elsewhere", config)  # control: another directory is free
        other.kill()
    opened_with(tmp_path, config)  # a killed process holds nothing
