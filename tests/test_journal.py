"""What a run writes: files whole or not at all, rows that survive kills, progress, metrics."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from esjax.errors import InputError, is_full_disk
from esjax.run import progress
from esjax.run.directory import bundled_hash
from esjax.run.files import replacing, sha256, write_jsonl, write_text
from esjax.run.journal import Journal, gather
from esjax.run.jsonl import json_line, read_jsonl
from esjax.run.metrics import Metrics


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- whole files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, "old"])
@pytest.mark.parametrize("deep", ["", "in/a/folder"], ids=["file", "folder"])
def test_replacing_puts_all_in_place_or_nothing(tmp_path: Path, old: str | None, deep: str) -> None:
    target = tmp_path / "new" / "a"

    def put(text: str, error: type[BaseException] | None = None) -> None:
        with replacing(target) as temporary:
            assert temporary.parent == target.parent  # the same file system, so that renaming is atomic
            (temporary / deep).parent.mkdir(parents=True, exist_ok=True)
            (temporary / deep).write_text(text)
            if error is not None:
                raise error

    if old is not None:
        put(old)
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            put("half", error)
        assert names(target.parent) == ([] if old is None else ["a"])
        assert old is None or (target / deep).read_text() == old
    (target.parent / ".a.writing").mkdir()  # what a kill left
    (target.parent / ".a.writing" / "junk").touch()
    put("new")
    assert [p.read_text() for p in tmp_path.rglob("*") if p.is_file()] == ["new"]


def test_a_full_disk_leaves_no_half_written_file(tmp_path: Path) -> None:
    """/dev/full takes no byte: the error that Python raises there is the one that counts as a full disk."""
    with pytest.raises(OSError) as e, replacing(tmp_path / "a.txt") as temporary:  # noqa: PT012
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert is_full_disk(e.value)
    assert names(tmp_path) == []


def test_sha256_of_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.bin"
    file.parent.mkdir()
    data = os.urandom(5_000_000)  # more than one block
    file.write_bytes(data)
    assert sha256(file) == bundled_hash(str(file)) == hashlib.sha256(data).hexdigest()
    before = sha256(file.parent)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert sha256(file.parent) != before
    file.write_bytes(data)
    assert sha256(file.parent) == before
    file.rename(file.with_name("y.bin"))
    assert sha256(file.parent) != before  # names count
    with pytest.raises(InputError, match=r"absent\.txt: no such file"):
        bundled_hash(str(tmp_path / "absent.txt"))


ODD: list[dict[str, Any]] = [{"b": "é\u2028\n\r\x85", "a": [1.5, None]}, {}, {"x": {"y": "👋"}}]


def test_json_lines_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ODD)
    assert read_jsonl(file) == ODD
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

ORDER = [7, 0, 10, 3, 1, 9, 2, 8, 4, 6, 5]
ROWS = len(ORDER)
Add = Callable[..., None]
Work = Callable[[list[int], Add], None]


def made(i: int) -> dict[str, Any]:
    """The row of an index, of odd texts and numbers."""
    return {"i": i, "text": "ü" * i + "\n\r\u2028\x85", "logprobs": [0.1 * i, None], "a": {"b": []}}


LINES = [json.dumps([i, made(i)], ensure_ascii=False).encode() + b"\n" for i in ORDER]
WHOLE = "".join(json_line(made(i)) for i in range(ROWS)).encode()


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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def part_of(file: Path) -> Path:
    return file.with_name(file.name + ".part")


@settings(max_examples=100, deadline=None)
@given(
    orders=st.lists(st.permutations(range(ROWS)), min_size=1, max_size=3),
    kill_after=st.integers(0, ROWS - 1),
    torn=st.integers(0, 60),
)
def test_any_order_and_any_kill_end_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, orders: list[list[int]], kill_after: int, torn: int
) -> None:
    """Kills, the last of which tore some bytes off what was written, and then a run to the end."""
    file = tmp_path_factory.mktemp("any") / "deep" / "rows.jsonl"
    for order in orders[:-1]:
        with contextlib.suppress(KeyboardInterrupt):  # few rows may be missing by then
            gather(file, ROWS, "test", worker(order, kill_after=kill_after))
    if part_of(file).exists():
        whole = part_of(file).read_bytes()
        part_of(file).write_bytes(whole[: max(0, len(whole) - torn)])
    rows = gather(file, ROWS, "test", worker(orders[-1]))
    assert file.read_bytes() == WHOLE
    assert rows == read_jsonl(file)
    assert names(file.parent) == ["rows.jsonl"]


# A torn line alone; torn within a character of two bytes, or beside it; and all is there, only the name is missing.
@pytest.mark.parametrize(("whole", "torn"), [(0, 0), (0, 5), (3, 1), (4, 0), (10, 20), (10, 21), (ROWS, 0)])
def test_resuming_asks_for_what_is_missing_alone(file: Path, whole: int, torn: int) -> None:
    part_of(file).write_bytes(b"".join(LINES[:whole]) + (b"" if whole == ROWS else LINES[whole][:torn]))
    asked: list[int] = []
    gather(file, ROWS, "test", worker(ORDER, asked))
    assert asked == sorted(ORDER[whole:])
    assert file.read_bytes() == WHOLE


def test_other_kept_rows_would_matter(file: Path) -> None:
    """Control: rows found in the part file are kept as they are, so other bytes there give another end."""
    part_of(file).write_bytes(LINES[0].replace(b"\xc3\xbc", b"u"))
    gather(file, ROWS, "test", worker(ORDER))
    assert file.read_bytes() != WHOLE
    assert len(read_jsonl(file)) == ROWS


def test_every_row_is_on_disk_at_once(file: Path) -> None:
    """And a torn line is gone before another is written, so that it does not spoil that one."""
    part_of(file).write_bytes(LINES[0] + LINES[1][:-3])
    with Journal(file, ROWS) as journal:
        for count, i in enumerate(ORDER[1:4], start=2):
            journal.add(i, made(i))
            assert part_of(file).read_bytes() == b"".join(LINES[:count])
    assert names(file.parent) == ["rows.jsonl.part"]
    with Journal(file, ROWS) as journal:
        assert journal.missing == sorted(ORDER[4:])
        assert journal.rows == {i: made(i) for i in ORDER[:4]}


def test_a_finished_file_is_read_and_not_made_again(file: Path) -> None:
    file.write_bytes(WHOLE)
    assert gather(file, ROWS, "test", never) == [made(i) for i in range(ROWS)]
    assert names(file.parent) == ["rows.jsonl"]
    with pytest.raises(InputError, match=f"{ROWS} rows instead of {ROWS + 1}; delete it"):
        gather(file, ROWS + 1, "test", never)
    assert file.read_bytes() == WHOLE
    with pytest.raises(AssertionError, match="asked for"):  # control: an unfinished one is
        gather(file.with_name("other.jsonl"), ROWS, "test", never)


def test_no_rows_at_all(file: Path) -> None:
    assert gather(file, 0, "test", never) == []
    assert file.read_bytes() == b""
    assert names(file.parent) == ["rows.jsonl"]


@pytest.mark.parametrize("index", [0, -1, ROWS])
def test_an_index_given_twice_or_out_of_range_is_an_error(file: Path, index: int) -> None:
    """Nothing of the row that is not wanted is kept."""
    with Journal(file, ROWS) as journal:
        journal.add(0, made(0))
        with pytest.raises(AssertionError, match=rf"rows\.jsonl: row {index} of {ROWS} is not wanted"):
            journal.add(index, {"i": "another"})
    assert part_of(file).read_bytes() == LINES[ORDER.index(0)]


def test_rows_that_are_not_made_are_an_error(file: Path) -> None:
    """The file gets no name before it is whole, and what was made is kept."""
    with pytest.raises(AssertionError, match="was not made"):
        gather(file, ROWS, "test", worker(ORDER[:5]))
    assert part_of(file).read_bytes() == b"".join(LINES[:5])
    assert not file.exists()


def test_a_kill_between_the_name_and_the_end_leaves_no_part_file(file: Path) -> None:
    file.write_bytes(WHOLE)
    part_of(file).write_bytes(b"".join(LINES))
    gather(file, ROWS, "test", never)
    assert names(file.parent) == ["rows.jsonl"]
    assert file.read_bytes() == WHOLE


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
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.mark.parametrize(("tokens", "rate"), [((), ""), ((300, 100), ", 20 tokens/s")])
def test_without_a_terminal_progress_is_lines(
    capsys: pytest.CaptureFixture[str], clock: Clock, tokens: tuple[int, ...], rate: str
) -> None:
    """One every fifteen seconds and one at the end, with tokens a second where tokens are told."""
    with progress.progress("drafts", 20, done=4) as advance:
        for i in range(2):
            clock.now += 10
            advance(2, *tokens[i : i + 1])
    printed = capsys.readouterr()
    assert printed.err == f"  drafts: 8/20, 0.20/s{rate}, 60 s left\n  drafts: 4 in 20.0 s (0.20/s{rate})\n"
    assert printed.out == ""  # results only


def test_a_gathered_file_tells_the_tokens_of_the_rows_made_now(
    file: Path, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    part_of(file).write_bytes(b"".join(LINES[:7]))

    def work(missing: list[int], add: Add) -> None:
        for i in missing:
            clock.now += 1
            add(i, made(i), 30)

    gather(file, ROWS, "replies", work)
    assert capsys.readouterr().err == "  replies: 4 in 4.0 s (1.00/s, 30 tokens/s)\n"
    assert file.read_bytes() == WHOLE  # which holds nothing of it


def test_on_a_terminal_progress_is_a_bar_with_the_same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*tokens: int) -> str:
        screen = io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
        with progress.progress("drafts", 4) as advance:
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
    lines = file.read_bytes().splitlines(keepends=True)
    write_text(file, file.read_text() + '{"step": 3, "lo')  # what a kill or a full disk tore
    for step in (5, 3, 0):
        metrics.rewind(step)
        assert file.read_bytes() == b"".join(lines[:step])
    metrics.log(1, loss=1.0)
    assert file.read_bytes() == lines[0]
    metrics.close()
    assert names(tmp_path / "board")
