"""The run directory: whole files or none, resuming to the same bytes, refusals, metrics, full disks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from esjax.cli import main
from esjax.errors import InputError, TransientError, is_full_disk
from esjax.run import files
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import replacing, sha256, write_jsonl, write_text
from esjax.run.journal import Journal, gather
from esjax.run.jsonl import json_line, read_jsonl
from esjax.run.metrics import Metrics
from esjax.settings.files import load
from esjax.settings.schema import Config


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


# --- row by row ------------------------------------------------------------------------------------------------------

ROWS = 11
Add = Callable[..., None]
Work = Callable[[list[int], Add], None]


def made(i: int) -> dict[str, Any]:
    """The row of an index, of odd texts and numbers."""
    return {"i": i, "text": "ü" * i + "\n\r\u2028\x85", "logprobs": [0.1 * i, None], "a": {"b": []}}


def worker(order: list[int], asked: list[int] | None = None, kill_after: int | None = None) -> Work:
    """Makes the missing rows in this order, and is interrupted after so many of them."""

    def work(missing: list[int], add: Add) -> None:
        if asked is not None:
            asked.extend(missing)
        for count, i in enumerate(i for i in order if i in missing):
            if count == kill_after:
                raise KeyboardInterrupt
            add(i, made(i))

    return work


def never(missing: list[int], add: Add) -> None:
    raise AssertionError(f"asked for {missing}")


def interrupted(file: Path, order: list[int], kill_after: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        gather(file, ROWS, "test", worker(order, kill_after=kill_after))


def part_of(file: Path) -> Path:
    return file.with_name(file.name + ".part")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What eleven rows, made in order, give without a kill."""
    file = tmp_path_factory.mktemp("undisturbed") / "deep" / "rows.jsonl"
    asked: list[int] = []
    rows = gather(file, ROWS, "test", worker([*range(ROWS)], asked))
    assert rows == read_jsonl(file) == [made(i) for i in range(ROWS)]
    assert asked == [*range(ROWS)]
    assert names(file.parent) == ["rows.jsonl"]
    return file.read_bytes()


@settings(max_examples=100, deadline=None)
@given(
    orders=st.lists(st.permutations(range(ROWS)), min_size=1, max_size=3),
    kill_after=st.integers(0, ROWS - 1),
    torn=st.integers(0, 60),
)
def test_any_order_and_any_kill_end_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, undisturbed: bytes, orders: list[list[int]], kill_after: int, torn: int
) -> None:
    """Kills, the last of which tore some bytes off what was written, and then a run to the end."""
    file = tmp_path_factory.mktemp("any") / "rows.jsonl"
    for order in orders[:-1]:
        with contextlib.suppress(KeyboardInterrupt):  # few rows may be missing by then
            gather(file, ROWS, "test", worker(order, kill_after=kill_after))
    if part_of(file).exists():
        whole = part_of(file).read_bytes()
        part_of(file).write_bytes(whole[: max(0, len(whole) - torn)])
    rows = gather(file, ROWS, "test", worker(orders[-1]))
    assert file.read_bytes() == undisturbed
    assert rows == read_jsonl(file)
    assert names(file.parent) == ["rows.jsonl"]


ORDER = [7, 0, 10, 3, 1, 9, 2, 8, 4, 6, 5]


@pytest.mark.parametrize(
    ("whole", "torn"),
    [
        (0, 0),
        (0, 5),  # a torn line alone
        (1, 0),
        (3, 1),
        (4, 0),
        (5, 9),
        (10, 20),  # torn within a character of two bytes, or beside it
        (10, 21),
        (ROWS, 0),  # all is there, only the name is missing
    ],
)
def test_resuming_asks_for_what_is_missing_alone(tmp_path: Path, undisturbed: bytes, whole: int, torn: int) -> None:
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps([i, made(i)], ensure_ascii=False).encode() + b"\n" for i in ORDER]
    after = b"" if whole == ROWS else lines[whole][:torn]
    part_of(file).write_bytes(b"".join(lines[:whole]) + after)
    asked: list[int] = []
    rows = gather(file, ROWS, "test", worker([*range(ROWS)], asked))
    assert asked == sorted(ORDER[whole:])
    assert file.read_bytes() == undisturbed
    assert rows == read_jsonl(file)
    assert names(tmp_path) == ["rows.jsonl"]


