"""Safetensors checkpoints of one or many files: read tensor by tensor, write in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from esjax.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


FLOATS = ("F64", "F32", "F16", "BF16")
PREFIX = "model."  # of a base model inside a causal one


def shard_names(folder: Path) -> list[str]:
    """The files that hold a folder's weights. Raises InputError naming a missing or damaged index."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    index = folder / INDEX
    if not index.exists():
        raise InputError(
            f"{folder}: no weights; expected {SINGLE} or {INDEX} in it (only safetensors are read: transformers' "
            "save_pretrained writes them)"
        )
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise InputError(f"{index}: damaged index ({e!r:.160}); fetch the checkpoint again") from e
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or len(name) > 255:
            raise InputError(f"{index}: {name!r:.160} is not the name of a safetensors file in this folder")
    return sorted(names)


class ShardReader:
    """The tensors of a Hugging Face folder, opened lazily."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError naming a missing or damaged file."""
        self.folder = folder
        self.files: dict[str, tuple[Any, str]] = {}  # the file, and the tensor's name in it
        for name in shard_names(folder):
            try:
                shard = safe_open(folder / name, framework="numpy")
            except (OSError, SafetensorError) as e:
                raise InputError(f"{folder / name}: missing or damaged ({e}); fetch the checkpoint again") from e
            for key in shard.keys():  # noqa: SIM118  not a dict
                self.files[key] = (shard, key)

    def keys(self) -> set[str]:
        return set(self.files)

    def rename(self, known: set[str]) -> None:
        """Add or take away a base model's prefix where that makes a name known, as transformers does."""
        for key in [k for k in self.files if k not in known]:
            other = key.removeprefix(PREFIX) if key.startswith(PREFIX) else PREFIX + key
            if other in known and other not in self.files:
                self.files[other] = self.files.pop(key)

    def same(self, key: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, looked at in parts."""
        shape = self._slice(key).get_shape()
        if shape != self._slice(other).get_shape():
            return False
        cuts = [slice(i, min(i + 4096, shape[0])) for i in range(0, shape[0], 4096)]
        return all(np.array_equal(self.read(key, (cut,)), self.read(other, (cut,))) for cut in cuts)

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raise InputError when a tensor is missing or misshaped, or holds no plain floating-point numbers."""
        if key not in self.files:
            raise InputError(f"{self.folder}: the tensor {key} is missing from the checkpoint")
        found, kind = self._slice(key).get_shape(), self._slice(key).get_dtype()
        if found != list(shape):
            raise InputError(f"{self.folder}: the tensor {key} has shape {found}, expected {list(shape)}")
        if kind not in FLOATS:
            raise InputError(
                f"{self.folder}: the tensor {key} has the type {kind}; allowed: {', '.join(FLOATS)} (quantised weights must "
                "be dequantised first)"
            )

    def read(self, key: str, part: tuple[slice, ...]) -> np.ndarray:
        """These slices of one tensor, and no more of its file."""
        return np.asarray(self._slice(key)[part])

    def _slice(self, key: str) -> Any:
        shard, name = self.files[key]
        return shard.get_slice(name)


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int = 4 << 30) -> None:
    """Write tensors as one file, or as several of at most ``max_bytes`` with an index, holding one file's worth at a time."""
    pending: dict[str, np.ndarray] = {}
    shards: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for key, array in tensors:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > max_bytes:
            flush()
        pending[key] = np.ascontiguousarray(array)
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, keys in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}.safetensors").rename(folder / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
