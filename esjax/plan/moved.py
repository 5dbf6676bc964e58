"""What one device moves in a compiled program: bytes in main memory, and over the network by kind of collective.

The compiler's own cost analysis counts a loop's body once, no network, and a TPU's vector memory as if it were main memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from esjax.plan.hlo import Computation, Instruction, Module, size, unreadable
from esjax.plan.parts import label

# Instructions and custom calls that move no data of their own: names, views, and what only holds other instructions.
FREE = set(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id domain opt-barrier "
    "add-dependency while conditional call async-start call-start send recv".split()
)
FREE_CALLS = ("Allocate", "ConcatBitcast", "AssumeGather", "GatherScatterIndices", "PrepareAsync", "AsyncCollective")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # done in place; which operand is written
VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert", "get-tuple-element")
RUNS = {  # where an instruction names the computations that it runs; others name them in "calls"
    "while": ("body", "condition"),
    "call": ("to_apply", "calls"),
    "call-start": ("to_apply",),
    "custom-call": ("called_computations", "calls"),
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?"
MESH = r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}"
GROUPS = re.compile(rf"\breplica_groups=(?:(\{{\}})|\{{(\{{[\d,{{}}]*\}})\}}|\[\d+,(\d+)\]<=({ORDER})|{MESH})(?=,|$)")
PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
BETWEEN = " between "
BETWEEN_SLICES, BETWEEN_NODES = BETWEEN + "slices", BETWEEN + "nodes"
# Between slices a TPU's program hands what it sends to its host, whose runtime, Megascale, does the rest.
MEGASCALE = re.compile(r'_xla_megascale_target=(.*),_xla_megascale_transfer_type="(\w+)"')
MEGASCALE_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
SLICE_IDS = 100_000  # device ids of slice i begin at i times this


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind. A device that is alone in its group sends nothing, and that counts as none."""

    count: int
    """How often one is run."""
    bytes: float
    """What a device sends over the network by a ring algorithm."""


@dataclass
class Moved:
    """What one device moves. A loop of unknown length counts as one iteration; of branches the one that moves most."""

    bytes: float = 0.0
    """Read and written in main memory, estimated: operands and results of instructions outside fusions. What is only sliced
    or updated in place counts as the slice or the update; other memories (a TPU's vector memory, the host's) do not count."""
    collectives: dict[str, Collective] = field(default_factory=dict)
    """By kind; what leaves a slice or node has " between slices" or " between nodes" in its kind."""
    parts: dict[str, float] = field(default_factory=dict)
    """The bytes by what they are moved for, see ``parts.label``."""

    def largest(self, count: int) -> list[tuple[str, float]]:
        """The parts that move most."""
        return sorted(self.parts.items(), key=lambda part: -part[1])[:count]

    def add(self, other: Moved, times: int = 1) -> None:
        """Add what is moved so often."""
        self.bytes += other.bytes * times
        for part, more_bytes in other.parts.items():
            self.parts[part] = self.parts.get(part, 0.0) + more_bytes * times
        for kind, more in other.collectives.items():
            had = self.collectives.get(kind, Collective(0, 0.0))
            if times:
                self.collectives[kind] = Collective(had.count + more.count * times, had.bytes + more.bytes * times)


def moved(text: str, nodes: Sequence[int] = (), steps: bool = False) -> Moved:
    """What running a module moves. Raises ValueError naming a line that cannot be read.

    Args:
        nodes: each partition's node, where there are several and the text does not tell what goes between them (GPUs).
        steps: only what one iteration of its outermost loops of unknown length moves.
    """
    module = Module(text)
    walk = _Walk(module, nodes)
    return walk.steps(module.entry) if steps else walk.work(module.entry, fused=False)