def test_other_kept_rows_would_matter(tmp_path: Path, undisturbed: bytes) -> None:
    """Control: rows found in the part file are kept as they are, so other bytes there give another end."""
    file = tmp_path / "rows.jsonl"
    interrupted(file, ORDER, 3)
    part_of(file).write_bytes(part_of(file).read_bytes().replace(b"\xc3\xbc", b"u"))
    gather(file, ROWS, "test", worker(ORDER))
    assert file.read_bytes() != undisturbed
    assert len(read_jsonl(file)) == ROWS


def test_an_interrupted_run_loses_no_row(tmp_path: Path, undisturbed: bytes) -> None:
    """Every row is on disk at once, and what was there before stays there while others are made."""
    file = tmp_path / "rows.jsonl"
    kept: list[bytes] = []

    def watched(kill_after: int) -> Work:
        def work(missing: list[int], add: Add) -> None:
            assert part_of(file).read_bytes() == b"".join(kept)
            for i in [i for i in ORDER if i in missing][:kill_after]:
                add(i, made(i))
                kept.append(json.dumps([i, made(i)], ensure_ascii=False).encode() + b"\n")
                assert part_of(file).read_bytes() == b"".join(kept)
            if len(missing) > kill_after:
                raise KeyboardInterrupt

        return work

    for count, so_far in ((3, 3), (0, 3), (6, 9)):
        with pytest.raises(KeyboardInterrupt):
            gather(file, ROWS, "test", watched(count))
        assert names(tmp_path) == ["rows.jsonl.part"]
        assert len(kept) == so_far
        with Journal(file, ROWS) as journal:
            assert journal.missing == sorted(ORDER[so_far:])
            assert journal.rows == {i: made(i) for i in ORDER[:so_far]}
    gather(file, ROWS, "test", watched(ROWS))
    assert len(kept) == ROWS
    assert file.read_bytes() == undisturbed


def test_a_kill_after_a_torn_line_loses_no_row(tmp_path: Path, undisturbed: bytes) -> None:
    """The torn line is gone before another is written, so it does not spoil that one."""
    file = tmp_path / "rows.jsonl"
    interrupted(file, ORDER, 4)
    part_of(file).write_bytes(part_of(file).read_bytes()[:-3])
    interrupted(file, ORDER, 2)
    with Journal(file, ROWS) as journal:
        assert sorted(journal.rows) == sorted(ORDER[:5])  # four, less the torn one, and two more
    gather(file, ROWS, "test", worker(ORDER))
    assert file.read_bytes() == undisturbed


