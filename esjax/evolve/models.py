"""Which model a command names, and the settings that come with it: a run's own, under what the command was told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.run import buckets
from esjax.settings.files import Overrides, changed, load
from esjax.settings.schema import Config

NO_SYSTEM = "bundled:prompts/none.txt"
# The settings, or whole sections, that a finished model makes use of.
EXPORT = ("model.sha256", "model.dtype", "model.attention")
SCORE = (*EXPORT, "mesh", "data.window", "prompts.system", "sft.micro_rows")
SAMPLE = (
    *("seed", *EXPORT, "model.cache_dtype", "model.decoding_weights", "mesh", "prompts.system"),
    *("reply.temperature", "reply.top_p", "reply.top_k", "reply.max_tokens", "reply.batch"),
)
BENCH = (
    *("model.attention", "model.remat", "model.source", "model.sha256", "data.train", "data.format", "data.window"),
    *("prompts.system", "seed"),
)
DATA = ("seed", "model.sha256", "data.format", "data.window", "screen", "filters.crisis_patterns", "prompts.system")
REFLECT = ("evolve.reflection", "prompts.principles", "prompts.reflect")
USED = (*SAMPLE, *SCORE, *REFLECT)
FIXED = ("model.source", "lora.rank", "lora.alpha", "lora.targets")  # the model's own: taken where they say what is so


def uses(used: Iterable[str], key: str) -> bool:
    """Whether a setting is among those that are used, or lies in a section that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in used)


def adapter_folder(run: Path, t: int) -> Path:
    """Where M_t's adapter lies in a run directory."""
    return run / "sft" / "adapter" if t == 0 else run / f"round{t}" / "dpo" / "adapter"


def run_model(spec: str) -> tuple[Path, int] | None:
    """The run directory and t of ``RUN_DIR:mT``; None for a bare backbone. Raises InputError where there is no such model."""
    match = re.fullmatch(r"(.+):m(\d+)", spec)
    if match is None:
        return None
    run, t = buckets.copied(match[1]), int(match[2])
    if not (run / "config.yaml").exists():
        raise InputError(f"{spec}: {run} is not a run directory (no config.yaml in it)")
    if not adapter_folder(run, t).exists():
        have = [f"m{i}" for i in range(100) if adapter_folder(run, i).exists()]
        raise InputError(f"{spec}: M_{t} is not there; this run has {', '.join(have) or 'no finished model'}")
    return run, t


def model_settings(spec: str, given: Overrides) -> Config:
    """The settings with which a model is opened, whatever was ``given`` over them.

    A run's model brings the run's settings, its system message too. A bare backbone has those of the given file or of the
    quickstart, and a system message only where one is given. Raises InputError.
    """
    for key in sorted(given.single):
        if not uses((*USED, *FIXED), key):
            raise InputError(f"{key}: an opened model makes no use of it; leave it out")
    base, asked = given.load(together=False), given.settings()
    own = run_settings(spec, {key: value for key, value in asked.items() if uses((*USED, *FIXED), key)})
    if own is not None:
        return own
    if (Path(spec) / "manifest.json").exists():
        raise InputError(f"{spec} is a run directory; name one of its models, such as {spec}:m0")
    for key in sorted(given.single.keys() & set(FIXED)):
        raise InputError(f"{key}: {spec} is a bare backbone, which has nothing to set there; leave it out")
    hashed = spec == base.model.source or "model.sha256" in asked
    source = {"model.source": spec, "model.sha256": base.model.sha256 if hashed else None}
    return changed(base, source if "prompts.system" in asked else source | {"prompts.system": NO_SYSTEM})


def run_settings(spec: str, asked: Mapping[str, Any], together: bool = False) -> Config | None:
    """The settings of the run behind ``RUN_DIR:mT`` with what was asked for over them; None for a bare backbone.

    ``together`` is for what trains on: settings must then fit one another, too. Raises InputError for what cannot be
    changed in an adapter that is made.
    """
    named = run_model(spec)
    if named is None:
        return None
    file = str(named[0] / "config.yaml")
    own, mixed = load(file, together=False), load(file, asked, together)
    for key, before in own.lora:
        now = getattr(mixed.lora, key)
        if sorted(now) != sorted(before) if key == "targets" else now != before:
            raise InputError(f"lora.{key}={now}: {spec} was made with lora.{key}={before}, which stays; leave it out")
    return mixed
