"""Regular expressions as Python's ``re`` reads them, as trees of character sets; what a finite automaton cannot do is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from re import _parser as sre  # type: ignore[attr-defined]
from typing import Any, NamedTuple

from esjax.errors import InputError

Ranges = tuple[tuple[int, int], ...]  # of code points, ascending, both ends included; never surrogates
LAST = 0x10FFFF


class Chars(NamedTuple):
    """One character of a set."""

    ranges: Ranges


class Join(NamedTuple):
    """One node after the other."""

    parts: tuple[Node, ...]


class Choice(NamedTuple):
    """One of the nodes."""

    options: tuple[Node, ...]


class Repeat(NamedTuple):
    """A node so many times; ``most`` None is any number."""

    body: Node
    least: int
    most: int | None


Node = Chars | Join | Choice | Repeat
# What is refused: the name, and how it looks in a pattern (to tell where it stands).
REFUSED = {
    "ASSERT": ("look-around", r"\(\?<?="),
    "ASSERT_NOT": ("look-around", r"\(\?<?!"),
    "GROUPREF": ("a back reference", r"\\[1-9]|\(\?P="),
    "GROUPREF_EXISTS": ("a conditional group", r"\(\?\("),
    "POSSESSIVE_REPEAT": ("a possessive repetition", r"[*+?}]\+"),
    "ATOMIC_GROUP": ("an atomic group", r"\(\?>"),
    "AT_BOUNDARY": ("a word boundary", r"\\b"),
    "AT_NON_BOUNDARY": ("a word boundary", r"\\B"),
    "AT_BEGINNING": ("an anchor that is not at the beginning", r"\^"),
    "AT_BEGINNING_STRING": ("an anchor that is not at the beginning", r"\\A"),
    "AT_END": ("an anchor that is not at the end", r"\$"),
    "AT_END_STRING": ("an anchor that is not at the end", r"\\[zZ]"),
    "IGNORECASE": ("the flag i (write both cases, as [Aa])", r"\(\?[a-z]*i"),
    "LOCALE": ("the flag L", r"\(\?[a-z]*L"),
}
CLASSES = {"DIGIT": ("0-9", r"\d"), "SPACE": (" \t\n\r\f\v", r"\s"), "WORD": ("a-zA-Z0-9_", r"\w")}


def parse(pattern: str) -> Node:
    r"""The tree of a pattern that texts match as a whole, so anchors at its very ends mean nothing, and lazy is greedy.

    ``\d``, ``\w`` and ``\s`` are their ASCII characters; a set that leaves them out leaves out all that Python's ``re``
    knows. Raises InputError, naming a construct that is not regular and where it stands.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = sre.parse(pattern)
            return _Reader(pattern, tree.state.flags).join(list(tree), True, True)
    except re.error as e:
        raise InputError(
            f"the pattern {shown(pattern)} is not a regular expression ({e.msg} at position {e.pos})"
        ) from e
    except (OverflowError, RecursionError) as e:
        raise InputError(f"the pattern {shown(pattern)} is nested too deeply or repeats too often; simplify it") from e


def shown(pattern: str) -> str:
    """A pattern for a message."""
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


