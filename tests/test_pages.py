"""A process asks for large pages of memory, once, and only where that means something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from esjax import __main__ as command
from esjax.runtime import pages

ASKING = "GLIBC_TUNABLES"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "enabled"
    path.write_text("always [madvise] never\n")
    return path


def test_asks_where_the_kernel_gives_to_those_that_ask(kernel: Path) -> None:
    assert pages.asking_for_large_pages({"A": "1"}, kernel) == {"A": "1", ASKING: "glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("said", ["[always] madvise never", "always madvise [never]"])
def test_asks_for_nothing_where_asking_changes_nothing(kernel: Path, said: str) -> None:
    kernel.write_text(said)
    assert pages.asking_for_large_pages({}, kernel) is None


def test_asks_for_nothing_where_the_kernel_says_nothing(tmp_path: Path) -> None:
    assert pages.asking_for_large_pages({}, tmp_path / "none") is None


def test_what_somebody_decided_stays(kernel: Path) -> None:
    assert pages.asking_for_large_pages({ASKING: "glibc.malloc.hugetlb=0"}, kernel) is None
    beside = pages.asking_for_large_pages({ASKING: "glibc.malloc.arena_max=1"}, kernel)
    assert beside == {ASKING: "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"}


# A command that says with what it began.
BEGAN = """
import json, os, pathlib, sys
from esjax.runtime import pages
pages.restart_with_large_pages(pathlib.Path(sys.argv[1]))
print(json.dumps([os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.argv[2:], sys.stdin.read()]))
"""


@pytest.mark.parametrize(
    ("said", "value"),
    [("always [madvise] never", "glibc.malloc.hugetlb=1"), ("[always] madvise never", None)],
)
def test_a_process_begins_again_as_it_was_called(kernel: Path, said: str, value: str | None) -> None:
    kernel.write_text(said)
    environment = {key: text for key, text in os.environ.items() if key != ASKING}
    began = subprocess.Popen(
        [sys.executable, "-c", BEGAN, str(kernel), "--a b", ""],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    said_by_it = json.loads(began.communicate("given")[0])
    assert began.returncode == 0
    assert said_by_it == [began.pid, value, ["--a b", ""], "given"]


def test_the_command_begins_again_before_it_does_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    class Restarted(Exception):
        pass

    def restart() -> None:
        raise Restarted

    monkeypatch.setattr(command, "restart_with_large_pages", restart)
    (script,) = entry_points(group="console_scripts", name="esjax")
    with pytest.raises(Restarted):
        script.load()()


def test_the_command_exits_as_before() -> None:
    for called in (["-m", "esjax"], [str(Path(sys.executable).with_name("esjax"))]):
        done = subprocess.run(
            [sys.executable, *called, "sft", "--run-dir"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert "--run-dir: expected one argument" in done.stderr
        assert "Traceback" not in done.stderr
