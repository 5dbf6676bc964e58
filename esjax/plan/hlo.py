"""What one device does in a compiled program, read from its text (``compiled.as_text()``; TPU, GPU and CPU).

The compiler's own cost analysis counts a loop's body once and no network; here loops count as often as they run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd, prod
from typing import NamedTuple

from esjax.plan.hlotext import Array, Computation, Instruction, Module, Type, arrays, size, trips
from esjax.plan.network import VIEWS, Collective, sent_by, started

# Instructions and custom calls that move no data of their own: names, views, and what only holds other instructions.
FREE = set(
    "parameter constant get-tuple-element tuple bitcast after-all partition-id replica-id domain opt-barrier "
    "add-dependency while conditional call async".split()
)
FREE_CALLS = ("Allocate", "ConcatBitcast", "AssumeGather", "GatherScatterIndices", "PrepareAsync", "AsyncCollective")
KERNELS = ("tpu_custom_call", "mosaic_gpu", "__gpu$xla.gpu.triton", "__cudnn$fmha")
SLICES = ("dynamic-slice", "slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # done in place; which operand is written


@dataclass(frozen=True)
class Tally:
    """What one device does."""

    flops: float = 0.0
    """Of dots and convolutions, 2 per multiply-add, and of kernels that state theirs."""
    bytes: float = 0.0
    """Read and written in main memory, estimated: operands and results of instructions outside fusions. What is only
    sliced or updated in place counts as the slice or the update; other memories (a TPU's vector memory, the host's) do
    not count."""
    collectives: Mapping[str, Collective] = field(default_factory=dict)
    """By kind; what hand-written kernels send themselves is "kernel-copy"."""
    kernels: int = 0
    """Hand-written kernels that are run; one without a stated cost counts as its operands and results, and no FLOPs."""

    def __add__(self, other: Tally) -> Tally:
        kinds = dict(self.collectives)
        for kind, more in other.collectives.items():
            had = kinds.get(kind, Collective(0, 0.0))
            kinds[kind] = Collective(had.count + more.count, had.bytes + more.bytes)
        return Tally(self.flops + other.flops, self.bytes + other.bytes, kinds, self.kernels + other.kernels)

    def __mul__(self, times: int) -> Tally:
        kinds = {k: Collective(c.count * times, c.bytes * times) for k, c in self.collectives.items() if times}
        return Tally(self.flops * times, self.bytes * times, kinds, self.kernels * times)


class Analysis(NamedTuple):
    """A device does ``once``, and k times ``each`` if the loops of unknown length all run k iterations."""

    once: Tally
    """Everything outside those loops."""
    each: Tally
    """One iteration of every outermost loop of unknown length, summed; those nested in it count as one iteration."""


def analyse(text: str, nodes: Sequence[int] = ()) -> Analysis:
    """What one device does in a module. Raises ValueError naming a line that cannot be read.

    Args:
        nodes: each partition's node, where there are several and the text does not tell what goes between them (GPUs).
    """
    walk = _Walk(Module(text), nodes)
    walk.check_chains()
    return walk.work(walk.module.entry, fused=False)


class _Walk:
    """What a module's computations cost, each looked at once."""

    def __init__(self, module: Module, nodes: Sequence[int]) -> None:
        self.module = module
        self.nodes = nodes
        self.computations = module.computations
        self.done: dict[tuple[str, bool], Analysis] = {}

    def work(self, name: str, fused: bool) -> Analysis:
        """What running a computation does; in a fusion main memory is not counted."""
        if (name, fused) not in self.done:
            comp, total = self.computations[name], Analysis(Tally(), Tally())
            for ins in comp.values():
                try:
                    more = self.instruction(name, comp, ins, fused)
                except (LookupError, TypeError, AttributeError) as e:
                    raise ValueError(f"not an HLO instruction that can be read: {ins.line.strip()[:300]}") from e
                total = Analysis(total.once + more.once, total.each + more.each)
            self.done[name, fused] = total
        return self.done[name, fused]

    def instruction(self, name: str, comp: Computation, ins: Instruction, fused: bool) -> Analysis:
        if ins.opcode.endswith(("-done", "-update")):
            return Analysis(Tally(), Tally())
        if ins.opcode == "conditional":
            keys = ("branch_computations", "true_computation", "false_computation")
            return sorted((self.work(b, fused) for b in ins.names(*keys)), key=_weight)[-1]
        if ins.opcode == "while":
            both = [self.work(n, fused) for n in ins.names("body", "condition")]
            once, each = both[0].once + both[1].once, both[0].each + both[1].each
            times = trips(self.module, name, ins)
            return Analysis(Tally(), once + each) if times is None else Analysis(once * times, each * times)
        inputs = [comp[n].type for n in ins.operands] if ins.opcode not in ("parameter", "constant") else []
        flops, moved, kernels = _flops(ins, inputs), 0.0, int(ins.target.startswith(KERNELS))
        if not fused and not ins.chained:
            moved = self.moved(comp, ins)
        if kernels:
            stated = {k: re.search(rf'"{k}":"?(\d+)', ins.line) for k in ("flops", "bytes_accessed")}
            flops = float(stated["flops"][1]) if stated["flops"] else 0.0
            moved = float(stated["bytes_accessed"][1]) if stated["bytes_accessed"] and not fused else moved
        sent = sent_by(self.module, self.nodes, comp, ins, inputs, fused)
        if ins.chained and (start := started(comp, ins)):
            moved = sum(size(made, main=True) for made in arrays(start.type)[:2])  # its part and the whole
        total = Analysis(Tally(flops, moved, sent, kernels), Tally())
        for called in ins.called:
            more = self.work(called, fused or ins.opcode == "fusion")
            total = Analysis(total.once + more.once, total.each + more.each)
        return total

    # --- main memory

    def moved(self, comp: Computation, ins: Instruction) -> float:
        """Bytes that an instruction outside fusions reads and writes in main memory."""
        if ins.opcode in FREE or ins.target.startswith(FREE_CALLS):
            return 0.0
        read = sum(self.read(comp, ins, i) for i, n in enumerate(ins.operands) if size(comp[n].type, main=True))
        if ins.opcode in UPDATES:
            return read + (self.written(comp, ins) if size(ins.type, main=True) else 0.0)
        if ins.opcode == "send":
            return read  # its result is its operand
        if ins.opcode != "fusion":
            results = ins.type
            if isinstance(results, list) and ins.target.startswith("__cu"):
                results = results[:-1]  # a GPU library's scratch space comes last
            return read + size(results, main=True)
        inner = self.computations[ins.called[0]]
        parts: list[tuple[Type, Instruction]] = [(ins.type, inner.root)]
        if isinstance(ins.type, list) and inner.root.opcode == "tuple":
            parts = [(ins.type[i], inner[n]) for i, n in enumerate(inner.root.operands)]
        return read + sum(self.written(inner, made) for to, made in parts if size(to, main=True))

    def read(self, comp: Computation, ins: Instruction, operand: int) -> float:
        """Bytes of an operand that an instruction reads, wherever they lie."""
        if ins.chained or (operand == 0 and ins.opcode in UPDATES):
            return 0.0
        if operand == 0 and ins.opcode in SLICES:
            return size(ins.type)
        if ins.opcode == "fusion":
            inner = self.computations[ins.called[0]]
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
        if ins.opcode == "fusion" and not isinstance(ins.type, list):
            inner = self.computations[ins.called[0]]
            return self.written(inner, inner.root)
        return size(comp[ins.operands[UPDATES[ins.opcode]]].type if ins.opcode in UPDATES else ins.type)

    def check_chains(self) -> None:
        """Raise ValueError for a collective spread over fusions of which none starts it: it would not be counted."""
        begun, seen = set(), {}
        for comp in self.computations.values():
            for ins in comp.values():
                if ins.chained and not ins.target:
                    seen[ins.attribute("channel_id")] = ins
                    begun |= {ins.attribute("channel_id")} if started(comp, ins) else set()
        for channel, ins in seen.items():
            if channel not in begun:
                raise ValueError(f"not a collective that any fusion starts: {ins.line.strip()[:300]}")


