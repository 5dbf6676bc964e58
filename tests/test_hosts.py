"""Several processes on this machine are one run, and a run stopped by SIGTERM, or by the death of a process, goes on.

The processes join through jax.distributed and compute together through gloo, on CPU devices that XLA simulates.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import tiny_overrides
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_resume import SIGNALLER, files, stages

from esjax import rows
from esjax.cli import main
from esjax.errors import Stopped
from esjax.model.weights import compute_dtype, load_backbone
from esjax.runtime.context import current, open_runtime
from esjax.runtime.processes import Processes
from esjax.runtime.stop import Stop
from esjax.sample.score import Scorer

Signal = tuple[str, str, str, str, int]  # what, module, class, function, call

TEXTS = ("drafts", "reflections", "refinements", "m0", "m1", "m2")
STOPPED = "esjax: stopped by SIGTERM; the same command continues"


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


def free_address() -> str:
    """A port of this machine where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def start(
    folder: Path,
    arguments: list[list[str]],
    devices: int,
    signals: dict[int, Signal] | None = None,
    limit: float = 300,
    prelude: str = "",
) -> list[Ended]:
    """Run a command as one process for each list of arguments, with that many simulated devices in all, until all end.

    ``prelude`` is Python that each runs first.
    """
    count, signals = len(arguments), signals or {}
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    if devices > 1:  # their programs are compiled fast rather than well
        flags = f"--xla_force_host_platform_device_count={devices // count} --xla_backend_optimization_level=0"
        environment["XLA_FLAGS"] = flags
    address = free_address()
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as stack:
        for i, words in enumerate(arguments):
            code = SIGNALLER if i in signals else "from esjax.cli import main; main()"
            begin = ["-c", prelude + code, *map(str, signals.get(i, ()))]
            join = (
                ["--coordinator", address, "--num-processes", str(count), "--process-id", str(i)] if count > 1 else []
            )
            out, err = (stack.enter_context(open(folder / f"{i}.{kind}", "wb")) for kind in ("out", "err"))
            made = subprocess.Popen([sys.executable, *begin, *words, *join], env=environment, stdout=out, stderr=err)
            stack.callback(made.kill)
            processes.append(made)
        end = time.monotonic() + limit
        codes = [p.wait(max(0.1, end - time.monotonic())) for p in processes]
    texts = [[(folder / f"{i}.{kind}").read_text() for kind in ("out", "err")] for i in range(count)]
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]


class Job:
    """A two-round run of little work, in one folder."""

    def __init__(self, model: Path, folder: Path, command: str = "evolve", mesh: str = "2,1,2", rows: int = 4) -> None:
        values = {
            "data.window": 256,
            "sft.row_length": 256,
            "sft.micro_rows": rows,
            "sft.batch_rows": max(8, rows),
            "dpo.micro_rows": rows,
            "dpo.batch_rows": rows,
            "dpo.row_length": 256,
            "dpo.trunk": "prompt",
            "evolve.contexts_per_round": 6,
            "evolve.context_tokens": 160,
            "evolve.batch": rows,
            "evolve.draft.max_tokens": 24,
            "evolve.refinement.max_tokens": 24,
            "evolve.reflection.field_tokens": 4,
            "reply.max_tokens": 24,
            "reply.max_contexts": 2,
        }
        sizes = dict(zip(("data", "fsdp", "tensor"), map(int, mesh.split(",")), strict=True))
        self.devices = int(np.prod(list(sizes.values())))
        settings = [f"--{k}={v}" for k, v in (values | {f"mesh.{k}": v for k, v in sizes.items()}).items()]
        self.folder, self.run = folder, folder / "run"
        self.words = [command, "--run-dir", str(self.run), *tiny_overrides(model), *settings]

    def start(self, processes: int = 1, signals: dict[int, Signal] | None = None) -> list[Ended]:
        return start(self.folder, [self.words] * processes, self.devices, signals)

    def finish(self, processes: int = 1) -> list[Ended]:
        ended = self.start(processes)
        assert [e.code for e in ended] == [0] * processes, ended[0].err[-2000:] + ended[-1].err[-2000:]
        return ended