class _Walk:
    """What a module's computations move, each looked at once."""

    def __init__(self, module: Module, nodes: Sequence[int]) -> None:
        self.module, self.nodes = module, nodes
        self.done: dict[tuple[str, bool], Moved] = {}
        self.begun: set[str] = set()  # channels of chained collectives

    def steps(self, name: str) -> Moved:
        """What one iteration of a computation's outermost loops of unknown length moves."""
        comp, total = self.module.computations[name], Moved()
        for ins in comp.values():
            if ins.opcode == "while" and self.module.trips(comp, ins) is None:
                total.add(self.instruction(comp, ins, fused=False))
            elif ins.opcode == "call":
                total.add(self.steps(ins.names(*RUNS["call"])[0]))
        return total

    def work(self, name: str, fused: bool) -> Moved:
        """What running a computation moves; in a fusion main memory is not counted."""
        if (name, fused) not in self.done:
            total = Moved()
            for ins in self.module.computations[name].values():
                try:
                    total.add(self.instruction(self.module.computations[name], ins, fused))
                except (LookupError, TypeError, AttributeError) as e:
                    raise unreadable("an HLO instruction", ins.line) from e
            self.done[name, fused] = total
        return self.done[name, fused]

    def instruction(self, comp: Computation, ins: Instruction, fused: bool) -> Moved:
        """What an instruction moves, with all that it calls."""
        kind, _, part = ins.opcode.rpartition("-")
        if part == "done" and comp[ins.operands[0]].opcode == f"{kind}-start" and kind not in ("async", "call"):
            # An asynchronous pair counts at its end, whose type is that of the result.
            ins = replace(comp[ins.operands[0]], opcode=kind, type=ins.type)
        elif part in ("done", "update") or (part == "start" and kind not in ("async", "call")):
            return Moved()
        if ins.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            return sorted((self.work(b, fused) for b in ins.names(*keys)), key=_weight)[-1]
        total = Moved(0.0 if fused else self.traffic(comp, ins), self.sent(comp, ins, fused))
        if ins.chained and total.collectives:
            started = [user.type[:2] for user, _ in comp.users[ins.name] if user.target == "AsyncCollectiveStart"]
            total.bytes = size(started[0] if started else ins.type, main=True)  # its part and the whole
        if total.bytes:
            total.parts[label(self.module, comp, ins)] = total.bytes
        times = self.module.trips(comp, ins) if ins.opcode == "while" else None
        for name in ins.names(*RUNS.get(ins.opcode, ("calls",))):
            total.add(self.work(name, fused or ins.opcode == "fusion"), 1 if times is None else times)
        return total

    # --- main memory

    def traffic(self, comp: Computation, ins: Instruction) -> float:
        """Bytes that an instruction outside fusions reads and writes in main memory."""
        if ins.opcode in FREE or ins.target.startswith(FREE_CALLS):
            return 0.0
        read = sum(self.read(comp, ins, i) for i, n in enumerate(ins.operands) if size(comp[n].type, main=True))
        if ins.opcode in UPDATES:
            return read + (self.written(comp, ins) if size(ins.type, main=True) else 0.0)
        if ins.opcode != "fusion":
            scratch = ins.target.startswith("__cu") and len(ins.type) > 1  # a GPU library's space comes last
            return read + size(ins.type[:-1] if scratch else ins.type, main=True)
        inner = self.module.computations[ins.names("calls")[0]]
        parts = [(ins.type, inner.root)]
        if inner.root.opcode == "tuple":
            parts = [([to], inner[n]) for to, n in zip(ins.type, inner.root.operands, strict=True)]
        return read + sum(self.written(inner, made) for to, made in parts if size(to, main=True))

    def read(self, comp: Computation, ins: Instruction, operand: int) -> float:
        """Bytes of an operand that an instruction reads, wherever they lie."""
        if ins.chained or (operand == 0 and ins.opcode in UPDATES):
            return 0.0
        if operand == 0 and ins.opcode in SLICES:
            return size(ins.type)
        if ins.opcode == "fusion":
            inner = self.module.computations[ins.names("calls")[0]]
            return self.touched(inner, inner.parameters[operand])
        return size(comp[ins.operands[operand]].type)

    def touched(self, comp: Computation, name: str) -> float:
        """Bytes that a fusion reads of what has this name in it."""
        whole, total = size(comp[name].type), 0.0
        for user, operand in comp.users[name]:
            if user.opcode in VIEWS and user is not comp.root:
                total += self.touched(comp, user.name)
            elif user.opcode == "tuple":
                total += 0.0 if comp[name].opcode == "parameter" else whole  # passed on, or computed for it
            else:
                total += self.read(comp, user, operand)
        return min(total, whole)

    def written(self, comp: Computation, ins: Instruction) -> float:
        """Bytes that a fusion writes for a result."""
        if ins.opcode == "parameter" or ins.chained:
            return 0.0  # passed on
        if ins.opcode in ("bitcast", "reshape") and comp[ins.operands[0]].opcode != "parameter":
            return self.written(comp, comp[ins.operands[0]])
        if ins.opcode == "fusion" and len(ins.type) == 1:
            inner = self.module.computations[ins.names("calls")[0]]
            return self.written(inner, inner.root)
        return size(comp[ins.operands[UPDATES[ins.opcode]]].type if ins.opcode in UPDATES else ins.type)

    # --- network

    def sent(self, comp: Computation, ins: Instruction, fused: bool) -> dict[str, Collective]:
        """What an instruction sends to other devices, by kind."""
        kind, x = ins.opcode, size(ins.type)
        if kind == "send" and "is_host_transfer=true" in ins.rest:
            return _between_slices(ins, size(comp[ins.operands[0]].type)) if "xla_megascale" in ins.line else {}
        if kind not in COLLECTIVES:
            if re.match(r"(ragged-)?all-|collective-|send$", kind):
                raise unreadable("a collective", ins.line)
            return {}
        if ins.chained:
            if (channel := ins.attribute("channel_id")) in self.begun:
                return {}
            self.begun.add(channel)
        if kind == "collective-permute":
            if not (pairs := PAIRS.search(ins.rest)):
                raise unreadable("source and target pairs", ins.line)
            moves = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1]) if a != b]
            leaves = any(self.nodes[a] != self.nodes[b] for a, b in moves) if self.nodes else False
            return {kind + BETWEEN_NODES * leaves: Collective(1, x)} if moves else {}
        group = self.group(ins)
        share = (len(group) - 1) / len(group)
        # By the result, for a TPU hands some collectives a buffer of its own beside the operand.
        if kind == "all-reduce" and fused and _scattered(comp, ins):
            kind = "reduce-scatter"
        elif kind in ("all-reduce", "reduce-scatter"):
            x *= 2 if kind == "all-reduce" else len(group)
        # In rings through the group, whose steps lead from node to node as often as there are nodes.
        ends = len({self.nodes[m] for m in group}) if self.nodes else 1
        far = x * share * ends / len(group) if ends > 1 else 0.0
        both = {kind: x * share - far, kind + BETWEEN_NODES: far}
        return {k: Collective(1, b) for k, b in both.items() if b}

    def group(self, ins: Instruction) -> list[int]:
        """The partitions of the first group that exchanges data in a collective."""
        if not (found := GROUPS.search(ins.rest)):
            raise unreadable("replica groups", ins.line)
        everyone, lists, size, iota, mesh, ids, axes = found.groups()
        if everyone:
            return list(range(self.module.partitions))
        if lists:
            return [int(i) for i in max((one.split(",") for one in lists.strip("{}").split("},{")), key=len)]
        return _ordered(iota)[: int(size)] if iota else _along(mesh, ids, axes)