def test_a_finished_file_is_read_and_not_made_again(tmp_path: Path, undisturbed: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(undisturbed)
    assert gather(file, ROWS, "test", never) == [made(i) for i in range(ROWS)]
    with Journal(file, ROWS) as journal:
        assert journal.missing == []
        assert journal.finish() == [made(i) for i in range(ROWS)]
    assert file.read_bytes() == undisturbed
    assert names(tmp_path) == ["rows.jsonl"]
    with pytest.raises(AssertionError, match="asked for"):  # control: an unfinished one is
        gather(tmp_path / "other.jsonl", ROWS, "test", never)


def test_no_rows_at_all(tmp_path: Path) -> None:
    assert gather(tmp_path / "rows.jsonl", 0, "test", never) == []
    assert (tmp_path / "rows.jsonl").read_bytes() == b""
    assert names(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("index", [0, -1, ROWS, ROWS + 5])
def test_an_index_given_twice_or_out_of_range_is_an_error(tmp_path: Path, undisturbed: bytes, index: int) -> None:
    """Row 0 is there already. Nothing of the row that is not wanted is kept."""
    file = tmp_path / "rows.jsonl"
    with Journal(file, ROWS) as journal:
        journal.add(0, made(0))
        before = part_of(file).read_bytes()
        with pytest.raises(AssertionError, match=rf"rows\.jsonl: row {index} of {ROWS} is not wanted"):
            journal.add(index, {"i": "another"})
        assert part_of(file).read_bytes() == before
        journal.add(1, made(1))
    gather(file, ROWS, "test", worker(ORDER))
    assert file.read_bytes() == undisturbed


def test_a_finished_file_of_another_size_is_refused(tmp_path: Path, undisturbed: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(undisturbed)
    with pytest.raises(InputError, match=f"{ROWS} rows instead of {ROWS + 1}; delete it"):
        gather(file, ROWS + 1, "test", worker([]))
    assert file.read_bytes() == undisturbed


def test_rows_that_are_not_made_are_an_error(tmp_path: Path, undisturbed: bytes) -> None:
    """The file gets no name before it is whole, and what was made is kept."""
    file = tmp_path / "rows.jsonl"
    with pytest.raises(AssertionError, match="was not made"):
        gather(file, ROWS, "test", worker(ORDER[:5]))
    assert names(tmp_path) == ["rows.jsonl.part"]
    asked: list[int] = []
    gather(file, ROWS, "test", worker(ORDER, asked))
    assert asked == sorted(ORDER[5:])
    assert file.read_bytes() == undisturbed


def test_a_kill_between_the_name_and_the_end_leaves_no_part_file(
    tmp_path: Path, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    unlink = Path.unlink

    def kill(path: Path, missing_ok: bool = False) -> None:
        if path == part_of(file):
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill)
        with pytest.raises(KeyboardInterrupt):
            gather(file, ROWS, "test", worker(ORDER))
    assert names(tmp_path) == ["rows.jsonl", "rows.jsonl.part"]
    gather(file, ROWS, "test", never)
    assert file.read_bytes() == undisturbed
    assert names(tmp_path) == ["rows.jsonl"]


# --- progress --------------------------------------------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(files, "time", clock)
    return clock


def test_without_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    """One every fifteen seconds and one at the end, with tokens a second where tokens are told."""
    with files.progress("drafts", 20, done=4) as advance:
        clock.now += 10
        advance(2, 300)  # too early for a line
        clock.now += 10
        advance(2, 100)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        "  drafts: 8/20, 0.20/s, 20 tokens/s, 60 s left",
        "  drafts: 4 in 20.0 s (0.20/s, 20 tokens/s)",
    ]
    assert printed.out == ""  # results only
    with files.progress("pairs", 20, done=4) as advance:
        clock.now += 20
        advance(4)
    assert capsys.readouterr().err.splitlines() == [
        "  pairs: 8/20, 0.20/s, 60 s left",
        "  pairs: 4 in 20.0 s (0.20/s)",
    ]


def test_a_gathered_file_tells_its_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], clock: Clock, undisturbed: bytes
) -> None:
    """Of the rows that this run made, at this run's speed."""
    file = tmp_path / "rows.jsonl"
    interrupted(file, ORDER, 7)
    capsys.readouterr()

    def work(missing: list[int], add: Add) -> None:
        for i in missing:
            clock.now += 1
            add(i, made(i), 30)

    gather(file, ROWS, "replies", work)
    assert capsys.readouterr().err == "  replies: 4 in 4.0 s (1.00/s, 30 tokens/s)\n"
    assert file.read_bytes() == undisturbed  # which holds nothing of it
    gather(file, ROWS, "replies", never)
    assert capsys.readouterr().err == ""


def test_on_a_terminal_progress_is_a_bar_with_the_same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*tokens: int) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(files, "console", Console(file=screen, force_terminal=True, width=120))
        with files.progress("drafts", 4) as advance:
            advance(1, *tokens)
        return screen.getvalue()

    assert "1/4" in shown(500)
    assert "tokens/s" in shown(500).split("drafts: 1 in")[0]
    assert "tokens/s" not in shown()


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


