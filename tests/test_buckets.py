"""Run directories in a bucket, against a Google Cloud Storage on this machine: kills, several processes, locks, odd names."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from conftest import Refused, tiny_overrides
from emulator import BUCKET, emulator
from test_hosts import Job, apart, start
from test_resume import files

import esjax
from esjax.cli import main
from esjax.errors import InputError, TransientError
from esjax.hub.fetch import resolve
from esjax.run import buckets
from esjax.run.journal import Journal
from esjax.train.keep import Best

SOON = "import esjax.run.buckets as b; b.HEARTBEAT, b.DEAD_AFTER = 0.5, 2.0\n"


@pytest.fixture(scope="module")
def objects() -> Iterator[Any]:
    """The emulator's own store; while it runs, gs:// leads there."""
    with emulator() as (environment, objects), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield objects


@pytest.fixture
def url(objects: Any, tmp_path: Path) -> str:
    """A run directory of this test's own in the bucket."""
    return f"gs://{BUCKET}/{tmp_path.name}/run"


@pytest.fixture
def bucket(url: str) -> buckets.Bucket:
    found = buckets.of(buckets.local(url))
    assert found is not None
    return found


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything about locks thirty times as fast."""
    monkeypatch.setattr(buckets, "HEARTBEAT", 0.5)
    monkeypatch.setattr(buckets, "DEAD_AFTER", 2.0)


def there(url: str) -> dict[str, bytes]:
    """All objects of a run."""
    driver, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    return {name.removeprefix(f"{root}/"): driver.cat_file(name) for name in driver.find(root)}


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_killed_and_go_on(url: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Each has a copy of its own, which dies with it: what the next ones continue from came through the bucket."""
    job = Job(tiny_folder, tmp_path, "sft", mesh="1,2,1")
    words = [url if word == str(job.run) else word for word in job.words]
    kill = ("SIGKILL", "esjax.train.loop", "StepLog", "finish", 7)  # a checkpoint is written, another under way
    ended = start(tmp_path, [words] * 2, 2, {0: kill}, prelude=SOON)
    assert ended[0].code == -signal.SIGKILL
    assert ".lock" in there(url)

    ended = start(tmp_path, [words] * 2, 2, prelude=SOON)
    assert [e.code for e in ended] == [0, 0], ended[0].err[-2000:] + ended[1].err[-2000:]
    assert f"{url}/.lock: a run was not ended here; waiting 2 s" in ended[0].err
    assert re.search("sft: continuing after step [24] of 5", ended[0].err)
    found = there(url)
    assert ".lock" not in found
    assert [json.loads(line)["step"] for line in found["sft/metrics.jsonl"].splitlines()] == [1, 2, 3, 4, 5]
    assert any(name.startswith("tensorboard/sft/events.") and data for name, data in found.items())

    main([*job.words, "--mesh.fsdp=1"])  # in a folder, alone
    name = "sft/adapter/adapter_model.safetensors"
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(found[name])
    assert apart(job.run, tmp_path) < 1e-5


