"""Run directories behind a URL: the bucket ends with what a folder would hold, also after kills and without the local copy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_overrides
from test_resume import SIGNALLER, files

from esjax import storage
from esjax.cli import main
from esjax.runlog import Journal, read_jsonl


def test_a_run_killed_twice_ends_in_the_bucket_as_in_a_folder(
    tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Each process has a copy of its own, so what the next one continues from came through the bucket."""
    url = f"file://{tmp_path}/bucket/run"
    command = ["evolve", "--run-dir", url, *tiny_overrides(tiny_folder)]
    scratch = os.environ | {"TMPDIR": str(tmp_path)}
    for module, owner, name, nth in (
        ("esjax.runlog", "Metrics", "log", "4"),
        ("esjax.runlog", "Journal", "add", "20"),
    ):
        killer = [sys.executable, "-c", SIGNALLER, "SIGKILL", module, owner, name, nth, *command]
        done = subprocess.run(killer, capture_output=True, text=True, env=scratch)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    last = subprocess.run([sys.executable, "-m", "esjax", *command], capture_output=True, text=True, env=scratch)
    assert last.returncode == 0, last.stderr[-2000:]
    assert "sft: done before" in last.stderr
    expected, found = files(tiny_run), files(tmp_path / "bucket" / "run")
    assert sorted(expected) == sorted(found)
    # The config names nothing of where it lies, so all bytes are those of the run in a folder.
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list((tmp_path / "bucket").rglob("*.part"))
    assert (tmp_path / "bucket" / "run" / "sft" / "checkpoint").is_dir()


def test_a_model_of_a_run_in_a_bucket(tiny_run: Path, tmp_path: Path) -> None:
    """`esjax score` and the like take URL:m1."""
    data = tmp_path / "chats.jsonl"
    data.write_text(
        '{"id": "a", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]}\n'
    )
    for name, run in (("folder", str(tiny_run)), ("bucket", f"file://{tiny_run}")):
        main(["score", "--model", f"{run}:m1", "--data", str(data), "--out", str(tmp_path / f"{name}.jsonl")])
    assert (tmp_path / "bucket.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """The local copy of an empty bucket at tmp_path/bucket."""
    return storage.local(f"file://{tmp_path}/bucket")


def test_a_growing_file_is_sent_now_and_then(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted machine takes its disk along: at most EVERY seconds of replies are not in the bucket."""
    there = tmp_path / "bucket" / "x.jsonl.part"
    clock = [100.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])

    def sent() -> int:
        return len(there.read_bytes().splitlines()) if there.exists() else 0

    with Journal(bucket / "x.jsonl", 6) as journal:
        counts = []
        for i, seconds in enumerate((0.0, 10.0, 19.0, 2.0, 10.0)):
            clock[0] += seconds
            journal.add(i, {"n": i})
            counts.append(sent())
        assert counts == [1, 1, 1, 4, 4]
    assert sent() == 5  # leaving it, by SIGTERM or otherwise, sends all
    with Journal(bucket / "x.jsonl", 6) as journal:
        journal.add(5, {"n": 5})
        journal.finish()
    assert not there.exists()
    assert read_jsonl(tmp_path / "bucket" / "x.jsonl") == [{"n": i} for i in range(6)]


def test_folders_and_files_come_and_go(bucket: Path, tmp_path: Path) -> None:
    (bucket / "a").mkdir()
    (bucket / "a" / "one").write_text("1")
    (bucket / "a" / "two").write_text("2")
    storage.publish(bucket / "a")
    assert {p.name: p.read_text() for p in (tmp_path / "bucket" / "a").iterdir()} == {"one": "1", "two": "2"}
    (bucket / "a" / "one").unlink()
    storage.keep(bucket / "a" / "one", now=True)
    assert [p.name for p in (tmp_path / "bucket" / "a").iterdir()] == ["two"]
    storage.keep(tmp_path / "elsewhere")  # not of a bucket: nothing happens


def test_a_bucket_that_cannot_be_used_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run-dir", "nosuch://bucket/run"])
    assert end.value.code == 2
    assert "nosuch://bucket/run: cannot be read" in capsys.readouterr().err


def test_a_file_option_takes_no_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would become a folder called gs: here."""
    with pytest.raises(SystemExit) as end:
        main(["score", "--model", "x", "--data", "gs://bucket/chats.jsonl", "--out", str(tmp_path / "out.jsonl")])
    assert end.value.code == 2
    assert "gs://bucket/chats.jsonl: give a path on this machine" in capsys.readouterr().err
