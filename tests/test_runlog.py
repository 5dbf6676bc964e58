"""The run directory: whole files or none, resuming to the same bytes, refusals, metrics, full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esjax.cli import main
from esjax.config import Config, InputError
from esjax.configfile import load
from esjax.runlog import (
    Metrics,
    RunDir,
    append_in_batches,
    bundled_hash,
    is_full_disk,
    json_line,
    read_jsonl,
    replacing,
    sha256,
    write_jsonl,
    write_text,
)


@pytest.fixture(scope="session")
def config() -> Config:
    return load(None, [])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- files that appear whole -----------------------------------------------------------------------------------------


def test_replacing_puts_a_file_in_place(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("one")
        assert not target.exists()
        assert temporary.parent == target.parent  # the same file system, so that renaming is atomic
    assert names(target.parent) == ["a.txt"]
    with replacing(target) as temporary:
        temporary.write_text("two")
        assert target.read_text() == "one"
    assert target.read_text() == "two"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_replacing_leaves_nothing_half_written(tmp_path: Path, error: type[BaseException], old: str | None) -> None:
    target = tmp_path / "a.txt"
    if old is not None:
        target.write_text(old)

    def half() -> None:
        with replacing(target) as temporary:
            temporary.write_text("ha")
            raise error

    with pytest.raises(error):
        half()
    assert names(tmp_path) == ([] if old is None else ["a.txt"])
    assert old is None or target.read_text() == old


def test_replacing_works_for_folders(tmp_path: Path) -> None:
    target = tmp_path / "folder"

    def fill(content: str, fail: bool) -> None:
        with replacing(target) as temporary:
            (temporary / "deep").mkdir(parents=True)
            (temporary / "deep" / content).write_text(content)
            if fail:
                raise ValueError

    fill("one", fail=False)
    assert names(target / "deep") == ["one"]
    with pytest.raises(ValueError):
        fill("two", fail=True)
    assert names(tmp_path) == ["folder"]
    assert names(target / "deep") == ["one"]
    fill("three", fail=False)
    assert names(target / "deep") == ["three"]


def test_replacing_clears_what_a_kill_left(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.txt") as temporary:
        left = temporary
        temporary.write_text("one")
    left.mkdir()
    (left / "junk").write_text("half")
    write_text(tmp_path / "a.txt", "two")
    assert names(tmp_path) == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "two"


# --- JSON Lines ------------------------------------------------------------------------------------------------------

ODD: list[dict[str, Any]] = [{"b": "é\u2028\n\r\x85", "a": [1.5, None]}, {}, {"x": {"y": "👋"}}]


def test_json_lines_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ODD)
    assert read_jsonl(file) == ODD
    assert read_jsonl(file) != ODD[::-1]
    assert file.read_bytes().count(b"\n") == len(ODD)
    assert "é" in file.read_text(encoding="utf-8")
    assert list(json.loads(json_line(ODD[0]))) == ["b", "a"]  # keys keep their order


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": }\n', "line 3: not JSON"),
        ('{"a": 1}\n[1]\n', "line 2: expected a JSON object, found list"),
        ('{"b": 1}\n', "line 1: the field 'a' is missing; required: a"),
    ],
)
def test_broken_json_lines_name_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(text)
    with pytest.raises(InputError) as e:
        read_jsonl(file, ("a",))
    assert str(e.value).startswith(f"{file}, {message}")


# --- batch by batch --------------------------------------------------------------------------------------------------


def worker(calls: list[tuple[int, int]], stop_before: int | None = None) -> Callable[[int, int], list[dict[str, Any]]]:
    """Rows that are a function of their index; fails when it gets to ``stop_before``."""

    def work(start: int, stop: int) -> list[dict[str, Any]]:
        if start == stop_before:
            raise KeyboardInterrupt
        calls.append((start, stop))
        return [{"i": i, "text": "ü" * i + "\n"} for i in range(start, stop)]

    return work


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What eleven rows in batches of three give without a kill."""
    file = tmp_path_factory.mktemp("undisturbed") / "rows.jsonl"
    calls: list[tuple[int, int]] = []
    rows = append_in_batches(file, 11, 3, worker(calls), "test")
    assert [r["i"] for r in rows] == list(range(11))
    assert calls == [(0, 3), (3, 6), (6, 9), (9, 11)]
    assert names(file.parent) == ["rows.jsonl"]
    return file.read_bytes()


