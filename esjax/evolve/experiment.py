"""What all stages of a run share: the config, the backbone, the tokenizer, the encoder, the dialogues and their rows."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.evolve.corpora import Corpora
from esjax.evolve.filters import Filters
from esjax.evolve.models import adapter_folder, is_adapter, run_model
from esjax.evolve.reflect import Instructions, cut_fields, form, parse, whole_words
from esjax.hub.fetch import RECORD, cache_root, public_name, resolve
from esjax.hub.identity import identity
from esjax.hub.shards import ShardReader
from esjax.model.families import read_architecture
from esjax.model.lora import Adapter, lora_from, place_adapter, read_peft
from esjax.model.weights import FLOAT32, Backbone, Choice, compute_dtype, load_backbone, read_weights
from esjax.run.files import sha256
from esjax.run.manifest import check_base, check_made, read_manifest
from esjax.run.progress import say
from esjax.sample.compiled import SamplingPrograms, sampling_programs
from esjax.sample.constrain import START, Template, drawable
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request
from esjax.settings.files import read_text
from esjax.settings.schema import Config
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer


@dataclass
class Experiment:
    """One opened experiment. What its files hold is read, encoded and compiled when first asked for, once."""

    config: Config
    backbone: Backbone
    tokenizer: ChatTokenizer
    encoder: Encoder
    programs: SamplingPrograms  # of the backbone, so that an experiment with other settings compiles nothing again

    @classmethod
    def open(cls, config: Config, adapted: bool = True) -> Experiment:
        """Fetch and load everything. Raises InputError; ``adapted`` false loads the bare backbone."""
        folder = resolve(config.model.source, config.model.sha256)
        trained: Any = None
        if adapted:
            trained = lora_from(config.lora, read_architecture(folder)) if config.train.what == "lora" else "all"
        dtype = compute_dtype(config.model.dtype)
        tokenizer = ChatTokenizer(folder, config.model.chat_template)
        m = config.model
        backbone = load_backbone(folder, trained, dtype, Choice.of(m))
        tokenizer.check_rows(backbone.arch.vocab)
        how = backbone.execution
        say(
            f"computing on {jax.default_backend()} in {dtype}; attention: {how.attention}, in decoding: {how.decoding}, "
            f"rematerialisation: {how.remat}, weights while decoding: {how.weights}, "
            f"cache: {dtype if m.cache_dtype == 'auto' else m.cache_dtype}"
            + ("" if m.base == "plain" else f"; linear layers are kept in {m.base}")
        )
        encoder = Encoder(tokenizer, config.data.window, read_text(config.prompts.system), cache_root() / "tokens")
        programs = sampling_programs(backbone.definition, dtype, backbone.execution)
        return cls(config, backbone, tokenizer, encoder, programs)

    def again(self, config: Config) -> Experiment:
        """With other settings, the model's and the adapter's apart, on the same backbone."""
        encoder = replace(self.encoder, window=config.data.window, system=read_text(config.prompts.system))
        return Experiment(config, self.backbone, self.tokenizer, encoder, self.programs)

    @cached_property
    def filters(self) -> Filters:
        return Filters.load(self.config.filters, self.config.screen)

    @cached_property
    def corpora(self) -> Corpora:
        return Corpora(self.config, self.encoder, self.filters)

    @cached_property
    def instructions(self) -> Instructions:
        return Instructions.load(self.config)

    @cached_property
    def form(self) -> Template:
        """The constraint under which reflections are sampled."""
        return form(self.tokenizer, self.config.evolve.reflection.field_tokens, self.backbone.arch.vocab)

    def reflection_request(self, key: Any, context: list[Message], seed: int, name: str) -> Request:
        """Asks for the reflection on a context, which holds its system message if it has one."""
        prompt = [*self.tokenizer.prompt(self.instructions.reflection_prompt(context)), *self.form.opening]
        return Request(key, prompt, seed, self.config.evolve.reflection, self.form.max_tokens, START, name)

    def reflection(self, token_ids: list[int]) -> dict[str, str]:
        """The fields of a reflection that was drawn: profile, emotional_state and situation; each ends with a whole word."""
        fields = parse(self.tokenizer.decode([*self.form.opening, *token_ids]))
        cut = cut_fields(token_ids, self.tokenizer, self.config.evolve.reflection.field_tokens)
        return {name: whole_words(text) if c else text for (name, text), c in zip(fields.items(), cut, strict=True)}

    @cached_property
    def generator(self) -> Generator:
        """The one sampler of the run, so that all rounds and the closing table share its programs."""
        name = self.config.model.cache_dtype
        allowed = drawable(self.tokenizer, self.backbone.arch.vocab)
        return Generator(
            self.backbone,
            self.config.evolve.batch,
            self.tokenizer.stops,
            cache_dtype=None if name == "auto" else jnp.dtype(name),
            drawable=allowed,
            made=self.programs,
        )

    @cached_property
    def identity(self) -> dict[str, str]:
        """Identifies the backbone: the hashes of its files, by name."""
        return identity(self.backbone.folder)

    @property
    def revision(self) -> str | None:
        """The commit of the backbone, where it comes from the hub."""
        return public_name(self.config.model.source, self.backbone.folder)[1]

    def adapter(self, folder: Path) -> Adapter:
        """A stored adapter. Raises InputError when it is missing or is not of the shape that the lora settings say.

        Where all parameters are trained: those of a whole model's folder.
        """
        if self.backbone.start is not None:
            return read_weights(ShardReader(folder), self.backbone.arch, self.backbone.adapter_shapes, FLOAT32)
        read, expected = read_peft(folder), self.backbone.lora
        stored = read.lora
        if expected is None or (
            (set(stored.targets), stored.rank) != (set(expected.targets), expected.rank)
            or not math.isclose(stored.scale, expected.scale, rel_tol=1e-9)
        ):
            raise InputError(f"{folder}: the adapter is {stored}, but the lora settings say {expected}")
        if (folder / RECORD).exists():
            self._say_base(folder)
        return place_adapter(read, self.backbone.adapter_shapes)

    def _say_base(self, folder: Path) -> None:
        """Say by how much the backbone differs from the one that an exported adapter was made on. Raises InputError."""
        try:
            then = dict(json.loads((folder / RECORD).read_text(encoding="utf-8"))["base"])
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{folder / RECORD}: not what esjax wrote there; restore it, or delete it") from e
        names = sorted({*then, *self.identity})
        if changed := [name for name in names if then.get(name) != self.identity.get(name)]:
            say(
                f"{folder}: the adapter was made on another base: {len(changed)} of {len(names)} files differ by their SHA-256: "
                f"{', '.join(changed)}"
            )

    @cached_property
    def start(self) -> tuple[Adapter, str]:
        """The adapter that training starts from, and what identifies it. Raises InputError where it does not fit."""
        given = self.config.lora.start
        if given is None:
            if self.backbone.start is not None:
                return self.backbone.fresh_adapter(0), "the backbone"
            return self.backbone.fresh_adapter(self.config.seed), f"fresh, seed {self.config.seed}"
        folder = Path(given).expanduser()
        return self.adapter(folder), sha256(folder)


def open_model(spec: str, config: Config, beside: Experiment | None = None) -> tuple[Experiment, Adapter]:
    """Open ``RUN_DIR:mT``, a PEFT folder, or any backbone, bare, with the settings that ``model_settings`` makes.

    ``beside``: an open experiment with the same backbone and kind of adapter, which is not loaded again. Raises InputError.
    """
    named = run_model(spec)
    experiment = (
        Experiment.open(config, adapted=named is not None or is_adapter(spec))
        if beside is None
        else beside.again(config)
    )
    if named is None:
        return experiment, experiment.adapter(Path(spec).expanduser()) if is_adapter(spec) else nnx.State({})
    return experiment, _stored(experiment, *named)


def _stored(experiment: Experiment, run: Path, t: int) -> Adapter:
    """M_t's adapter. Raises InputError where it, or the backbone, is not the one that the run made it with."""
    manifest, folder = read_manifest(run), adapter_folder(run, t)
    check_base(run, manifest, experiment.identity)
    name = folder.parent.relative_to(run).as_posix()
    check_made(run, name, manifest["stages"].get(name, {}))
    return experiment.adapter(folder)


