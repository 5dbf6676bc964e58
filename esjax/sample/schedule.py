"""Which reply is drawn where and when: rows and lanes of fixed shapes, kept busy until all is done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from esjax.errors import InputError, RunError, Stopped
from esjax.model.cache import Cache, Chunk, empty_cache
from esjax.model.families import Architecture
from esjax.runtime.context import current
from esjax.runtime.mesh import batch_groups, replicate
from esjax.sample.compiled import STEPS, SamplingPrograms
from esjax.sample.constrain import Constraint
from esjax.sample.decode import Asked, Continuation, Draw, Lanes, Log, idle_lanes
from esjax.sample.rowbook import Group, Placed, Request, RowBook, stack_windows, windows
from esjax.sample.shapes import BUCKET, Shapes


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
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def occupancy(self) -> float:
        """Share of the lanes' steps that drew a token."""
        return self.tokens / self.lane_steps if self.lane_steps else 0.0

    def facts(self) -> dict[str, int | float]:
        """For the manifest."""
        seconds = round(self.prefill_seconds + self.decode_seconds, 2)
        made = {
            "replies": self.replies,
            "tokens": self.tokens,
            "lanes_busy": round(self.occupancy, 4),
            "seconds": seconds,
        }
        return made | {"prompt_tokens": self.prompt_tokens, "computed_tokens": self.computed_tokens}

    def __str__(self) -> str:
        return (
            f"lanes busy {self.occupancy:.0%}; {self.computed_tokens} of {self.prompt_tokens} prompt tokens computed, "
            f"the others shared; {self.prefill_seconds:.1f} s prefill, {self.decode_seconds:.1f} s decoding"
        )


Done = Callable[[Request, Completion], Iterable[list[Request]]]