def _weight(what: Analysis) -> float:
    """What branches are compared by, in bytes: chips do some 200 FLOPs in a byte's time and send a tenth of a byte."""
    both = what.once + what.each
    return both.flops / 200 + both.bytes + 10 * sum(c.bytes for c in both.collectives.values())


# --- arithmetic


@cache
def _taps(inputs: int, window: int, outputs: int, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """In one dimension, pairs of an output and a window position that meet an input: no padding, no gap of a dilation."""
    step = gcd(stride, lhs_dilate)
    every, total = lhs_dilate // step, 0
    for k in range(window):
        offset = k * rhs_dilate - pad  # output o meets position o * stride + offset of the dilated input
        if offset % step == 0:
            first = -(offset // step) * pow(stride // step, -1, every) % every
            low, high = max(0, -(offset // stride)), min(outputs - 1, ((inputs - 1) * lhs_dilate - offset) // stride)
            total += max(0, (high - low - (first - low) % every) // every + 1)
    return total


def _convolution(ins: Instruction, lhs: Array, rhs: Array, out: Array) -> float:
    """FLOPs. A TPU writes batched products as convolutions too: the batch is a dilated dimension, one tap an output."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", ins.attribute("dim_labels"))
    if not labels:
        raise ValueError(f"not a convolution that can be read: {ins.line.strip()[:300]}")
    window = dict(part.split("=") for part in ins.attribute("window").strip("{}").split())
    of, kernel = dict(zip(labels[3], out.dims, strict=True)), dict(zip(labels[2], rhs.dims, strict=True))
    total = 2.0 * of["b"] * of["f"] * kernel["i"]
    for d in (d for d in labels[3] if d.isdigit()):
        how = {k: int(v.split("x")[int(d)].partition("_")[0]) for k, v in window.items()}
        stride, lhs_dilate, rhs_dilate = (how.get(k, 1) for k in ("stride", "lhs_dilate", "rhs_dilate"))
        inputs = lhs.dims[labels[1].index(d)]
        total *= _taps(inputs, how.get("size", 1), of[d], stride, how.get("pad", 0), lhs_dilate, rhs_dilate)
    return total


def _flops(ins: Instruction, inputs: Sequence[Type]) -> float:
    if ins.opcode in ("dot", "ragged-dot", "scaled-dot"):
        over = ins.attribute("lhs_contracting_dims")
    elif ins.target.startswith("__cublas$"):
        over = ins.line.partition('"lhs_contracting_dimensions":[')[2].partition("]")[0]
    elif ins.opcode == "convolution":
        return _convolution(ins, *(a for made in (*inputs, ins.type) for a in arrays(made)))
    else:
        return 0.0
    summed = (arrays(inputs[0])[0].dims[int(d)] for d in re.findall(r"\d+", over))
    return 2.0 * prod(arrays(ins.type)[0].dims) * prod(summed)