@pytest.mark.parametrize("left", ["draft.txt", "draft.txt.part", "checkpoint/7/x"])
def test_an_interrupted_stage_does_not_go_on_with_other_inputs(run: RunDir, left: str) -> None:
    """Else rows or steps made from the old input mix with ones made from the new, and no manifest tells."""
    stage = Stage(run, fail=True)
    with pytest.raises(KeyboardInterrupt):
        stage.go(data="1")
    (run.path / left).parent.mkdir(parents=True, exist_ok=True)
    (run.path / left).write_text("made of 1")
    stage.fail = False
    with pytest.raises(InputError, match="stage draft was begun, but data changed since"):
        stage.go(data="2")
    stage.go(data="1")


def test_a_stage_that_made_nothing_takes_mended_inputs_and_settings(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        stage = Stage(run, fail=True)
        with pytest.raises(KeyboardInterrupt):
            stage.go(data="1")
        (tmp_path / "draft.txt.part").touch()  # opened, and nothing in it
        (tmp_path / "checkpoint").mkdir()
    with RunDir(tmp_path, load(None, ["--seed", "5"])) as run:
        Stage(run).go(data="2")
    assert load(str(tmp_path / "config.yaml"), []).seed == 5
    with pytest.raises(InputError, match="differing: seed;"):  # control
        opened_with(tmp_path, config)


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
    with RunDir(tmp_path, config) as run:
        Stage(run).go()
    other = load(None, ["--sft.micro_rows", "1", "--evolve.rounds", "5", "--data.train", "elsewhere.jsonl"])
    opened_with(tmp_path, other)
    assert load(str(tmp_path / "config.yaml"), []) == config  # nothing was asked of it yet
    capsys.readouterr()
    with RunDir(tmp_path, other) as run:
        Stage(run).go()
    assert load(str(tmp_path / "config.yaml"), []) == other
    assert "sft.micro_rows=1 (was 2)" in capsys.readouterr().err
    with pytest.raises(InputError, match="data changed"), RunDir(tmp_path, config) as run:
        Stage(run).go(data="2")
    assert load(str(tmp_path / "config.yaml"), []) == other  # a refused command writes nothing down


def test_changed_outputs_are_refused_by_name(run: RunDir) -> None:
    stage = Stage(run)
    stage.go(data="1")
    stage.go(data="1")
    stage.output.write_text("edited")
    with pytest.raises(InputError, match=r"draft\.txt: changed since stage draft made it"):
        stage.go(data="1")
    write_text(stage.output, "done")
    stage.go(data="1")
    with pytest.raises(InputError, match="data changed since"):
        stage.go()  # an input less


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
    with pytest.raises(InputError, match=r"differing: dpo\.beta"):
        opened_with(tmp_path, load(None, ["--dpo.beta", "0.3"]))
    (tmp_path / "manifest.json").write_text('{"stages": [')
    with pytest.raises(InputError, match=r"manifest\.json: not a manifest"):
        opened_with(tmp_path, config)


def test_another_backbone_is_refused_once_something_was_made(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config) as run:
        run.check_base({"config.json": "0", "model.safetensors": "1"})
        run.check_base({"config.json": "0", "model.safetensors": "2"})  # nothing was made yet
        Stage(run).go()
    with RunDir(tmp_path, config) as run:
        run.check_base({"config.json": "0", "model.safetensors": "2"})
        with pytest.raises(InputError, match=r"another backbone; differing: chat_template\.jinja, model\.safetensors;"):
            run.check_base({"config.json": "0", "model.safetensors": "1", "chat_template.jinja": "3"})


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


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path, config: Config) -> None:
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


def test_two_run_directories_in_one_process_are_refused_too(tmp_path: Path, config: Config) -> None:
    with RunDir(tmp_path, config), pytest.raises(TransientError, match="another process"):
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
    with Journal(out, 4) as journal:
        for i in (0, 2):
            journal.add(i, {"id": f"old{i}", "text": "of another model"})
    assert names(tmp_path) == ["out.jsonl.part", "prompts.jsonl"]
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
