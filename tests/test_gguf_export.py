"""GGUF files that are written: transformers' own reader, our own and llama.cpp compute from them what the model computes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CHAT_TEMPLATE, Refused, save_tiny_model, tiny_overrides
from families import FAMILIES, SMALL, make
from oracles import BARE, Ours, perturbed, random_adapter, torch_logits, torch_model, worst
from safetensors.numpy import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from esjax.cli import main
from esjax.errors import InputError
from esjax.evolve.experiment import Experiment, open_model
from esjax.export import SHARES, Form, export
from esjax.hub.gguf_export import tokenizer_keys, write_gguf
from esjax.hub.gguf_import import convert
from esjax.hub.gguf_tokenizer import Metadata, tokenizer_of
from esjax.hub.shards import SINGLE
from esjax.model.gguf_form import describe, gguf_shapes, gguf_tensors
from esjax.model.linear import Lora
from esjax.model.weights import Backbone, load_backbone
from esjax.sample.generate import Generator
from esjax.settings.files import load
from esjax.settings.schema import SamplingSettings
from esjax.tokens.tokenizer import ChatTokenizer

FLOAT32 = jnp.dtype("float32")
TOKENS = np.random.default_rng(4).integers(2, SMALL["vocab_size"], 40).tolist()
# What GGUF has words for: of Gemma 3 only the order of layers of all published models.
SIX = {
    "num_hidden_layers": 7,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 16,
    "rope_local_base_freq": 10000.0,
}
SAID: dict[str, dict[str, Any]] = {
    "llama31": {"head_dim": 12, "original_max_position_embeddings": 16},
    "llama-dynamic": {},  # which up to the positions of training is the plain one
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},  # transformers' reader takes that for any Qwen3
    "gemma3": SIX,
}
UNSAID = {
    "llama-biases": "biased",
    "llama-linear": "rope scaling",
    "mistral-window": "windows",
    "qwen2-window": "windows",
    "qwen2-yarn": "rope scaling",
    "qwen3-biases": "biased",
    "gemma3": "query_scale",
    "gemma2": "a gemma2 model",
    "phi3": "a phi3 model",
    "olmo2": "an? olmo2 model",
    "smollm3": "a smollm3 model",
}


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model of a family, with some of its options changed and weights that float16 holds, as a folder."""

    def save(name: str, folder: Path, options: dict[str, Any]) -> Path:
        kind, others = FAMILIES[name]
        monkeypatch.setitem(FAMILIES, name, (kind, others | options))
        make(name).half().float().save_pretrained(folder)
        return folder

    return save


def written(backbone: Backbone, file: Path, stored: Any = "F16", adapter: Any = BARE) -> Path:
    """A GGUF file of a model whose tokenizer is of no interest."""
    said = describe(backbone.arch, backbone.folder, 1, file)
    words = [chr(33 + i) for i in range(backbone.arch.vocab - 1)]
    plain = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*words, "!#"],
        "tokenizer.ggml.token_type": [1] * backbone.arch.vocab,
        "tokenizer.ggml.merges": ["! #"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
    tensors = gguf_tensors(backbone, adapter, said)
    write_gguf(file, said.keys | plain, gguf_shapes(backbone.arch, said), tensors, stored)
    return file


@pytest.mark.parametrize("name", SAID)
def test_a_file_holds_the_model_for_transformers_and_for_us(name: str, changed: Any, tmp_path: Path) -> None:
    folder = changed(name, tmp_path / "hf", SAID[name])
    backbone = load_backbone(folder, None, FLOAT32)
    file = written(backbone, tmp_path / "m.gguf")
    ours = Ours(backbone).sequence(TOKENS, 40)
    convert(file, tmp_path / "again")
    before, after = load_file(folder / SINGLE), load_file(tmp_path / "again" / SINGLE)
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    assert max(worst(before[k], after[k]) for k in before) <= 1e-6
    again = load_backbone(tmp_path / "again", None, FLOAT32)
    assert worst(Ours(again).sequence(TOKENS, 40), ours) <= 1e-4
    assert worst(Ours(perturbed(again, 1)).sequence(TOKENS, 40), ours) > 1e-3
    if name == "llama31":  # transformers' reader leaves out the tensor of rope factors
        return
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype="float32").eval()
    if name == "gemma3":  # and what llama.cpp knows of this family without being told
        model = torch_model(tmp_path / "again")
        model.load_state_dict(theirs.state_dict(), strict=False)
        theirs = model
    assert worst(torch_logits(theirs, TOKENS), ours) <= 1e-3


@pytest.mark.parametrize("name", UNSAID)
def test_what_gguf_has_no_word_for_is_refused_by_name(name: str, changed: Any, tmp_path: Path) -> None:
    backbone = load_backbone(changed(name, tmp_path / "hf", {}), None, FLOAT32)
    with pytest.raises(InputError, match=UNSAID[name]):
        describe(backbone.arch, backbone.folder, 1, tmp_path / "m.gguf")


