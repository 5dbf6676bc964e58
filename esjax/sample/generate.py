"""Generate continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from esjax.model.attention import Decoding
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone
from esjax.rows import common_prefix
from esjax.runtime.mesh import replicate
from esjax.sample.compiled import SamplingPrograms, sampling_programs
from esjax.sample.constrain import START, Constraint, free, narrowed
from esjax.sample.faster import settled
from esjax.sample.rowbook import Request
from esjax.sample.schedule import Completion, Done, Task, Usage, check_positions
from esjax.sample.shapes import SHARED_LANES, Need, Shapes, shapes
from esjax.tokens.batches import group_by_prefix


class DrawSettings(Protocol):
    """Any settings section that says how tokens are drawn."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...


@dataclass
class Generator:
    """Samples from base + adapter with ``replies`` under way at once.

    Shapes only ever grow, so that what is asked for later shares programs. ``lanes`` that share a row, ``slots`` of a row and
    ``new`` tokens of a reply may be given to begin with. ``clocked`` waits for each prefill, so that its time can be told
    from decoding's; ``cache_dtype`` is that of the keys and values kept.
    """

    backbone: Backbone
    replies: int
    end_of_turn: int | Sequence[int]  # ids that end a reply
    lanes: int = 0  # 0: decided by the first prompts
    slots: int = 0
    new: int = 0
    clocked: bool = False
    cache_dtype: jnp.dtype | None = None  # the backbone's, if None
    drawable: np.ndarray | None = None  # bool [V], the tokens that unconstrained replies may have; all, if None
    made: SamplingPrograms | None = None  # the backbone's programs, where another generator has compiled them
    usage: Usage = field(default_factory=Usage, init=False)
    programs: SamplingPrograms = field(init=False)
    attends: Decoding | None = field(default=None, init=False)  # in decoding, settled by the first shapes
    constraint: Constraint = field(init=False)  # the latest: all have a state for replies without a constraint

    def __post_init__(self) -> None:
        backbone = self.backbone
        self.programs = self.made or sampling_programs(backbone.definition, backbone.dtype, backbone.execution)
        self.obey(free(backbone.arch.vocab))

    def generate(
        self,
        adapter: Adapter,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: DrawSettings,
        max_tokens: int,
        constraint: Constraint | None = None,
    ) -> list[Completion]:
        """Continue each prompt with its own seed, all under one constraint. Raises InputError when one is too long."""
        state = 0 if constraint is None else START
        requests = [
            Request(i, p, s, how, max_tokens, state) for i, (p, s) in enumerate(zip(prompts, seeds, strict=True))
        ]
        out: dict[int, Completion] = {}

        def done(request: Request, completion: Completion) -> tuple[()]:
            out[request.key] = completion
            return ()

        self.work(adapter, self.grouped(requests), done, constraint)
        return [out[i] for i in range(len(prompts))]

    def grouped(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests whose prompts begin alike, together; in groups small enough that all rows have work to the end."""
        rows = max(1, self.replies // SHARED_LANES)
        most = max(SHARED_LANES, -(-len(requests) // (2 * rows)))
        return [[requests[i] for i in group] for group in group_by_prefix([r.prompt for r in requests], most)]

    def work(
        self,
        adapter: Adapter,
        groups: Sequence[list[Request]],
        done: Done,
        constraint: Constraint | None = None,
        more_may_follow: bool = False,
    ) -> None:
        """Answer all requests, and those that ``done`` answers a finished one with.

        Args:
            groups: requests of one group share a row, so their prompts should begin alike; groups are begun in this order.
            done: told every request and its completion, in the order in which they end; returns groups to be begun next.
            constraint: what requests with a state other than 0 obey; the one before stays where none is given.
            more_may_follow: whether ``done`` ever returns any.

        Raises InputError when a prompt and its new tokens exceed the model's positions.
        """
        if not groups:
            return
        if constraint is not None:
            self.obey(constraint)
        self.task(adapter, done, more_may_follow).finish(groups)

    def task(self, adapter: Adapter, done: Done, more_may_follow: bool) -> Task:
        """What ``work`` works on, see there."""
        return Task(
            arch=self.backbone.arch,
            programs=self.programs,
            weights=self.programs.weights(self.backbone.computed(adapter), self.backbone.base),
            attend=self.attend,
            cache_dtype=self.kept,
            stop=np.atleast_1d(np.asarray(self.end_of_turn, np.int32)),
            constraint=self.constraint,
            done=done,
            more_may_follow=more_may_follow,
            fit=self.fit,
            usage=self.usage,
            clocked=self.clocked,
        )

    @property
    def kept(self) -> jnp.dtype:
        """The dtype of the keys and values kept."""
        return self.cache_dtype or self.backbone.dtype

    def attend(self, shapes: Shapes) -> Decoding:
        """How decoding attends, the same from its first shapes on."""
        if self.attends is None:
            b = self.backbone
            self.attends = settled(b.execution, b.arch, shapes, b.dtype, self.kept)
        return self.attends

    def obey(self, constraint: Constraint) -> None:
        """From now on a request's state is one of this constraint."""
        self.constraint = replicate(narrowed(constraint, self.drawable))

    def reserve(self, need: Need, shared: bool = True) -> Shapes:
        """Make room for what is to come. Raises InputError where the devices do not divide the replies."""
        wanted = shapes(self.replies, need, jax.default_backend(), self.lanes, shared)
        self.lanes, self.slots, self.new = wanted.lanes, max(self.slots, wanted.slots), max(self.new, wanted.new)
        return wanted._replace(slots=self.slots, new=self.new)

    def fit(self, groups: Sequence[list[Request]]) -> Shapes:
        """Make room for these groups. Raises InputError when a prompt and its new tokens exceed the model's positions."""
        requests = [r for g in groups for r in g]
        for request in requests:
            check_positions(request, self.backbone.arch.max_positions)
        longest, new = max(len(r.prompt) for r in requests), max(r.max_tokens for r in requests)
        beyond = 0
        if longest > self.slots:
            parts = (len(r.prompt) - common_prefix(r.prompt, g[0].prompt) for g in groups for r in g[1:])
            beyond = max(parts, default=0)
        return self.reserve(Need(longest, beyond, new), shared=len(requests) >= 2 * len(groups))
