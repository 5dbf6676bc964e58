"""Generate continuations of prompts: rows and lanes of fixed shapes, kept busy until all is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from esjax.errors import InputError, RunError, Stopped
from esjax.model.cached import Cache, Chunk, empty_cache
from esjax.model.lora import Adapter
from esjax.model.weights import Backbone
from esjax.rows import common_prefix
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, check_split, put_everywhere
from esjax.sample.compiled import sampling_programs, windows_of
from esjax.sample.constrain import START, Constraint, free, narrowed
from esjax.sample.decode import Draw, Lanes, Leaf, Log, idle_lanes
from esjax.sample.rowbook import Group, Placed, Request, RowBook, together, windows
from esjax.sample.rowbook import row_seed as row_seed
from esjax.tokens.batches import alike

BUCKET = 128  # rows have a multiple of so many slots, so that a run compiles a handful of programs
SHARED_LANES = 2  # lanes that read a row together, where prompts share trunks


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


@dataclass
class Usage:
    """What generating cost."""

    replies: int = 0
    tokens: int = 0  # drawn
    steps: int = 0
    lane_steps: int = 0  # steps times lanes
    prompt_tokens: int = 0  # of all prompts
    computed_tokens: int = 0  # of those, what was not shared
    seen: int = 0  # tokens that those see, all together
    loaded_tokens: int = 0  # with the padding of chunks
    load_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the lanes' steps that drew a token."""
        return self.tokens / self.lane_steps if self.lane_steps else 0.0

    def __str__(self) -> str:
        return (
            f"lanes busy {self.occupancy:.0%}; {self.computed_tokens} of {self.prompt_tokens} prompt tokens computed, "
            f"the others shared; {self.load_seconds:.1f} s prefill, {self.decode_seconds:.1f} s decoding"
        )


Done = Callable[[Request, Completion], Iterable[list[Request]]]