def adapters(run: Path) -> dict[str, np.ndarray]:
    """Each adapter of a run as one vector."""
    found = sorted(run.rglob("adapter_model.safetensors"))
    return {
        str(f.relative_to(run)): np.concatenate([x.ravel() for _, x in sorted(load_file(f).items())]) for f in found
    }


def apart(a: Path, b: Path) -> float:
    """How far the adapters of two runs are apart, relative to their norm: the most of any."""
    left, right = adapters(a), adapters(b)
    common = left.keys() & right.keys()
    assert "sft/adapter/adapter_model.safetensors" in common
    return max(float(np.linalg.norm(left[k] - right[k]) / np.linalg.norm(left[k])) for k in common)


def texts(run: Path) -> dict[str, bytes]:
    """What the models of a run wrote."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*.jsonl") if p.stem in TEXTS}


def check_same(expected: Path, found: Path) -> None:
    """Two whole runs have the same texts, and adapters that differ by rounding."""
    assert len(adapters(found)) == 3
    assert len(texts(found)) == 9
    assert texts(found) == texts(expected)
    assert apart(expected, found) < 1e-5


@pytest.fixture(scope="module")
def alone(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with all four devices."""
    job = Job(tiny_folder, tmp_path_factory.mktemp("alone"))
    job.finish()
    return job.run


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """The same by two processes, with two devices each."""
    job = Job(tiny_folder, tmp_path_factory.mktemp("pair"))
    return job.run, job.finish(2)


# --- several processes -----------------------------------------------------------------------------------------------


def test_two_processes_do_what_one_does(alone: Path, pair: tuple[Path, list[Ended]]) -> None:
    check_same(alone, pair[0])