def united(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The union, without surrogates, which no text contains."""
    out: list[tuple[int, int]] = []
    whole = [part for low, high in ranges for part in ((low, min(high, 0xD7FF)), (max(low, 0xE000), high))]
    for low, high in sorted(part for part in whole if part[0] <= part[1]):
        if out and low <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(high, out[-1][1])
        else:
            out.append((low, high))
    return tuple(out)


def without(ranges: Ranges) -> Ranges:
    """All characters but those."""
    starts = [0, *(high + 1 for _, high in ranges)]
    ends = [*(low - 1 for low, _ in ranges), LAST]
    return united(zip(starts, ends, strict=True))


@lru_cache
def _class(name: str, wide: bool) -> Ranges:
    """Characters of a CATEGORY: certainly (ASCII's), or ``wide``, by any meaning that it has."""
    if name.startswith("NOT_"):
        return without(_class(name[4:], not wide))
    narrow, letter = CLASSES[name]
    text = "".join(map(chr, range(LAST + 1))) if wide else "".join(map(chr, range(128)))
    found = re.finditer(f"{letter}+" if wide else f"[{narrow}]+", text)
    return united((m.start(), m.end() - 1) for m in found)


class _Reader:
    """From ``re``'s own tree to ours."""

    def __init__(self, pattern: str, flags: int) -> None:
        self.pattern = pattern
        self.check_flags(flags)

    def check_flags(self, flags: int) -> None:
        for name in ("IGNORECASE", "LOCALE"):
            if flags & getattr(re, name):
                self.refuse(name)
        self.any = ((0, LAST),) if flags & re.DOTALL else ((0, 9), (11, LAST))

    def refuse(self, name: str) -> None:
        what, look = REFUSED[name]
        tokens = rf"(?P<it>{look})|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|."
        found = [m.start() for m in re.finditer(tokens, self.pattern, re.DOTALL) if m["it"]]
        if name in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            found = found[::-1]
        where = f" at position {found[0]}" if found else ""
        raise InputError(
            f"the pattern {shown(self.pattern)} has {what}{where}, which constrained sampling cannot follow; write it without"
        )

    def join(self, items: Sequence[Any], first: bool, last: bool) -> Node:
        """Nodes one after the other; ``first`` and ``last`` say whether they stand at the text's very ends."""
        kinds = [str(op) for op, _ in items]
        before = next((i for i, kind in enumerate(kinds) if kind != "AT"), len(kinds))
        after = next((i for i in reversed(range(len(kinds))) if kinds[i] != "AT"), -1)
        parts = []
        for i, (op, argument) in enumerate(items):
            at_start, at_end = first and i <= before, last and i >= after
            if str(op) == "AT":
                name = str(argument)
                if "BOUNDARY" in name or not (at_start if "BEGINNING" in name else at_end):
                    self.refuse(name)
            else:
                parts.append(self.node(str(op), argument, at_start, at_end))
        return parts[0] if len(parts) == 1 else Join(tuple(parts))

    def node(self, op: str, argument: Any, first: bool, last: bool) -> Node:
        if op in REFUSED:
            self.refuse(op)
        if op == "LITERAL":
            return Chars(united([(argument, argument)]))
        if op == "NOT_LITERAL":
            return Chars(without(united([(argument, argument)])))
        if op == "ANY":
            return Chars(united(self.any))
        if op == "IN":
            return Chars(self.set(argument))
        if op == "BRANCH":
            return Choice(tuple(self.join(list(option), first, last) for option in argument[1]))
        if op == "SUBPATTERN":
            _, add, remove, body = argument
            outer = self.any
            if add or remove:
                self.check_flags(add | (re.DOTALL if len(outer) == 1 and not remove & re.DOTALL else 0))
            made = self.join(list(body), first, last)
            self.any = outer
            return made
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            unbounded = most == sre.MAXREPEAT
            once = most == 1
            return Repeat(self.join(list(body), first and once, last and once), least, None if unbounded else int(most))
        raise InputError(
            f"the pattern {shown(self.pattern)} has {op.lower()}, which constrained sampling cannot follow"
        )

    def set(self, items: Sequence[Any]) -> Ranges:
        negated = bool(items) and str(items[0][0]) == "NEGATE"
        ranges: list[tuple[int, int]] = []
        for op, argument in items[1:] if negated else items:
            if str(op) == "LITERAL":
                ranges.append((argument, argument))
            elif str(op) == "RANGE":
                ranges.append(argument)
            else:
                ranges += _class(str(argument).removeprefix("CATEGORY_"), negated)
        return without(united(ranges)) if negated else united(ranges)
