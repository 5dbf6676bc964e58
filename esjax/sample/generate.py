"""Generate continuations of prompts in batches of fixed shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import jax
import numpy as np

from esjax.config import InputError
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone
from esjax.sample.constrain import Automaton
from esjax.sample.decode import Draw, decode
from esjax.tokens.batches import plant

BUCKET = 128  # prompts are padded to a multiple of this, so that a run compiles a handful of programs


class DrawSettings(Protocol):
    """Any settings section that says how tokens are drawn."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


@dataclass(frozen=True)
class Completion:
    """One generated reply. ``finish`` is "stop" when an end token was drawn (the last of ``token_ids``), else "length"."""

    token_ids: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


class Generator:
    """Samples from base + adapter, ``batch`` prompts at a time."""

    def __init__(self, backbone: Backbone, batch: int, end_of_turn: int) -> None:
        self.backbone, self.batch, self.end_of_turn = backbone, batch, end_of_turn
        program = partial(decode, backbone.definition, how=backbone.execution)
        self._program = jax.jit(program, static_argnames="max_tokens")

    @property
    def programs(self) -> int:
        """How many programs were compiled so far."""
        return int(self._program._cache_size())  # type: ignore[attr-defined]

    def generate(
        self,
        adapter: Adapter,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: DrawSettings,
        max_tokens: int,
        constraint: Automaton | None = None,
    ) -> list[Completion]:
        """Continue each prompt with its own seed; at most ``batch`` prompts. Raises InputError when one is too long."""
        if len(prompts) > self.batch:
            raise ValueError(f"{len(prompts)} prompts for a batch of {self.batch}")
        longest = max(map(len, prompts))
        most = self.backbone.arch.max_positions
        if longest + max_tokens > most:
            raise InputError(
                f"a prompt of {longest} tokens and {max_tokens} new ones exceed the model's {most} positions; shorten data.window"
            )
        planted = plant(prompts, self.batch, BUCKET)
        live, all_seeds = np.zeros(self.batch, bool), np.zeros(self.batch, np.uint32)
        live[planted.place], all_seeds[planted.place] = True, seeds
        shape = planted.leaves.shape
        draw = Draw(
            np.float32(how.temperature),
            np.float32(how.top_p),
            np.int32(how.top_k),
            np.asarray([self.end_of_turn], np.int32),
        )
        trace = self._program(
            adapter,
            self.backbone.base,
            planted.rows,
            planted.leaves,
            all_seeds.reshape(shape),
            live.reshape(shape),
            draw,
            constraint,
            max_tokens=max_tokens,
        )
        tokens, logprobs, lengths, stopped = (np.asarray(x)[planted.place] for x in trace)
        return [
            Completion(
                tokens[i, :n].tolist(),
                [round(float(x), 6) for x in logprobs[i, :n]],
                "stop" if stopped[i] else "length",
            )
            for i, n in enumerate(lengths)
        ]


def row_seed(*parts: object) -> int:
    """A seed for one row from what identifies it (run seed, stage, context): the same on every machine and batch."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")
