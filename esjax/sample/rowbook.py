"""Which prompts lie in which slots of which row: allocation, prefixes that are still there, and what must be computed.

A row's slots hold *pieces*: trunks, and the branches that prompts have beyond a trunk. A piece that nobody needs any more
stays until its slots are wanted, so a later prompt that begins like it finds its beginning computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np

from esjax.model.cache import Chunk
from esjax.rows import common_prefix
from esjax.sample.decode import Continuation, Draw

BLOCK = 16  # tokens by which beginnings are compared


def beginnings(tokens: Sequence[int]) -> list[int]:
    """A number for each beginning of whole blocks, the same for the same tokens."""
    whole = len(tokens) // BLOCK * BLOCK
    blocks = (tuple(tokens[i : i + BLOCK]) for i in range(0, whole, BLOCK))
    return list(accumulate(blocks, lambda so_far, block: hash((so_far, block)), initial=0))[1:]


class Request(NamedTuple):
    """A prompt to be continued."""

    key: Any  # whose it is; handed back with the reply
    prompt: list[int]  # token ids, one at least
    seed: int
    how: Any  # DrawSettings
    max_tokens: int
    state: int = 0  # of the constraint
    name: str = ""  # what messages call it
    room: int = 0  # tokens that the conversation may grow to, whose next prompts begin as this one does


@dataclass(eq=False)
class Piece:
    """Tokens computed in slots [start, start + len(tokens)) of a row."""

    start: int
    tokens: list[int]
    position: int = 0  # of the first token: a trunk begins at 0, a branch behind what it shares
    users: int = 0  # replies that still need it
    last_use: int = 0
    room: int = 0  # slots that are kept for it at least

    @property
    def stop(self) -> int:
        return self.start + max(len(self.tokens), self.room)

    @cached_property
    def beginnings(self) -> list[int]:
        return beginnings(self.tokens)


@dataclass(eq=False)
class Placed:
    """A request whose prompt lies in a row, but for the last token: it sees ``seen`` tokens of a trunk and all of its own."""

    request: Request
    trunk: Piece | None
    seen: int
    own: Piece | None
    uid: int
    tokens: list[int] = field(default_factory=list)  # drawn so far
    logprobs: list[float] = field(default_factory=list)
    due: int = 0  # how many of its device's windows must have been computed before it can be drawn

    @cached_property
    def entry(self) -> Continuation:
        """As the lanes take it."""
        request, last = self.request, len(self.request.prompt) - 1
        return Continuation(
            self.uid,
            *self.spans,
            request.prompt[last],
            last,
            request.seed,
            request.max_tokens,
            Draw(request.how.temperature, request.how.top_p, request.how.top_k),
            request.state,
        )

    @property
    def spans(self) -> tuple[int, int, int, int]:
        """Slots that it sees: trunk_start, trunk_end, own_start, own_end."""
        start = self.trunk.start if self.trunk else 0
        own = (self.own.start, self.own.stop) if self.own else (0, 0)
        return start, start + self.seen, *own


@dataclass(eq=False)
class Group:
    """Requests that are placed in one row, because their prompts begin alike. The first one's prompt is the trunk."""

    pending: deque[Request]
    trunk: Piece | None = None

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Group:
        """The longest prompt first."""
        return cls(deque(sorted(requests, key=lambda r: -len(r.prompt))))

    def forget(self, key: Any) -> None:
        """Take out the request with this key, if it is here."""
        self.pending = deque(r for r in self.pending if r.key != key)


class Run(NamedTuple):
    """Tokens to be computed in successive slots of a row."""

    slot: int
    tokens: list[int]
    position: int  # of the first
    trunk: tuple[int, int]  # slots of the trunk that all of them see


