"""Chat templates by name for base models, and what is done with a chat that a template would refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Refused, WithTemplate, chat, save_tiny_model, tiny_overrides
from transformers import AutoTokenizer

import esjax
from esjax.cli import main
from esjax.errors import InputError
from esjax.run.jsonl import read_jsonl
from esjax.tokens.taking import Taking
from esjax.tokens.tokenizer import ChatTokenizer

CHAT: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " I'm tired. "},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "May."},
]
# As the makers of these models describe their formats.
WRITTEN = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n I'm tired. <|im_end|>\n"
    "<|im_start|>assistant\nSince when?<|im_end|>\n<|im_start|>user\nMay.<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n I'm tired. <|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nSince when?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMay.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<start_of_turn>user\nBe kind.\n\n I'm tired. <end_of_turn>\n<start_of_turn>model\nSince when?<end_of_turn>\n"
    "<start_of_turn>user\nMay.<end_of_turn>\n<start_of_turn>model\n",
    "alpaca": "Be kind.\n\n### Instruction:\n I'm tired. \n\n### Response:\nSince when?</s>\n\n"
    "### Instruction:\nMay.\n\n### Response:\n",
}
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "alpaca": "</s>"}
NAMES = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
NAMES += ["<start_of_turn>", "<end_of_turn>"]


def base(folder: Path, bos: bool, names: list[str] = NAMES) -> Path:
    """The tiny model as a base model: no template, an end of text, and perhaps a start of text before every text."""
    save_tiny_model(folder)
    (folder / "chat_template.jinja").unlink()
    state = json.loads((folder / "tokenizer.json").read_text())
    for old, new in (("<|im_start|>", "<s>"), ("<|im_end|>", "</s>")):
        number = state["model"]["vocab"].pop(old)
        state["model"]["vocab"][new] = number
        for token in state["added_tokens"]:
            token["content"] = new if token["content"] == old else token["content"]
    size = len(state["model"]["vocab"])
    for n, name in enumerate(names):  # in place of the last words
        last = next(w for w, i in state["model"]["vocab"].items() if i == size - 1 - n)
        state["model"]["merges"] = [m for m in state["model"]["merges"] if "".join(m) != last and last not in m]
        del state["model"]["vocab"][last]
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["model"]["vocab"][name] = size - 1 - n
        state["added_tokens"].append({"id": size - 1 - n, "content": name, **flags, "special": True})
    state["added_tokens"].sort(key=lambda token: token["id"])
    if bos:
        piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
        ids = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        state["post_processor"] = {"type": "TemplateProcessing", "single": [piece, text], "pair": [piece, text, text]}
        state["post_processor"]["pair"] = [piece, text, {"Sequence": {"id": "B", "type_id": 1}}]
        state["post_processor"]["special_tokens"] = ids
    (folder / "tokenizer.json").write_text(json.dumps(state))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("bos", [False, True])
def test_a_named_template(name: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(base(tmp_path / "hf", bos), name)
    expected = "<s>" * bos + WRITTEN[name]
    assert tokenizer.render(CHAT, header=True) == expected
    prompt = tokenizer.prompt(CHAT)
    assert prompt.count(0) == bos  # the start of text once, or never
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.end_of_turn) == ENDS[name]
    answered = [*CHAT, {"role": "assistant", "content": "It is long."}]
    reply = tokenizer.reply(prompt, answered)
    assert tokenizer.decode(reply) == "It is long."
    assert reply[-1] == tokenizer.end_of_turn
    assert tokenizer.stops == tuple(dict.fromkeys((tokenizer.end_of_turn, 1)))  # </s> as well


def test_what_a_base_model_lacks_is_said(tmp_path: Path) -> None:
    folder = base(tmp_path / "hf", False, ["<|im_start|>", "<|im_end|>"])
    with pytest.raises(
        InputError, match=r"no chat template; name one \(model.chat_template=chatml, llama3, gemma, alpaca"
    ):
        ChatTokenizer(folder)
    with pytest.raises(
        InputError, match=r"=llama3 writes <\|start_header_id\|>, .*; allowed: chatml, alpaca, or a .jinja"
    ):
        ChatTokenizer(folder, "llama3")
    with pytest.raises(InputError, match=r"chat_template=mine: give chatml, .* a file whose name ends with .jinja"):
        ChatTokenizer(folder, "mine")
    with pytest.raises(InputError, match=r"none.jinja"):
        ChatTokenizer(folder, str(tmp_path / "none.jinja"))
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}[{{ m.content }}]{{ eos_token }}{% endfor %}\n")
    assert ChatTokenizer(folder, str(tmp_path / "mine.jinja")).render(CHAT[1:2]) == "[ I'm tired. ]</s>"


def test_a_run_with_a_named_template_exports_it(tmp_path: Path, refused: Refused, capsys: Any) -> None:
    folder, run = base(tmp_path / "hf", True), tmp_path / "run"
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "1", "messages": chat("Hi.")}) + "\n")
    assert "no chat template" in refused("sft", "--run-dir", run, *tiny_overrides(folder))
    main(["sft", "--run-dir", str(run), *tiny_overrides(folder), "--model.chat_template", "gemma"])
    out = tmp_path / "out"
    main(["export", "--run-dir", str(run), "--model", "m0", "--format", "merged", "--out", str(out)])
    hf: Any = AutoTokenizer.from_pretrained(out)
    own = ChatTokenizer(folder, "gemma")
    asked = [{"role": "user", "content": "Be kind.\n\nHi."}]
    assert hf.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == own.prompt(asked)  # type: ignore[arg-type]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == list(own.stops)
    assert ChatTokenizer(out).stops == own.stops
    # A run brings its template: what it is asked by is the same with and without the setting.
    main(["sample", "--model", f"{run}:m0", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "a.jsonl")])
    assert read_jsonl(tmp_path / "a.jsonl")[0]["token_ids"]


def test_a_base_model_is_opened_with_a_template(tmp_path: Path) -> None:
    folder = base(tmp_path / "hf", False)
    with pytest.raises(InputError, match="no chat template"):
        esjax.open_model(folder)
    asked, greedy = chat("Hi."), {"temperature": 0.0, "max_tokens": 8}
    made = {
        name: esjax.open_model(folder, {"model.chat_template": name}).sample(asked, **greedy)[0].token_ids  # type: ignore[arg-type]
        for name in ("chatml", "alpaca")
    }
    assert made["chatml"] != made["alpaca"]


def test_a_folder_s_own_template_can_be_replaced(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "hf")
    plain, other = ChatTokenizer(tmp_path / "hf"), ChatTokenizer(tmp_path / "hf", "alpaca")
    assert "<|im_start|>" in plain.render(CHAT)
    assert "### Instruction:" in other.render(CHAT)
    assert plain.fingerprint != other.fingerprint


# Templates that refuse

LOOP = "{% for m in messages %}%s{{ '<|im_start|>' + m.role + ' ' + %s + '<|im_end|>' }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
STOP = "{{ raise_exception('no') }}"
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" + STOP + "{% endif %}"
PARTS = "m.content[0].text"
TEMPLATES = {
    "no system": (
        LOOP.replace("%s", "{% if m.role == 'system' %}" + STOP + "{% endif %}", 1),
        "m.content",
        (1, 0, 1, 1),
    ),
    "silent": (
        LOOP.replace("%s", "", 1).replace("messages", "messages if m.role != 'system'"),
        "m.content",
        (1, 0, 1, 1),
    ),
    "alternating": (LOOP.replace("%s", ALTERNATE, 1), "m.content", (1, 0, 0, 0)),
    "parts": (LOOP.replace("%s", "", 1), PARTS, (0, 1, 1, 1)),
    "alternating parts": (LOOP.replace("%s", ALTERNATE, 1), PARTS, (0, 0, 0, 0)),
    "any": (LOOP.replace("%s", "", 1), "m.content", (1, 1, 1, 1)),
    "none": (LOOP.replace("%s", STOP, 1), "m.content", (1, 1, 1, 1)),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_takes_is_found(name: str, with_template: WithTemplate) -> None:
    loop, content, expected = TEMPLATES[name]
    tokenizer = with_template(loop.replace("%s", content) + GENERATION)
    assert Taking.of(tokenizer._written) == Taking(*map(bool, expected))


MANY: list[Any] = [
    {"role": "system", "content": "S."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "A."},
    {"role": "user", "content": "B."},
    {"role": "assistant", "content": "C."},
    {"role": "user", "content": "D."},
]
EXPECTED = {
    "no system": "<|im_start|>assistant Hello.<|im_end|><|im_start|>user S.\n\nA.<|im_end|><|im_start|>user B.<|im_end|>"
    "<|im_start|>assistant C.<|im_end|><|im_start|>user D.<|im_end|>",
    "alternating": "<|im_start|>user S.\n\nA.\nB.<|im_end|><|im_start|>assistant C.<|im_end|><|im_start|>user D.<|im_end|>",
    "parts": "".join(f"<|im_start|>{m['role']} {m['content']}<|im_end|>" for m in MANY),
}
EXPECTED["alternating parts"] = EXPECTED["alternating"]
EXPECTED["any"] = EXPECTED["parts"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_chat_is_put_as_the_template_takes_it(name: str, tiny_folder: Path, tmp_path: Path, capsys: Any) -> None:
    loop, content, _ = TEMPLATES[name]
    (tmp_path / "t.jinja").write_text(loop.replace("%s", content) + GENERATION)
    tokenizer = ChatTokenizer(tiny_folder, str(tmp_path / "t.jinja"))
    assert tokenizer.render(MANY) == EXPECTED[name]
    said = capsys.readouterr().err
    assert ("messages of a role in a row become one" in said) == name.startswith("alternating")
    prompt = tokenizer.prompt(MANY)
    reply = tokenizer.reply(prompt, [*MANY, {"role": "assistant", "content": "E <|im_end|> F."}])
    assert tokenizer.decode(reply) == "E <|im_end|> F."  # a control token's name in what people wrote stays text
