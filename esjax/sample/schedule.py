"""Which reply is drawn where and when: rows and lanes of fixed shapes, kept busy until all is done."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice, takewhile
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from esjax.errors import InputError, RunError, Stopped
from esjax.model.attention import Decoding
from esjax.model.cache import Cache, empty_cache
from esjax.model.families import Architecture
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, replicate
from esjax.sample.backlog import Backlog
from esjax.sample.compiled import STEPS, SamplingPrograms
from esjax.sample.constrain import Constraint
from esjax.sample.decode import Asked, Called, Continuation, Lanes, Log, idle_lanes
from esjax.sample.prefills import Prefills
from esjax.sample.rowbook import Group, Placed, Request, RowBook, windows
from esjax.sample.shapes import BUCKET, Shapes

# Of the lanes may be idle before the host looks after them, or before a prompt is computed with few others.
IDLE = 1 / 8


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
    padded_tokens: int = 0  # computed, with the padding of chunks
    seconds: float = 0.0  # of all
    prefill_seconds: float = 0.0  # these two where the task is clocked
    decode_seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the lanes' steps that drew a token."""
        return self.tokens / self.lane_steps if self.lane_steps else 0.0

    def facts(self) -> dict[str, int | float]:
        """For the manifest."""
        made = {
            "replies": self.replies,
            "tokens": self.tokens,
            "lanes_busy": round(self.occupancy, 4),
            "seconds": round(self.seconds, 2),
        }
        return made | {"prompt_tokens": self.prompt_tokens, "computed_tokens": self.computed_tokens}

    def __str__(self) -> str:
        return (
            f"lanes busy {self.occupancy:.0%}; {self.computed_tokens} of {self.prompt_tokens} prompt tokens computed, "
            f"the others shared; {self.seconds:.1f} s"
        )


Done = Callable[[Request, Completion], Iterable[list[Request]]]


@dataclass(frozen=True)
class Task:
    """What one call is about, see ``Generator.work``."""

    arch: Architecture
    programs: SamplingPrograms
    weights: Any
    attend: Callable[[Shapes], Decoding]  # how a decoding step does
    cache_dtype: jnp.dtype
    stop: np.ndarray  # int32 [n]
    constraint: Constraint
    done: Done
    more_may_follow: bool
    fit: Callable[[Sequence[list[Request]]], Shapes]
    usage: Usage
    clocked: bool

    def finish(self, groups: Sequence[list[Request]]) -> None:
        """Answer all. Raises Stopped on SIGTERM: replies that ended were handed on, others are lost."""
        began = time.perf_counter()
        now: Scheduler | None = Scheduler(self, self.fit(groups), groups, ahead=not self.clocked)
        with current().stop.deferred() as stops:
            while now is not None:
                if stops():
                    now.land()
                    raise Stopped
                now = now.advance()
        self.usage.seconds += time.perf_counter() - began


def check_positions(request: Request, most: int) -> None:
    """Raise InputError where a prompt and its new tokens exceed the model's positions."""
    longest = len(request.prompt)
    if longest + request.max_tokens > most:
        raise InputError(
            f"a prompt of {longest} tokens and {request.max_tokens} new ones exceed the model's {most} positions; "
            "lower max_tokens, or data.window"
        )


