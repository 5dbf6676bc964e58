"""What can be known is known before anything is written; what may change at a restart does; what a run is made of is checked."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY, Refused, chat, tiny_overrides
from safetensors.numpy import load_file, save_file

from esjax.cli import main
from esjax.evolve import preflight
from esjax.evolve.experiment import Experiment
from esjax.hub.identity import identity
from esjax.hub.shards import INDEX, SINGLE, write_shards
from esjax.run.directory import RunDir
from esjax.run.files import write_jsonl
from esjax.run.journal import Journal
from esjax.run.jsonl import read_jsonl
from esjax.run.metrics import Metrics
from esjax.settings.files import bundled, load


def double(file: Path, key: str = "") -> None:
    """Multiply a safetensors file's tensors by two, or that one."""
    tensors = load_file(file)
    save_file(tensors | {k: v * 2 for k, v in tensors.items() if key in k}, file, metadata={"format": "pt"})


def asked(folder: Path) -> Path:
    """A file with one prompt."""
    write_jsonl(folder / "prompts.jsonl", [{"id": 1, "messages": chat("hi")}])
    return folder / "prompts.jsonl"


def untouched(run: Path) -> bool:
    """Whether nothing is left of a run directory that a command would have made."""
    return not run.exists()


# --- before anything is written --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 600 positions."""
    folder = tmp_path_factory.mktemp("short") / "model"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 600}))
    return folder


FILES = {
    "prompts.system": (None, "cannot be read"),
    "prompts.principles": (None, "cannot be read"),
    "prompts.reflect": ("{{ draft }}", "broken template"),
    "prompts.refine": ("{{ nothing }}", "broken template"),
    "screen.crisis_patterns": ("(", "not a regular expression"),
    "filters.scaffolding_patterns": (None, "cannot be read"),
    "data.replay": ('\n{"id": 1}\n', "line 2: the field 'messages' is missing"),
    "data.valid": ("{}\n", "line 1: the field 'id' is missing"),
    "data.test": ("", "no dialogue with a supporter's answer"),
}


@pytest.mark.parametrize("setting", FILES)
def test_a_bad_file_is_found_before_writing(refused: Refused, tiny_folder: Path, tmp_path: Path, setting: str) -> None:
    text, expected = FILES[setting]
    file = tmp_path / "file.txt"
    if text is not None:
        file.write_text(text)
    run = tmp_path / "run"
    line = refused("evolve", "--run-dir", run, *tiny_overrides(tiny_folder), f"--{setting}", file)
    assert str(file) in line
    assert expected in line
    assert untouched(run)


