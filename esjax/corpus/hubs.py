"""Rows of datasets that libraries fetch and keep: hf: through ``datasets``, tfds: through ``tensorflow_datasets``."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.hub.fetch import unreachable
from esjax.run.jsonl import Line, line_of

HUBS = ("hf:", "hf-stream:")


def is_hub(source: str) -> bool:
    """Whether one of these libraries reads a source."""
    return source.startswith((*HUBS, "tfds:"))


@lru_cache(maxsize=8)
def rows(source: str) -> list[Line]:
    """The rows of a split, as ``datasets`` or ``tensorflow_datasets`` keep it.

    Args:
        source: hf:ORG/NAME[@REVISION][[/CONFIG]/SPLIT], the split "train" when left out; hf:FOLDER[/SPLIT], which
            ``save_to_disk`` wrote or which holds data files; hf-stream: and the same, read row by row from the hub with
            nothing kept on disk, and of SPLIT[:N] only the first N rows; or tfds:NAME[/CONFIG][:VERSION]/SPLIT, under
            $TFDS_DATA_DIR.

    Raises:
        InputError: no such dataset, folder or split (with those that there are).
        TransientError: the network.
    """
    kind, _, name = source.partition(":")
    found = _from_tfds(source, name) if kind == "tfds" else _from_hub(source, name, stream=kind == "hf-stream")
    return [line_of(row, f"{source}, row {n}", n) for n, row in enumerate(found, start=1)]


def _from_hub(source: str, name: str, stream: bool) -> list[dict[str, Any]]:
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder, split = _folder(name)
    try:
        if folder is not None and any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(str(folder))
            parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            name, count = _cut(split) if stream else (split, None)
            if name not in parts:
                raise InputError(f"{source}: no split {name!r}; there are {', '.join(parts)}")
            return list(islice(parts[name], count))
        if folder is not None:
            return _loaded(str(folder), None, None, split, stream)
        match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/([^/]+))??(?:/([^/]+))?", name)
        if not match:
            raise InputError(
                f"{source}: expected hf:ORG/NAME[@REVISION][/SPLIT], or hf:FOLDER[/SPLIT] of a folder that exists"
            )
        repository, revision, config, split = match.groups()
        split = split or "train"
        try:
            return _loaded(repository, config, revision, split, stream)
        except ConnectionError:
            # Offline the library knows what it has prepared; a repository that was only downloaded lies in the hub's cache.
            try:
                folder = Path(
                    snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
                )
            except LocalEntryNotFoundError:
                folder = None
            if folder is None:
                raise
            return _loaded(str(folder), config, None, split, stream)
    except InputError:
        raise
    except IndexError:  # so the library meets a saved dataset without rows
        return []
    except ValueError as e:  # no such split or config: the library says which there are
        raise InputError(f"{source}: {' '.join(str(e).split())[:300]}") from e
    except Exception as e:
        remedy = "check the name, log in, or download it elsewhere (save_to_disk) and give hf:FOLDER"
        if "OfflineModeIsEnabled" in str(e):  # and it is not in the cache: no retry will help
            raise InputError(
                f"{source} is not in the cache of datasets, and it is told to stay offline; {remedy}"
            ) from e
        raise unreachable(f"{source} could not be loaded with datasets", e, remedy) from e


def _loaded(path: str, config: str | None, revision: str | None, split: str, stream: bool) -> list[dict[str, Any]]:
    """The rows of a split. Raises ValueError naming the splits that there are."""
    import datasets

    if not stream:
        return list(datasets.load_dataset(path, config, revision=revision, split=split))
    name, count = _cut(split)
    return list(islice(datasets.load_dataset(path, config, revision=revision, split=name, streaming=True), count))


def _cut(split: str) -> tuple[str, int | None]:
    """The name in SPLIT[:N], and N."""
    match = re.fullmatch(r"(.*)\[:(\d+)\]", split)
    return (match[1], int(match[2])) if match else (split, None)


def _folder(name: str) -> tuple[Path | None, str]:
    """The local folder that a name means, if it does, and the split."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path, "train"
    local = name.startswith(("/", "~", ".")) or (path.parent.is_dir() and len(path.parts) > 1)
    return (path.parent, path.name) if local and path.parent.is_dir() else (None, "train")


def _from_tfds(source: str, name: str) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    dataset, slash, split = name.rpartition("/")
    if not slash:
        raise InputError(f"{source}: the split is missing; expected tfds:NAME[/CONFIG][:VERSION]/SPLIT")
    try:
        builder = tfds.builder(dataset, data_dir=os.environ.get("TFDS_DATA_DIR"))
        if split not in builder.info.splits:
            there = ", ".join(builder.info.splits) or "none, as it is not built"
            raise InputError(f"{source}: no split {split!r}; there are {there}")
        return [_plain(row) for row in builder.as_data_source(split=split)]
    except InputError:
        raise
    except Exception as e:
        where = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise InputError(
            f"{source}: could not be read with tensorflow_datasets ({where}); build it (README), in the folder $TFDS_DATA_DIR"
        ) from e


def _plain(value: Any) -> Any:
    """Text for bytes, and lists of objects for what TFDS keeps as an object of lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        made = {key: _plain(x) for key, x in value.items()}
        lengths = {len(x) for x in made.values() if isinstance(x, list)}
        if made and len(lengths) == 1 and all(isinstance(x, list) for x in made.values()):
            return [dict(zip(made, each, strict=True)) for each in zip(*made.values(), strict=True)]
        return made
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
