"""The text of a compiled HLO module as instructions, and how often its loops run."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple

HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
ASSIGNED = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
WIDTH = re.compile(r"(?:bf|f|s|u|c)(\d+)|(pred)|token$|opaque$")
OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
COMMENT = re.compile(r"/\*index=\d+\*/")


class Array(NamedTuple):
    """An array's type."""

    dims: tuple[int, ...]
    bytes: float
    main: bool
    """Whether it lies in main memory, not in a TPU's vector memory or the host's."""


Type = Array | list["Type"]
"""An array's, or a tuple's."""


def arrays(made: Type) -> list[Array]:
    """The arrays in a type, in order."""
    return [made] if isinstance(made, Array) else [a for part in made for a in arrays(part)]


def size(made: Type, main: bool = False) -> float:
    """Bytes of a type; of what lies in ``main`` memory only, if so asked."""
    return sum(a.bytes for a in arrays(made) if a.main or not main)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. Of an asynchronous pair the start is kept, under the name of what it starts."""

    name: str
    opcode: str
    """Without -start."""
    type: Type
    """Of what it delivers, at once or later."""
    operands: list[str]
    rest: str
    """Attributes, strings blanked."""
    line: str

    def attribute(self, key: str) -> str:
        """Its text; empty if absent."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|[^,\s]+)", self.rest)
        return found[1] if found else ""

    def names(self, *keys: str) -> list[str]:
        """The computations in attributes."""
        return [n for key in keys for n in re.findall(r"[\w.\-]+", self.attribute(key))]

    @property
    def called(self) -> list[str]:
        """Computations that it runs once; what a reduction applies to each element is not one."""
        runs = {"call": ("to_apply", "calls"), "custom-call": ("called_computations", "calls")}
        return self.names(*runs.get(self.opcode, ("calls",)))

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
    """Instructions by name."""

    root: Instruction

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
        return [ins.name for ins in sorted(found, key=lambda ins: int(ins.operands[0]))]


class Module:
    """Computations by name. Raises ValueError naming a line that cannot be read."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.loops: dict[str, tuple[str, Instruction]] = {}
        """Of a loop's body and its condition: where the loop is."""
        header = STRING.sub('""', text.partition("\n")[0])
        counts = {k: int(n) for k, n in re.findall(r"\b(num_partitions|replica_count)=(\d+)", header)}
        self.partitions, self.replicas = counts.get("num_partitions", 1), counts.get("replica_count", 1)
        inside, pending, depth = Computation(), "", 0
        where = ""  # in no computation
        for line in text.splitlines():
            if not where:
                if head := HEAD.match(line.strip()):
                    where, inside = head[2], Computation()
                    self.computations[where] = inside
                    self.entry = where if head[1] else self.entry
                elif ASSIGNED.match(line) or line.endswith("{"):
                    raise ValueError(f"not an HLO computation that can be read: {line.strip()[:300]}")
                continue
            if not pending and line.startswith("}"):
                where = ""
                continue
            # Some attributes, kernels' metadata, are printed over several lines.
            pending, bare = f"{pending} {line}", STRING.sub("", line)
            depth += bare.count("{") - bare.count("}")
            if depth <= 0 and line.strip():
                ins, root = _instruction(pending)
                pending, depth, inside[ins.name] = "", 0, ins
                if root:
                    inside.root = ins
                if ins.opcode == "while":
                    self.loops |= dict.fromkeys(ins.names("body", "condition"), (where, ins))
        if where:
            raise ValueError(f"not a whole HLO module: it ends in {where} {pending.strip()[:300]}")
        if not self.entry:
            raise ValueError("no HLO module: it has no entry computation")


def _instruction(line: str) -> tuple[Instruction, bool]:
    """A line's instruction, and whether it is the root. Raises ValueError naming a line that cannot be read."""
    text = STRING.sub('""', COMMENT.sub("", line))
    head = ASSIGNED.match(text)
    try:
        if not head:
            raise ValueError
        made, at = _type(text, head.end())
        if not (opcode := OPCODE.match(text, at)):
            raise ValueError
        at, depth = opcode.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
    except (ValueError, IndexError) as e:
        raise ValueError(f"not an HLO instruction that can be read: {line.strip()[:300]}") from e
    inside, op = text[opcode.end() : at - 1], opcode[1]
    operands = re.findall(r"%([\w.\-]+)", inside) or re.findall(r"([\w.\-]+)(?:,|$)", inside)
    if op.endswith("-start"):
        op = op.removesuffix("-start")
        if isinstance(made, list) and (op != "all-reduce" or isinstance(made[0], list)):
            made = made[isinstance(made[0], list) or op != "copy"]  # (source, result, ...); a copy's result comes first
    return Instruction(head[2], op, made, operands, text[at:], line), bool(head[1])


def _type(text: str, at: int) -> tuple[Type, int]:
    """The type at a position, and where it ends."""
    if text[at] == "(":
        parts: list[Type] = []
        at += 1
        while text[at] != ")":
            part, at = _type(text, at)
            parts.append(part)
            while text[at] in ", ":
                at += 1
        return parts, at + 1
    found = ARRAY.match(text, at)
    width = found and WIDTH.match(found[1])
    if not found or not width:
        raise ValueError
    dims = tuple(int(d.lstrip("<=")) for d in found[2].split(",") if d)
    space = re.search(r"S\((\d+)\)", found[3] or "")
    # Space 1 is a TPU's vector memory; on a GPU, whose layouts have no tiles, it is main memory set apart for collectives.
    main = space is None or space[1] == "0" or (space[1] == "1" and "T(" not in found[3])
    bits = 8 if width[2] else int(width[1] or 0)
    return Array(dims, prod(dims) * bits / 8, main), found.end()