def lines_of(data: bytes, count: int) -> bytes:
    return b"".join(line + b"\n" for line in data.split(b"\n")[:count])


@pytest.mark.parametrize(
    ("whole", "torn", "again_from"),
    [
        (0, 0, 0),
        (0, 5, 0),  # a torn line alone
        (3, 0, 3),
        (3, 7, 3),  # a torn line after a whole batch
        (4, 0, 3),  # a partial batch
        (5, 9, 3),  # a partial batch and a torn line
        (9, 0, 9),
        (10, 4, 9),
        (11, 0, None),  # all is there, only the name is missing
    ],
)
def test_resuming_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: bytes, whole: int, torn: int, again_from: int | None
) -> None:
    file = tmp_path / "rows.jsonl"
    kept = lines_of(undisturbed, whole)
    (tmp_path / "rows.jsonl.part").write_bytes(undisturbed[: len(kept) + torn])
    calls: list[tuple[int, int]] = []
    rows = append_in_batches(file, 11, 3, worker(calls), "test")
    assert file.read_bytes() == undisturbed
    assert rows == read_jsonl(file)
    assert calls == [(i, min(i + 3, 11)) for i in range(0, 11, 3) if again_from is not None and i >= again_from]
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_torn_line_would_matter(tmp_path: Path, undisturbed: bytes) -> None:
    """Control: rows found in the part file are kept as they are, so other bytes there give another end."""
    (tmp_path / "rows.jsonl.part").write_bytes(lines_of(undisturbed, 3).replace(b"\xc3\xbc", b"u"))
    append_in_batches(tmp_path / "rows.jsonl", 11, 3, worker([]), "test")
    assert (tmp_path / "rows.jsonl").read_bytes() != undisturbed


def test_an_interrupted_run_loses_no_whole_batch(tmp_path: Path, undisturbed: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    for stop in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            append_in_batches(file, 11, 3, worker([], stop_before=stop), "test")
        assert names(tmp_path) == ["rows.jsonl.part"]
        assert (tmp_path / "rows.jsonl.part").read_bytes() == lines_of(undisturbed, stop)
    calls: list[tuple[int, int]] = []
    append_in_batches(file, 11, 3, worker(calls), "test")
    assert calls == [(9, 11)]
    assert file.read_bytes() == undisturbed


def test_a_kill_during_the_first_batch_after_resuming_loses_no_whole_batch(tmp_path: Path, undisturbed: bytes) -> None:
    """What was on disk before the kill must be on disk whenever ``work`` runs, which may take minutes."""
    part = tmp_path / "rows.jsonl.part"
    part.write_bytes(lines_of(undisturbed, 6))
    on_disk: list[bytes] = []

    def work(start: int, stop: int) -> list[dict[str, Any]]:
        on_disk.append(part.read_bytes())
        return worker([])(start, stop)

    append_in_batches(tmp_path / "rows.jsonl", 11, 3, work, "test")
    assert on_disk[1] == lines_of(undisturbed, 9)
    assert on_disk[0] == lines_of(undisturbed, 6)


def test_a_finished_file_is_read_and_not_made_again(tmp_path: Path, undisturbed: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(undisturbed)
    calls: list[tuple[int, int]] = []
    assert len(append_in_batches(file, 11, 3, worker(calls), "test")) == 11
    assert calls == []


def test_a_batch_of_another_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="test: 1 rows for 3 inputs"):
        append_in_batches(tmp_path / "rows.jsonl", 11, 3, lambda start, stop: [{}], "test")


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, tmp_path / "board")
    metrics.rewind(0)
    for step in range(1, 6):
        metrics.log(step, loss=1.0 / step)
    whole = file.read_bytes()
    metrics.rewind(5)
    assert file.read_bytes() == whole
    metrics.rewind(3)
    assert [r["step"] for r in read_jsonl(file)] == [1, 2, 3]
    metrics.log(4, loss=0.25)
    metrics.log(5, loss=0.2)
    assert file.read_bytes() == whole
    metrics.rewind(0)
    assert file.read_bytes() == b""
    metrics.close()
    assert list((tmp_path / "board").iterdir())


