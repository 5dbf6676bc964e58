"""What a device sends over the network in a compiled program: its collectives, by kind and bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from esjax.plan.hlotext import Computation, Instruction, Module, Type, size

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
COPIES = ("collective-permute", "collective-broadcast")
VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")
THROUGH = (*VIEWS, "get-tuple-element")
ORDER = r"\[[\d,]+\](?:T\([\d,]+\))?"
MESH = r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^}]*)\}"
IOTA = rf"\[\d+,(\d+)\]<=({ORDER})"
GROUPS = re.compile(rf"\breplica_groups=(?:(\{{\}})|\{{(\{{[\d,{{}}]*\}})\}}|{IOTA}|{MESH})(?=,|$)")
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
PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind. A device that is alone in its group sends nothing, and that counts as none."""

    count: int
    """How often one is run."""
    bytes: float
    """What a device sends over the network by a ring algorithm."""


def sent_by(
    module: Module, nodes: Sequence[int], comp: Computation, ins: Instruction, inputs: Sequence[Type], fused: bool
) -> dict[str, Collective]:
    """What an instruction sends to other devices, by kind; what leaves the slice or node has BETWEEN in its kind.

    Args:
        nodes: each partition's node, see ``hlo.analyse``.
    """
    kind = ins.opcode
    if remote := re.search(r'"remote_bytes_transferred":"?([1-9]\d*)', ins.line) if ins.target else None:
        return {"kernel-copy": Collective(1, float(remote[1]))}
    if kind == "send":
        if "is_host_transfer=true" not in ins.rest:
            return {"collective-permute": Collective(1, size(inputs[0]))}
        return _between_slices(ins, size(inputs[0])) if "xla_megascale_runtime" in ins.line else {}
    if kind not in COLLECTIVES + COPIES:
        if re.match(r"(ragged-)?all-|collective-|reduce-scatter", kind):
            raise ValueError(f"not a collective that is known: {ins.line.strip()[:300]}")
        return {}
    if ins.chained and not started(comp, ins):
        return {}
    if kind == "collective-permute":
        if not (pairs := PAIRS.search(ins.rest)):
            raise ValueError(f"not source and target pairs that can be read: {ins.line.strip()[:300]}")
        moves = [(int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", pairs[1]) if a != b]
        far = nodes and any(nodes[a] != nodes[b] for a, b in moves)
        return {kind + BETWEEN_NODES * bool(far): Collective(1, size(ins.type))} if moves else {}
    group = _group(module, ins)
    if (n := len(group)) == 1:
        return {}
    # By the result, for a TPU hands some collectives a buffer of its own beside the operand.
    x, share = size(ins.type), (n - 1) / n
    if kind == "all-reduce":
        if not (fused and _scattered(comp, ins)):
            return _around(nodes, group, kind, 2 * x * share)
        kind = "reduce-scatter"
    elif kind == "reduce-scatter":
        x *= n
    elif kind == "ragged-all-to-all":
        x = size(inputs[0])  # at most; the result is a buffer that may be larger
    return _around(nodes, group, kind, x if kind == "collective-broadcast" else x * share)


def _around(nodes: Sequence[int], group: Sequence[int], kind: str, sent: float) -> dict[str, Collective]:
    """What a device sends in rings through the group, whose steps lead from node to node as often as there are nodes."""
    ends = len({nodes[m] for m in group}) if nodes else 1
    far = sent * ends / len(group) if ends > 1 else 0.0
    both = {kind: sent - far, kind + BETWEEN_NODES: far}
    return {k: Collective(1, b) for k, b in both.items() if b}


def started(comp: Computation, ins: Instruction) -> Instruction | None:
    """What starts a collective that is spread over fusions, if this fusion does."""
    return next((user for user, _ in comp.users[ins.name] if user.target == "AsyncCollectiveStart"), None)


def _scattered(comp: Computation, ins: Instruction) -> bool:
    """Whether only slices of an all-reduce leave its fusion, as a TPU writes a reduce-scatter."""
    if ins is comp.root:
        return False
    users = [user for user, _ in comp.users[ins.name]]
    return all(u.opcode == "dynamic-slice" or (u.opcode in THROUGH and _scattered(comp, u)) for u in users)


def _group(module: Module, ins: Instruction) -> list[int]:
    """The partitions of the first group that exchanges data in a collective. Raises ValueError if that cannot be read."""
    if not (found := GROUPS.search(ins.rest)):
        raise ValueError(f"not replica groups that can be read: {ins.line.strip()[:500]}")
    everyone, lists, size, iota, mesh, ids, axes = found.groups()
    all_ids, channel = "use_global_device_ids=true" in ins.rest, "channel_id=" in ins.rest
    # With a channel but no global ids these name replicas, all partitions of which take part; others name partitions.
    both = channel and not all_ids and ins.opcode in ("all-gather", "all-reduce", "reduce-scatter")
    if everyone:
        replicas = module.replicas if all_ids or both or not channel else 1
        return list(range(replicas * (module.partitions if channel else 1)))
    if lists:
        group = max((one.split(",") for one in lists.strip("{}").split("},{")), key=len)
        members = [int(i) for i in group]
    elif iota:
        members = _ordered(iota)[: int(size)]
    else:
        members = _along(mesh, ids, axes)
    return [m * module.partitions + p for m in members for p in range(module.partitions)] if both else members


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
    """What a device sends to other slices, of x bytes that it hands to its host. Raises ValueError if that cannot be read."""
    found = MEGASCALE.search(ins.line)
    kind = MEGASCALE_KINDS.get(found[2]) if found else None
    if not found or not kind:
        raise ValueError(f"not a transfer between slices that can be read: {ins.line.strip()[:500]}")
    # The first group: slices by device ("{1,2}x{0:3}"), or devices ("{{100000,200000},{100001,200001}}").
    slices, _, of_devices = found[1].strip('"').partition("x")
    ids = [int(i) for i in re.findall(r"\d+", slices.partition("}")[0])]
    n = len(ids if of_devices else {i // SLICE_IDS for i in ids})
    if n < 2 or ":" in slices:
        raise ValueError(f"not slices that can be read: {ins.line.strip()[:500]}")
    share = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}.get(kind, (n - 1) / n)
    return {kind + BETWEEN_SLICES: Collective(1, x * share)}
