"""What all stages of a run share: the config, the backbone, the tokenizer, the encoder and the dialogues."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from esjax.config import Config
from esjax.configfile import Given, load, read_text
from esjax.corpus.dialogue import Dialogue
from esjax.corpus.sources import read_dialogues
from esjax.errors import InputError
from esjax.evolve.models import adapter_folder, run_model, settings_of
from esjax.hub.fetch import resolve, weights_file
from esjax.model.lora import Adapter, load_adapter, lora_from, read_lora
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.runlog import say, sha256
from esjax.sample.generate import Generator
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer


@dataclass
class Lab:
    """One opened experiment. Dialogues are read when first asked for."""

    config: Config
    backbone: Backbone
    tokenizer: ChatTokenizer
    encoder: Encoder

    @classmethod
    def open(cls, config: Config, adapted: bool = True) -> Lab:
        """Fetch and load everything. Raises InputError; ``adapted`` false loads the bare backbone."""
        lora = lora_from(config.lora) if adapted else None
        folder = resolve(config.model.source, config.model.sha256)
        dtype = compute_dtype(config.model.dtype)
        tokenizer = ChatTokenizer(folder)
        m = config.model
        backbone = load_backbone(folder, lora, dtype, m.attention, m.remat, m.decoding_weights)
        how = backbone.execution
        say(
            f"computing on {jax.default_backend()} in {dtype}; attention: {how.attention}, rematerialisation: {how.remat}, "
            f"weights while decoding: {how.weights}, cache: {dtype if m.cache_dtype == 'auto' else m.cache_dtype}"
        )
        encoder = Encoder(tokenizer, config.data.window, read_text(config.prompts.system))
        return cls(config, backbone, tokenizer, encoder)

    @cached_property
    def train(self) -> list[Dialogue]:
        return read_dialogues(self.config.data.format, self.config.data.train)

    @cached_property
    def valid(self) -> list[Dialogue]:
        return read_dialogues(self.config.data.format, self.config.data.valid)

    @cached_property
    def test(self) -> list[Dialogue]:
        return read_dialogues(self.config.data.format, self.config.data.test)

    @cached_property
    def generator(self) -> Generator:
        """The one sampler of the run, so that all rounds and the closing table share its programs."""
        name = self.config.model.cache_dtype
        made = Generator(self.backbone, self.config.evolve.batch, self.tokenizer.end_of_turn)
        return made if name == "auto" else replace(made, cache_dtype=jnp.dtype(name))

    @cached_property
    def weights_hash(self) -> str:
        """Identifies the backbone in the manifest."""
        return sha256(weights_file(self.backbone.folder))

    def adapter(self, folder: Path) -> Adapter:
        """A stored adapter. Raises InputError when it is missing or is not of the shape that the lora settings say."""
        stored, expected = read_lora(folder), self.backbone.lora
        if expected is None or (set(stored.targets), stored[1:]) != (set(expected.targets), expected[1:]):
            raise InputError(f"{folder}: the adapter is {stored}, but the lora settings say {expected}")
        return load_adapter(folder, self.backbone.adapter_shapes)


def open_model(spec: str, config: Config, told: Given | None = None) -> tuple[Lab, Adapter]:
    """Open ``RUN_DIR:mT`` with the run's settings, or any backbone source, bare, with those of ``config``.

    What the command was ``told`` counts over the run's settings. A run's model brings the run's system message; a bare
    backbone has none unless the command was told one. Raises InputError.
    """
    told = told or Given()
    named, settings = run_model(spec), settings_of(spec, told)
    if named is not None and settings is not None:
        lab = Lab.open(settings)
        if "model.source" in told.settings:
            check_base(spec, named[0], lab)
        return lab, lab.adapter(adapter_folder(*named))
    hashed = spec == config.model.source or "model.sha256" in told.settings
    model = config.model.model_copy(update={"source": spec, "sha256": config.model.sha256 if hashed else None})
    config = config.model_copy(update={"model": model})
    if "prompts.system" not in told.settings:
        none = config.prompts.model_copy(update={"system": "bundled:prompts/none.txt"})
        config = config.model_copy(update={"prompts": none})
    return Lab.open(config, adapted=False), nnx.State({})


def check_base(spec: str, run: Path, lab: Lab) -> None:
    """Raise InputError unless a backbone that was named in so many words is the one that the run's adapter was made on."""
    if load(str(run / "config.yaml"), [], together=False).model.source == lab.config.model.source:
        return
    manifest = run / "manifest.json"
    stages = json.loads(manifest.read_text(encoding="utf-8"))["stages"] if manifest.exists() else {}
    if lab.weights_hash not in (stage["inputs"].get("weights") for stage in stages.values()):
        raise InputError(
            f"model.source={lab.config.model.source}: not the weights that {spec} was made on; leave it out"
        )


def model_hash(spec: str, lab: Lab) -> str:
    """Identifies an opened model: its backbone, and its adapter if it has one."""
    named = run_model(spec)
    return lab.weights_hash + (sha256(adapter_folder(*named)) if named else "")
