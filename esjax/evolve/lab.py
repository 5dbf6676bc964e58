"""What all stages of a run share: the config, the backbone, the tokenizer, the encoder and the dialogues."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from esjax import storage
from esjax.config import Config
from esjax.configfile import load, read_text
from esjax.corpus.dialogue import Dialogue
from esjax.corpus.sources import read_dialogues
from esjax.errors import InputError
from esjax.hub.fetch import resolve, weights_file
from esjax.model.lora import Adapter, load_adapter, lora_from, read_lora
from esjax.model.weights import Backbone, compute_dtype, load_backbone
from esjax.runlog import say, sha256
from esjax.sample.constrain import drawable
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
            f"computing on {jax.default_backend()} in {dtype}; attention: {how.attention}, rematerialisation: {how.remat}"
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
        allowed = drawable(self.tokenizer, self.backbone.arch.vocab)
        made = Generator(self.backbone, self.config.evolve.batch, self.tokenizer.end_of_turn, drawable=allowed)
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


def adapter_folder(run: Path, t: int) -> Path:
    """Where M_t's adapter lies in a run directory."""
    return run / "sft" / "adapter" if t == 0 else run / f"round{t}" / "dpo" / "adapter"


def open_model(spec: str, config: Config) -> tuple[Lab, Adapter]:
    """Open ``RUN_DIR:mT``, with the run's own config, or any backbone source, bare.

    A run's model brings the run's system message; a bare backbone has none. Raises InputError.
    """
    match = re.fullmatch(r"(.+):m(\d+)", spec)
    if match is None:
        given = config.model.sha256 if spec == config.model.source else None
        prompts = config.prompts.model_copy(update={"system": "bundled:prompts/none.txt"})
        model = config.model.model_copy(update={"source": spec, "sha256": given})
        lab = Lab.open(config.model_copy(update={"model": model, "prompts": prompts}), adapted=False)
        return lab, nnx.State({})
    run, t = storage.local(match[1]), int(match[2])
    if not (run / "config.yaml").exists():
        raise InputError(f"{spec}: {run} is not a run directory (no config.yaml in it)")
    folder = adapter_folder(run, t)
    if not folder.exists():
        have = [f"m{i}" for i in range(100) if adapter_folder(run, i).exists()]
        raise InputError(f"{spec}: M_{t} is not there; this run has {', '.join(have) or 'no finished model'}")
    lab = Lab.open(load(str(run / "config.yaml"), []))
    return lab, lab.adapter(folder)
