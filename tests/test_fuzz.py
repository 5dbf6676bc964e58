"""Damaged files: whatever bytes a reader is given, it returns a result or refuses with one line that names the file.

Two kinds of damage, drawn by hypothesis: to bytes (cut, put in, overwritten), and to values (anywhere in a JSON or YAML
document something else stands). What is written here is right before it is damaged, which is asserted, too.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import read_conversations, read_dialogues
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from esjax.errors import InputError
from esjax.evolve.answers import read_chats
from esjax.evolve.filters import Filters
from esjax.evolve.pairs import read_pairs
from esjax.hub.shards import ShardReader
from esjax.model.families import FAMILIES, read_architecture
from esjax.model.families.family import COMMON
from esjax.model.families.reading import FIXED, WINDOWS
from esjax.model.layers import rope_at
from esjax.settings.files import bundled, load
from esjax.settings.schema import FilterSettings, ScreenSettings

EXAMPLES = 100
READ = sorted({key for family in FAMILIES.values() for key in (*family.read, *family.only)})
CHAT = [{"role": "user", "content": "I am tired."}, {"role": "assistant", "content": "Since when?"}]
PAIR = {"id": "a", "prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [{"role": "assistant", "content": "Sleep."}]}
ESCONV = {
    "emotion_type": "fear",
    "problem_type": "job",
    "situation": "",
    "dialog": [{"text": "Hi", "speaker": "usr"}, {"text": "Hello", "speaker": "sys", "strategy": "Question"}],
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_parameters": ROPE | {"original_max_position_embeddings": 64},
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [0, -1, 10**400, float("nan"), float("inf"), 1e308, "", "8", "\ud800", "\x00", "\ufeff", "a/b", "~"]
    )
    | st.floats()
    | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=5
)


@st.composite
def damaged_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """One to three cuts, insertions or overwritten stretches."""
    data = whole
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        stop = draw(st.integers(start, min(len(data), start + 40)))
        ugly = st.binary(max_size=6) | st.sampled_from(
            [b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\xff\xfe", b'"', b"[", b"{" * 3000]
        )
        data = data[:start] + draw(ugly) + data[stop:]
    return data


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into a document."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(p for key, value in inside for p in places(value, (*path, key)))]


@st.composite
def damaged_values(draw: st.DrawFn, whole: Any) -> Any:
    """A document in which something else stands at some place, or nothing, or one key more."""
    tree = json.loads(json.dumps(whole))
    path = draw(st.sampled_from(places(tree)))
    value = draw(VALUES)
    if not path:
        return value
    *way, last = path
    node = tree
    for key in way:
        node = node[key]
    match draw(st.sampled_from(["replace", "remove", "add"])):
        case "remove":
            del node[last]
        case "add" if isinstance(node, dict):
            node[
                draw(st.text(max_size=8) | st.sampled_from(["weight", "auto_map", *COMMON, *WINDOWS, *FIXED, *READ]))
            ] = value
        case _:
            node[last] = value
    return tree


def either(read: Callable[[], Any], file: Path) -> Any:
    """The result, or None where it was refused with one line that names the file. Anything else is a fault."""
    try:
        return read() or True
    except InputError as refusal:
        line = str(refusal)
        line.encode()  # can be printed
        assert "\n" not in line
        assert file.name in line or file.parent.name in line, line
        assert len(line) < 2000, line
        return None


SAID = [["usr", "I moved."], ["sys", "Where to?"]]
OTHERS: dict[str, Any] = {
    "pesconv": ESCONV | {"persona": ["I am tall."]},
    "extes": {
        "scene": "Work",
        "description": "A desk.",
        "content": [{"User": "a"}, {"AI Strategy": "Others", "AI": "b"}],
    },
    "augesc": {"text": str(SAID)},
    "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "alpaca": {"instruction": "Add.", "input": "1 2", "output": "3"},
}
LINES: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "sample": (
        json.loads(bundled("bundled:data/sample/train.jsonl").read_text().splitlines()[0]),
        lambda f: read_dialogues("sample", str(f)),
    ),
    "esconv": (ESCONV, lambda f: read_dialogues("esconv", str(f))),
    **{name: (row, lambda f, name=name: read_dialogues(name, str(f))) for name, row in OTHERS.items()},
    "conversations": ({"id": "a", "messages": CHAT}, lambda f: read_conversations(str(f))),
    "chats": ({"id": "a", "messages": CHAT[:1]}, lambda f: read_chats(f, "user")),
    "pairs": (PAIR, read_pairs),
}
relaxed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", LINES)
@relaxed
@given(data=st.data())
def test_json_lines(kind: str, data: st.DataObject, tmp_path: Path) -> None:
    row, read = LINES[kind]
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(row))
    assert either(lambda: read(file), file)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_bytes((json.dumps(row) + "\n" + json.dumps(row | {"id": "b"})).encode())))
    else:
        file.write_text(
            "\n" + json.dumps(data.draw(damaged_values(row))) + "\n", encoding="utf-8", errors="surrogatepass"
        )
    either(lambda: read(file), file)


@settings(relaxed, max_examples=40)
@given(data=st.data())
def test_yaml(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    text = bundled("bundled:configs/quickstart.yaml").read_text()
    file.write_text(text)
    assert load(str(file), []) == load(None, [])
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_bytes(text.encode())))
    else:
        tree = data.draw(damaged_values(yaml.safe_load(text)))
        file.write_text(yaml.safe_dump(tree, allow_unicode=False), encoding="utf-8")
    either(lambda: load(str(file), []), file)


@relaxed
@given(data=st.data())
def test_config_json(data: st.DataObject, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    family = data.draw(st.sampled_from(list(FAMILIES)))
    whole = LLAMA | {"model_type": family, "pad_token_id": 0}
    if family in ("gemma3_text", "phi3"):  # their rope parameters are of another form
        whole["rope_parameters"] = None
    file.write_text(json.dumps(whole))
    assert either(lambda: read_architecture(tmp_path), file)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_bytes(json.dumps(whole).encode())))
    else:
        file.write_text(json.dumps(data.draw(damaged_values(whole))))
    arch = either(lambda: read_architecture(tmp_path), file)
    if arch is not None:  # numbers that a model can be made of
        for kind in arch.kinds:
            assert kind.window is None or 0 < kind.window < arch.max_positions
            rope = rope_at(kind, np.arange(3)[None])
            assert rope is None or all(np.isfinite(x).all() for x in rope)
        sizes = (arch.vocab, arch.width, arch.layers, arch.heads, arch.kv_heads, arch.head_size, arch.hidden)
        assert all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (*sizes, arch.max_positions))
        assert arch.heads % arch.kv_heads == 0
        assert arch.head_size % 2 == 0
        assert np.isfinite(arch.norm_eps)


@relaxed
@given(data=st.data())
def test_safetensors(data: st.DataObject, tmp_path: Path) -> None:
    """The header is eight bytes of its length and as much JSON: both are damaged, and what follows is cut."""
    file = tmp_path / "model.safetensors"
    whole = save({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float32)})
    size = struct.unpack("<Q", whole[:8])[0]
    header, rest = json.loads(whole[8 : 8 + size]), whole[8 + size :]

    def read() -> dict[str, np.ndarray]:
        reader = ShardReader(tmp_path)
        reader.check("a", (3, 4))
        return {"a": reader.read("a", (slice(None), slice(0, 2)))}

    file.write_bytes(whole)
    found = either(read, file)
    assert np.array_equal(found["a"], np.ones((3, 2)))
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_bytes(whole)))
    else:
        made = json.dumps(data.draw(damaged_values(header))).encode()
        length = data.draw(st.just(len(made)) | st.integers(0, 2**64 - 1))
        file.write_bytes(struct.pack("<Q", length) + made + rest[: data.draw(st.integers(0, len(rest)))])
    found = either(read, file)
    assert found is None or found["a"].shape == (3, 2)


@relaxed
@given(data=st.data())
def test_safetensors_index(data: st.DataObject, tmp_path: Path) -> None:
    whole = save({"a": np.ones((3, 4), np.float32)})
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(whole)
    index = {"metadata": {"total_size": 48}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    file = tmp_path / "model.safetensors.index.json"

    def read() -> np.ndarray:
        reader = ShardReader(tmp_path)
        reader.check("a", (3, 4))
        return reader.read("a", (slice(None), slice(None)))

    file.write_text(json.dumps(index))
    assert either(lambda: {"a": read()}, file)
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged_bytes(json.dumps(index).encode())))
    else:
        file.write_text(json.dumps(data.draw(damaged_values(index))))
    either(lambda: {"a": read()}, tmp_path / "model")


@relaxed
@given(text=st.text(max_size=12) | st.text("()[]\\?*+|^$b-", max_size=8))
def test_patterns(text: str, tmp_path: Path) -> None:
    file = tmp_path / "patterns.txt"
    file.write_text("I want to die\n", encoding="utf-8")

    def reason(said: str) -> str | None:
        return Filters.load(FilterSettings(), ScreenSettings(crisis_patterns=str(file))).screen.dropped(said, False)

    assert reason("So I want to die.") == "crisis"
    file.write_text(text, encoding="utf-8", errors="ignore")
    either(lambda: {"reason": reason("I want to live")}, file)
