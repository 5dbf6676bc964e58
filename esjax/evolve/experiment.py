"""What all stages of a run share: the config, the backbone, the tokenizer, the encoder, the dialogues and their rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
from esjax.evolve.models import adapter_folder, run_model
from esjax.evolve.reflect import Instructions, form, parse
from esjax.hub.fetch import cache_root, resolve
from esjax.hub.identity import identity
from esjax.model.lora import Adapter, load_adapter, lora_from, read_lora
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.run.directory import check_base, check_made, read_manifest
from esjax.run.files import sha256
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
        lora = lora_from(config.lora) if adapted else None
        folder = resolve(config.model.source, config.model.sha256)
        dtype = compute_dtype(config.model.dtype)
        tokenizer = ChatTokenizer(folder)
        m = config.model
        backbone = load_backbone(folder, lora, dtype, m.attention, m.remat, m.decoding_weights)
        tokenizer.check_rows(backbone.arch.vocab)
        how = backbone.execution
        say(
            f"computing on {jax.default_backend()} in {dtype}; attention: {how.attention}, rematerialisation: {how.remat}, "
            f"weights while decoding: {how.weights}, cache: {dtype if m.cache_dtype == 'auto' else m.cache_dtype}"
        )
        encoder = Encoder(tokenizer, config.data.window, read_text(config.prompts.system), cache_root() / "tokens")
        programs = sampling_programs(backbone.definition, dtype, backbone.execution)
        return cls(config, backbone, tokenizer, encoder, programs)

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
        """The fields of a reflection that was drawn: profile, emotional_state and situation."""
        return parse(self.tokenizer.decode([*self.form.opening, *token_ids]))

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

    def adapter(self, folder: Path) -> Adapter:
        """A stored adapter. Raises InputError when it is missing or is not of the shape that the lora settings say."""
        stored, expected = read_lora(folder), self.backbone.lora
        if expected is None or (set(stored.targets), stored[1:]) != (set(expected.targets), expected[1:]):
            raise InputError(f"{folder}: the adapter is {stored}, but the lora settings say {expected}")
        return load_adapter(folder, self.backbone.adapter_shapes)


def open_model(spec: str, config: Config) -> tuple[Experiment, Adapter]:
    """Open ``RUN_DIR:mT``, or any backbone, bare, with the settings that ``model_settings`` makes. Raises InputError."""
    named = run_model(spec)
    experiment = Experiment.open(config, adapted=named is not None)
    return experiment, _stored(experiment, *named) if named else nnx.State({})


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
    return json.dumps([experiment.identity, sha256(adapter_folder(*named)) if named else ""])


def start_of_dpo(spec: str | None, experiment: Experiment) -> tuple[Adapter, str]:
    """The adapter that ``esjax dpo`` starts from, and what identifies it: a run's M_t, or a fresh one on the backbone.

    Raises InputError when the run's backbone is not the experiment's, or ``spec`` is another backbone.
    """
    c = experiment.config
    named = run_model(spec) if spec else None
    if named is None:
        folder = Path(spec or "").expanduser()
        if spec not in (None, c.model.source) and not (folder.is_dir() and identity(folder) == experiment.identity):
            raise InputError(
                f"--model {spec} is neither RUN_DIR:mT nor the backbone that model.source={c.model.source} names; to start "
                f"from it, leave --model out and give --model.source {spec}"
            )
        return experiment.backbone.fresh_adapter(c.seed), f"fresh, seed {c.seed}"
    return _stored(experiment, *named), sha256(adapter_folder(*named))
