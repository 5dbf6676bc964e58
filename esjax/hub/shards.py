"""Safetensors checkpoints of one or many files: read tensor by tensor, write in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

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


class _Shard:
    """A safetensors file that is written tensor by tensor: room for its header is left at its start."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self._room = path, -(-(64 + ENTRY * count) // 8) * 8
        self.size = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._file = open(path, "wb")  # noqa: SIM115  closed in close()
        self._file.seek(8 + self._room)

    def add(self, key: str, array: np.ndarray) -> None:
        end = self.size + array.nbytes
        kind = KINDS[array.dtype.name]
        self._header[key] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [self.size, end]}
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self.size = end

    def has_room(self, nbytes: int, most: int) -> bool:
        """Whether the file, which holds one tensor at least, may take so many bytes more."""
        return not self.size or 8 + self._room + self.size + nbytes <= most

    def close(self) -> None:
        header = json.dumps(self._header, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise AssertionError("the header needs more room than was left for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
        self._file.close()

    @property
    def keys(self) -> list[str]:
        return list(self._header)[1:]


KINDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
ENTRY = 192  # bytes that a tensor takes in a header, with a name of up to 80


def write_shards(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], count: int, max_bytes: int = 4 << 30) -> None:
    """Write tensors as one file, or as several of at most ``max_bytes`` with an index, holding one tensor at a time.

    There are at most ``count`` of them. (safetensors' own writer wants all of a file in memory, and copies it.)
    """
    shards: list[_Shard] = []
    for key, array in tensors:
        if not shards or not shards[-1].has_room(array.nbytes, max_bytes):
            if shards:
                shards[-1].close()
            shards.append(_Shard(folder / f"shard-{len(shards)}.safetensors", count))
        shards[-1].add(key, array)
    shards[-1].close()
    if len(shards) == 1:
        shards[0].path.rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        shard.path.rename(folder / name)
        weight_map |= dict.fromkeys(shard.keys, name)
    index = {"metadata": {"total_size": sum(shard.size for shard in shards)}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
