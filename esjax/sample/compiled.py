"""The two programs of sampling, prefill and decode, and what they read as weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from esjax.model.attention import Decoding
from esjax.model.cache import Cache, Chunk
from esjax.model.cached import Weights, layered
from esjax.model.cached import prefill as prefill_chunk
from esjax.model.decoder import Decoder, Execution
from esjax.model.joined import joined, merged, turned
from esjax.model.layers import Block
from esjax.model.lora import Adapter
from esjax.model.weights import bind
from esjax.runtime.programs import program
from esjax.sample.decode import Asked, Called, Lanes, run

STEPS = 128  # most steps between two looks of the host


class SamplingPrograms(NamedTuple):
    """What sampling runs. ``weights`` gives what the other two take as weights: adapter and base themselves, or layers of
    its own beside what both have of the base."""

    weights: Callable[[Adapter, nnx.State], Any]
    prefill: Any  # (weights, cache, chunk) -> cache
    decode: Any  # (weights, cache, lanes, asked, how to attend: plain or a kernel; static) -> Called


def sampling_programs(definition: nnx.GraphDef[Decoder], dtype: jnp.dtype, execution: Execution) -> SamplingPrograms:
    """The programs for a model. The cache is donated."""
    exact = turned if execution.attention == "chunked" else merged  # to rounding, in float32 alone
    form = exact if dtype.itemsize == 4 else joined

    def layers(adapter: Adapter, base: nnx.State) -> tuple[Block, ...]:
        return layered(bind(definition, adapter, base), form).layers

    copied = program("weights", layers)

    def apart(adapter: Adapter, base: nnx.State) -> Weights:
        """Outside of a program, which would give back copies of what it was given, too."""
        model = bind(definition, adapter, base)
        return Weights(model.embed[...], model.head_weight, model.norm[...], copied(adapter, base))

    def see(weights: Any) -> Weights:
        """The layers of what a program was given."""
        return weights if isinstance(weights, Weights) else layered(bind(definition, *weights))

    def prefill(weights: Any, cache: Cache, chunk: Chunk) -> Cache:
        return prefill_chunk(see(weights), cache, chunk, execution)

    def decode(weights: Any, cache: Cache, lanes: Lanes, asked: Asked, attend: Decoding) -> Called:
        return run(lambda: see(weights), cache, lanes, asked, STEPS, execution._replace(decoding=attend))

    return SamplingPrograms(
        weights=apart if execution.weights == "apart" else lambda adapter, base: (adapter, base),
        prefill=program("prefill", prefill, donate_argnums=1),
        decode=program("decode", decode, donate_argnums=1, static_argnums=4),
    )