def test_eight_bits_are_gguf_s_own(changed: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    folder = changed("llama31", tmp_path / "hf", sizes)
    lora = Lora(("q_proj", "down_proj"), 2, 1.0)
    backbone = load_backbone(folder, lora, FLOAT32)
    adapter = random_adapter(backbone, 3, 0.2)
    file = written(backbone, tmp_path / "m.gguf", "Q8_0", adapter)
    exact = written(backbone, tmp_path / "f32.gguf", "F32", adapter)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert {kind for name, kind in kinds.items() if "norm" not in name and "rope" not in name} == {"Q8_0"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    wide = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(exact).tensors}
    for tensor in gguf.GGUFReader(file).tensors:
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        if kinds[tensor.name] == "Q8_0":
            blocks = np.abs(wide[tensor.name]).reshape(-1, 32)
            off = np.abs(theirs - wide[tensor.name]).reshape(-1, 32).max(1)
            assert (off <= blocks.max(1) / 127 * 0.57).all()  # half a step, and the scale's rounding to float16
            assert off.max() > 0


def test_rows_that_no_block_fits_are_kept_in_sixteen_bits_and_named(changed: Any, tmp_path: Path) -> None:
    backbone = load_backbone(changed("qwen2", tmp_path / "hf", {}), None, FLOAT32)  # a width of 48, and 80 hidden units
    said = describe(backbone.arch, backbone.folder, 1, tmp_path / "m.gguf")
    shapes = gguf_shapes(backbone.arch, said)
    kept = write_gguf(tmp_path / "m.gguf", said.keys, shapes, gguf_tensors(backbone, BARE, said), "Q8_0")
    assert kept == [name for name, shape in shapes.items() if len(shape) > 1]
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors} == {"F16", "F32"}


def test_a_number_too_large_for_float16_is_refused(changed: Any, tmp_path: Path) -> None:
    backbone = load_backbone(changed("qwen2", tmp_path / "hf", {}), None, FLOAT32)
    said = describe(backbone.arch, backbone.folder, 1, tmp_path / "m.gguf")
    tensors = ((name, x * 1e6) for name, x in gguf_tensors(backbone, BARE, said))
    with pytest.raises(InputError, match=r"token_embd.weight has numbers above 65504.*bfloat16"):
        write_gguf(tmp_path / "m.gguf", said.keys, gguf_shapes(backbone.arch, said), tensors, "F16")


# Tokenizers


