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


def shard_names(folder: Path) -> list[str]:
    """The files that hold a folder's weights. Raises InputError naming a missing or damaged index."""
    if (folder / SINGLE).exists():
        return [SINGLE]
    if not (folder / INDEX).exists():
        raise InputError(f"{folder}: no weights; expected {SINGLE} or {INDEX} in it")
    try:
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as e:
        raise InputError(f"{folder / INDEX}: damaged index ({e})") from e


class ShardReader:
    """The tensors of a Hugging Face folder, opened lazily."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError naming a missing or damaged file."""
        names = shard_names(folder)
        self.folder = folder
        self.files: dict[str, Any] = {}
        for name in names:
            try:
                shard = safe_open(folder / name, framework="numpy")
            except (OSError, SafetensorError) as e:
                raise InputError(f"{folder / name}: missing or damaged ({e}); fetch the checkpoint again") from e
            for key in shard.keys():  # noqa: SIM118  not a dict
                self.files[key] = shard

    def keys(self) -> set[str]:
        return set(self.files)

    def check(self, key: str, shape: tuple[int, ...]) -> None:
        """Raise InputError when a tensor is missing or misshaped."""
        if key not in self.files:
            raise InputError(f"{self.folder}: the tensor {key} is missing from the checkpoint")
        found = self.files[key].get_slice(key).get_shape()
        if found != list(shape):
            raise InputError(f"{self.folder}: the tensor {key} has shape {found}, expected {list(shape)}")

    def read(self, key: str, part: tuple[slice, ...]) -> np.ndarray:
        """These slices of one tensor, and no more of its file."""
        return np.asarray(self.files[key].get_slice(key)[part])


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
