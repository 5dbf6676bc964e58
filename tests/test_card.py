"""An export's model card, its dtypes and shards, and its way to the hub, of which a stand-in listens on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from conftest import Refused, tiny_overrides
from datasets import Dataset
from huggingface_hub import ModelCard
from oracles import torch_logits, torch_model, worst
from safetensors.numpy import load_file

import esjax
from esjax.cli import main
from esjax.hub.card import Card, card_text

TOKENS = [5, 900, 2, 40, 41, 42, 7]


def export(run: Path, out: Path, *more: str) -> Path:
    main(["export", "--run-dir", str(run), "--model", "m2", "--format", "merged", "--out", str(out), *more])
    return out


def card(**changes: Any) -> Card:
    plain: dict[str, Any] = {
        "name": "M_1",
        "form": "merged",
        "base": "org/base",
        "backbone": "hf:org/base",
        "data": {"phase 1": "esconv:train.json"},
        "formats": ["esconv"],
        "system": 'You are "kind".',
        "rounds": 1,
        "settings": {"seed": 0},
        "version": "0",
    }
    return Card(**plain | changes)


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_a_card_is_one_that_the_hub_reads(form: str) -> None:
    made = ModelCard(card_text(card(form=form)))
    assert made.data.license == "cc-by-nc-4.0"
    assert made.data.base_model == "org/base"
    assert made.data.library_name == {"merged": "transformers", "peft": "peft"}[form]
    assert "non-commercial use only" in made.text
    assert "Nothing was measured" in made.text
    code = made.text.split("```python")[1].split("```")[0]
    compile(code, "card", "exec")  # the system message is quoted whatever it holds
    assert 'You are "kind".' in code
    free = ModelCard(card_text(card(formats=["messages"], base=None)))
    assert (free.data.license, free.data.license_name) == ("other", "of-base-and-data")
    assert "non-commercial" not in free.text


def test_an_export_brings_its_card(tiny_run: Path, tmp_path: Path) -> None:
    text = (export(tiny_run, tmp_path / "out") / "README.md").read_text()
    made = ModelCard(text)
    assert made.data.license == "other"  # of the sample dialogues
    assert "# M_2: a model for emotional support" in text
    assert "2 rounds of self-improvement" in text
    records = json.loads((tiny_run / "eval" / "results.json").read_text())
    measured = [r for r in records if r["metric"] in ("perplexity", "specificity")]
    assert len(measured) == 8  # the backbone and three models
    for r in measured:
        assert f"{r['value']:.3f}" in text
    (perplexity,) = (r for r in measured if (r["metric"], r["model"]) == ("perplexity", "m2"))
    assert f"{perplexity['value']:.3f} [{perplexity['low']:.3f}, {perplexity['high']:.3f}]" in text
    assert str(tmp_path.parent.parent) not in text  # no folder of this machine
    assert "Not for therapy" in text


def test_a_card_says_what_the_run_read_and_nothing_of_an_adapter_from_elsewhere(
    tiny_run: Path, tiny_folder: Path, esconv: Path, tmp_path: Path
) -> None:
    """ESConv's rows are known by their shape, whatever the source is called: here a dataset that was saved to disk."""
    rows = [json.loads(line) for line in (esconv / "valid.jsonl").read_text().splitlines()[:12]]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "nameless"))
    run = tmp_path / "run"
    main(["sft", "--run-dir", str(run), *tiny_overrides(tiny_folder), "--data.train", f"hf:{tmp_path / 'nameless'}"])
    main(["export", "--run-dir", str(run), "--model", "m0", "--format", "peft", "--out", str(tmp_path / "adapter")])
    restricted = ModelCard((tmp_path / "adapter" / "README.md").read_text())
    assert restricted.data.license == "cc-by-nc-4.0"
    assert "ESConv" in restricted.text

    esjax.open_model(tmp_path / "adapter").export(tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert "It was trained elsewhere, and only written by esjax." in text
    assert "not known here what this model was trained on" in text
    assert "self-improvement" not in text
    assert "bundled" not in text  # no setting of the quickstart


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_and_shards(dtype: str, tiny_run: Path, tmp_path: Path) -> None:
    exact = export(tiny_run, tmp_path / "exact")
    out = export(tiny_run, tmp_path / "out", "--dtype", dtype, "--shard-gib", "0.0001")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == {f.name for f in files}
    largest = max(x.nbytes for f in files for x in load_file(f).values())
    assert all(f.stat().st_size <= max(0.0001 * 2**30, largest + 8192) for f in files)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)
    off = worst(torch_logits(torch_model(out), TOKENS), torch_logits(torch_model(exact), TOKENS))
    assert 0 < off < 0.02 * np.abs(torch_logits(torch_model(exact), TOKENS)).max()


class Hub(BaseHTTPRequestHandler):
    """The hub's HTTP endpoints that an upload needs."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012  of the class on purpose
    created: list[dict[str, Any]] = []  # noqa: RUF012

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        return self.answer({"name": "me", "type": "user", "auth": {"type": "access_token"}, "orgs": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid credentials"}, 401)
        here = f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[attr-defined]
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"{here}/{name}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            name = "/".join(self.path.split("/")[3:5])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{here}/{name}/commit/0"})
        return self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.repositories, Hub.created = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def push(hub: str, token: str, run: Path, out: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [
        "export",
        "--run-dir",
        str(run),
        "--model",
        "m1",
        "--format",
        "merged",
        "--out",
        str(out),
        "--push-to",
        name,
    ]
    environment = os.environ | {"HF_ENDPOINT": hub, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "esjax", *command], env=environment, capture_output=True, text=True, check=False
    )


def test_an_export_is_pushed_whole(hub: str, tiny_run: Path, tmp_path: Path) -> None:
    done = push(hub, "hf_right", tiny_run, tmp_path / "out", "org/model")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"pushed to {hub}/org/model" in done.stderr
    (created,) = Hub.created
    assert created.get("private") is True or created.get("visibility") == "private"
    there = Hub.repositories["org/model"]
    local = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert local.items() <= there.items()
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= there.keys()


def test_what_cannot_be_pushed_is_said_before_anything_is_written(hub: str, tiny_run: Path, tmp_path: Path) -> None:
    for token, name, message in (
        ("hf_wrong", "org/model", "the hub does not know this token"),
        ("hf_right", "model", "expected ORG/NAME"),
    ):
        done = push(hub, token, tiny_run, tmp_path / "out", name)
        assert done.returncode == 2, done.stderr[-2000:]
        assert message in done.stderr
        assert not (tmp_path / "out").exists()
    assert Hub.created == []


def test_what_an_adapter_has_none_of_is_refused(tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["export", "--run-dir", tiny_run, "--model", "m1", "--out", tmp_path / "out"]
    assert "an adapter is written in float32" in refused(*command, "--format", "peft", "--dtype", "bfloat16")
    assert "give a number above 0" in refused(*command, "--format", "merged", "--shard-gib", "0")
