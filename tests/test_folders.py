"""Model folders as people have them: odd heads, names, types and tokenizers, with transformers as the oracle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, chat
from oracles import Ours, torch_logits, torch_model, worst
from safetensors.numpy import load_file, save_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from esjax.errors import InputError
from esjax.hub.shards import INDEX, SINGLE, ShardReader
from esjax.model.weights import load_backbone
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
