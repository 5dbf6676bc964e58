"""Checkpoints: restored onto another mesh, survived when damaged, kept as many as asked, for adapters and whole models."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import tiny_overrides
from test_hosts import Ended, apart, free_address, start

from esjax.bench.workload import parts
from esjax.cli import main
from esjax.errors import InputError, Stopped, TransientError
from esjax.model.families import architecture
from esjax.settings.identity import differing
from esjax.settings.schema import Config
from esjax.train.checkpoint import Checkpoints

# Reading what is damaged leaves coroutines of orbax behind, which complain when they are collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited:RuntimeWarning"
)

# --- another mesh ----------------------------------------------------------------------------------------------------

ADAPTER = Path("sft", "adapter", "adapter_model.safetensors")
SETTINGS = {
    "data.window": 256,
    "sft.row_length": 256,
    "sft.batch_rows": 8,
    "sft.micro_rows": 8,
    "sft.epochs": 2,
    "sft.learning_rate": 0.001,
    "sft.checkpoints_kept": 3,
    "dpo.row_length": 512,
    "dpo.trunk": "prompt",
}


def sft(model: Path, run: Path, mesh: tuple[int, int, int], *more: str) -> list[str]:
    """The command that makes M_0 in ten steps with a checkpoint after every other, on a mesh of data, fsdp and tensor."""
    sizes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), mesh, strict=True))
    settings = [f"--{key}={value}" for key, value in (SETTINGS | sizes).items()]
    return ["sft", "--run-dir", str(run), *tiny_overrides(model), *settings, *more]


def losses(run: Path) -> list[float]:
    """The loss of every step, and the validation loss at the end."""
    rows = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows] + [rows[-1]["valid_loss"]]


def ended(found: list[Ended], code: int = 0) -> str:
    """What the one process said that ended with this code."""
    assert found[0].code == code, found[0].err[-2000:]
    return found[0].err


@pytest.fixture(scope="module")
def undisturbed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on eight devices that share the weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended(start(folder, [sft(tiny_folder, folder / "run", (1, 8, 1))], 8))
    return folder / "run"


@pytest.fixture(scope="module")
def killed(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run killed in its eighth step."""
    folder = tmp_path_factory.mktemp("killed")
    kill = ("SIGKILL", "esjax.run.metrics", "Metrics", "log", 7)
    ended(start(folder, [sft(tiny_folder, folder / "run", (1, 8, 1))], 8, {0: kill}), -9)
    return folder / "run"


def copy(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / "run")


def continued(said: str) -> bool:
    """From the last checkpoint, or the one before where the kill was faster than the disk."""
    return any(f"sft: continuing after step {step} of 10" in said for step in (4, 6))


def test_more_devices_go_on_alike(undisturbed: Path, killed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    run = copy(killed, tmp_path)
    assert continued(ended(start(tmp_path, [sft(tiny_folder, run, (2, 4, 1))], 8)))
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)
    assert apart(undisturbed, run) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 2, 2), (8, 1, 1), (4, 1, 1)])
def test_any_mesh_goes_on_alike(
    undisturbed: Path, killed: Path, tiny_folder: Path, tmp_path: Path, mesh: tuple[int, int, int]
) -> None:
    run = copy(killed, tmp_path)
    assert continued(ended(start(tmp_path, [sft(tiny_folder, run, mesh)], int(np.prod(mesh)))))
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)
    assert apart(undisturbed, run) < 1e-5


def test_one_device_goes_on_alike(
    undisturbed: Path, killed: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(killed, tmp_path)
    main(sft(tiny_folder, run, (1, 1, 1)))
    assert continued(capsys.readouterr().err)
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=1e-5)
    assert apart(undisturbed, run) < 1e-5


