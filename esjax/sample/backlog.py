"""Groups of requests that wait for a row: in order, and found by how their prompts begin."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from esjax.sample.rowbook import Group, RowBook, beginnings


class Backlog:
    """Waiting groups. What a group costs does not grow with how many wait, nor with how many rows there are."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._groups: dict[int, Group] = {}  # by place; those that are looked at first have the lowest
        self._front: list[int] = []  # a heap of places; of groups that are gone, too
        self._alike: dict[int, list[int]] = {}  # by the beginning of a prompt: a heap of such places
        self._last, self._first = count(), 0
        self.append(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return (self._groups[place] for place in sorted(self._groups))

    def append(self, groups: Iterable[Group]) -> None:
        """Groups that come after all others."""
        for group in groups:
            self._add(next(self._last), group)

    def put_first(self, groups: Sequence[Group]) -> None:
        """Groups that come before all others, the first of them first."""
        self._first -= len(groups)
        for place, group in enumerate(groups, start=self._first):
            self._add(place, group)

    def take(self, row: RowBook, near: int) -> Group:
        """The first group; or one of the ``near`` places behind it of whose prompt some half lies in this row already."""
        first = self._live(self._front)
        assert first is not None, "nothing waits"
        found = (self._live(self._alike[key]) for key in row.beginnings if key in self._alike)
        best = min((place for place in found if place is not None), default=first)
        return self._groups.pop(best if best < first + near else first)

    def forget(self, key: Any) -> None:
        """Take out the request with this key, if it is here."""
        for place, group in list(self._groups.items()):
            group.forget(key)
            if not group.pending:
                del self._groups[place]

    def _add(self, place: int, group: Group) -> None:
        self._groups[place] = group
        heapq.heappush(self._front, place)
        prompt = group.pending[0].prompt
        half = beginnings(prompt[: len(prompt) // 2])
        if half:
            heapq.heappush(self._alike.setdefault(half[-1], []), place)

    def _live(self, heap: list[int]) -> int | None:
        """The lowest place on a heap that still has a group."""
        while heap and heap[0] not in self._groups:
            heapq.heappop(heap)
        return heap[0] if heap else None