def test_too_little_room_is_found_before_writing(
    refused: Refused, tiny_folder: Path, short_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    evolve = ["evolve", "--run-dir", run, *tiny_overrides(tiny_folder)]
    line = refused(*evolve, "--reply.max_tokens", 768)
    assert "data/sample/test.jsonl: no context of 8 dialogues fits 0 tokens" in line
    assert "lower reply.max_tokens" in line
    assert "data/sample/train.jsonl: no context" in refused(*evolve, "--evolve.context_tokens", 16)
    assert "mesh" in refused(*evolve, "--mesh.tensor", 3)
    short = ["--run-dir", run, *tiny_overrides(short_model)]
    line = refused("sft", *short, "--data.window", 1024, "--sft.row_length", 1024)
    assert "data.window=1024 exceeds the model's 600 positions; lower it to 600 or less" in line
    short += ["--data.window", 600, "--sft.row_length", 600]
    line = refused("evolve", *short)  # a refinement sees the context, the draft and the reflection
    assert "and the model has 600; set evolve.context_tokens to " in line
    assert untouched(run)
    # The remedy works: so many tokens are let through.
    most = int(line.split("evolve.context_tokens to ")[1].split()[0])
    assert 16 < most < 480
    config = load(None, [*map(str, short[2:]), "--evolve.context_tokens", str(most)])
    with RunDir(run, config) as opened:
        preflight.check_evolve(Experiment.open(config), opened)


# --- what may change at a restart ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_execution_may_change_at_any_restart(
    tiny_run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in SFT and in the replies, each time continued otherwise, at last with one round more and a moved model."""
    run = tmp_path / "run"

    def evolve(*more: str, stop: tuple[type, str, int] | None = None) -> None:
        with monkeypatch.context() as patched:
            if stop is not None:
                owner, name, left = stop
                real = getattr(owner, name)

                def counted(*args: object, **values: object) -> object:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise KeyboardInterrupt
                    return real(*args, **values)

                patched.setattr(owner, name, counted)
            code: Any = contextlib.nullcontext() if stop is None else pytest.raises(SystemExit, match="130")
            with code:
                main(["evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder), *more])

    less = ["--sft.micro_rows", "2", "--dpo.micro_rows", "1", "--model.remat", "none", "--sft.checkpoint_every", "1"]
    evolve("--evolve.rounds", "1", stop=(Metrics, "log", 3))
    assert any((run / "sft" / "checkpoint").iterdir())
    evolve("--evolve.rounds", "1", *less, stop=(Journal, "add", 20))
    assert load(str(run / "config.yaml"), []).sft.micro_rows == 2
    assert sum(len(p.read_text().splitlines()) for p in (run / "round1").glob("*.part")) == 20
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, moved)
    other = ["--evolve.batch", "2", "--model.attention", "dense", "--model.source", f"{moved}/"]
    evolve(*less, *other, "--data.train", str(REPOSITORY / "data" / "sample" / "train.jsonl"))
    saved = load(str(run / "config.yaml"), [])
    assert (saved.evolve.rounds, saved.evolve.batch, saved.model.source) == (2, 2, f"{moved}/")

    names = [p.relative_to(tiny_run) for p in tiny_run.glob("round*/*.jsonl")]
    assert len(names) == 10
    for name in names:
        rows = [read_jsonl(r / name) for r in (tiny_run, run)]
        texts = [[(r["id"], r.get("text"), r.get("reflection"), r.get("chosen")) for r in x] for x in rows]
        assert texts[0] == texts[1], name
    for place in ("sft/adapter", "round1/dpo/adapter", "round2/dpo/adapter"):
        one, two = (load_file(r / place / "adapter_model.safetensors") for r in (tiny_run, run))
        assert all(np.abs(one[key] - two[key]).max() < 1e-5 for key in one)
    first, last = (load_file(run / f"{x}/adapter/adapter_model.safetensors") for x in ("sft", "round1/dpo"))
    assert any(np.abs(first[key] - last[key]).max() > 5e-5 for key in first)  # control: training moves them more


def test_fewer_rounds_than_were_begun_are_refused(refused: Refused, tiny_run: Path, tiny_folder: Path) -> None:
    line = refused("evolve", "--run-dir", tiny_run, *tiny_overrides(tiny_folder), "--evolve.rounds", 1)
    assert "evolve.rounds=1, but round 2 was begun; set it to 2 or more" in line


# --- the backbone's identity -----------------------------------------------------------------------------------------


def test_a_backbone_is_its_weights_config_template_and_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    write_shards(folder, sorted(tensors.items()), len(tensors), 100_000)
    shards = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    before = identity(folder)
    assert {*shards, INDEX, "config.json", "tokenizer.json", "tokenizer_config.json"} <= set(before)
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("not read")
    assert identity(tmp_path / "moved") == before
    double(folder / shards[1])
    assert {name for name, digest in identity(folder).items() if before.get(name) != digest} == {shards[1]}
    template = next(p for p in folder.glob("chat_template*"))
    template.write_text(template.read_text().replace("user", "User") + " ")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    now = identity(folder)
    changed = {name for name in now if before.get(name) != now[name]}
    assert changed == {shards[1], template.name, "additional_chat_templates/tool.jinja"}


@pytest.fixture
def own(tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A finished run and its backbone, to change."""
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_folder, model)
    saved = run / "config.yaml"
    saved.write_text(saved.read_text().replace(f"source: {tiny_folder}", f"source: {model}"))
    return run, model


@pytest.mark.parametrize("file", ["chat_template.jinja", "model.safetensors"])
def test_no_command_takes_another_backbone(refused: Refused, own: tuple[Path, Path], tmp_path: Path, file: str) -> None:
    run, model = own
    sample = ["sample", "--model", f"{run}:m1", "--prompts", asked(tmp_path), "--reply.max_tokens", 2]
    main([str(x) for x in [*sample, "--out", tmp_path / "before.jsonl"]])  # control
    if file == "model.safetensors":
        double(model / file, "model.norm")
    else:
        (model / file).write_text((model / file).read_text().replace("assistant", "helper"))
    pairs = run / "round1" / "pairs.jsonl"
    for command in (
        ["evolve", "--run-dir", run, "--config", run / "config.yaml"],
        [*sample, "--out", tmp_path / "out.jsonl"],
        ["export", "--run-dir", run, "--model", "m1", "--format", "peft", "--out", tmp_path / "hf"],
        ["dpo", "--run-dir", tmp_path / "d", "--config", run / "config.yaml", "--model", f"{run}:m0", "--pairs", pairs],
    ):
        line = refused(*command)
        assert f"{run}: this run was made with another backbone; differing: {file}; restore the files" in line
    assert untouched(tmp_path / "d")


# --- what a stage made -----------------------------------------------------------------------------------------------