def test_rewind_survives_a_line_that_a_kill_or_a_full_disk_tore(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = json_line({"step": 1, "loss": 0.5}) + json_line({"step": 2, "loss": 0.4})
    file.write_text(whole + '{"step": 3, "lo')
    metrics = Metrics(file, tmp_path / "board")
    metrics.rewind(2)
    metrics.close()
    assert file.read_text() == whole


# --- the run directory -----------------------------------------------------------------------------------------------


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


def test_the_first_stage_claims_the_directory_for_its_config(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        assert not (tmp_path / "config.yaml").exists()  # bad input found before any work leaves nothing behind
        Stage(run).go()
        assert load(str(tmp_path / "config.yaml"), []) == config
    opened_with(tmp_path, load(None, []))
    assert load(str(tmp_path / "config.yaml"), []) != load(None, ["--seed", "1"])


def test_another_config_is_refused_with_the_differing_keys(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        Stage(run).go()
    saved = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(InputError) as e:
        opened_with(tmp_path, load(None, ["--dpo.beta", "0.3", "--seed", "5"]))
    assert "differing: seed, dpo.beta;" in str(e.value)
    assert str(tmp_path) in str(e.value)
    assert (tmp_path / "config.yaml").read_bytes() == saved
    opened_with(tmp_path, config)  # the refusal did not keep the lock


def test_a_stage_is_done_once_also_in_a_later_process(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        stage = Stage(run)
        stage.go(data="1", prompts="2")
        stage.go(data="1", prompts="2")
        assert stage.worked == 1
    entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["draft"]
    assert entry["status"] == "done"
    assert entry["inputs"] == {"data": "1", "prompts": "2"}
    assert entry["rows"] == 3
    assert entry["seconds"] >= 0
    assert {"python", "esjax", "jax"} <= set(entry["versions"])
    with RunDir(tmp_path, config) as run:
        again, other = Stage(run), Stage(run, "reflect")
        again.go(data="1", prompts="2")
        other.go(data="1")
    assert (again.worked, other.worked) == (0, 1)


def test_changed_inputs_are_refused_by_name(run: RunDir) -> None:
    stage = Stage(run)
    stage.go(data="1", prompts="2")
    with pytest.raises(InputError, match="stage draft is done, but prompts changed since"):
        stage.go(data="1", prompts="3")
    with pytest.raises(InputError, match="but data, prompts changed since"):
        stage.go(data="0", prompts="3")
    with pytest.raises(InputError, match="but more changed since"):
        stage.go(data="1", prompts="2", more="4")
    stage.go(data="1", prompts="2")
    assert stage.worked == 1


def test_lost_outputs_are_refused_by_name(run: RunDir) -> None:
    stage = Stage(run)
    stage.go(data="1")
    stage.output.unlink()
    with pytest.raises(InputError, match=r"draft\.txt is gone; restore it"):
        stage.go(data="1")
    write_text(stage.output, "done")
    stage.go(data="1")
    assert stage.worked == 1


def test_a_failed_stage_is_not_recorded_as_done_and_runs_again(run: RunDir) -> None:
    stage = Stage(run, fail=True)
    with pytest.raises(KeyboardInterrupt):
        stage.go(data="1")
    stage.fail = False
    stage.go(data="1")
    assert stage.worked == 2
    with pytest.raises(AssertionError, match="did not make"):
        run.stage("lazy", [run.path / "absent.txt"], {}, lambda: None)
    entries = json.loads((run.path / "manifest.json").read_text())["stages"]
    assert [name for name, entry in entries.items() if entry["status"] == "done"] == ["draft"]


def test_an_interrupted_stage_does_not_go_on_with_other_inputs(run: RunDir) -> None:
    """Else rows or steps made from the old input mix with ones made from the new, and no manifest tells."""
    stage = Stage(run, fail=True)
    with pytest.raises(KeyboardInterrupt):
        stage.go(data="1")
    stage.fail = False
    with pytest.raises(InputError, match="data"):
        stage.go(data="2")
    stage.go(data="1")


# --- one process at a time -------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from esjax.configfile import load
from esjax.runlog import RunDir
with RunDir(Path(sys.argv[1]), load(None, [])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path, config: Config) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="another process") as e:
            opened_with(tmp_path, config)
        assert str(tmp_path) in str(e.value)
        opened_with(tmp_path / "elsewhere", config)  # control: another directory is free
        other.kill()
    opened_with(tmp_path, config)  # a killed process holds nothing


def test_two_run_directories_in_one_process_are_refused_too(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config), pytest.raises(InputError, match="another process"):
        opened_with(tmp_path, config)
    opened_with(tmp_path, config)


def test_a_run_directory_that_is_a_file_is_bad_input(tmp_path: Path, config: Config) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        opened_with(tmp_path / "file", config)
    opened_with(tmp_path / "folder", config)


def test_replies_of_another_command_are_not_continued(tmp_path: Path, tiny_folder: Path) -> None:
    """``esjax sample`` killed halfway with one model or file, then run with another: nothing of the first may stay."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    write_jsonl(prompts, [{"id": f"new{i}", "messages": [{"role": "user", "content": "Hi"}]} for i in range(4)])
    write_jsonl(tmp_path / "out.jsonl.part", [{"id": f"old{i}", "text": "of another model"} for i in range(2)])
    words = ["sample", "--model", str(tiny_folder), "--prompts", str(prompts), "--out", str(out)]
    try:
        main([*words, "--reply.batch", "2", "--reply.max_tokens", "3"])
    except SystemExit as refused:
        assert refused.code == 2  # noqa: PT017  to refuse would do as well
        assert not out.exists()
    else:
        assert [r["id"] for r in read_jsonl(out)] == ["new0", "new1", "new2", "new3"]


# --- hashes and full disks -------------------------------------------------------------------------------------------


def test_sha256_of_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.bin"
    file.parent.mkdir()
    data = os.urandom(5_000_000)  # more than one block
    file.write_bytes(data)
    assert sha256(file) == hashlib.sha256(data).hexdigest()
    assert bundled_hash(str(file)) == sha256(file)
    before = sha256(file.parent)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    changed = sha256(file.parent)
    file.write_bytes(data)
    assert sha256(file.parent) == before != changed
    file.rename(file.with_name("y.bin"))
    assert sha256(file.parent) != before  # names count
    with pytest.raises(InputError, match=r"absent\.txt: no such file"):
        bundled_hash(str(tmp_path / "absent.txt"))


def chained(cause: BaseException, explicit: bool) -> BaseException:
    """An error raised while, or because of, ``cause``."""
    try:
        try:
            raise cause
        except BaseException as e:
            if explicit:
                raise RuntimeError("could not save") from e
            raise RuntimeError("could not save")  # noqa: B904  the implicit context is the point
    except RuntimeError as outer:
        return outer


FULL = [
    OSError(errno.ENOSPC, "x"),
    OSError(errno.EDQUOT, "x"),
    OSError(errno.EFBIG, "x"),
    RuntimeError("INTERNAL: write failed: No space left on device"),
    ValueError("Disk quota exceeded [ENOSPC]"),
]
OTHER = [OSError(errno.ENOENT, "x"), OSError(errno.EACCES, "x"), RuntimeError("loss is nan"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_a_full_disk_is_recognised_at_any_depth(error: BaseException) -> None:
    assert is_full_disk(error)
    assert is_full_disk(chained(error, explicit=True))
    assert is_full_disk(chained(error, explicit=False))


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_no_full_disk(error: BaseException) -> None:
    assert not is_full_disk(error)
    assert not is_full_disk(chained(error, explicit=True))
    assert not is_full_disk(chained(error, explicit=False))


def test_a_really_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error that Python raises there is the one that counts as a full disk."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def write() -> None:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(OSError) as e:
        write()
    assert is_full_disk(e.value)
    assert names(tmp_path) == []
