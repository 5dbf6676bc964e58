"""Shared fixtures: a tiny random model with its own tokenizer, the real SmolLM2, and real ESConv dialogues where present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Compiled programs, also those of an instant, are shared by all tests and the processes that they start. Set before jax comes.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")  # a test's programs run once: compiled fast

import jax
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esjax.cli import main
from esjax.corpus.dialogue import Dialogue, Message
from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.evolve.filters import Filters
from esjax.hub.fetch import cache_root, resolve
from esjax.rows import Rows
from esjax.settings.files import bundled, load
from esjax.settings.schema import Config, FilterSettings, ScreenSettings
from esjax.tokens.answers import Chat
from esjax.tokens.encode import Encoder, Pair
from esjax.tokens.tokenizer import ChatTokenizer

Refused = Callable[..., str]  # see the fixture
WithTemplate = Callable[[str], ChatTokenizer]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
REPOSITORY = Path(__file__).parent.parent
ESCONV = Path(os.environ.get("ESJAX_ESCONV", REPOSITORY.parent / "shared" / "data" / "esconv"))


def chat(*texts: str, first: int = 0) -> list[Message]:
    """Messages by turns of the user and the assistant; ``first`` is 1 where the assistant begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts, first)]


def read_dialogues(format: str, path: str) -> list[Dialogue]:
    """The dialogues of a file in a format."""
    return read(path, format).dialogues


def read_conversations(path: str) -> list[tuple[str, list[Message]]]:
    """The chats of a file of messages, by id."""
    return [(d.id, d.messages(len(d.turns))) for d in read(path, "messages").dialogues]


def examples(encoder: Encoder, dialogue: Dialogue) -> list[Rows]:
    """The SFT rows of one dialogue."""
    return encoder.examples([encoder.chat(dialogue)])[0]


def chat_examples(encoder: Encoder, messages: list[Message]) -> list[Rows]:
    """The SFT rows of one chat, whose every answer of a user is a target."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    answers = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant" and i > first)
    return encoder.examples([Chat(messages, answers, "here")])[0]


def context(encoder: Encoder, dialogue: Dialogue, turn: int) -> list[Message]:
    """The chat that turn ``turn`` answers."""
    return encoder.with_system(dialogue.messages(turn))


def pair_ids(encoder: Encoder, prompt: list[Message], chosen: str, rejected: str) -> tuple[list[int], list[list[int]]]:
    """The tokens of one preference pair."""
    return encoder.pairs([Pair(prompt, chosen, rejected, "here")])[0]


def target(encoder: Encoder, messages: list[Message], cut: bool = True) -> Rows:
    """The scoring row of one chat."""
    return encoder.targets([(messages, "here")], cut)[0]


def sample_texts() -> list[str]:
    rows = [json.loads(line) for line in bundled("bundled:data/sample/train.jsonl").read_text().splitlines()]
    return [turn["text"] for row in rows for turn in row["turns"]]


def save_tokenizer(folder: Path, vocab: int = 1024) -> PreTrainedTokenizerFast:
    """A small byte-level BPE trained on the sample corpus, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
    fast.save_pretrained(folder)
    return fast


def save_tiny_model(folder: Path, seed: int = 0, kv_heads: int = 2) -> None:
    """A random two-layer Llama that ends its replies after some twenty tokens, so that the whole pipeline has work to do."""
    fast = save_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:
                p.copy_(torch.randn_like(p) * (0.3 if "lm_head" in name or "embed" in name else 0.1))
        model.model.embed_tokens.weight[:, 0] = 4.0  # a constant direction, which the head of the end token reads
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[1] = 0.0
        model.lm_head.weight[1, 0] = 1.7
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random Llama and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny_folder: Path) -> ChatTokenizer:
    return ChatTokenizer(tiny_folder)


@pytest.fixture(scope="session")
def with_template(tiny_folder: Path) -> WithTemplate:
    """The tiny tokenizer with another chat template."""

    def make(template: str) -> ChatTokenizer:
        out = ChatTokenizer(tiny_folder)
        out.hf.chat_template = template
        return out

    return make


@pytest.fixture(scope="session")
def filters() -> Filters:
    """The shipped patterns with the default limits."""
    return Filters.load(FilterSettings(), ScreenSettings())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused as bad input; returns its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("esjax: ")]
        assert stop.value.code == 2, lines
        assert len(lines) == 1
        return lines[0].removeprefix("esjax: error: ")

    return run


def tiny_overrides(folder: Path) -> list[str]:
    """Settings that make the quickstart's config a run of seconds with the tiny model."""
    values = {
        "model.source": folder,
        "model.sha256": "null",
        "lora.rank": 4,
        "data.window": 768,
        "sft.row_length": 768,
        "sft.epochs": 1,
        "sft.learning_rate": 0.0001,
        "sft.batch_rows": 4,
        "sft.checkpoint_every": 2,
        "dpo.row_length": 640,
        "dpo.trunk": "dialogue",
        "dpo.checkpoint_every": 1,
        "dpo.batch_rows": 2,
        "evolve.contexts_per_round": 16,
        "evolve.batch": 4,
        "evolve.context_tokens": 480,
        "evolve.draft.max_tokens": 64,
        "evolve.refinement.max_tokens": 64,
        "evolve.reflection.field_tokens": 8,
        "filters.min_words": 1,
        "filters.min_length_ratio": 0.05,
        "filters.max_length_ratio": 20.0,
        "reply.max_tokens": 64,
        "reply.max_contexts": 4,
        "reply.batch": 4,
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def tiny_config(tiny_folder: Path) -> Config:
    return load(None, tiny_overrides(tiny_folder))


@pytest.fixture(scope="session")
def tiny_config_file(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny config as a YAML file, for the command line."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config.model_dump(mode="json")))
    return file


@pytest.fixture(scope="session")
def tiny_run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run directory of the tiny model, made by a process of its own; what that said lies beside it."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "-m", "esjax", "evolve", "--run-dir", str(run), *tiny_overrides(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run.with_suffix(".err").write_text(done.stderr)
    return run


@pytest.fixture(scope="session")
def smollm_folder() -> Path:
    """SmolLM2-135M-Instruct as the quickstart uses it, dequantised to a Hugging Face folder."""
    config = load(None, [])
    try:
        return resolve(config.model.source, config.model.sha256)
    except InputError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(f"real weights are not at hand: {error}")


@pytest.fixture(scope="session")
def esconv() -> Path:
    """The folder with real ESConv rows (not part of this repository: non-commercial licence)."""
    if not (ESCONV / "valid.jsonl").exists():
        pytest.skip(f"no ESConv data at {ESCONV}; set ESJAX_ESCONV to a folder with train_part.jsonl and valid.jsonl")
    return ESCONV