@pytest.mark.slow
def test_a_run_killed_twice_ends_in_the_bucket_as_in_a_folder(
    url: str, tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    words = ["evolve", "--run-dir", url, *tiny_overrides(tiny_folder)]
    for where in (("esjax.run.metrics", "Metrics", "log", 4), ("esjax.run.journal", "Journal", "add", 20)):
        (ended,) = start(tmp_path, [words], 1, {0: ("SIGKILL", *where)}, prelude=SOON)
        assert ended.code == -signal.SIGKILL, ended.err[-2000:]
    (last,) = start(tmp_path, [words], 1, prelude=SOON)
    assert last.code == 0, last.err[-2000:]
    assert "sft: done before" in last.err
    found, expected = there(url), files(tiny_run)
    # The config names nothing of where it lies, so all bytes are those of the run in a folder.
    assert [name for name in expected if found[name] != expected[name]] == []
    assert [name for name in found if name.endswith((".part", ".lock"))] == []
    for phase in ("sft", "round1-dpo", "round2-dpo"):
        assert any(name.startswith(f"tensorboard/{phase}/events.") for name in found)


def test_a_model_of_a_run_in_a_bucket(url: str, bucket: buckets.Bucket, tiny_run: Path, tmp_path: Path) -> None:
    """`esjax score` and the like take gs://...:m1; file:// is another word for a folder."""
    for name in ("config.yaml", "manifest.json", "round1/dpo/adapter"):
        bucket.files.put(str(tiny_run / name), f"{bucket.root}/{name}", recursive=True)
    data = tmp_path / "chats.jsonl"
    data.write_text(
        '{"id": "a", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]}\n'
    )
    for name, run in (("folder", f"file://{tiny_run}"), ("bucket", url)):
        main(["score", "--model", f"{run}:m1", "--data", str(data), "--out", str(tmp_path / f"{name}.jsonl")])
    assert (tmp_path / "bucket.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()


# --- the lock --------------------------------------------------------------------------------------------------------


def test_one_run_writes_a_bucket(
    url: str, bucket: buckets.Bucket, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first = buckets.Lock(bucket)
    assert capsys.readouterr().err == ""
    with pytest.raises(TransientError, match=rf"{url}: in use by another process; wait for it or choose another"):
        buckets.Lock(bucket)
    assert "waiting 2 s to see whether it still goes on" in capsys.readouterr().err
    first.close()
    assert there(url) == {}
    buckets.Lock(bucket).close()
    assert capsys.readouterr().err == ""


def test_what_a_dead_run_held_is_taken(url: str, bucket: buckets.Bucket, soon: None) -> None:
    bucket.files.pipe_file(f"{bucket.root}/.lock", b"a process that was killed")
    began = time.monotonic()
    lock = buckets.Lock(bucket)
    assert time.monotonic() - began > buckets.DEAD_AFTER
    before = lock._generation()
    time.sleep(3 * buckets.HEARTBEAT)
    assert lock._generation() > before  # it gives signs of life
    lock.close()
    assert there(url) == {}


def test_a_run_that_lost_its_lock_sends_nothing_more(url: str, bucket: buckets.Bucket, soon: None) -> None:
    """It was silent for too long, and another one came."""
    lock = buckets.Lock(bucket)
    (bucket.local / "a").write_text("a")
    buckets.keep(bucket.local / "a", now=True)
    bucket.files.pipe_file(f"{bucket.root}/.lock", b"another run")
    time.sleep(3 * buckets.HEARTBEAT)
    with pytest.raises(TransientError, match="another run writes here now; nothing more was sent"):
        buckets.keep(bucket.local / "a", now=True)
    lock.close()
    assert there(url) == {".lock": b"another run", "a": b"a"}


def test_an_answer_that_got_lost_does_not_lose_the_lock(bucket: buckets.Bucket, soon: None) -> None:
    """The object was written, nobody heard of it, and the client tries again: what is there is not what it saw, but its own."""
    lock = buckets.Lock(bucket)
    lock._object.bucket.blob(lock._object.name).upload_from_string(lock._token)
    time.sleep(3 * buckets.HEARTBEAT)
    assert not bucket.lost
    lock.close()


def test_of_many_that_come_at_once_one_has_it(bucket: buckets.Bucket, soon: None) -> None:
    """Whether the lock is free or a dead run's."""

    def take(_: int) -> buckets.Lock | None:
        try:
            return buckets.Lock(bucket)
        except TransientError:
            return None

    for _ in range(2):
        with ThreadPoolExecutor(8) as threads:
            (lock,) = [lock for lock in threads.map(take, range(8)) if lock is not None]
        lock._ended.set()  # it dies


def test_the_command_says_that_a_bucket_is_in_use(
    url: str, bucket: buckets.Bucket, tiny_folder: Path, soon: None, capsys: pytest.CaptureFixture[str]
) -> None:
    held = buckets.Lock(bucket)
    with pytest.raises(SystemExit) as ended:
        main(["sft", "--run-dir", url, *tiny_overrides(tiny_folder)])
    assert ended.value.code == 75
    assert f"{url}: in use by another process" in capsys.readouterr().err
    held.close()
    assert there(url) == {}


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_growing_file_is_sent_now_and_then(url: str, bucket: buckets.Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preempted machine takes its disk along: at most UPLOAD_EVERY seconds of replies are not in the bucket."""
    clock = [100.0]
    monkeypatch.setattr(buckets.time, "monotonic", lambda: clock[0])
    file = bucket.local / "x.jsonl"

    def sent() -> int:
        return len(there(url)["x.jsonl.part"].splitlines())

    with Journal(file, 6) as journal:
        counts = []
        for i, seconds in enumerate((0.0, 10.0, 19.0, 2.0, 10.0)):
            clock[0] += seconds
            journal.add(i, {"n": i})
            counts.append(sent())
        assert counts == [1, 1, 1, 4, 4]
    assert sent() == 5  # leaving it, by SIGTERM or otherwise, sends all
    with Journal(file, 6) as journal:
        journal.add(5, {"n": 5})
        journal.finish()
    assert there(url) == {"x.jsonl": "".join(f'{{"n": {i}}}\n' for i in range(6)).encode()}


def test_folders_and_files_come_and_go(url: str, bucket: buckets.Bucket, tmp_path: Path) -> None:
    folder = bucket.local / "a"
    folder.mkdir()
    (folder / "one").write_text("1")
    (folder / "empty").touch()
    buckets.publish(folder)
    assert there(url) == {"a/one": b"1", "a/empty": b""}
    (folder / "empty").unlink()
    buckets.keep(folder / "empty", now=True)
    assert there(url) == {"a/one": b"1"}
    buckets.keep(tmp_path / "elsewhere")  # not of a bucket: nothing happens
    (folder / "one").unlink()
    bucket.files.pipe_file(f"{bucket.root}/folder/", b"")  # how Google's console marks a folder
    bucket.pull(bucket.local)
    assert [p.relative_to(bucket.local).as_posix() for p in bucket.local.rglob("*")] == ["a", "a/one"]


@pytest.mark.parametrize("name", ["../escaped", "sft/../../escaped", "a//b", "./a"])
def test_an_object_that_no_file_can_be_is_refused(
    name: str, bucket: buckets.Bucket, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.files.pipe_file(f"{bucket.root}/{name}", b"x")
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run-dir", bucket.url, *tiny_overrides(tiny_folder)])
    assert end.value.code == 2
    assert f"{bucket.url}: the object {bucket.root}/{name} cannot be a file here" in capsys.readouterr().err
    assert not (bucket.local.parent / "escaped").exists()


# --- addresses and errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["nosuch://bucket/run", "memory://run", "abfs://bucket/run", "s3://bucket/run"])
def test_an_address_that_runs_cannot_use_is_refused(
    address: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded, with what can be used."""
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run-dir", address, *tiny_overrides(tiny_folder)])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert (
        said == f"esjax: error: {address}: not a place for runs; give a folder or an address that begins with gs://\n"
    )


@pytest.mark.parametrize(
    "address", ["gs://bucket/lr=1 [v2]", "gs://bucket/a#1", "gs://bucket/a/../b", "gs://bucket//a"]
)
def test_an_address_that_names_no_one_place_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="names no one place; choose another name"):
        buckets.local(address)


def test_a_bucket_that_is_not_there(objects: Any, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sft", "--run-dir", "gs://nosuchbucket/run", *tiny_overrides(tiny_folder)])
    assert end.value.code == 2
    assert "gs://nosuchbucket/run: cannot be read" in capsys.readouterr().err


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
def test_errors_of_a_bucket(error: Exception, ends: type[Exception]) -> None:
    with pytest.raises(ends), buckets.reaching("gs://bucket/run"):
        raise error


def test_a_file_option_takes_no_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would become a folder called gs: here."""
    with pytest.raises(SystemExit) as end:
        main(["score", "--model", "x", "--data", "gs://bucket/chats.jsonl", "--out", str(tmp_path / "out.jsonl")])
    assert end.value.code == 2
    assert "gs://bucket/chats.jsonl: give a path on this machine" in capsys.readouterr().err


# --- a model in a bucket ---------------------------------------------------------------------------------------------


def test_a_folder_in_a_bucket_is_a_model(
    objects: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched once for each state of it; what is not part of the model stays there."""
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    source = f"gs://{BUCKET}/{tmp_path.name}/tiny"
    driver, root = fsspec.core.url_to_fs(source, use_listings_cache=False)
    with pytest.raises(InputError, match=r"no config\.json lies in it"):
        resolve(source, None)
    for file in tiny_folder.iterdir():
        driver.put_file(str(file), f"{root}/{file.name}")
    for other in ("consolidated.safetensors", "original/tokenizer.model", "modeling_own.py"):
        driver.pipe_file(f"{root}/{other}", b"x")
    folder = resolve(source, None)
    brought = {p.name for p in folder.iterdir()} - {"esjax.json"}
    assert brought == {p.name for p in tiny_folder.iterdir()}
    assert all((folder / name).read_bytes() == (tiny_folder / name).read_bytes() for name in brought)
    with monkeypatch.context() as patch:  # what is there is not fetched again
        patch.setattr(driver, "get_file", lambda *_: pytest.fail("fetched again"))
        assert fsspec.core.url_to_fs(source, use_listings_cache=False)[0] is driver
        assert resolve(f"{source}/", None) == folder
    model = esjax.open_model(source)
    assert model.sample([{"role": "user", "content": "Hello."}], max_tokens=3)
    config = json.loads((tiny_folder / "config.json").read_text()) | {"rope_theta": 5000.0}
    driver.pipe_file(f"{root}/config.json", json.dumps(config).encode())
    changed = resolve(source, None)
    assert changed != folder
    assert json.loads((changed / "config.json").read_text())["rope_theta"] == 5000.0


def test_no_bucket_is_no_model(objects: Any, refused: Refused, tmp_path: Path) -> None:
    ask = ["score", "--model", "gs://nowhere/model", "--data", tmp_path / "x.jsonl", "--out", tmp_path / "out.jsonl"]
    (tmp_path / "x.jsonl").write_text(
        '{"id": "a", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    assert "gs://nowhere/model" in refused(*ask)


def test_a_best_step_outlives_its_machine(url: str, bucket: buckets.Bucket) -> None:
    """What is kept lies in the bucket while training goes on, and is gone when it is forgotten."""

    def save(place: Path, adapter: str) -> None:
        place.mkdir(parents=True)
        (place / "weights").write_text(adapter)

    folder = bucket.local / "round1" / "dpo" / "best"
    best = Best(folder, "loss", save, lambda place: (place / "weights").read_text())
    best.offer(2, {"loss": 0.7}, "two")
    best.offer(4, {"loss": 0.6}, "four")
    assert there(url)["round1/dpo/best/step4/weights"] == b"four"
    assert json.loads(there(url)["round1/dpo/best/best.json"]) == [[2, 0.7], [4, 0.6]]
    shutil.rmtree(folder)  # another machine begins with an empty folder, and fetches
    bucket.pull(folder)
    best.rewind(5)
    assert best.taken() == "four"
    best.forget()
    assert not any("best" in name for name in there(url))
    assert not folder.exists()