def byte_level(split: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE that splits text by an expression, or as SmolLM's does."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    parts: list[Any] = [pre_tokenizers.Split(Regex(split), "isolated") if split else digits]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def sentencepiece(prefix: bool) -> PreTrainedTokenizerFast:
    """A BPE with byte fallback, as Llama 2's, Mistral's and Gemma's are."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = None if prefix else normalizers.Replace(" ", "▁")
    if prefix:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return trained(tokenizer, [], ["<unk>", *(f"<0x{b:02X}>" for b in range(256))])


def trained(tokenizer: Tokenizer, alphabet: list[str], first: list[str] | None = None) -> PreTrainedTokenizerFast:
    text = [
        "I'm sorry that you're losing your job in 1999 and 2024, it's hard. " * 3,
        "if  (x == 10) {\n\n  return 100;\n}",
    ]
    text.append("123 456 it's hard.\n\n" * 40)
    ends = ["<s>", "</s>"] if first else []
    names = [*(first or []), *ends, "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(names) + 120, initial_alphabet=alphabet, special_tokens=names
    )
    tokenizer.train_from_iterator(text, trainer)
    if first:  # these are words, and control tokens only in the trainer's eyes
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    more = {"unk_token": "<unk>"} if first else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=(ends or names)[0],
        eos_token=(ends or names)[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **more,
    )


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KEYS = {"general.architecture": "llama", "llama.context_length": 64}
TOKENIZERS: dict[str, Any] = {
    "smollm": lambda: byte_level(None),
    "llama-bpe": lambda: byte_level(LLAMA3),
    "qwen2": lambda: byte_level(QWEN2),
    "default with a space before": lambda: sentencepiece(True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_comes_back(name: str, tmp_path: Path) -> None:
    hf = TOKENIZERS[name]()
    rows = len(hf) + 5  # an embedding may have more rows than the tokenizer tokens
    said = tokenizer_keys(hf, 1, rows, KEYS, tmp_path / "m.gguf")
    assert said["tokenizer.ggml.pre"] == name.split(" ")[0]
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == rows
    fields = {k: (lambda v=v: v) for k, v in (KEYS | said).items()}  # type: ignore[misc]
    again = tokenizer_of(Metadata(fields, tmp_path))
    for text in ("You're 40, and it's 2024!", " two  spaces\n\n\n and ünïcode 😀", "<|im_start|>user\nhi<|im_end|>"):
        assert again.encode(text, add_special_tokens=False) == hf.encode(text, add_special_tokens=False)
    assert len(again) == len(hf)  # the rows beyond it are no words
    assert again.chat_template == hf.chat_template
    assert (again.eos_token, again.bos_token, again.unk_token) == (hf.eos_token, hf.bos_token, hf.unk_token)


@pytest.mark.parametrize(
    ("hf", "words"),
    [
        (lambda: byte_level(r"\p{N}{1,2}|\S+|\s"), "none of smollm, .* splits text as it does"),
        (
            lambda: PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")), eos_token="b"
            ),
            "cannot hold this tokenizer .WordLevel.",
        ),
    ],
)
def test_another_kind_of_tokenizer_is_refused(hf: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        tokenizer_keys(hf(), 1, 400, KEYS, tmp_path / "m.gguf")


# The command


@pytest.fixture(scope="module")
def file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "helper"
    main(["export", "--run-dir", str(tiny_run), "--model", "m1", "--format", "gguf", "--out", str(out)])
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "helper-F16.gguf"]
    return out / "helper-F16.gguf"


def test_a_run_s_model_is_a_backbone_again(tiny_run: Path, file: Path, tmp_path: Path) -> None:
    experiment, adapter = open_model(f"{tiny_run}:m1", load(str(tiny_run / "config.yaml")))
    convert(file, tmp_path / "again")
    chat = [{"role": "user", "content": "I'm 40, and I lost my job. 12345 nights  without sleep!"}]
    prompt = experiment.tokenizer.prompt(chat)
    assert ChatTokenizer(tmp_path / "again").prompt(chat) == prompt
    assert ChatTokenizer(tmp_path / "again").stops == experiment.tokenizer.stops
    ours = Ours(experiment.backbone).sequence(prompt, len(prompt), adapter)
    theirs = torch_logits(torch_model(tmp_path / "again"), prompt)
    assert worst(ours, theirs) <= (SHARES["float16"] or 0) * np.abs(ours).max()
    bare = Ours(experiment.backbone).sequence(prompt, len(prompt), experiment.backbone.fresh_adapter(0))
    assert worst(bare, theirs) > worst(ours, theirs)
    card = (file.parent / "README.md").read_text()
    assert "llama-cli -m helper-F16.gguf" in card
    assert "library_name: gguf" in card


def test_what_does_not_go_together_is_refused(tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    command = ["export", "--run-dir", tiny_run, "--model", "m1", "--out", tmp_path / "out", "--format"]
    assert "only a GGUF file holds such numbers" in refused(*command, "merged", "--dtype", "q8_0")
    assert "gguf is written as one file" in refused(*command, "gguf", "--shard-gib", "1")
    assert "peft is written as one file" in refused(*command, "peft", "--shard-gib", "1")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_model_that_gguf_cannot_hold(tmp_path: Path, refused: Refused) -> None:
    save_tiny_model(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    run = tmp_path / "run"
    main(["sft", "--run-dir", str(run), *tiny_overrides(tmp_path / "hf")])
    line = refused("export", "--run-dir", run, "--model", "m0", "--format", "gguf", "--out", tmp_path / "out")
    assert "rope scaling (linear)" in line
    assert "give --format merged" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_llama_cpp_says_the_same(smollm_folder: Path, tmp_path: Path) -> None:
    """The quickstart's model in float16, where a binding is installed: greedy text from tokens, and from a chat."""
    llama = pytest.importorskip("xllamacpp")
    folder = tmp_path / "hf"
    shutil.copytree(smollm_folder, folder)
    experiment = Experiment.open(load(None, ["--model.source", str(folder), "--model.sha256", "null"]))
    adapter = experiment.backbone.fresh_adapter(0)
    export(experiment, adapter, tmp_path / "out", Form("gguf"), str(folder))
    convert(tmp_path / "out" / "out-F16.gguf", tmp_path / "again")
    chats = [
        [{"role": "user", "content": text}]
        for text in ("I lost my job this morning.", "My 2 cats died, and it's all my fault!", "Wie geht es dir? 😀")
    ]
    tokenizer = experiment.tokenizer
    prompts = [tokenizer.prompt(chat) for chat in chats]
    greedy = SamplingSettings(temperature=0)
    again = load_backbone(tmp_path / "again", None, FLOAT32)
    made = Generator(again, 4, tokenizer.stops).generate(BARE, prompts, [0, 1, 2], greedy, 24)

    settings = llama.CommonParams()
    settings.model.path = str(tmp_path / "out" / "out-F16.gguf")
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1  # more would wait for each other
    settings.n_ctx, settings.n_parallel, settings.warmup = 1024, 1, False
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(settings)
    fixed = {"temperature": 0, "top_k": 1, "cache_prompt": False}
    for chat, prompt, mine in zip(chats, prompts, made, strict=True):
        expected = tokenizer.decode(mine.token_ids)
        answer = server.handle_completions({"prompt": prompt, "n_predict": 24, **fixed})
        assert answer["choices"][0]["text"] == expected
        told = server.handle_chat_completions({"messages": chat, "max_tokens": 24, **fixed})
        assert told["usage"]["prompt_tokens"] == len(prompt)
        assert told["choices"][0]["message"]["content"] == expected
    assert len({tokenizer.decode(m.token_ids) for m in made}) == 3