def test_another_seed_does_something_else(alone: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Negative control: the comparison above can fail."""
    job = Job(tiny_folder, tmp_path, "sft", mesh="1,1,1")
    main([*job.words, "--seed", "1"])
    assert apart(alone, job.run) > 1e-2


def test_only_the_first_process_speaks(pair: tuple[Path, list[Ended]]) -> None:
    first, second = pair[1]
    assert "Held-out dialogues" in first.out
    assert "round2/dpo: started" in first.err
    # Gloo greets from several threads at once, in pieces that mix.
    assert re.sub(r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. [\w ]+ is : |\s", "", second.out) == ""
    # Nor are warnings of the runtime's own a voice of ours.
    assert [x for x in second.err.splitlines() if not re.match(r"[IWEF]\d{4} |WARNING: All log messages", x)] == []


def test_only_the_first_process_writes(pair: tuple[Path, list[Ended]]) -> None:
    """Each metric is there once, and so is each row; nothing half-written is left."""
    run = pair[0]
    for file in run.rglob("metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1))
    assert len((run / "round1" / "drafts.jsonl").read_text().splitlines()) == 6
    assert len(list((run / "tensorboard" / "sft").iterdir())) == 1
    assert [p for p in run.rglob("*") if p.name.endswith((".part", ".writing"))] == []


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, "1,2,2"), (4, "2,1,2"), (4, "2,2,2")])
def test_processes_and_meshes(alone: Path, tiny_folder: Path, tmp_path: Path, processes: int, mesh: str) -> None:
    """One to four devices a process, with data or fsdp between them."""
    job = Job(tiny_folder, tmp_path, mesh=mesh)
    job.finish(processes)
    check_same(alone, job.run)


@pytest.mark.slow
def test_thirty_two_devices_do_what_one_does(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    one = Job(tiny_folder, tmp_path / "one", mesh="1,1,1", rows=16)
    one.finish()
    (tmp_path / "many").mkdir()
    many = Job(tiny_folder, tmp_path / "many", mesh="4,4,2", rows=16)
    assert many.devices == 32
    many.finish()
    check_same(one.run, many.run)


# --- bad input -------------------------------------------------------------------------------------------------------


ONE_DEVICE = ("--mesh.data=1", "--mesh.fsdp=1", "--mesh.tensor=1")
REFUSED = {  # what -> more words for each process, and what each says
    "a config that is not on this host": (
        ((), ("--config", "FOLDER/none.yaml")),
        ("another process of this run has bad input", "none.yaml"),
    ),
    "a mesh that leaves a process idle": (
        (ONE_DEVICE, ONE_DEVICE),
        ("a mesh of 1 devices leaves 3 idle on other hosts: set mesh.fsdp=-1",) * 2,
    ),
    "a directory that is not shared": (
        ((), ("--run-dir", "FOLDER/other")),
        ("not the same folder on all hosts; choose a --run-dir on storage that they share",) * 2,
    ),
    "other settings": (
        ((), ("--sft.learning_rate", "0.01")),
        ("the processes of this run have different settings",) * 2,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_one_process_refuses_ends_both(what: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Without a word, one would wait for the other, or each train its own model."""
    job = Job(tiny_folder, tmp_path, "sft")
    more, said = REFUSED[what]
    words = [[*job.words, *(word.replace("FOLDER", str(tmp_path)) for word in add)] for add in more]
    ended = start(tmp_path, words, job.devices, limit=120)
    assert [e.code for e in ended] == [2, 2], [e.err[-1000:] for e in ended]
    assert [line in e.err for line, e in zip(said, ended, strict=True)] == [True, True], [e.err for e in ended]
    assert not (job.run / "config.yaml").exists()


def test_an_address_needs_all_three_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    three = {"--coordinator": "127.0.0.1:1", "--num-processes": "2", "--process-id": "0"}
    for left_out in three:
        given = [word for name, value in three.items() if name != left_out for word in (name, value)]
        with pytest.raises(SystemExit) as end:
            main(["sft", "--run-dir", str(tmp_path / "run"), *given])
        assert end.value.code == 2
        assert "give all three" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- SIGTERM, one process --------------------------------------------------------------------------------------------

# stage in which SIGTERM comes -> where exactly, and what is said of it
TERMS: dict[str, tuple[Signal, str]] = {
    "sft": (("SIGTERM", "esjax.run.metrics", "Metrics", "log", 3), "sft: stopped by SIGTERM; step 4 of 8 is saved"),
    "round1/replies": (("SIGTERM", "esjax.run.journal", "Journal", "add", 9), ""),
    "round1/dpo": (
        ("SIGTERM", "esjax.run.metrics", "Metrics", "log", 2),
        "dpo: stopped by SIGTERM; step 3 of 5 is saved",
    ),
}


def join(index: int, count: int) -> list[str]:
    return ["--coordinator", free_address(), "--num-processes", str(count), "--process-id", str(index)]


@pytest.fixture(scope="module")
def stopped(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run stopped in three stages and then finished; and what was said after each stop.

    In SFT its process has joined as the only one, as every launcher starts it: JAX's own handler would swallow SIGTERM.
    """
    folder = tmp_path_factory.mktemp("stopped")
    run = folder / "run"
    words = ["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder)]
    said: list[str] = []
    for stage, (how, saved) in TERMS.items():
        (ended,) = start(folder, [words + (join(0, 1) if stage == "sft" else [])], 1, {0: how})
        said.append(ended.err)
        assert ended.code == 143, f"{stage}: exit {ended.code}\n{ended.err[-2000:]}"
        assert ended.err.rstrip().endswith(STOPPED)
        assert saved in ended.err
        assert "Traceback" not in ended.err
        assert f"{stage}: started" in ended.err
        assert stage not in stages(run)
    (last,) = start(folder, [words], 1)
    assert last.code == 0, last.err[-2000:]
    return run, dict(zip(TERMS, [*said[1:], last.err], strict=True))


def test_a_stopped_run_equals_an_undisturbed_run(tiny_run: Path, stopped: tuple[Path, dict[str, str]]) -> None:
    expected, found = files(tiny_run), files(stopped[0])
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_no_step_and_no_finished_reply_is_lost(stopped: tuple[Path, dict[str, str]]) -> None:
    """The step under way when SIGTERM came is the last one saved; what is still to be made is what had not ended."""
    _, said = stopped
    assert "sft: continuing after step 4 of 8" in said["sft"]
    assert "dpo: continuing after step 3 of 5" in said["round1/dpo"]
    assert int(said["round1/replies"].split("round 1 replies: ")[1].split()[0]) <= 48 - 9


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_for_others_can_be_stopped(tiny_folder: Path, tmp_path: Path, index: int) -> None:
    words = ["sft", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder), *join(index, 2)]
    waiting = subprocess.Popen([sys.executable, "-m", "esjax", *words], stderr=subprocess.PIPE, text=True)
    try:
        while len(list(Path(f"/proc/{waiting.pid}/task").iterdir())) < 4:  # until the runtime has begun
            time.sleep(0.1)
        time.sleep(2)
        began = time.monotonic()
        waiting.terminate()
        _, said = waiting.communicate(timeout=60)
    finally:
        waiting.kill()
    assert (waiting.returncode, said.strip()) == (143, STOPPED)
    assert time.monotonic() - began < 10


def test_others_that_never_come_end_the_wait(tiny_folder: Path, tmp_path: Path) -> None:
    words = [
        "sft",
        "--run-dir",
        str(tmp_path / "run"),
        *tiny_overrides(tiny_folder),
        *join(0, 2),
        "--join-timeout",
        "2",
    ]
    done = subprocess.run([sys.executable, "-m", "esjax", *words], capture_output=True, text=True, timeout=100)
    assert done.returncode == 75
    (line,) = done.stderr.splitlines()
    assert line.startswith("esjax: error: not all processes of this run came within 2 s")
    assert not (tmp_path / "run").exists()


def test_sigterm_elsewhere_stops_at_once(tiny_folder: Path, tmp_path: Path) -> None:
    """While the model is loaded there is nothing to save."""
    words = ["sft", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder)]
    (ended,) = start(tmp_path, [words], 1, {0: ("SIGTERM", "esjax.evolve.experiment", "", "load_backbone", 1)})
    assert (ended.code, ended.err.strip()) == (143, STOPPED)


# --- SIGTERM and SIGKILL, several processes --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_stops_both(
    told: int, pair: tuple[Path, list[Ended]], tiny_folder: Path, tmp_path: Path
) -> None:
    """In training and in generation; the coordination service tells the other, and both stop after the same step."""
    job = Job(tiny_folder, tmp_path)
    ended = job.start(2, {told: ("SIGTERM", "esjax.train.loop", "StepLog", "finish", 2)})
    assert [e.code for e in ended] == [143, 143], ended[0].err[-2000:] + ended[1].err[-2000:]
    assert all(STOPPED in e.err for e in ended)
    assert "sft: stopped by SIGTERM; step " in ended[0].err
    step = ended[0].err.split("stopped by SIGTERM; step ")[1].split()[0]
    assert len((job.run / "sft" / "metrics.jsonl").read_text().splitlines()) == int(step)

    ended = job.start(2, {told: ("SIGTERM", "esjax.run.journal", "Journal", "add", 5)})
    assert f"sft: continuing after step {step} of 5" in ended[0].err
    assert [e.code for e in ended] == [143, 143], ended[0].err[-2000:] + ended[1].err[-2000:]
    assert "round1/replies" not in stages(job.run)
    assert sum(len(p.read_text().splitlines()) for p in (job.run / "round1").glob("*.part")) >= 5

    job.finish(2)
    check_same(pair[0], job.run)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_takes_the_other_along(
    killed: int, pair: tuple[Path, list[Ended]], tiny_folder: Path, tmp_path: Path
) -> None:
    """Gloo's error or the missing heartbeat ends it within a minute, and both go on from the last checkpoint."""
    job = Job(tiny_folder, tmp_path, "sft")
    began = time.monotonic()
    ended = job.start(2, {killed: ("SIGKILL", "esjax.train.loop", "StepLog", "finish", 6)})
    assert ended[killed].code == -signal.SIGKILL
    assert ended[1 - killed].code not in (0, 2)
    assert time.monotonic() - began < 150
    first, _ = job.finish(2)
    assert "sft: continuing after step 2 of 5" in first.err
    assert apart(pair[0], job.run) < 1e-5


@pytest.mark.slow
def test_a_failing_process_takes_the_other_along(tiny_folder: Path, tmp_path: Path) -> None:
    job = Job(tiny_folder, tmp_path, "sft")
    ended = job.start(2, {1: ("raise", "esjax.train.loop", "StepLog", "finish", 6)})
    assert all(e.code not in (0, 2) for e in ended)
    assert "ValueError: this process alone fails" in ended[1].err


# --- without processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def watched() -> Iterator[Stop]:
    """SIGTERM is handled as in a command."""
    with open_runtime() as runtime:
        yield runtime.stop


def test_sigterm_is_deferred_within(watched: Stop) -> None:
    """Work within work never stops by itself: what it belongs to has a step to save."""

    def work() -> None:
        with watched.deferred() as stops:
            assert not stops()
            with watched.deferred() as inner:
                signal.raise_signal(signal.SIGTERM)
                assert not inner()
            assert stops()
            done.append(1)

    done: list[int] = []
    with pytest.raises(Stopped):  # at the end, though nothing was left to stop: nothing else begins
        work()
    assert done == [1]


@pytest.mark.parametrize("error", [None, ValueError])
def test_sigterm_raises_outside(watched: Stop, error: type[Exception] | None) -> None:
    """Also after work that ended with an error."""
    with contextlib.suppress(ValueError), watched.deferred():
        if error is not None:
            raise error
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_runtime_leaves_the_process_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM), current()
    with open_runtime() as runtime:
        assert current() is runtime
    assert (signal.getsignal(signal.SIGTERM), current()) == before


def test_several_processes_stop_where_they_agree(watched: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal of one's own is no reason to stop before the others do."""
    answers = iter([False, True])
    monkeypatch.setattr(watched, "here", lambda: next(answers))
    with pytest.raises(Stopped), watched.deferred() as stops:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        assert [stops(), stops()] == [False, True]


class Notes:
    """A board in memory."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def post(self, key: str, value: str) -> None:
        self.notes[key] = value

    def read(self) -> dict[str, str]:
        return dict(self.notes)


@given(
    speeds=st.lists(st.integers(0, 3), min_size=2, max_size=4),
    order=st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=40),
    told=st.integers(0, 3),
    when=st.integers(0, 40),
)
def test_all_stop_at_one_point_wherever_the_notice_falls(
    speeds: list[int], order: list[tuple[bool, int]], told: int, when: int
) -> None:
    """Processes that are up to some points apart, looking at the board and asking in any order: none misses the notice."""
    count, board = len(speeds), Notes()
    made = [Stop(Processes(i, count, board=board)) for i in range(count)]
    stopped: dict[int, int] = {}

    def ask(i: int) -> None:
        me = made[i]
        if i not in stopped and (me.promised is None or me.point is not None) and me.here():
            stopped[i] = me.passed

    for i, ahead in enumerate(speeds):
        for _ in range(ahead):
            ask(i)
    for n, (looks, i) in enumerate(order):
        if n == when:
            made[told % count].requested = True
        made[i % count].look(board) if looks else ask(i % count)
    made[told % count].requested = True
    for _ in range(3):
        for i in range(count):
            made[i].look(board)
    for _ in range(60):
        for i in range(count):
            ask(i)
    assert len(stopped) == count
    assert len(set(stopped.values())) == 1


def test_the_end_of_one_is_known_to_the_others() -> None:
    board = Notes()
    me = Stop(Processes(1, 3, board=board))
    me.look(board)
    assert (me.ended, me.known) == (None, False)
    board.post("end/0", "143")
    board.post("end/2", "2")
    me.look(board)
    assert me.ended == (2, 2)  # bad input is the reason, the stop its consequence
    board.post("end/1", "0")
    me.look(board)
    assert me.ended == (2, 2)


def test_scoring_stops_between_batches(watched: Stop, tiny_folder: Path) -> None:
    backbone = load_backbone(tiny_folder, None, compute_dtype("float32"))
    examples = [rows.prompt_with_replies([5, 6, 7], [[8, 9]])] * 4
    done: list[int] = []

    def advance(i: int, branches: list[np.ndarray]) -> None:
        done.append(i)
        if len(done) == 2:
            signal.raise_signal(signal.SIGTERM)

    scorer = Scorer(backbone, row_length=16, batch_rows=1)
    with pytest.raises(Stopped):
        scorer.score(nnx.State({}), [*examples * 8], advance)
    assert done == [0, 1, 2]  # three lie in a row, which is finished