@dataclass(frozen=True)
class Task:
    """What one call is about, see ``Generator.work``."""

    arch: Architecture
    programs: SamplingPrograms
    weights: Any
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
        now: Scheduler | None = Scheduler(self, self.fit(groups), groups)
        with current().stop.deferred() as stops:
            while now is not None:
                if stops():
                    raise Stopped
                now = now.advance()


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

    def __init__(self, task: Task, shapes: Shapes, groups: Iterable[list[Request]], steps: int = STEPS) -> None:
        """``steps``: most tokens that each lane draws before the host looks."""
        self.task, self.shapes, self.steps = task, shapes, steps
        self.backlog: deque[Group] = deque(map(Group.of, groups))
        self.uids = count()
        self.usage = task.usage
        self.books = [RowBook(shapes.slots) for _ in range(shapes.rows)]
        self.cache: Cache = empty_cache(task.arch, *shapes[:4], task.cache_dtype)
        self.lanes: Lanes = replicate(idle_lanes(shapes.rows, shapes.lanes))

    def advance(self) -> Scheduler | None:
        """Compute prompts and draw for a while. Returns who goes on: itself, one with longer rows, or nobody."""
        self._compute(self._hand_out())
        if any(b.waiting or b.running for b in self.books):
            self._decode()
            return self
        left = self.backlog or any(b.groups for b in self.books)
        return self._longer() if left else None

    def drop(self, key: Any) -> None:
        """Forget a request wherever it is; its lane draws for others from the next step on."""
        for group in self.backlog:
            group.forget(key)
        self.backlog = deque(group for group in self.backlog if group.pending)
        if uids := [uid for book in self.books for uid in book.drop(key)]:
            leaf = self.lanes.leaf
            gone = jnp.isin(leaf.uid, jnp.asarray(uids))
            leaf = leaf._replace(uid=jnp.where(gone, -1, leaf.uid), state=jnp.where(gone, 0, leaf.state))
            self.lanes = replicate(self.lanes._replace(leaf=leaf))

    def _hand_out(self) -> list[list[Chunk]]:
        """Give groups to rows that run out of work, and place what waits there. Returns what each device must compute."""
        m = self.shapes.lanes
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
                    out += windows(number, runs, self.shapes.width, self.shapes.slots)
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
        usage, shapes = self.usage, self.shapes
        began = time.perf_counter()
        start, most = 0, max(map(len, loads))
        while start < most:
            size = shapes.windows if most - start > shapes.few else shapes.few
            part = stack_windows([chunks[start : start + size] for chunks in loads], size)
            start += size
            self.cache = self.task.programs.prefill(self.task.weights, self.cache, part)
            usage.padded_tokens += part.tokens.size
            usage.computed_tokens += int(part.valid.sum())
            usage.seen += int(part.position[part.valid].sum()) + int(part.valid.sum())
        if self.task.clocked:
            jax.block_until_ready(self.cache)
        usage.prefill_seconds += time.perf_counter() - began

    def _decode(self) -> None:
        """Let the lanes draw, and take in what they drew."""
        began = time.perf_counter()
        m, total = self.shapes.lanes, self.shapes.rows * self.shapes.lanes
        waiting, counts = self._waiting(4 * m)
        unemployed = sum(max(0, m - len(b.running) - len(b.waiting)) for b in self.books)
        more = self.task.more_may_follow or self.backlog or any(b.groups for b in self.books)
        patience = np.int32(unemployed + max(1, total // 8) if more else total)
        asked = Asked(waiting, counts, self.task.stop, self.task.constraint, patience, np.int32(self.steps))
        made = self.task.programs.decode(self.task.weights, self.cache, self.lanes, asked)
        self.lanes, self.cache = made.lanes, made.cache
        started, steps, log = jax.device_get((made.started, made.steps, made.log))
        usage = self.usage
        usage.steps += int(steps)
        usage.lane_steps += int(steps) * total
        for book, n in zip(self.books, started, strict=True):
            for _ in range(int(n)):
                placed = book.waiting.popleft()
                book.running[placed.uid] = placed
        self._take_in(Log(*(x[: int(steps)] for x in log)))
        usage.decode_seconds += time.perf_counter() - began

    def _waiting(self, most: int) -> tuple[Continuation, np.ndarray]:
        """What waits, as arrays [R, Q]."""
        shape = (len(self.books), most)
        table = jax.tree.map(lambda x: np.zeros(shape, x.dtype), self.lanes.leaf)
        counts = np.asarray([min(len(b.waiting), most) for b in self.books], np.int32)
        for r, book in enumerate(self.books):
            for q, placed in enumerate(list(book.waiting)[:most]):
                request = placed.request
                draw = Draw(request.how.temperature, request.how.top_p, request.how.top_k)
                last = len(request.prompt) - 1
                entry = Continuation(
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
        self.usage.tokens += len(uid)
        followers: list[Group] = []
        for placed, finished in ended:
            request = placed.request
            self.usage.replies += 1
            self.usage.prompt_tokens += len(request.prompt)
            logprobs = [round(x, 6) for x in placed.logprobs]
            completion = Completion(placed.tokens, logprobs, "stop" if finished else "length")
            for group in self.task.done(request, completion):
                for follower in group:
                    check_positions(follower, self.task.arch.max_positions)
                    if follower.max_tokens > self.shapes.new:
                        raise ValueError(
                            f"a reply of {follower.max_tokens} tokens for lanes of {self.shapes.new}: see Generator.reserve"
                        )
                followers.append(Group.of(group))
        self.backlog.extendleft(reversed(followers))

    def _longer(self) -> Scheduler:
        """Some prompt fits no empty row: what is left, with longer rows. Nothing is under way."""
        left = [list(g.pending) for g in (*(g for b in self.books for g in b.groups), *self.backlog)]
        wanted = self.task.fit(left).slots
        slots = max(wanted, self.shapes.slots + BUCKET)
        return Scheduler(self.task, self.shapes._replace(slots=slots), left)