class Scheduler:
    """One call's state: what waits, the rows, the cache, the lanes and what each of them does."""

    def __init__(
        self, task: Task, shapes: Shapes, groups: Iterable[list[Request]], steps: int = STEPS, ahead: bool = False
    ) -> None:
        """``steps``: most tokens that each lane draws before the host looks; ``ahead``: whether they go on while it does."""
        self.task, self.shapes, self.steps, self.ahead = task, shapes, steps, ahead
        self.backlog = Backlog(map(Group.of, groups))
        self.uids = count()
        self.usage = task.usage
        self.books = [RowBook(shapes.slots) for _ in range(shapes.rows)]
        self.devices = batch_groups()  # that share the rows
        self.prefills = Prefills(self.devices, shapes)
        self.attend = task.attend(shapes)
        self.cache: Cache = empty_cache(task.arch, *shapes[:4], task.cache_dtype)
        self.lanes: Lanes = replicate(idle_lanes(shapes.rows, shapes.lanes))
        self.busy = np.zeros(shapes.rows, np.int64)  # lanes of each row that have something to do
        self.flying: Called | None = None  # a call of the lanes that the host has not looked at yet
        self._counted: np.ndarray | None = None  # see _ready, until something changes

    def advance(self) -> Scheduler | None:
        """Compute prompts and draw for a while. Returns who goes on: itself, one with longer rows, or nobody."""
        log = self._landed()
        if self.ahead and self._able() and self._idle() <= self._spare:
            self._fly()
        self._take_in(log)
        self._hand_out()
        self._place()
        self._compute()
        if self.flying is None and self._able():
            self._fly()
        if self.flying is not None:
            if not self.ahead:
                self.land()
            return self
        return self._longer() if self.backlog or any(b.groups for b in self.books) else None

    def land(self) -> None:
        """Take in what lanes that were let go have drawn."""
        self._take_in(self._landed())

    def drop(self, key: Any) -> None:
        """Forget a request wherever it is; its lane draws for others from the next step on. Lanes must not be under way."""
        self._compute(everything=True)  # or others' prompts could be queued for the same slots
        self.backlog.forget(key)
        if uids := [uid for book in self.books for uid in book.drop(key)]:
            leaf = self.lanes.leaf
            gone = jnp.isin(leaf.uid, jnp.asarray(uids))
            leaf = leaf._replace(uid=jnp.where(gone, -1, leaf.uid), state=jnp.where(gone, 0, leaf.state))
            self.lanes = replicate(self.lanes._replace(leaf=leaf))
            self.busy = np.asarray([len(book.running) for book in self.books])
        self._counted = None

    # --- what waits, and where ---

    def _hand_out(self) -> None:
        """Give groups to rows that run out of work."""
        m = self.shapes.lanes
        idlest = [(book.outstanding, number) for number, book in enumerate(self.books)]
        heapq.heapify(idlest)
        while self.backlog and idlest[0][0] < 2 * m:
            outstanding, number = idlest[0]
            group = self.backlog.take(self.books[number], near=4 * len(self.books))
            self.books[number].groups.append(group)
            heapq.heapreplace(idlest, (outstanding + len(group.pending), number))

    def _place(self) -> None:
        """Find room in the rows for what they were given, and queue what must be computed for it."""
        shapes = self.shapes
        rows = len(self.books) // self.devices
        for number, book in enumerate(self.books):
            known = len(book.waiting)
            runs = book.place(2 * shapes.lanes, self.uids)
            chunks = [chunk for part in runs for chunk in windows(number % rows, part, shapes.width, shapes.slots)]
            book.due = self.prefills.add(number // rows, chunks) if chunks else book.due
            for placed in islice(book.waiting, known, None):
                placed.due = book.due
        self._counted = None

    def _ready(self) -> np.ndarray:
        """How many of those that wait in each row [R] have all of their prompt computed."""
        if self._counted is None:
            done = np.repeat(self.prefills.done, len(self.books) // self.devices).tolist()
            each = (
                sum(1 for _ in takewhile(lambda placed: placed.due <= n, book.waiting))  # noqa: B023  it is used at once
                for book, n in zip(self.books, done, strict=True)
            )
            self._counted = np.fromiter(each, np.int64, len(self.books))
        return self._counted

    def _able(self) -> bool:
        """Whether any lane has something to do."""
        return bool(self.busy.any() or self._ready().any())

    def _idle(self) -> int:
        """Lanes that have nothing to do and nothing that is ready for them."""
        return int(np.maximum(self.shapes.lanes - self.busy - self._ready(), 0).sum())

    @property
    def _spare(self) -> int:
        """Lanes that may be idle before the host looks after them."""
        return max(1, int(IDLE * self.shapes.rows * self.shapes.lanes))

    # --- what the devices do ---

    def _compute(self, everything: bool = False) -> None:
        """Compute what is queued: when devices are filled well, lanes are short of work, or ``everything`` is asked for."""
        usage, began = self.usage, time.perf_counter()
        while (part := self.prefills.next(lambda: everything or self._short())) is not None:
            self._counted = None
            self.cache = self.task.programs.prefill(self.task.weights, self.cache, part)
            usage.padded_tokens += part.tokens.size
            usage.computed_tokens += int(part.valid.sum())
            usage.seen += int(part.position[part.valid].sum()) + int(part.valid.sum())
        if self.task.clocked:
            jax.block_until_ready(self.cache)
        usage.prefill_seconds += time.perf_counter() - began

    def _short(self) -> bool:
        """Whether many lanes of those that could be busy wait for what is queued."""
        lanes, ready = self.shapes.lanes, self._ready()
        queued = np.asarray([len(book.waiting) for book in self.books]) - ready
        able = np.minimum(self.busy + ready, lanes)  # that have something to do
        hungry = np.minimum(queued, lanes - able).sum()
        return bool(hungry >= max(1, IDLE * (able.sum() + hungry)))

    def _fly(self) -> None:
        """Let the lanes draw."""
        began = time.perf_counter()
        waiting, counts = self._waiting(4 * self.shapes.lanes)
        total = self.shapes.rows * self.shapes.lanes
        more = self.task.more_may_follow or self.backlog or any(b.groups for b in self.books) or self.prefills
        # Lanes may have gone on while the host looked. Those that ended meanwhile wait for the next look: it comes sooner.
        patience = np.int32(max(self._spare, self._idle() + -(-self._spare // 2)) if more else total)
        asked = Asked(waiting, counts, self.task.stop, self.task.constraint, patience, np.int32(self.steps))
        made = self.task.programs.decode(self.task.weights, self.cache, self.lanes, asked, self.attend)
        self.lanes, self.cache, self.flying = made.lanes, made.cache, made
        self.usage.decode_seconds += time.perf_counter() - began

    def _landed(self) -> Log | None:
        """What lanes that were let go have drawn."""
        if self.flying is None:
            return None
        began, made = time.perf_counter(), self.flying
        self.flying = None
        uid, started, steps, log = jax.device_get((made.lanes.leaf.uid, made.started, made.steps, made.log))
        self.busy, self._counted = (uid >= 0).sum(axis=1), None
        self.usage.steps += int(steps)
        self.usage.lane_steps += int(steps) * uid.size
        for book, n in zip(self.books, started.tolist(), strict=True):
            for _ in range(n):
                placed = book.waiting.popleft()
                book.running[placed.uid] = placed
        self.usage.decode_seconds += time.perf_counter() - began
        return Log(*(x[: int(steps)] for x in log))

    def _waiting(self, most: int) -> tuple[Continuation, np.ndarray]:
        """What waits and is ready, as arrays [R, Q]."""
        counts = np.minimum(self._ready(), most).astype(np.int32)
        first = [islice(book.waiting, int(n)) for book, n in zip(self.books, counts, strict=True)]
        entries = [jax.tree.leaves(placed.entry) for row in first for placed in row]
        at = np.arange(most) < counts[:, None]
        leaves, form = jax.tree.flatten(self.lanes.leaf)
        table = [np.zeros(at.shape, x.dtype) for x in leaves]
        for array, values in zip(table, zip(*entries, strict=True), strict=False):  # no values where nothing waits
            array[at] = values
        return jax.tree.unflatten(form, table), counts

    # --- what was drawn ---

    def _take_in(self, log: Log | None) -> None:
        """Add what was drawn to the replies; those that ended are handed on."""
        if log is None:
            return
        live = log.uid >= 0
        order = np.argsort(np.asarray(log.uid)[live], kind="stable")  # by reply, and in order of time within each
        row = np.broadcast_to(np.arange(len(self.books))[:, None], log.uid.shape)
        drawn = (log.uid, row, log.token, log.logprob, log.stopped)
        uid, row, token, logprob, stopped = (np.asarray(x)[live][order] for x in drawn)
        finite = np.isfinite(logprob)
        cuts = np.flatnonzero(np.diff(uid, prepend=-1)).tolist()
        tokens, logprobs = token.tolist(), np.round(logprob.astype(np.float64), 6).tolist()
        ended: list[tuple[Placed, bool]] = []
        for start, stop in zip(cuts, [*cuts[1:], len(uid)], strict=True):
            book = self.books[row[start]]
            placed = book.running[int(uid[start])]
            placed.tokens += tokens[start:stop]
            placed.logprobs += logprobs[start:stop]
            finished = bool(stopped[stop - 1])
            if not finite[start:stop].all():
                raise RunError(
                    f"{placed.request.name or placed.request.key}: the model's logits are not finite numbers, so nothing can be "
                    "drawn from them; its weights or its adapter are damaged, or its numbers overflow model.dtype"
                )
            if finished or len(placed.tokens) == placed.request.max_tokens:
                ended.append((book.finish(placed.uid), finished))
        self.usage.tokens += len(uid)
        self.backlog.put_first([follower for placed, stop in ended for follower in self._ended(placed, stop)])

    def _ended(self, placed: Placed, stopped: bool) -> list[Group]:
        """Hand a reply on; returns what follows from it."""
        request = placed.request
        self.usage.replies += 1
        self.usage.prompt_tokens += len(request.prompt)
        completion = Completion(placed.tokens, placed.logprobs, "stop" if stopped else "length")
        groups = []
        for group in self.task.done(request, completion):
            for follower in group:
                check_positions(follower, self.task.arch.max_positions)
                if follower.max_tokens > self.shapes.new:
                    raise ValueError(
                        f"a reply of {follower.max_tokens} tokens for lanes of {self.shapes.new}: see Generator.reserve"
                    )
            groups.append(Group.of(group))
        return groups

    def _longer(self) -> Scheduler:
        """Some prompt fits no empty row: what is left, with longer rows. Nothing is under way."""
        left = [list(g.pending) for g in (*(g for b in self.books for g in b.groups), *self.backlog)]
        wanted = self.task.fit(left).slots
        slots = max(wanted, self.shapes.slots + BUCKET)
        return Scheduler(self.task, self.shapes._replace(slots=slots), left, self.steps, self.ahead)
