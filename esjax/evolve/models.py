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
EXPORT = ("model.sha256", "model.chat_template", "model.dtype", "model.attention", "model.base")
DECODING = ("model.cache_dtype", "model.decoding_attention", "model.decoding_weights")
SCORE = (*EXPORT, "mesh", "data.window", "prompts.system", "sft.micro_rows")
SAMPLE = (
    *("seed", *EXPORT, *DECODING, "mesh", "prompts.system"),
    *("reply.temperature", "reply.top_p", "reply.top_k", "reply.max_tokens", "reply.batch"),
)
SERVE = (*SAMPLE, "data.window")
BENCH = (
    *("model.attention", "model.decoding_attention", "model.remat", "model.source", "model.sha256", "data.train"),
    *("data.format", "data.window", "prompts.system", "seed"),
)
DATA = ("seed", "model.sha256", "data.format", "data.window", "screen", "prompts.system")
EVAL = (
    *("seed", *EXPORT, *DECODING, "mesh", "data", "evolve.batch"),
    *("sft.row_length", "sft.micro_rows", "dpo.row_length", "dpo.micro_rows", "filters", "screen", "reply", "eval"),
    *("evolve.reflection", "prompts"),
)
REFLECT = ("evolve.reflection", "prompts.principles", "prompts.reflect")
CHAT = (*SERVE, *REFLECT)
USED = (*SAMPLE, *SCORE, *REFLECT)
# The model's own: taken where they say what is so.
FIXED = ("model.source", "lora.rank", "lora.alpha", "lora.targets", "lora.rslora")


def uses(used: Iterable[str], key: str) -> bool:
    """Whether a setting is among those that are used, or lies in a section that is."""
    return any(f"{key}.".startswith(f"{name}.") for name in used)


KEPT_AS = {"lora": "adapter", "all": "model"}  # by train.what: a PEFT folder, or a whole Hugging Face folder


def adapter_folder(run: Path, t: int) -> Path:
    """Where what was trained for M_t lies in a run directory: its adapter, or all of it."""
    made_by = run / "sft" if t == 0 else run / f"round{t}" / "dpo"
    return made_by / "model" if (made_by / "model").exists() else made_by / "adapter"


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


def is_adapter(spec: str) -> bool:
    """Whether a model is named by a PEFT folder."""
    return (Path(spec).expanduser() / "adapter_config.json").is_file()


def adapter_settings(spec: str, source: str | None) -> dict[str, Any]:
    """The settings that a PEFT folder brings: its base (unless ``source`` is given instead) and its shape. Raises InputError."""
    from esjax.model.lora import read_peft

    folder = Path(spec).expanduser()
    stored = read_peft(folder)
    shape = stored.lora
    lora = {"rank": shape.rank, "alpha": shape.scale * shape.rank, "targets": shape.targets, "rslora": False}
    name, revision = (stored.config.get(key) for key in ("base_model_name_or_path", "revision"))
    if source is None:
        if (folder / "base").is_dir():  # an export of a model that has no name brings it along
            source = str(folder / "base")
        elif isinstance(name, str) and (Path(name).expanduser().is_dir() or re.fullmatch(r"pypi:.+|.+\.gguf", name)):
            source = name
        elif isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            source = f"hf:{name}" + (f"@{revision}" if revision else "")
        else:
            raise InputError(f"{spec}: its base {name!r} is not there; say where it is with --model.source")
    return {"model.source": source, **{f"lora.{key}": value for key, value in lora.items()}}


def _own_shape(spec: str, given: Overrides) -> None:
    """Raise InputError for a shape that was asked for beside an adapter, which has its own."""
    for key in sorted(given.single.keys() & set(FIXED) - {"model.source"}):
        raise InputError(f"{key}: {spec} is an adapter, which is of the shape that it has; leave it out")


def start_settings(spec: str, given: Overrides) -> Config:
    """The settings of training that starts from a PEFT folder: its base and shape, and what was given. Raises InputError."""
    _own_shape(spec, given)
    base = given.load()
    brought = adapter_settings(spec, base.model.source if "model.source" in given.settings() else None)
    return changed(base, brought | _own_hash(given) | {"lora.start": spec}).validate_together()


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
    if is_adapter(spec):
        _own_shape(spec, given)
        own_source = given.single.get("model.source")
        brought = adapter_settings(spec, None if own_source is None else base.model.source)
        brought |= _own_hash(given)
        return changed(base, brought if "prompts.system" in asked else brought | {"prompts.system": NO_SYSTEM})
    if (Path(spec) / "manifest.json").exists():
        raise InputError(f"{spec} is a run directory; name one of its models, such as {spec}:m0")
    for key in sorted(given.single.keys() & set(FIXED)):
        raise InputError(f"{key}: {spec} is a bare backbone, which has nothing to set there; leave it out")
    own = backbone_settings(spec, base, given)
    return own if "prompts.system" in asked else changed(own, {"prompts.system": NO_SYSTEM})


def backbone_settings(spec: str, base: Config, given: Overrides) -> Config:
    """A config with a bare backbone as its model, without the hash and the template that ``base`` has for its own model."""
    source = {"model.source": spec} | _own_hash(given)
    if spec != base.model.source and "model.chat_template" not in given.single:
        source["model.chat_template"] = None
    return changed(base, source)


def _own_hash(given: Overrides) -> dict[str, Any]:
    """The model's hash if it was given in so many words; that of a config file is of the file's own model."""
    return {key: value for key, value in given.single.items() if key == "model.sha256"}


def named_model(spec: str, sha256: str | None) -> Config:
    """The settings with which a model is opened that another setting names, such as a judge. Raises InputError."""
    return model_settings(spec, Overrides.of(None, {} if sha256 is None else {"model.sha256": sha256}))


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
