"""The README's examples are run, so that none can rot: every shell and Python block, in order, in a folder of its own.

A tiny model and a finished run of it stand in for the real ones: the config that counts where none is named, the configs
under configs/, and the hub's model are the tiny ones. What compiles for other hardware,
measures this one or waits for people is only parsed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import REPOSITORY
from test_layering import RANKS

import esjax
from esjax import cli
from esjax.run.jsonl import read_jsonl
from esjax.settings import files
from esjax.settings.files import Overrides

README = (REPOSITORY / "README.md").read_text()
HUB = "hf:HuggingFaceTB/SmolLM2-360M-Instruct"
FOLDERS = ("esjax", "esjax/bench", "esjax/corpus", "esjax/eval", "esjax/serve", "esjax/study", "launch")
PARSED = ("plan", "bench", "serve", "chat")


def blocks() -> list[tuple[str, str]]:
    """(language, text) of all blocks that say their language."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def lines(block: str) -> list[str]:
    """A shell block's commands; of an installation, which the tests themselves are the proof of, what comes after it."""
    return [
        re.sub(r"^(python\S* -m venv|pip install) .*&& (?=\w)", "", x) for x in block.replace("\\\n", "").splitlines()
    ]


@pytest.fixture
def folder(tiny_run: Path, tiny_config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "DEFAULT", str(tiny_config_file))
    for name in ("quickstart", "llama3-8b"):
        (tmp_path / "configs").mkdir(exist_ok=True)
        shutil.copy(tiny_config_file, tmp_path / "configs" / f"{name}.yaml")
    shutil.copytree(tiny_run, tmp_path / "runs" / "quickstart")
    (tmp_path / "my").mkdir()
    for name, count in (("train", 3), ("valid", 1), ("test", 1)):
        rows = (REPOSITORY / "data" / "sample" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "my" / f"{name}.jsonl").write_text("".join(rows[:count]))
    return tmp_path


def test_every_example_runs(
    folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = []
    for name in PARSED:

        def stub(args: argparse.Namespace, given: Overrides) -> None:
            parsed.append(args.command)

        stub.__name__, stub.__doc__ = name, "."
        monkeypatch.setattr(cli, name, stub)
    ran = []
    for language, text in blocks():
        if language == "python":
            exec(compile(text, "README.md", "exec"), {})
            ran.append("python")
        for line in lines(text) if language == "sh" else ():
            words = shlex.split(line.replace(HUB, str(tiny_folder)))
            if words[0] == "esjax":
                cli.main(words[1:])
                ran.append(words[1])
            elif words[0] == "pytest":
                ran.append("pytest")
            else:
                subprocess.run(["bash", "-c", line], check=True)
    assert set(ran) == {
        "evolve",
        "sft",
        "dpo",
        "sample",
        "score",
        "eval",
        "export",
        "data",
        "report",
        *PARSED,
        "python",
        "pytest",
    }
    assert parsed == ["chat", "serve", "plan", "bench"]
    table = re.findall(r"^\s*Held-out dialogues.*$", capsys.readouterr().out, re.MULTILINE)
    assert len(table) == ran.count("evolve") + ran.count("eval")
    assert [r["sample"] for r in read_jsonl(folder / "replies.jsonl")] == [0, 1, 2, 3]
    pattern = r"(I hear|It sounds)[a-z ,]+\."
    assert re.fullmatch(pattern, read_jsonl(folder / "matched.jsonl")[0]["text"])
    for made in ("hf", "adapter", "hf-from-python", "my/model", "runs/small/sft/adapter", "runs/dpo/dpo/adapter"):
        assert list((folder / made).glob("*.safetensors")), made


def test_the_table_that_is_shown_has_the_lines_of_today(tiny_run: Path, tiny_config_file: Path) -> None:
    run = esjax.evolve(esjax.load_config(tiny_config_file), tiny_run)
    shown = re.findall(r"^(\S.*?) {2,}-?\d", README, re.MULTILINE)
    assert shown == [str(x) for x in run.table.columns[0].cells]


def test_what_is_installed_and_linked_exists() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    pages = [
        REPOSITORY / p
        for p in (
            "README.md",
            "esjax/README.md",
            "esjax/bench/README.md",
            "esjax/eval/README.md",
            "esjax/serve/README.md",
            "launch/README.md",
        )
    ]
    for page in pages:
        text = page.read_text()
        assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= set(project["optional-dependencies"])
        headings = {re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)}
        for target in re.findall(r"\]\((?!https)([^)]+)\)", text):
            if target.startswith("#"):
                assert target[1:] in headings, target
            else:
                assert (page.parent / target).exists(), (page, target)
    assert "torch==" in README
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (REPOSITORY / "LICENSE").read_text()
    assert len(README.splitlines()) <= 220


def test_the_architecture_page_names_every_package_with_its_rank() -> None:
    page = (REPOSITORY / "esjax" / "README.md").read_text()
    shown = re.findall(r"^  (\w+)(?:/|\.py) .* (\d+)$", page, re.MULTILINE)
    assert {name: int(rank) for name, rank in shown} == RANKS
