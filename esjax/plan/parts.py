"""What an instruction of a compiled program is for: the part of the model that it belongs to, and what it does there."""

from __future__ import annotations

import re
from collections.abc import Iterator

from esjax.model.linear import KERNEL_AXES
from esjax.plan.hlo import Computation, Instruction, Module

# The scopes (jax.named_scope) that the model, the sampler and the step are traced under.
PARTS = (*KERNEL_AXES, "lora", "norm", "rotate", "attend", "cache", "embed", "head", "draw", "optimiser")
PART = re.compile(rf"(?<!\w)(?:{'|'.join(PARTS)})(?!\w)")
TRACED = re.compile(r'op_name="([^"]*)"')
PRODUCTS = {"dot", "convolution"}
MOVES = set("parameter constant tuple get-tuple-element bitcast reshape transpose copy slice dynamic-slice".split())
MOVES |= {"concatenate", "pad", "broadcast"}


def label(module: Module, comp: Computation, ins: Instruction) -> str:
    """Such as "q_proj: product", "attend: reduction", "cache: update"; "other: copy" where no name tells the part."""
    return f"{_part(comp, ins)}: {_kind(module, ins)}"


def _part(comp: Computation, ins: Instruction) -> str:
    """By its own name, else by what uses it, else by what it uses: the compiler's own copies and converts have no name."""
    near = [ins, *(user for user, _ in comp.users[ins.name]), *(comp[n] for n in ins.operands if n in comp)]
    for one in near:
        if (traced := TRACED.search(one.line)) and (found := PART.findall(traced[1])):
            return str(found[-1])
    return "other"


def _kind(module: Module, ins: Instruction) -> str:
    """What it does, in a word."""
    kind = ins.opcode.removesuffix("-start").removesuffix("-done")
    if kind == "custom-call":
        return "product" if re.search("gemm|matmul|conv", ins.target) else f"kernel {ins.target}"
    done = {i.opcode for i in _within(module, ins)} if kind == "fusion" else {kind}
    if done & PRODUCTS:
        return "product"
    for updates in ("dynamic-update-slice", "scatter"):
        if updates in done:
            return "update"
    if done <= MOVES | {"convert"}:
        return "convert" if "convert" in done else "copy"
    if "gather" in done:
        return "gather"
    if "reduce" in done:
        return "reduction"
    return "element-wise" if kind == "fusion" else kind


def _within(module: Module, ins: Instruction) -> Iterator[Instruction]:
    """All instructions of a fusion, those of fusions in it included."""
    for name in ins.names("calls"):
        for inner in module.computations[name].values():
            yield inner
            if inner.opcode == "fusion":
                yield from _within(module, inner)
