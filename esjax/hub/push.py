"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from esjax.errors import InputError
from esjax.hub.fetch import unreachable

REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token that may write there"


def check_push(name: str) -> None:
    """Whether somebody is logged in and the name is one, before anything is computed. Raises InputError, TransientError."""
    from huggingface_hub import HfApi, get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"--push-to {name}: expected ORG/NAME, a repository of the Hugging Face hub")
    if get_token() is None:
        raise InputError(f"--push-to {name}: nobody is logged in; {REMEDY}")
    try:
        HfApi().whoami()
    except Exception as e:
        raise unreachable(f"--push-to {name}: the hub does not know this token", e, REMEDY) from e


def push(folder: Path, name: str, message: str) -> str:
    """Upload a folder to the model repository ``name``, a new one private, as one commit; returns its address.

    Raises InputError where the hub refuses it, TransientError where it may take it later.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = str(api.create_repo(name, repo_type="model", private=True, exist_ok=True))
        api.upload_folder(folder_path=str(folder), repo_id=name, repo_type="model", commit_message=message)
    except Exception as e:
        raise unreachable(f"{folder} is written, but could not be pushed to {name}", e, REMEDY) from e
    return address
