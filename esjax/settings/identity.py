"""What makes a run itself, and what only says how it is executed: the settings in which two configs really differ."""

from __future__ import annotations

from typing import Any

from esjax.settings.files import fields, flat
from esjax.settings.schema import CONTENT, EXECUTION, Config, Settings


def differing(a: Config, b: Config) -> list[str]:
    """Dotted names of the settings that define the result and in which two configs differ.

    Left out are those that only say how to compute, with which a run may go on, and the spelling of files' places: what is
    in them counts, and the stages of a run hash it.
    """
    execution, content = marked(Config, EXECUTION), marked(Config, CONTENT)
    return [
        key
        for key, (old, new) in changes(a, b).items()
        if key not in execution and (key not in content or (key != "model.sha256" and None in (old, new)))
    ]


def changes(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """All settings in which two configs differ, by dotted name, with both values."""
    left, right = (dict(flat(config.model_dump(mode="json"))) for config in (a, b))
    return {key: (left[key], right[key]) for key in left if left[key] != right[key]}


def marked(section: type[Settings], mark: str) -> set[str]:
    """Dotted names of the settings below a section that have this mark."""
    return {name for name, info in fields(section) if mark in info.metadata}