def test_without_the_optimiser_it_goes_on_otherwise(
    undisturbed: Path, killed: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: what is compared above depends on all of the checkpoint."""
    whole = Checkpoints.restore

    def forgetful(self: Checkpoints, like: Any) -> tuple[int, Any]:
        step, (adapter, _) = whole(self, like)
        return step, (adapter, like[1])

    monkeypatch.setattr(Checkpoints, "restore", forgetful)
    run = copy(killed, tmp_path)
    main(sft(tiny_folder, run, (1, 1, 1)))
    found, expected = losses(run), losses(undisturbed)
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5)
    assert abs(found[-1] / expected[-1] - 1) > 1e-4
    assert apart(undisturbed, run) > 1e-2


def test_another_mesh_is_the_same_config_and_another_rate_is_not(
    killed: Path, tiny_folder: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(sft(tiny_folder, killed, (1, 1, 1), "--sft.learning_rate", "0.002"))
    assert end.value.code == 2
    assert "made with another config; differing: sft.learning_rate; " in capsys.readouterr().err
    mesh = tiny_config.mesh.model_copy(update={"data": 2, "fsdp": 4, "tensor": 2})
    assert differing(tiny_config, tiny_config.model_copy(update={"mesh": mesh})) == []
    assert differing(tiny_config, tiny_config.model_copy(update={"mesh": mesh, "seed": 1})) == ["seed"]


# --- how many --------------------------------------------------------------------------------------------------------


def test_a_run_keeps_as_many_as_it_is_told(undisturbed: Path) -> None:
    assert {p.name for p in (undisturbed / "sft" / "checkpoint").iterdir()} == {"6", "8", "10"}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    fill(tmp_path / "checkpoint", keep, (1, 2, 4, 8))
    assert kept(tmp_path / "checkpoint") == [1, 2, 4, 8][-keep:]


# --- damage ----------------------------------------------------------------------------------------------------------

State = dict[str, Any]


def state(step: int) -> State:
    """Random arrays of some kinds; the largest has a file of its own in a checkpoint."""
    draw = np.random.default_rng(step).normal
    return {
        "adapter": {"a": jnp.asarray(draw(size=(16, 8)), jnp.float32), "b": jnp.asarray(draw(size=3), jnp.bfloat16)},
        "moments": [jnp.asarray(draw(size=(64, 64)), jnp.float32), jnp.asarray(step, jnp.int32)],
    }


def fill(folder: Path, keep: int, steps: tuple[int, ...]) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state(step))
    checkpoints.close()


def kept(folder: Path) -> list[int]:
    checkpoints = Checkpoints(folder, 2)
    steps = sorted(checkpoints.manager.all_steps())
    checkpoints.close()
    return steps


def restored(folder: Path) -> int:
    """The step that is restored; its state is checked to the bit."""
    checkpoints = Checkpoints(folder, 2)
    step, found = checkpoints.restore(jax.tree.map(jnp.zeros_like, state(0)))
    checkpoints.close()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(state(step)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    return step


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("two") / "checkpoint"
    fill(folder, 2, (1, 2, 3))
    return folder


DAMAGES: dict[str, Callable[[Path], None]] = {
    "halved": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "deleted": lambda file: file.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damaged_file_is_survived(
    two: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file of the newest checkpoint it is: all numbers are the newest's or, when that was said, those before."""
    files = sorted(p.relative_to(two) for p in (two / "3").rglob("*") if p.is_file())
    assert len(files) > 10
    noticed = []
    for number, file in enumerate(files):
        folder = tmp_path / str(number) / "checkpoint"
        shutil.copytree(two, folder)
        DAMAGES[damage](folder / file)
        step = restored(folder)
        said = "checkpoint 3 is damaged" in capsys.readouterr().err
        assert (step, kept(folder)) == ((2, [2]) if said else (3, [2, 3])), file
        aside = folder.parent / "checkpoint.damaged" / "3"
        assert aside.is_dir() == said, file
        if said:
            noticed.append(file)
    gc.collect()
    largest = max(files, key=lambda file: (two / file).stat().st_size)
    assert largest in noticed  # the data: what is not there would else be zeros
    assert Path("3", "default", "manifest.ocdbt") in noticed


def test_a_damaged_step_is_saved_again(two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two, tmp_path / "checkpoint"))
    shutil.rmtree(folder / "3" / "default")
    assert restored(folder) == 2
    checkpoints = Checkpoints(folder, 2)
    checkpoints.save(3, state(3))
    checkpoints.close()
    assert (restored(folder), kept(folder)) == (3, [2, 3])
    shutil.rmtree(folder / "3" / "default")
    assert restored(folder) == 2
    assert sorted(p.name for p in (tmp_path / "checkpoint.damaged").iterdir()) == ["3", "3-1"]


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (OSError(errno.EIO, "Input/output error"), TransientError),
        (OSError(errno.ESTALE, "Stale file handle"), TransientError),
        (TimeoutError("the read operation timed out"), TransientError),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), TransientError),
        (ValueError("UNAVAILABLE: Error opening driver: 503"), TransientError),
        (ValueError("UNKNOWN: Error reading: Input/output error [os_error_code='5']"), TransientError),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError),
        (ValueError("PERMISSION_DENIED: Failed to open: Permission denied [os_error_code='13']"), PermissionError),
        (Stopped(), Stopped),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:20],
)
def test_what_says_nothing_about_a_checkpoint_moves_nothing(
    two: Path, tmp_path: Path, error: BaseException, ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network's blip must not cost the newest steps; the same command reads them later."""
    folder = Path(shutil.copytree(two, tmp_path / "checkpoint"))

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointHandler, "restore", fails)
        with pytest.raises(ends):
            restored(folder)
    assert not (tmp_path / "checkpoint.damaged").exists()
    assert (restored(folder), kept(folder)) == (3, [2, 3])


