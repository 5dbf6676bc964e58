"""``sample``, ``score`` and ``export`` at their seams: killed and continued, one --out, a run's settings, odd prompts."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from conftest import save_tiny_model
from oracles import torch_logits, torch_model, torch_score, worst
from peft import AutoPeftModelForCausalLM
from safetensors.numpy import load_file
from test_resume import SIGNALLER

from esjax import export
from esjax.cli import main
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.hub.fetch import public_name
from esjax.model.lora import peft_tensors, save_adapter
from esjax.run.files import write_jsonl
from esjax.run.jsonl import read_jsonl
from esjax.run.outfile import held
from esjax.settings.files import dump, load
from esjax.settings.schema import Config

Refused = Callable[..., str]
ANSWER = {"role": "assistant", "content": "That sounds hard."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def esjax(*words: object) -> None:
    main([*map(str, words)])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused, by default as bad input; returns its one line."""

    def run(*words: object, code: int = 2) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            esjax(*words)
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("esjax:")]
        assert (stop.value.code, len(lines)) == (code, 1), lines
        return lines[0]

    return run


@pytest.fixture(scope="module")
def run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with an M_0 that differs from its backbone, made without training."""
    folder = tmp_path_factory.mktemp("runs") / "made"
    config = tiny_config.model_copy(update={"seed": 3})
    experiment = Experiment.open(config)
    draw = np.random.default_rng(1).standard_normal
    noisy = jax.tree.map(lambda x: x + 0.02 * draw(x.shape, np.float32), experiment.backbone.fresh_adapter(0))
    assert experiment.backbone.lora is not None
    save_adapter(
        adapter_folder(folder, 0),
        peft_tensors(noisy, experiment.backbone.arch),
        experiment.backbone.lora,
        config.model.source,
    )
    (folder / "config.yaml").write_text(dump(config))
    (folder / "manifest.json").write_text(json.dumps({"stages": {}, "base": experiment.identity}))
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    write_jsonl(file, [{"id": i, "messages": [user("I am so tired. " * (1 + i % 5))]} for i in range(40)])
    return file


# --- killed and continued --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("sample", "SIGKILL"),
        ("score", "SIGTERM"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in (("sample", "SIGTERM"), ("score", "SIGKILL"))),
    ],
)
def test_a_killed_command_goes_on_from_what_is_finished(
    tiny_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, what: str
) -> None:
    if command == "sample":
        words = ["sample", "--prompts", str(prompts), "--reply.max_tokens", "6", "--reply.batch", "1"]
    else:
        rows = [r | {"messages": [*r["messages"], ANSWER]} for r in read_jsonl(prompts)]
        write_jsonl(tmp_path / "chats.jsonl", rows)
        words = ["score", "--data", str(tmp_path / "chats.jsonl"), "--data.window", "64", "--sft.micro_rows", "1"]
    words += ["--model", str(tiny_folder)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    killer = [sys.executable, "-c", SIGNALLER, what, "esjax.run.journal", "Journal", "add", "36"]
    killed = subprocess.run([*killer, *words, "--out", str(out)], capture_output=True, text=True, check=False)
    assert killed.returncode == (143 if what == "SIGTERM" else -signal.SIGKILL), killed.stderr[-2000:]
    assert "Traceback" not in killed.stderr
    done = len((tmp_path / "out.jsonl.part").read_text().splitlines()) - 1  # the first line says what it is of
    assert 35 <= done < 40
    if what == "SIGTERM":
        assert killed.stderr.splitlines()[-1] == "esjax: stopped by SIGTERM; the same command continues"
    esjax(*words, "--out", whole)
    capsys.readouterr()
    esjax(*words, "--out", out)
    assert f"out.jsonl: {done} of 40 rows were finished before" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == ["out.jsonl"]


def test_what_another_command_left_is_refused_by_name(
    refused: Refused, tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out, part = tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    words = ["sample", "--model", tiny_folder, "--prompts", prompts, "--out", out, "--reply.max_tokens", 3]
    other = tmp_path / "other"
    save_tiny_model(other, seed=1)
    for name in ("of", "row"):  # of a command that is not known, and a damaged one
        part.write_text('{"of": {"--model": "x"}}\n[0, {"id": 0}]\n' if name == "of" else "[0, \n")
        before = part.read_bytes()
        line = refused(*words)
        assert "--model" in line if name == "of" else "damaged" in line
        assert str(part) in line
        assert part.read_bytes() == before
    part.unlink()
    esjax(*words)
    made = out.read_bytes()
    assert [r["id"] for r in read_jsonl(out)] == list(range(40))
    # What a kill between the name and the end leaves is done; what one before it leaves goes on.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("esjax.run.journal.Journal.finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        out.unlink()
        with pytest.raises(SystemExit):
            esjax(*words)
    identity = json.loads(part.read_text().splitlines()[0])["of"]
    for change, named in (
        (["--seed", 1], "seed"),
        (["--reply.top_p", 0.5], "reply.top_p"),
        (["--num-samples", 2], "--num-samples"),
        (["--regex", "[a-z]+"], "--regex or --json-schema"),
        (["--model", other], "--model"),
        (["--prompts.system", "bundled:prompts/system.txt"], "prompts.system"),
    ):
        line = refused(*words, *change)
        assert f"40 rows of another command, which differs in {named}" in line
    assert set(identity) >= {"--model", "content of the file", "model.dtype"}
    out.write_bytes(made)
    esjax(*words)
    assert out.read_bytes() == made
    assert not part.exists()
    assert f"{out} exists; give a new file as --out" in refused(*words)


def test_only_what_continues_says_so(
    refused: Refused, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    from esjax.errors import Stopped

    def stopped(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr("esjax.evolve.experiment.open_model", stopped)
    monkeypatch.setattr("esjax.plan.outcome.Outcome.of", stopped)
    words = ["export", "--run-dir", run, "--model", "m0", "--format", "peft", "--out", tmp_path / "hf"]
    assert refused(*words, code=143) == "esjax: stopped by SIGTERM; the same command starts over"
    assert refused("plan", code=143) == "esjax: stopped by SIGTERM; the same command starts over"
    words = ["sample", "--model", f"{run}:m0", "--prompts", prompts, "--out", tmp_path / "out.jsonl"]
    assert refused(*words, code=143) == "esjax: stopped by SIGTERM; the same command continues"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl"]


# --- one command at a time, at a place that can be written -----------------------------------------------------------


def test_a_second_command_on_one_out_is_told_to_wait(
    refused: Refused, run: Path, tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    words = ["sample", "--model", tiny_folder, "--prompts", prompts, "--reply.max_tokens", 2]
    with held(out):
        line = refused(*words, "--out", out, code=75)
        assert line == f"esjax: error: {out}: another command is writing it; wait for it or give another --out"
        esjax(*words, "--out", tmp_path / "another.jsonl")  # control
    with held(tmp_path / "hf", "folder"):
        words = ["export", "--run-dir", run, "--model", "m0", "--format", "peft", "--out", tmp_path / "hf"]
        assert "another command is writing it" in refused(*words, code=75)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["another.jsonl", "prompts.jsonl"]


@pytest.mark.parametrize("command", ["sample", "score", "export"])
def test_a_place_that_cannot_be_written_is_refused_first(
    refused: Refused, prompts: Path, tmp_path: Path, command: str
) -> None:
    """The model does not exist either, so nothing was opened yet."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("")
    folder.mkdir()
    write_jsonl(tmp_path / "chats.jsonl", [{"id": 0, "messages": [user("Hi"), ANSWER]}])
    words: list[object] = {
        "sample": ["sample", "--model", "/absent", "--prompts", prompts],
        "score": ["score", "--model", "/absent", "--data", tmp_path / "chats.jsonl"],
        "export": ["export", "--run-dir", tmp_path, "--model", "m0", "--format", "peft"],
    }[command]
    if command == "export":
        (tmp_path / "config.yaml").write_text(dump(load(None, [])))
        adapter_folder(tmp_path, 0).mkdir(parents=True)
    before = sorted(p.name for p in tmp_path.iterdir())
    for out, message in (
        (folder, "exists; give a new"),
        (prompts, "exists; give a new"),
        (file / "below" / "out", "is not a folder"),
        ("", "--out is empty; give a value"),
        ("x" * 300, "File name too long"),
    ):
        assert message in refused(*words, "--out", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert prompts.read_text()


# --- a run's settings ------------------------------------------------------------------------------------------------


def test_a_run_s_model_brings_its_settings_and_takes_what_it_is_told(
    refused: Refused, run: Path, tiny_config_file: Path, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    def sampled(name: str, *words: object) -> tuple[list[dict[str, Any]], str]:
        capsys.readouterr()
        out = tmp_path / f"{name}.jsonl"
        esjax("sample", "--model", f"{run}:m0", "--prompts", prompts, "--out", out, *words)
        return read_jsonl(out), capsys.readouterr().err

    short = ("--reply.max_tokens", 3)
    own, log = sampled("own")
    assert max(len(r["token_ids"]) for r in own) > 3  # the run's 64
    assert "attention: chunked" in log
    assert "cache: float32" in log
    assert sampled("seed", "--seed", 3)[0] == own  # the run's seed is 3, the quickstart's 0
    assert sampled("other", "--seed", 0)[0] != own
    assert sampled("file", "--config", tiny_config_file)[0] == sampled("zero", "--seed", 0)[0]  # its seed is 0
    told = sampled("told", *short, "--model.attention", "dense", "--model.cache_dtype", "bfloat16")
    assert max(len(r["token_ids"]) for r in told[0]) == 3
    assert "attention: dense" in told[1]
    assert "cache: bfloat16" in told[1]
    assert "in bfloat16" in sampled("half", *short, "--model.dtype", "bfloat16")[1]
    plain, kept = (sampled(n, *short, *w)[0] for n, w in (("plain", ()), ("kept", ("--lora.rank", 4))))
    assert plain == kept  # said, and so
    none = sampled("none", *short, "--prompts.system", "bundled:prompts/none.txt")[0]
    assert [r["logprobs"] for r in none] != [r["logprobs"] for r in plain]
    files = ("--prompts", prompts, "--out", tmp_path / "bad.jsonl")
    line = refused("sample", "--model", f"{run}:m0", *files, "--lora.rank", 2)
    assert f"lora.rank=2: {run}:m0 was made with lora.rank=4" in line
    other = tmp_path / "elsewhere"
    save_tiny_model(other, seed=1)
    line = refused("sample", "--model", f"{run}:m0", *files, "--model.source", other)
    assert "was made with another backbone; differing: model.safetensors" in line
    for word in ("sft.learning_rate=1", "model.remat=full", "reply.max_contexts=1", "data.window=16"):
        line = refused("sample", "--model", "x", *files, f"--{word}")
        assert f"--{word.partition('=')[0]}: esjax sample makes no use of it" in line
    assert "is a bare backbone" in refused("sample", "--model", other, *files, "--lora.rank", 4)
    assert not (tmp_path / "bad.jsonl.part").exists()


def test_export_writes_the_dtype_that_it_is_told(refused: Refused, run: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        words = ["export", "--run-dir", run, "--model", "m0", "--format", "merged", "--out", out]
        esjax(*words, "--model.dtype", dtype)
        assert json.loads((out / "config.json").read_text())["dtype"] == dtype
        assert {t.dtype.name for t in load_file(out / "model.safetensors").values()} == {dtype}
    words = ["export", "--run-dir", run, "--format", "peft", "--out", tmp_path / "no"]
    assert "--reply.top_p: esjax export makes no use of it" in refused(*words, "--model", "m0", "--reply.top_p", 1)
    assert "--model x: give m0, m1" in refused(*words, "--model", "x")


@pytest.mark.parametrize("converted", [False, True], ids=["a folder", "a converted file"])
def test_peft_opens_an_export_by_itself(
    run: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, converted: bool
) -> None:
    """The oracle is PEFT's own way to open an adapter on its base."""
    if converted:
        monkeypatch.setattr(export, "public_name", lambda *_: (None, None))
    out = tmp_path / "hf"
    esjax("export", "--run-dir", run, "--model", "m0", "--format", "peft", "--out", out)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(out / "base" if converted else tiny_folder)
    esjax("export", "--run-dir", run, "--model", "m0", "--format", "merged", "--out", tmp_path / "merged")
    tokens = list(range(5, 60))
    opened: Any = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ours = torch_logits(torch_model(tmp_path / "merged"), tokens)
    assert worst(torch_logits(opened.eval(), tokens), ours) < 1e-3
    assert worst(torch_logits(torch_model(tiny_folder), tokens), ours) > 1e-2  # control: the base alone


def test_a_base_is_called_what_others_know_it_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc"
    assert public_name("hf:org/name", cached) == ("org/name", "0123abc")
    assert public_name("hf:org/name@v2", tmp_path) == ("org/name", "v2")
    assert public_name("pypi:dist==1/m.gguf", cached) == (None, None)
    (tmp_path / "m.gguf").write_text("")
    assert public_name(str(tmp_path / "m.gguf"), cached) == (None, None)
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name("model", tmp_path / "model") == (str(tmp_path / "model"), None)


# --- long chats, short prompts ---------------------------------------------------------------------------------------


def test_a_chat_longer_than_the_window_is_scored_whole(
    refused: Refused, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [m for i in range(60) for m in (user(f"Day {i}: I am tired, and nobody calls me back."), ANSWER)]
    write_jsonl(tmp_path / "chats.jsonl", [{"id": "long", "messages": turns}, {"id": "b", "messages": turns[:4]}])
    words = ["score", "--model", str(tiny_folder), "--data", str(tmp_path / "chats.jsonl")]
    esjax(*words, "--out", tmp_path / "whole.jsonl")
    assert "lost their oldest turns" not in capsys.readouterr().err
    rows = read_jsonl(tmp_path / "whole.jsonl")
    expected, length = torch_score(tiny_folder, turns)
    assert length > 1024  # the window of the config
    assert rows[0]["logprob"] == pytest.approx(sum(expected), abs=1e-3)
    esjax(*words, "--out", tmp_path / "cut.jsonl", "--data.window", 600)
    assert "1 of 2 chats lost their oldest turns to data.window=600; raise it" in capsys.readouterr().err
    cut = read_jsonl(tmp_path / "cut.jsonl")
    assert abs(cut[0]["logprob"] - rows[0]["logprob"]) > 1e-2
    assert cut[1]["logprob"] == pytest.approx(rows[1]["logprob"], abs=1e-4)
    assert "exceeds the model's 4096 positions" in refused(*words, "--out", tmp_path / "x", "--data.window", 5000)
    (tmp_path / "chats.jsonl").write_text("\n" + json.dumps({"id": "far", "messages": turns * 4}) + "\n")
    line = refused(*words, "--out", tmp_path / "x.jsonl")
    assert f"{tmp_path}/chats.jsonl, line 2, id 'far': its " in line
    esjax(*words, "--out", tmp_path / "x.jsonl", "--data.window", 4096)  # the remedy
    assert not list(tmp_path.glob("*.part"))


def test_a_prompt_beyond_the_positions_is_named_before_anything_is_drawn(
    refused: Refused, tiny_folder: Path, tmp_path: Path
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": "a", "messages": [user("Hi")]}, {"id": "b", "messages": [user("word " * 1900)]}]
    file.write_text("\n\n" + "".join(json.dumps(r) + "\n" for r in rows))
    words = ["sample", "--model", tiny_folder, "--prompts", file, "--out", out]
    line = refused(*words, "--reply.max_tokens", 4000)
    assert f"{file}, line 4, id 'b': its " in line
    room = int(line.split("lower reply.max_tokens to ")[1].split(",")[0])
    assert not list(tmp_path.glob("out*"))
    refused(*words, "--reply.max_tokens", room + 1)
    esjax(*words, "--reply.max_tokens", room, "--reply.temperature", 0)  # the remedy
    assert len(read_jsonl(out)) == 2


def test_prompts_of_no_or_one_token(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    """A template that writes no roles and no header, and one that writes nothing for a user."""
    folder, file, out = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(tiny_folder, folder)
    write_jsonl(file, [{"id": "short", "messages": [user("a")]}, {"id": "long", "messages": [user("a b c d")]}])
    template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    words = ["sample", "--model", folder, "--prompts", file, "--out", out, "--reply.max_tokens", 4]
    esjax(*words)
    assert [r["id"] for r in read_jsonl(out)] == ["short", "long"]
    only = tmp_path / "one.jsonl"
    write_jsonl(only, [{"id": "short", "messages": [user("a")]}])
    esjax(*words[:4], only, "--out", tmp_path / "one.out", *words[7:])
    assert read_jsonl(tmp_path / "one.out")[0]["token_ids"] == read_jsonl(out)[0]["token_ids"]
    chats = tmp_path / "chats.jsonl"
    write_jsonl(chats, [{"id": "short", "messages": [user("a"), ANSWER]}])
    scored = ["score", "--model", folder, "--data", chats, "--out", tmp_path / "scores.jsonl"]
    line = refused(*scored)
    assert f"{chats}, line 1, id 'short': the chat template makes a single token of the prompt" in line
    system = ["--prompts.system", "bundled:prompts/system.txt"]
    esjax(*scored, *system)  # the remedy
    (folder / "chat_template.jinja").write_text(
        template.replace("{{ m['content'] }}", "{% if m['role'] != 'user' %}{{ m['content'] }}{% endif %}")
    )
    out.unlink()
    assert f"{file}, line 1, id 'short': the chat template makes no token of a chat" in refused(*words)
    esjax(*words, *system)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("name", [None, True, 1.5, ["a"], {"a": 1}])
def test_an_id_is_a_text_or_a_whole_number(refused: Refused, tmp_path: Path, name: Any) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n" + json.dumps({"id": name, "messages": [user("Hi")]}) + "\n")
    line = refused("sample", "--model", "/absent", "--prompts", file, "--out", tmp_path / "out.jsonl")
    assert f"{file}, line 2: the id is {json.dumps(name)}; give a text or a whole number" in line


def test_a_file_of_somebody_else_is_not_taken_for_a_part(
    refused: Refused, tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    part = tmp_path / "keep.part"
    part.write_text("half a download")
    words = ("sample", "--model", tiny_folder, "--prompts", prompts, "--out", tmp_path / "keep")
    assert "keep.part: damaged; delete it" in refused(*words)
    assert part.read_text() == "half a download"


@pytest.mark.parametrize("option", ["--config", "--run-dir", "--sft.epochs"])
def test_an_empty_value_is_refused_by_name(refused: Refused, tmp_path: Path, option: str) -> None:
    """What a variable that is not set makes of a command."""
    assert f"{option} is empty" in refused("sft", "--run-dir", tmp_path / "r", option, "")
    assert f"{option} is empty" in refused("sft", "--run-dir", tmp_path / "r", f"{option}=")
    assert not (tmp_path / "r").exists()


def test_what_is_no_size_is_refused(refused: Refused, run: Path, prompts: Path, tmp_path: Path) -> None:
    words = ("sample", "--model", f"{run}:m0", "--prompts", prompts, "--out", tmp_path / "o")
    for count in (0, -1, 10**12):
        assert f"--num-samples {count}: at least 1" in refused(*words, "--num-samples", count)
    assert "mesh.fsdp=0: give a number of devices, or -1" in refused(*words, "--mesh.fsdp", 0)
    bench = ("bench", "--profile", "tiny", "--micro-rows")
    assert "--micro-rows 0: it must divide" in refused(*bench, 0, "--tasks", "sft")
    assert "--micro-rows: only the tasks" in refused(*bench, 3, "--tasks", "sample")
    assert "is a run directory; name one of its models" in refused("sample", "--model", run, *words[3:])
    line = refused("sft", "--run-dir", tmp_path / "r", "--distributed", "--join-timeout", 10**15)
    assert "--join-timeout 1000000000000000: 1 to 1,000,000 seconds" in line