def model_hash(spec: str, experiment: Experiment) -> str:
    """Identifies an opened model: its backbone, and its adapter if it has one."""
    named = run_model(spec)
    adapter = adapter_folder(*named) if named else Path(spec).expanduser() if is_adapter(spec) else None
    return json.dumps([experiment.identity, sha256(adapter) if adapter else ""])


def start_of_dpo(spec: str | None, experiment: Experiment) -> tuple[Adapter, str]:
    """The adapter that ``esjax dpo`` starts from, and what identifies it: a run's M_t, or a fresh one on the backbone.

    Raises InputError when the run's backbone is not the experiment's, or ``spec`` is another backbone.
    """
    c = experiment.config
    named = run_model(spec) if spec else None
    if spec is not None and is_adapter(spec):
        return experiment.adapter(Path(spec).expanduser()), sha256(Path(spec).expanduser())
    if named is None:
        folder = Path(spec or "").expanduser()
        if spec not in (None, c.model.source) and not (folder.is_dir() and identity(folder) == experiment.identity):
            raise InputError(
                f"--model {spec} is neither RUN_DIR:mT nor the backbone that model.source={c.model.source} names; to start "
                f"from it, leave --model out and give --model.source {spec}"
            )
        return experiment.start
    return _stored(experiment, *named), sha256(adapter_folder(*named))