class RowBook:
    """One row of ``slots`` slots: what lies in it, who waits for its lanes, who is in them."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.pieces: list[Piece] = []
        self.groups: deque[Group] = deque()  # with pending requests
        self.waiting: deque[Placed] = deque()
        self.running: dict[int, Placed] = {}
        self.due = 0  # see Placed, of the last window that is computed for this row
        self._time = 0

    @property
    def outstanding(self) -> int:
        """Requests that were given to this row and are not done."""
        return len(self.waiting) + len(self.running) + sum(len(g.pending) for g in self.groups)

    @property
    def beginnings(self) -> Iterator[int]:
        """See ``beginnings``: of all prompts that begin as something that lies here."""
        return chain.from_iterable(p.beginnings for p in self.pieces if not p.position)

    def place(self, most_waiting: int, uids: Iterable[int]) -> list[list[Run]]:
        """Place pending requests until ``most_waiting`` wait. Returns what to compute: trunks first, then branches."""
        trunks: list[Run] = []
        branches: list[Run] = []
        numbers = iter(uids)
        while self.groups and len(self.waiting) < most_waiting:
            group = self.groups[0]
            if group.trunk is None and not self._open(group, trunks):
                break
            if not self._place_one(group, trunks, branches, numbers) and not (
                self._open_anew(group, trunks) and self._place_one(group, trunks, branches, numbers)
            ):
                break
            if not group.pending:
                self.groups.popleft()
                if group.trunk is not None:
                    group.trunk.users -= 1
        return [trunks, branches]

    def finish(self, uid: int) -> Placed:
        """A running request is done; what it needed may be given up."""
        placed = self.running.pop(uid)
        _release(placed)
        return placed

    def drop(self, key: Any) -> list[int]:
        """Forget the request with this key. Returns its number where it is in a lane, which then must stop."""
        for group in self.groups:
            group.forget(key)
            if not group.pending and group.trunk is not None:
                group.trunk.users -= 1
        self.groups = deque(group for group in self.groups if group.pending)
        for placed in [p for p in self.waiting if p.request.key == key]:
            self.waiting.remove(placed)
            _release(placed)
        uids = [uid for uid, placed in self.running.items() if placed.request.key == key]
        for uid in uids:
            self.finish(uid)
        return uids

    def _open(self, group: Group, trunks: list[Run]) -> bool:
        """Give the group a trunk: a piece that is there, or a new one. False where there is no room."""
        prompt = group.pending[0].prompt[:-1]
        if not prompt:
            return True
        beginnings = (p for p in self.pieces if not p.position)
        best = max(beginnings, key=lambda p: common_prefix(p.tokens, prompt), default=None)
        if best is None or 2 * common_prefix(best.tokens, prompt) < len(prompt):
            return self._new_trunk(group, prompt, trunks)
        alone = len(group.pending) == 1 and not best.users
        group.trunk = (self._grown(best, prompt, trunks) if alone else None) or best
        self._use(group.trunk)  # until none of the group is pending
        return True

    def _grown(self, piece: Piece, prompt: list[int], trunks: list[Run]) -> Piece | None:
        """A trunk that nobody needs, going on as this prompt does, as in a conversation: what follows takes the slots behind.

        None where there is no room.
        """
        stop = piece.start + max(len(prompt), piece.room)
        others = [p for p in self.pieces if p is not piece and p.start < stop and piece.start < p.stop]
        seen = common_prefix(piece.tokens, prompt)
        if stop > self.slots or any(p.users for p in others) or seen == len(prompt):
            return None
        grown = Piece(piece.start, prompt, room=piece.room)
        self.pieces = [*(p for p in self.pieces if p is not piece and p not in others), grown]
        trunks.append(Run(grown.start + seen, prompt[seen:], seen, (grown.start, grown.start + seen)))
        return grown

    def _open_anew(self, group: Group, trunks: list[Run]) -> bool:
        """In a row that does nothing else, a trunk that lay there may take the room that the request needs beside it."""
        if self.waiting or self.running or group.trunk is None:
            return False
        group.trunk.users -= 1
        group.trunk = None
        return self._new_trunk(group, group.pending[0].prompt[:-1], trunks)

    def _new_trunk(self, group: Group, prompt: list[int], trunks: list[Run]) -> bool:
        room = max(r.room for r in group.pending)
        group.trunk = self._allocate(prompt, 0, room) or (self._allocate(prompt, 0) if room else None)
        if group.trunk is None:
            return False
        trunks.append(Run(group.trunk.start, prompt, 0, (group.trunk.start, group.trunk.start)))
        self._use(group.trunk)
        return True

    def _place_one(self, group: Group, trunks: list[Run], branches: list[Run], uids: Any) -> bool:
        request, trunk = group.pending[0], group.trunk
        known = request.prompt[:-1]
        seen = common_prefix(trunk.tokens, known) if trunk else 0
        own = None
        if seen < len(known):
            own = self._allocate(known[seen:], seen)
            if own is None:
                return False
            start = trunk.start if trunk else 0
            # What shares nothing may become a trunk itself, so it is computed with them.
            (branches if seen else trunks).append(Run(own.start, own.tokens, seen, (start, start + seen)))
            self._use(own)
        if trunk is not None:
            self._use(trunk)
        self.waiting.append(Placed(group.pending.popleft(), trunk, seen, own, next(uids)))
        return True

    def _use(self, piece: Piece) -> None:
        self._time += 1
        piece.users += 1
        piece.last_use = self._time

    def _allocate(self, tokens: list[int], position: int, room: int = 0) -> Piece | None:
        """Slots for these tokens, ``room`` at least, of which nothing is needed any more; least recently used pieces go first."""
        best: tuple[tuple[int, int], int] | None = None
        for start in sorted({0, *(p.stop for p in self.pieces)}):
            stop = start + max(len(tokens), room)
            if stop > self.slots:
                continue
            hit = [p for p in self.pieces if p.start < stop and start < p.stop]
            if any(p.users for p in hit):
                continue
            cost = max((p.last_use for p in hit), default=0), start
            if best is None or cost < best[0]:
                best = cost, start
        if best is None:
            return None
        piece = Piece(best[1], tokens, position, room=room)
        self.pieces = [p for p in self.pieces if p.stop <= piece.start or piece.stop <= p.start]
        self.pieces.append(piece)
        return piece


def _release(placed: Placed) -> None:
    for piece in (placed.trunk, placed.own):
        if piece is not None:
            piece.users -= 1


def windows(row: int, runs: Sequence[Run], width: int, slots: int) -> list[Chunk]:
    """Chunks of one row [C], C = ``width``, that compute the runs; runs that lie beside each other share chunks."""
    out: list[_Window] = []
    for run in sorted(runs, key=lambda r: r.slot):
        done = 0
        while done < len(run.tokens):
            taken = out[-1].take(run, done) if out else 0
            if not taken:
                out.append(_Window(row, min(run.slot + done, slots - width), width, slots))
            done += taken
    return [w.chunk for w in out]


class _Window:
    """A chunk in the making."""

    def __init__(self, row: int, start: int, width: int, slots: int) -> None:
        tokens, position, since, until, at = (np.zeros(n, np.int32) for n in (width, width, slots, slots, slots))
        self.chunk = Chunk(np.int32(row), np.int32(start), tokens, position, np.zeros(width, bool), since, until, at)
        self.end = 0  # behind the last token taken

    def take(self, run: Run, done: int) -> int:
        """Take what follows the ``done`` first tokens of a run, as far as it goes; returns how many tokens.

        None where the run sees slots that an earlier run of the window sees and the one before does not: the tokens that see
        a slot must follow one another.
        """
        c = self.chunk
        slot, trunk = run.slot + done, slice(*run.trunk)
        first = slot - int(c.start)
        last = min(first + len(run.tokens) - done, len(c.tokens))
        seen = c.until[trunk]
        if first >= last or ((seen > 0) & (seen < self.end)).any():
            return 0
        c.tokens[first:last] = run.tokens[done : done + last - first]
        c.position[first:last] = np.arange(run.position + done, run.position + done + last - first)
        c.valid[first:last] = True
        c.since[trunk] = np.where(seen > 0, c.since[trunk], first)
        c.since[run.slot : slot] = first
        c.since[slot : slot + last - first] = np.arange(first, last)
        c.until[trunk] = c.until[run.slot : slot + last - first] = last
        c.slot_position[trunk] = np.arange(trunk.stop - trunk.start)
        c.slot_position[run.slot : slot + last - first] = run.position + np.arange(done + last - first)
        self.end = last
        return last - first


def row_seed(*parts: object) -> int:
    """A seed for one row from what identifies it (run seed, stage, context): the same on every machine and batch.

    Other parts give another seed; 1 and "1" are the same part. The parts (run seed, stage) and (run seed, stage, id) are
    joined by slashes, which is unambiguous for the names that stages have; all others as a JSON list.
    """
    texts = [str(part) for part in parts]
    staged = len(parts) in (2, 3) and isinstance(parts[0], int) and re.fullmatch(r"[a-z]+|round\d+/[a-z]+", texts[1])
    joined = "/".join(texts) if staged else json.dumps(texts)
    return int.from_bytes(hashlib.sha256(joined.encode()).digest()[:4], "big")