# --- how often loops run

Value = tuple[int | None, int]
"""An integer in a loop: an element that the loop carries, by its index, or nothing, plus a constant."""
SAME = ("copy", "copy-done", "bitcast", "convert", "reshape")
MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}


def trips(module: Module, name: str, loop: Instruction) -> int | None:
    """How often a loop in the named computation runs its body, if the text tells.

    It does by the compiler's own note, or if the condition compares with a constant a counter that steps evenly.
    """
    if told := re.search(r'"known_trip_count":\{"n":"?(\d+)', loop.line):
        return int(told[1])
    (body,), (condition,) = loop.names("body"), loop.names("condition")
    left, right, way = _comparison(module, condition, module.computations[condition].root.name, None)
    for counter, bound, towards in ((left, right, way), (right, left, MIRRORED.get(way, way))):
        if counter is None or counter[0] is None:
            continue
        step, first = _carried(module, body, counter[0]), _initial(module, name, loop, counter[0])
        limit = _settled(module, condition, bound)
        if step and step[0] == counter[0] and step[1] and first is not None and limit is not None:
            return _steps(limit - first - counter[1], step[1], towards)
    return None


def _steps(distance: int, step: int, way: str) -> int | None:
    """How often a counter passes the test "less than", or another, this far before the bound."""
    if step < 0:
        distance, step, way = -distance, -step, MIRRORED.get(way, way)
    if way == "LT":
        return max(0, -(-distance // step))
    if way == "LE":
        return max(0, distance // step + 1)
    return distance // step if way == "NE" and distance >= 0 and distance % step == 0 else None


def _comparison(
    module: Module, name: str, what: str, given: list[Value | None] | None
) -> tuple[Value | None, Value | None, str]:
    """Both sides of a test and its direction, as far as they can be told."""
    ins = module.computations[name][what]
    if ins.opcode == "compare":
        left, right = (_value(module, name, operand, given) for operand in ins.operands)
        return left, right, ins.attribute("direction")
    if ins.opcode in SAME:
        return _comparison(module, name, ins.operands[0], given)
    if ins.opcode in ("fusion", "call"):
        return _comparison(module, *_into(module, name, ins, given))
    return None, None, ""


def _value(module: Module, name: str, what: str, given: list[Value | None] | None) -> Value | None:
    """An integer in a loop's computation, or in one that is called from it and ``given`` arguments."""
    comp = module.computations[name]
    ins = comp[what]
    if ins.opcode == "constant":
        found = re.search(r"constant\((-?\d+)\)", ins.line)
        return (None, int(found[1])) if found else None
    if ins.opcode == "parameter":
        return given[int(ins.operands[0])] if given is not None else None
    if ins.opcode in SAME:
        return _value(module, name, ins.operands[0], given)
    if ins.opcode == "get-tuple-element":
        source, index = comp[ins.operands[0]], int(ins.attribute("index"))
        if source.opcode == "parameter" and given is None:
            return index, 0
        return _value(module, name, source.operands[index], given) if source.opcode == "tuple" else None
    if ins.opcode in ("add", "subtract"):
        a, b = (_value(module, name, operand, given) for operand in ins.operands)
        if a is None or b is None or (b[0] is not None and (a[0] is not None or ins.opcode == "subtract")):
            return None
        return (a[0], a[1] - b[1]) if ins.opcode == "subtract" else (b[0] if a[0] is None else a[0], a[1] + b[1])
    if ins.opcode in ("fusion", "call") and not isinstance(ins.type, list):
        return _value(module, *_into(module, name, ins, given))
    return None


def _into(
    module: Module, name: str, ins: Instruction, given: list[Value | None] | None
) -> tuple[str, str, list[Value | None]]:
    """What an instruction calls, what that returns, and its arguments."""
    called = ins.called[0]
    return called, module.computations[called].root.name, [_value(module, name, n, given) for n in ins.operands]


def _carried(module: Module, body: str, index: int) -> Value | None:
    """What an iteration makes of a carried element."""
    root = module.computations[body].root
    return _value(module, body, root.operands[index], None) if root.opcode == "tuple" else None


def _initial(module: Module, name: str, loop: Instruction, index: int) -> int | None:
    """What a carried element is before the first iteration."""
    start = module.computations[name][loop.operands[0]]
    return (
        _settled(module, name, _value(module, name, start.operands[index], None)) if start.opcode == "tuple" else None
    )


def _settled(module: Module, name: str, value: Value | None) -> int | None:
    """A value that is the same whenever the named computation, a loop's or not, is run."""
    if value is None or value[0] is None:
        return value and value[1]
    where, loop = module.loops.get(name, ("", None))
    if loop is None or _carried(module, loop.names("body")[0], value[0]) != (value[0], 0):
        return None
    first = _initial(module, where, loop, value[0])
    return None if first is None else first + value[1]