@pytest.mark.parametrize("name", ["lr=1e-4 [v2]", "[!x]", "a*b", "a?b", "a%20b#c", "a\"b'c", "ü {x} $HOME"])
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    """What would be a pattern elsewhere: it must match itself, and nothing beside it."""
    fill(tmp_path / "aXb" / "checkpoint", 2, (7,))
    folder = tmp_path / name / "checkpoint"
    fill(folder, 2, (1, 2, 3))
    assert (restored(folder), kept(folder)) == (3, [2, 3])


def test_what_is_no_checkpoint_is_survived(two: Path, tmp_path: Path) -> None:
    """A stray file, a folder that a killed copy left empty, and what orbax had not renamed yet."""
    folder = Path(shutil.copytree(two, tmp_path / "checkpoint"))
    (folder / "notes.txt").write_text("?")
    (folder / "7").mkdir()
    shutil.copytree(folder / "3", folder / "9.orbax-checkpoint-tmp")
    assert restored(folder) == 3


def test_all_damaged_ends_with_the_remedy(two: Path, tmp_path: Path) -> None:
    """Nothing is deleted: whatever keeps them from being read may pass."""
    folder = Path(shutil.copytree(two, tmp_path / "checkpoint"))
    manifests = {file: file.read_bytes() for file in folder.glob("*/default/manifest.ocdbt")}
    for file in manifests:
        os.truncate(file, 0)
    for _ in range(2):
        with pytest.raises(InputError, match=r"all 2 are damaged; restore .* or delete it to begin the phase anew"):
            restored(folder)
    for file, content in manifests.items():
        file.write_bytes(content)
    assert restored(folder) == 3


