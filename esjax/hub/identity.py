"""What makes a backbone itself: the hashes of its weights, its config, its tokenizer and its chat templates."""

from __future__ import annotations

import contextlib
import fcntl
import json
from pathlib import Path

from esjax.hub.fetch import cache_root
from esjax.hub.shards import INDEX, SINGLE, shard_names
from esjax.run.files import sha256, write_text

# Files beside the weights that change what a model computes or how text reaches it.
OTHERS = (
    "config.json",
    "generation_config.json",
    "chat_template*",
    "additional_chat_templates/*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


def identity(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a Hugging Face folder that counts, by name; where the folder lies does not.

    Large files are read once: their hashes are kept in the cache beside their size, times and number on the disk, which
    change with any write. Raises InputError naming a missing file.
    """
    names = shard_names(folder)
    files = [folder / name for name in ([INDEX, *names] if names != [SINGLE] else names)]
    files += [p for pattern in OTHERS for p in folder.glob(pattern) if p.is_file()]
    cache = cache_root() / "hashes.json"
    cache.parent.mkdir(parents=True, exist_ok=True)
    with open(cache.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one machine do not read the same files at once
        known: dict[str, list[object]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = dict(json.loads(cache.read_text(encoding="utf-8")))
        before = dict(known)
        out = {file.relative_to(folder).as_posix(): _hash(file, known) for file in sorted(set(files))}
        if known != before:
            there = {place: entry for place, entry in known.items() if Path(place).exists()}
            write_text(cache, json.dumps(there, indent=1) + "\n")
    return out


def _hash(file: Path, known: dict[str, list[object]]) -> str:
    s = file.stat()
    place, state = str(file.resolve()), [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
    entry = known.get(place)
    if entry is None or entry[:-1] != state:
        entry = known[place] = [*state, sha256(file)]
    return str(entry[-1])