def test_what_was_changed_since_is_not_used(refused: Refused, own: tuple[Path, Path], tmp_path: Path) -> None:
    """Pairs whose reference was changed between their stage and DPO, and an adapter that no stage made."""
    run, _ = own
    manifest = json.loads((run / "manifest.json").read_text())
    for name in ("round2/dpo", "eval/backbone", "eval/m0", "eval/m1", "eval/m2", "eval/results"):
        del manifest["stages"][name]
    (run / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(run / "round2" / "dpo")
    pairs = run / "round2" / "pairs.jsonl"
    rows = read_jsonl(pairs)
    rows[-1]["reference"]["chosen"] -= 3.0  # not of the first step
    write_jsonl(pairs, rows)
    evolve = ["evolve", "--run-dir", run, "--config", run / "config.yaml"]
    assert f"{pairs}: changed since stage round2/pairs made it; restore it" in refused(*evolve)
    assert not (run / "round2" / "dpo").exists()
    double(run / "round1" / "dpo" / "adapter" / "adapter_model.safetensors")
    line = refused("sample", "--model", f"{run}:m1", "--prompts", asked(tmp_path), "--out", tmp_path / "o.jsonl")
    assert "changed since stage round1/dpo made it" in line


# --- dpo alone -------------------------------------------------------------------------------------------------------


def test_dpo_from_the_backbone_and_a_long_pair(
    refused: Refused, tiny_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    run, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    kept = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in read_jsonl(tiny_run / "round1/pairs.jsonl")]
    good = "".join(json.dumps(row) + "\n" for row in kept[:2])
    long = kept[2] | {"chosen": [{"role": "assistant", "content": "I am here. " * 300}]}
    dpo = ["dpo", "--run-dir", run, "--pairs", pairs, *tiny_overrides(tiny_folder)]
    pairs.write_text("\n" + good + "\n" + json.dumps(long) + "\n")
    line = refused(*dpo, "--model", tiny_folder)
    assert f"{pairs}, line 5: the pair has " in line
    assert "a row 640; set dpo.row_length to " in line
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    double(other / SINGLE, "model.norm")
    pairs.write_text(good)
    line = refused(*dpo, "--model", other)
    assert f"give --model.source {other}" in line
    assert untouched(run)
    main([str(x) for x in [*dpo, "--model", f"{tiny_folder}/"]])  # the mended command: the backbone by another name
    first = read_jsonl(run / "dpo" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)
    adapter = load_file(run / "dpo" / "adapter" / "adapter_model.safetensors")
    assert any(np.abs(v).max() > 0 for k, v in adapter.items() if "lora_B" in k)  # it trained
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["base"] == identity(tiny_folder)
    assert str(tiny_folder) not in json.dumps(manifest)


def test_what_the_end_needs_is_compared_at_the_start(
    refused: Refused, tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """More rounds of a finished run, with another test file: refused before the first of them, not after the last."""
    run, file = tmp_path / "run", tmp_path / "test.jsonl"
    shutil.copytree(tiny_run, run)
    text = bundled("bundled:data/sample/test.jsonl").read_text()
    file.write_text(text + "\n" + text.splitlines()[0].replace('"id": "', '"id": "other-'))
    more = ["evolve", "--run-dir", run, *tiny_overrides(tiny_folder), "--evolve.rounds", 3, "--data.test", file]
    assert f"stage eval/backbone is done, but data.test changed since ({file})" in refused(*more)
    assert not (run / "round3").exists()


def test_the_mended_corpus_is_taken(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "train.jsonl"
    lines = bundled("bundled:data/sample/train.jsonl").read_text().splitlines()[:4]
    file.write_text("\n".join([lines[0], "", lines[1][:-2], *lines[2:]]))
    sft = ["sft", "--run-dir", run, *tiny_overrides(tiny_folder), "--data.train", file, "--data.replay_share", 0]
    assert f"{file}, line 3: not JSON" in refused(*sft)
    assert untouched(run)
    file.write_text("\n".join(lines))
    main([str(x) for x in sft])
    assert (run / "sft" / "adapter").exists()
    file.write_text("\n".join(lines[:3]))
    assert "stage sft is done, but data.train changed since" in refused(*sft)  # control


def test_a_lost_config_or_broken_manifest_is_refused(
    refused: Refused, tiny_folder: Path, tiny_run: Path, tmp_path: Path
) -> None:
    """Else another setting would be taken for the one that a stage was made with, or a traceback would end the command."""
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    sft = ["sft", "--run-dir", run, *tiny_overrides(tiny_folder)]
    whole = json.loads((run / "manifest.json").read_text())
    stage = whole["stages"]["sft"]
    manifest = run / "manifest.json"
    damages: list[Any] = [
        {k: v for k, v in stage.items() if k != "seconds"},
        stage | {"seconds": None},
        stage | {"inputs": []},
        stage | {"outputs": []},
        stage | {"status": "started", "makes": []},
        stage | {"settings": 5},
        {"status": "gone", "inputs": {}},
    ]
    for damaged in ({"base": []}, *({"stages": whole["stages"] | {"sft": d}} for d in damages)):
        manifest.write_text(json.dumps(whole | damaged))
        assert "manifest.json: not a manifest; restore it" in refused(*sft)
    manifest.write_text(json.dumps(whole))
    saved = (run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    assert "config.yaml is gone, but stage sft was begun" in refused(*sft, "--sft.learning_rate", 0.5)
    (run / "config.yaml").write_text(saved)
    main([str(x) for x in sft])  # control