def test_without_any_there_is_nothing_to_restore(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoint", 2)
    step, found = checkpoints.restore(state(5))
    checkpoints.close()
    assert step == 0
    np.testing.assert_array_equal(found["moments"][0], state(5)["moments"][0])


# Two processes, each with its half of an array; a file that only the second reads is damaged.
HALVES = """
import os, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from esjax.runtime import distributed
from esjax.runtime.context import current
from esjax.train.checkpoint import Checkpoints
address, index, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
current().join(distributed.start(address, 2, index, 120))
processes = current().processes
where = NamedSharding(jax.make_mesh((2,), ("fsdp",)), PartitionSpec("fsdp"))
def state(step):
    whole = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return {"w": jax.make_array_from_callback(whole.shape, where, whole.__getitem__)}
checkpoints = Checkpoints(folder, 2)
for step in (1, 2):
    checkpoints.save(step, state(step))
checkpoints.close()
processes.wait("saved")
if processes.writer:
    file = max((folder / "2" / "default" / "ocdbt.process_1" / "d").iterdir(), key=lambda f: f.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
processes.wait("damaged")
checkpoints = Checkpoints(folder, 2)
step, found = checkpoints.restore(state(0))
pairs = zip(found["w"].addressable_shards, state(step)["w"].addressable_shards)
assert all(np.array_equal(a.data, b.data) for a, b in pairs)
checkpoints.save(2, state(3))
checkpoints.close()
print("restored", step)
"""


def test_damage_that_one_process_meets_is_survived_by_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HALVES, free_address()]
    both = [
        subprocess.Popen([*command, str(i), str(tmp_path / "checkpoint")], text=True, stdout=-1, stderr=-1)
        for i in (0, 1)
    ]
    try:
        (first, said), (second, other) = [p.communicate(timeout=120) for p in both]
    finally:
        for p in both:
            p.kill()
    assert "restored 1" in first, said[-2000:]
    assert "restored 1" in second, other[-2000:]
    assert "checkpoint 2 is damaged (on another host); taking the one before" in said


# --- all parameters --------------------------------------------------------------------------------------------------

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Saves a whole model and its optimiser's state on one mesh, restores them on another, and writes down what they were.
WHOLE = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from test_checkpoint import named, whole
from esjax.runtime.mesh import shardings_here, make_mesh
from esjax.train.checkpoint import Checkpoints
folder = Path(sys.argv[1])
with jax.set_mesh(make_mesh(jax.devices(), (1, 8, 1))):
    model = whole()
    state = jax.device_put(model, shardings_here(model))
    state = (state, optax.adam(1e-3).init(state))
    assert any(not x.is_fully_replicated for x in jax.tree.leaves(state))
    checkpoints = Checkpoints(folder / "checkpoint", 1)
    checkpoints.save(1, state)
    checkpoints.close()
with jax.set_mesh(make_mesh(jax.devices(), (2, 2, 2))):
    model = jax.tree.map(jnp.zeros_like, whole())
    like = jax.device_put(model, shardings_here(model))
    like = (like, optax.adam(1e-3).init(like))
    step, found = Checkpoints(folder / "checkpoint", 1).restore(like)
assert step == 1
for a, b, c in zip(jax.tree.leaves(found), jax.tree.leaves(state), jax.tree.leaves(like), strict=True):
    assert a.sharding == c.sharding and a.dtype == b.dtype
    assert np.array_equal(a, b)
np.savez(folder / "saved.npz", **named(state[0]))
"""


def whole() -> Any:
    """All parameters of a tiny random model."""
    _, make = parts(architecture(TINY, "tiny"), None, jnp.dtype("float32"))
    return make()[0]


def named(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_a_whole_model_is_restored_on_another_mesh(tmp_path: Path) -> None:
    """On eight devices divided otherwise, and on one."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", WHOLE, str(tmp_path)], capture_output=True, text=True, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr[-2000:]
    model = jax.tree.map(jnp.zeros_like, whole())
    checkpoints = Checkpoints(tmp_path / "checkpoint", 1)
    step, (found, _) = checkpoints.restore((model, optax.adam(1e-3).init(model)))
    checkpoints.close()
    assert step == 1
    saved = np.load(tmp_path / "saved.npz")
    values = named(found)
    assert sorted(values) == sorted(saved.files)
    assert len(values) > 10
    for name, value in values.items():
        np.testing.assert_array_equal(value, saved[name])
        assert "norm" in name or value.std() > 0