@dataclass
class Generator:
    """Samples from base + adapter with ``lanes`` replies under way at once, ``shared`` lanes on a row.

    Shapes are fixed by what is first asked for, and only ever grow: ``slots`` of a row and ``new`` tokens of a lane may be
    given to begin with. ``clocked`` waits for each load, so that its time can be told from decoding's; ``cache_dtype`` is
    that of the keys and values kept.
    """

    backbone: Backbone
    lanes: int
    end_of_turn: int | Sequence[int]  # ids that end a reply
    shared: int = 0  # 0: decided by the first prompts
    slots: int = 0
    new: int = 0
    clocked: bool = False
    cache_dtype: jnp.dtype | None = None  # the backbone's, if None
    drawable: np.ndarray | None = None  # bool [V], the tokens that unconstrained replies may have; all, if None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        backbone = self.backbone
        self._windows, self._width = windows_of(jax.default_backend())
        self._how = backbone.execution
        programs = sampling_programs(backbone.arch, backbone.definition, backbone.dtype, self._how)
        self._weights, self._load, self._run = programs
        arch = backbone.arch
        self._place(free(arch.vocab))  # the latest: all have a state for replies without a constraint

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
        rows = max(1, self.lanes // SHARED_LANES)
        most = max(SHARED_LANES, -(-len(requests) // (2 * rows)))
        return [[requests[i] for i in group] for group in alike([r.prompt for r in requests], most)]

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
        self.fit(groups)
        weights = self._weights(adapter, self.backbone.base)
        if constraint is not None:
            self._place(constraint)
        session = _Session(self, weights, done, more_may_follow)
        session.backlog.extend(map(Group.of, groups))
        session.finish_all()

    def _place(self, constraint: Constraint) -> None:
        self._constraint = put_everywhere(narrowed(constraint, self.drawable))

    def _check(self, request: Request) -> None:
        longest, most = len(request.prompt), self.backbone.arch.max_positions
        if longest + request.max_tokens > most:
            raise InputError(
                f"a prompt of {longest} tokens and {request.max_tokens} new ones exceed the model's {most} positions; "
                "lower max_tokens, or data.window"
            )

    def fix_shapes(self, longest: int, branch: int, new: int, least: int = 0) -> None:
        """Make room for what is to come, in tokens.

        Args:
            longest: the longest prompt that others share a part of, or that shares nothing.
            branch: what others have beyond that part; there is room for one more than the lanes of a row.
            new: the longest reply.
            least: a branch that has a row to itself, if that is more.
        """
        self._share(True)
        room = max(longest + max(branch * (self.shared + 1), least), self._width)
        self.slots = max(self.slots, -(-room // BUCKET) * BUCKET)
        self.new = max(self.new, new)

    @property
    def rows(self) -> int:
        """Rows R; each device that shares the batch has as many of them."""
        return self.lanes // self.shared

    def _share(self, wanted: bool) -> None:
        """Decide once how many lanes read a row together. Raises InputError where the devices do not divide the lanes."""
        if self.shared:
            return
        check_split("replies at once (evolve.batch, in `esjax sample` reply.batch)", self.lanes)
        self.shared = SHARED_LANES if wanted and self.lanes % (batch_groups() * SHARED_LANES) == 0 else 1

    def fit(self, groups: Sequence[list[Request]]) -> None:
        """Make room for these groups. Raises InputError when a prompt and its new tokens exceed the model's positions."""
        for request in (r for g in groups for r in g):
            self._check(request)
        self._fit(groups)

    def _fit(self, groups: Sequence[list[Request]]) -> None:
        """Shapes that hold these groups."""
        self._share(sum(map(len, groups)) >= 2 * len(groups))
        longest = max(len(r.prompt) for g in groups for r in g)
        if max(longest, self._width) > self.slots:
            beyond = (len(r.prompt) - common_prefix(r.prompt, g[0].prompt) for g in groups for r in g[1:])
            self.fix_shapes(longest, max(beyond, default=0), 0)
        self.new = max(self.new, max(r.max_tokens for g in groups for r in g))


class _Session:
    """One call of ``work``: the cache, the lanes and what each of them does."""

    def __init__(self, owner: Generator, weights: Any, done: Done, more_may_follow: bool) -> None:
        self.owner, self.weights, self.done, self.more_may_follow = owner, weights, done, more_may_follow
        self.stop = np.atleast_1d(np.asarray(owner.end_of_turn, np.int32))
        self.backlog: deque[Group] = deque()
        self.uids = count()
        self._begin()

    def _begin(self) -> None:
        """Empty rows and lanes of the owner's present shapes."""
        o = self.owner
        rows = o.rows
        self.books = [RowBook(o.slots) for _ in range(rows)]
        self.cache: Cache = empty_cache(
            o.backbone.arch, rows, o.shared, o.slots, o.new, o.cache_dtype or o.backbone.dtype
        )
        self.lanes: Lanes = put_everywhere(idle_lanes(rows, o.shared))

    def finish_all(self) -> None:
        """Until nothing is left to do. Raises Stopped on SIGTERM: replies that ended were handed on, others are lost."""
        with current().stop.deferred() as stops:
            while not stops():
                loads = self._hand_out()
                self._compute(loads)
                if not any(b.waiting or b.running for b in self.books):
                    if not self.backlog and not any(b.groups for b in self.books):
                        return
                    self._grow()
                    continue
                self._decode()
        raise Stopped

    def _hand_out(self) -> list[list[Chunk]]:
        """Give groups to rows that run out of work, and place what waits there. Returns what each device must compute."""
        m = self.owner.shared
        while self.backlog:
            row = min(self.books, key=lambda b: b.outstanding)
            if row.outstanding >= 2 * m:
                break
            row.groups.append(self._best_for(row))
        rows = len(self.books) // batch_groups()
        loads: list[list[Chunk]] = []
        for first in range(0, len(self.books), rows):
            trunks: list[Chunk] = []
            branches: list[Chunk] = []
            for number, book in enumerate(self.books[first : first + rows]):
                for runs, out in zip(book.place(2 * m, self.uids), (trunks, branches), strict=True):
                    out += windows(number, runs, self.owner._width, self.owner.slots)
            loads.append([*trunks, *branches])
        return loads

    def _best_for(self, row: RowBook) -> Group:
        """The first group, or a near one whose beginning lies in this row already."""
        for group in islice(self.backlog, 4 * len(self.books)):
            prompt = group.pending[0].prompt
            if 2 * row.overlap(prompt) >= len(prompt):
                self.backlog.remove(group)
                return group
        return self.backlog.popleft()

    def _compute(self, loads: list[list[Chunk]]) -> None:
        usage, size = self.owner.usage, self.owner._windows
        began = time.perf_counter()
        for start in range(0, max(map(len, loads)), size):
            part = together([chunks[start : start + size] for chunks in loads], size)
            self.cache = self.owner._load(self.weights, self.cache, part)
            usage.loaded_tokens += part.tokens.size
            usage.computed_tokens += int(part.valid.sum())
            usage.seen += int(part.position[part.valid].sum()) + int(part.valid.sum())
        if self.owner.clocked:
            jax.block_until_ready(self.cache)
        usage.load_seconds += time.perf_counter() - began

    def _decode(self) -> None:
        """Let the lanes draw, and take in what they drew."""
        began = time.perf_counter()
        m, total = self.owner.shared, self.owner.lanes
        waiting, counts = self._waiting(4 * m)
        unemployed = sum(max(0, m - len(b.running) - len(b.waiting)) for b in self.books)
        more = self.more_may_follow or self.backlog or any(b.groups for b in self.books)
        patience = np.int32(unemployed + max(1, total // 8) if more else total)
        made = self.owner._run(
            self.weights, self.cache, self.lanes, waiting, counts, self.stop, self.owner._constraint, patience
        )
        self.lanes, self.cache = made.lanes, made.cache
        started, steps, log = jax.device_get((made.started, made.steps, made.log))
        usage = self.owner.usage
        usage.steps += int(steps)
        usage.lane_steps += int(steps) * total
        for book, n in zip(self.books, started, strict=True):
            for _ in range(int(n)):
                placed = book.waiting.popleft()
                book.running[placed.uid] = placed
        self._take_in(Log(*(x[: int(steps)] for x in log)))
        usage.decode_seconds += time.perf_counter() - began

    def _waiting(self, most: int) -> tuple[Leaf, np.ndarray]:
        """What waits, as arrays [R, Q]."""
        shape = (len(self.books), most)
        table = jax.tree.map(lambda x: np.zeros(shape, x.dtype), self.lanes.leaf)
        counts = np.asarray([min(len(b.waiting), most) for b in self.books], np.int32)
        for r, book in enumerate(self.books):
            for q, placed in enumerate(list(book.waiting)[:most]):
                request = placed.request
                draw = Draw(request.how.temperature, request.how.top_p, request.how.top_k)
                last = len(request.prompt) - 1
                entry = Leaf(
                    placed.uid,
                    *placed.spans,
                    request.prompt[last],
                    last,
                    request.seed,
                    request.max_tokens,
                    draw,
                    request.state,
                )
                for array, value in zip(jax.tree.leaves(table), jax.tree.leaves(entry), strict=True):
                    array[r, q] = value
        return table, counts

    def _take_in(self, log: Log) -> None:
        """Add what was drawn to the replies; those that ended are handed on."""
        row = np.broadcast_to(np.arange(len(self.books))[:, None], log.uid.shape)
        live = log.uid >= 0
        order = np.argsort(np.asarray(log.uid)[live], kind="stable")  # by reply, and in order of time within each
        drawn = (log.uid, row, log.token, log.logprob, log.stopped)
        uid, row, token, logprob, stopped = (np.asarray(x)[live][order] for x in drawn)
        cuts = np.flatnonzero(np.diff(uid, prepend=-1))
        ended: list[tuple[Placed, bool]] = []
        for start, stop in zip(cuts, [*cuts[1:], len(uid)], strict=True):
            book = self.books[row[start]]
            placed = book.running[int(uid[start])]
            placed.tokens += token[start:stop].tolist()
            placed.logprobs += logprob[start:stop].tolist()
            finished = bool(stopped[stop - 1])
            if not np.isfinite(logprob[start:stop]).all():
                raise RunError(
                    f"{placed.request.name or placed.request.key}: the model's logits are not finite numbers, so nothing can be "
                    "drawn from them; its weights or its adapter are damaged, or its numbers overflow model.dtype"
                )
            if finished or len(placed.tokens) == placed.request.max_tokens:
                ended.append((book.finish(placed.uid), finished))
        self.owner.usage.tokens += len(uid)
        followers: list[Group] = []
        for placed, finished in ended:
            request = placed.request
            self.owner.usage.replies += 1
            self.owner.usage.prompt_tokens += len(request.prompt)
            logprobs = [round(x, 6) for x in placed.logprobs]
            completion = Completion(placed.tokens, logprobs, "stop" if finished else "length")
            for group in self.done(request, completion):
                for follower in group:
                    self.owner._check(follower)
                    if follower.max_tokens > self.owner.new:
                        raise ValueError(
                            f"a reply of {follower.max_tokens} tokens for lanes of {self.owner.new}: see fix_shapes"
                        )
                followers.append(Group.of(group))
        self.backlog.extendleft(reversed(followers))

    def _grow(self) -> None:
        """Some prompt fits no empty row: begin again with longer rows. Nothing is under way."""
        left = [*(g for b in self.books for g in b.groups), *self.backlog]
        self.owner._fit([list(g.pending) for g in left])
        if self.owner.slots == self.books[0].slots:
            self.owner.slots += BUCKET
        for group in left:
            group.trunk = None
        self._begin()
        self.backlog = deque(left)
