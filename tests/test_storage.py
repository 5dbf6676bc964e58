"""Run directories behind a URL: the bucket ends with what a folder would hold, also after kills and without the local copy."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import tiny_overrides
from test_resume import SIGNALLER, files

from esjax.cli import main
from esjax.errors import InputError, TransientError
from esjax.run import buckets
from esjax.run.files import Journal
from esjax.run.jsonl import read_jsonl


def test_a_run_killed_twice_ends_in_the_bucket_as_in_a_folder(
    tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Each process has a copy of its own, so what the next one continues from came through the bucket."""
    url = f"file://{tmp_path}/bucket/run"
    command = ["evolve", "--run-dir", url, *tiny_overrides(tiny_folder)]
    scratch = os.environ | {"TMPDIR": str(tmp_path)}
    for module, owner, name, nth in (
        ("esjax.run.files", "Metrics", "log", "4"),
        ("esjax.run.files", "Journal", "add", "20"),
    ):
        killer = [sys.executable, "-c", SIGNALLER, "SIGKILL", module, owner, name, nth, *command]
        done = subprocess.run(killer, capture_output=True, text=True, env=scratch)
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        (tmp_path / "bucket" / "run" / ".lease").unlink()  # else the next one would wait a minute, see below
    last = subprocess.run([sys.executable, "-m", "esjax", *command], capture_output=True, text=True, env=scratch)
    assert last.returncode == 0, last.stderr[-2000:]
    assert "sft: done before" in last.stderr
    expected, found = files(tiny_run), files(tmp_path / "bucket" / "run")
    assert sorted(expected) == sorted(found)
    # The config names nothing of where it lies, so all bytes are those of the run in a folder.
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list((tmp_path / "bucket").rglob("*.part"))
    assert (tmp_path / "bucket" / "run" / "sft" / "checkpoint").is_dir()
    for phase in ("sft", "round1-dpo", "round2-dpo"):
        assert list((tmp_path / "bucket" / "run" / "tensorboard" / phase).glob("events.*"))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything about leases thirty times as fast."""
    monkeypatch.setattr(buckets, "BEAT", buckets.BEAT / 30)
    monkeypatch.setattr(buckets, "SILENCE", buckets.SILENCE / 30)


def test_one_run_writes_a_bucket(bucket: Path, tmp_path: Path, soon: None) -> None:
    said: list[str] = []
    first = buckets.Lease(bucket, said.append)
    assert said == []
    with pytest.raises(
        TransientError, match=r"file://.*bucket: in use by another process; wait for it or choose another"
    ):
        buckets.Lease(bucket, said.append)
    assert len(said) == 1
    assert "waiting 2 s to see whether it is still under way" in said[0]
    first.close()
    assert list((tmp_path / "bucket").iterdir()) == []
    buckets.Lease(bucket, said.append).close()
    assert len(said) == 1


def test_what_a_dead_run_held_is_taken(bucket: Path, tmp_path: Path, soon: None) -> None:
    said: list[str] = []
    file = tmp_path / "bucket" / ".lease"
    file.parent.mkdir()
    file.write_text("a process that was killed")
    began = time.monotonic()
    lease = buckets.Lease(bucket, said.append)
    assert time.monotonic() - began > buckets.SILENCE
    assert len(said) == 1
    before = file.read_text()
    time.sleep(4 * buckets.BEAT)
    assert file.read_text() != before  # it gives signs of life
    lease.close()
    assert not file.exists()


def test_a_run_that_lost_its_lease_sends_nothing_more(bucket: Path, tmp_path: Path, soon: None) -> None:
    """It was silent for too long, and another one came."""
    lease, file = buckets.Lease(bucket, lambda text: None), tmp_path / "bucket" / ".lease"
    (bucket / "a").write_text("a")
    buckets.keep(bucket / "a", now=True)
    file.write_text("another run")
    time.sleep(4 * buckets.BEAT)
    assert file.read_text() == "another run"
    (bucket / "b").write_text("b")
    with pytest.raises(TransientError, match="another run writes here now; nothing more was sent"):
        buckets.keep(bucket / "b", now=True)
    lease.close()
    assert sorted(p.name for p in file.parent.iterdir()) == [".lease", "a"]


def test_of_two_that_come_at_once_one_has_it(bucket: Path, soon: None) -> None:
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: _lease(bucket), range(8)))
    assert sum(lease is not None for lease in found) == 1


def _lease(bucket: Path) -> buckets.Lease | None:
    try:
        return buckets.Lease(bucket, lambda text: None)
    except TransientError:
        return None


def test_the_command_says_that_a_bucket_is_in_use(
    tiny_folder: Path, tmp_path: Path, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"file://{tmp_path}/bucket"
    held = buckets.Lease(buckets.local(url), lambda text: None)
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--run-dir", url, *tiny_overrides(tiny_folder)])
    assert ended.value.code == 75
    assert f"{url}: in use by another process" in capsys.readouterr().err
    held.close()
    assert list((tmp_path / "bucket").iterdir()) == []


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
    return buckets.local(f"file://{tmp_path}/bucket")


def test_a_growing_file_is_sent_now_and_then(bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted machine takes its disk along: at most EVERY seconds of replies are not in the bucket."""
    there = tmp_path / "bucket" / "x.jsonl.part"
    clock = [100.0]
    monkeypatch.setattr(buckets.time, "monotonic", lambda: clock[0])

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
    buckets.publish(bucket / "a")
    assert {p.name: p.read_text() for p in (tmp_path / "bucket" / "a").iterdir()} == {"one": "1", "two": "2"}
    (bucket / "a" / "one").unlink()
    buckets.keep(bucket / "a" / "one", now=True)
    assert [p.name for p in (tmp_path / "bucket" / "a").iterdir()] == ["two"]
    buckets.keep(tmp_path / "elsewhere")  # not of a bucket: nothing happens


@pytest.mark.parametrize("url", ["nosuch://bucket/run", "memory://run", "abfs://bucket/run", "s3://bucket/run"])
def test_an_address_that_runs_cannot_use_is_refused(
    url: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded, with what can be used."""
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run-dir", url, *tiny_overrides(tiny_folder)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        f"esjax: error: {url}: not a place for runs; give a folder or an address that begins with gs:// or file://\n"
    )


def test_a_pattern_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pattern to its driver; choose another name"):
        buckets.local(f"file://{tmp_path}/lr=1 [v2]")


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), ConnectionResetError),  # which `outcome` knows: 75
        (RuntimeError("503 Service Unavailable"), TransientError),
        (OSError("Forbidden: https://buckets.googleapis.com/b: no access"), InputError),
        (RuntimeError("Anonymous caller does not have buckets.objects.list access, 401"), InputError),
        (ImportError("Please install gcsfs"), InputError),
    ],
)
def test_errors_of_a_bucket(
    error: Exception, ends: type[Exception], bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bucket / "a").write_text("a")
    mine = buckets._of(bucket)
    assert mine is not None

    def fails(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(mine.files, "put_file", fails)
        with pytest.raises(ends):
            buckets.keep(bucket / "a", now=True)
    buckets.keep(bucket / "a", now=True)
    assert (tmp_path / "bucket" / "a").exists()


def test_a_file_option_takes_no_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would become a folder called gs: here."""
    with pytest.raises(SystemExit) as end:
        main(["score", "--model", "x", "--data", "gs://bucket/chats.jsonl", "--out", str(tmp_path / "out.jsonl")])
    assert end.value.code == 2
    assert "gs://bucket/chats.jsonl: give a path on this machine" in capsys.readouterr().err