def _weight(what: Moved) -> float:
    """What branches are compared by: chips send about a tenth of what they read."""
    return what.bytes + 10 * sum(c.bytes for c in what.collectives.values())


def _scattered(comp: Computation, ins: Instruction) -> bool:
    """Whether only slices of an all-reduce leave its fusion, as a TPU writes a reduce-scatter."""
    if ins is comp.root:
        return False
    users = [user for user, _ in comp.users[ins.name]]
    return all(u.opcode == "dynamic-slice" or (u.opcode in VIEWS and _scattered(comp, u)) for u in users)


def _ordered(text: str) -> list[int]:
    """0, 1, ... in a shape whose axes are then transposed, as "[2,4]T(1,0)"; or plain numbers behind a shape, "[3]2,0,1"."""
    shape, _, rest = text.rpartition("<=")[2].strip("[").partition("]")
    if rest and not rest.startswith("T"):
        return [int(i) for i in rest.split(",")]
    dims = [int(d) for d in shape.split(",")]
    turn = [int(a) for a in rest.strip("T()").split(",")] if rest else range(len(dims))
    made: list[int] = np.arange(prod(dims)).reshape(dims).transpose(turn).reshape(-1).tolist()
    return made


def _along(mesh: str, ids: str | None, axes: str) -> list[int]:
    """The first partitions along some axes of a mesh; 'a':(B)S is the part S of an axis a that has B parts before it."""
    sizes = {name: int(n) for name, n in (axis.rsplit("=", 1) for axis in mesh.split(","))}
    lie = _ordered(ids) if ids else range(prod(sizes.values()))
    at = [0]
    for axis in filter(None, axes.split(",")):
        name, _, part = axis.partition(":(")
        before, _, share = part.partition(")") if part else ("1", "", str(sizes[name]))
        names = list(sizes)
        inner = prod(sizes[n] for n in names[names.index(name) + 1 :])
        stride = inner * sizes[name] // (int(before) * int(share))
        at = [a + stride * i for a in at for i in range(int(share))]
    return [lie[a] for a in at]


def _between_slices(ins: Instruction, x: float) -> dict[str, Collective]:
    """What a device sends to other slices, of x bytes that it hands to its host."""
    found = MEGASCALE.search(ins.line)
    if not found or not (kind := MEGASCALE_KINDS.get(found[2])):
        raise unreadable("a transfer between slices", ins.line)
    # The first group: slices by device ("{1,2}x{0:3}"), or devices ("{{100000,200000},{100001,200001}}").
    slices, _, of_devices = found[1].strip('"').partition("x")
    ids = [int(i) for i in re.findall(r"\d+", slices.partition("}")[0])]
    n = len(ids if of_devices else {i // SLICE_IDS for i in ids})
    if n < 2 or ":" in slices:
        raise unreadable("slices", ins.line)
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
    return {kind + BETWEEN_SLICES: Collective(1, x * share)}
