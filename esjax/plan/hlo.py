"""The text of a compiled HLO module (``compiled.as_text()``; TPU, GPU and CPU) as instructions, and how often its loops run."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
START = re.compile(r"\s*(?:ROOT )?%?[\w.\-]+ = ")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
WIDTH = re.compile(r"(?:bf|f|s|u|c)(\d+)|(pred)|token$|opaque$")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class Array(NamedTuple):
    """An array's type."""

    bytes: float
    main: bool
    """Whether it lies in main memory, not in a TPU's vector memory or the host's."""


def size(arrays: Sequence[Array], main: bool = False) -> float:
    """Bytes of arrays; of those in ``main`` memory only, if so asked."""
    return sum(a.bytes for a in arrays if a.main or not main)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    opcode: str
    type: list[Array]
    """The arrays of its result, in order."""
    inside: str
    """What stands between its parentheses."""
    rest: str
    """Attributes, strings blanked."""
    line: str

    @cached_property
    def operands(self) -> list[str]:
        """By name."""
        return re.findall(r"%([\w.\-]+)", self.inside)

    def attribute(self, key: str) -> str:
        """Its text; empty if absent."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else ""

    def names(self, *keys: str) -> list[str]:
        """The computations in attributes."""
        return [n for key in keys for n in re.findall(r"[\w.\-]+", self.attribute(key))]

    @cached_property
    def target(self) -> str:
        """What a custom call calls."""
        found = re.search(r'custom_call_target="([^"]*)"', self.line) if self.opcode == "custom-call" else None
        return found[1] if found else ""

    @cached_property
    def chained(self) -> bool:
        """Whether it is part of a TPU's collective that is spread over several fusions, each of which repeats it."""
        return "chain_id=" in self.rest or self.target.startswith("AsyncCollective")


class Computation(dict[str, Instruction]):
    """Instructions by name. Raises ValueError naming a line that cannot be read."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__()
        for line in lines:
            found = INSTRUCTION.match(STRING.sub('""', line))
            made = [_array(*a) for a in ARRAY.findall(found[3])] if found else []
            if not found or None in made or not (made or found[3] == "()"):
                raise unreadable("an HLO instruction", line)
            root, name, _, opcode, inside, rest = found.groups()
            self[name] = Instruction(name, opcode, [a for a in made if a], inside, rest, line)
            if root:
                self.root = self[name]

    @cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """By name: who uses it, and as which operand."""
        out = defaultdict(list)
        for ins in self.values():
            for i, operand in enumerate(ins.operands):
                out[operand].append((ins, i))
        return out

    @cached_property
    def parameters(self) -> list[str]:
        """In order."""
        found = [ins for ins in self.values() if ins.opcode == "parameter"]
        return [ins.name for ins in sorted(found, key=lambda ins: int(ins.inside))]

    def source(self, name: str) -> Instruction:
        """What a value is, behind copies."""
        while self[name].opcode == "copy":
            name = self[name].operands[0]
        return self[name]


def _array(kind: str, shape: str, layout: str) -> Array | None:
    """An array's type, if that can be read."""
    if not (width := WIDTH.match(kind)):
        return None
    space = re.search(r"S\((\d+)\)", layout)
    # Space 1 is a TPU's vector memory; on a GPU, whose layouts have no tiles, it is main memory set apart for collectives.
    main = space is None or space[1] == "0" or (space[1] == "1" and "T(" not in layout)
    bits = 8 if width[2] else int(width[1] or 0)
    return Array(prod(int(d.lstrip("<=")) for d in shape.split(",") if d) * bits / 8, main)


def unreadable(what: str, line: str) -> ValueError:
    return ValueError(f"not {what} that can be read: {' '.join(line.split())[:500]}")


class Module:
    """A compiled module's computations. Raises ValueError naming a line that cannot be read."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        count = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
        self.partitions = int(count[1]) if count else 1
        name, self.entry = "", ""
        lines: list[str] = []
        for line in text.splitlines():
            if head := HEAD.match(line):
                name, lines = head[2], []
                self.entry = name if head[1] else self.entry
            elif name and re.match(r"\}(,|$)", line):
                self.computations[name], name = Computation(lines), ""
            elif START.match(line) and name:
                lines.append(line)
            elif name and lines:  # some attributes, kernels' metadata, are printed over several lines
                lines[-1] += f" {line}"
            elif name or START.match(line):
                raise unreadable("an HLO computation", line)
        if name or not self.entry:
            raise ValueError("not a whole HLO module: it has no entry computation, or ends within one")

    def trips(self, comp: Computation, loop: Instruction) -> int | None:
        """How often a loop runs, if its text tells: by the compiler's note, or by a counter that goes up by 1 to a constant."""
        if told := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.line):
            return int(told[1])
        (body,), (condition,) = ([self.computations[n] for n in loop.names(key)] for key in ("body", "condition"))
        test, first = condition.root, comp[loop.operands[0]]
        if test.opcode != "compare" or test.attribute("direction") != "LT" or first.opcode != "tuple":
            return None
        counter, bound = (condition.source(n) for n in test.operands)
        if not (index := counter.attribute("index")):
            return None
        start, step = comp.source(first.operands[int(index)]), body.source(body.root.operands[int(index)])
        added = [body.source(n) for n in step.operands]
        if step.opcode != "add" or [a.attribute("index") or a.inside for a in added] != [index, "1"]:
            return None
        return max(0, int(bound.inside) - int(start.inside)) if start.opcode == bound.opcode == "constant" else None
