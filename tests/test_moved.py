"""What compiled programs move and compute: snippets of every syntax, and real programs whose counts follow from formulas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from esjax.errors import InputError
from esjax.plan.chips import CHIPS, KINDS, chip_of, gpu_share
from esjax.plan.moved import Collective, Moved, moved
from esjax.plan.topology import GPUS
from esjax.runtime.programs import compile_named, products

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module(entry: str, before: str = "", header: str = "num_partitions=8") -> str:
    """A module around the lines of an entry computation."""
    return f"""HloModule jit_f, is_scheduled=true, entry_computation_layout={{()->f32[]}}, {header}

FileNames
1 "/tmp/a = b.py"

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

{ADD}{before}
ENTRY %main (p: f32[8,16]) -> f32[8,16] {{
  %p = f32[8,16]{{1,0}} parameter(0), metadata={{op_name="f(calls=%x), \\"replica_groups={{}}\\""}}
{entry}
}}
"""


def once(entry: str, before: str = "", header: str = "num_partitions=8") -> Moved:
    """What such a module moves."""
    return moved(module(entry, before, header))


X = 8 * 16 * 4.0  # bytes of the parameter

# --- types and memories -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "size"),
    [
        ("pred[10]{0}", 10),
        ("s4[10]{0:T(1024)(8,1)E(4)}", 5),
        ("f4e2m1fn[10]{0}", 5),
        ("f8e4m3fn[10]{0}", 10),
        ("bf16[3,10]{1,0:T(8,128)(2,1)}", 60),
        ("f32[]{:T(128)}", 4),
        ("f32[<=10]{0}", 40),
        ("c128[10]{0}", 160),
        ("f32[0,10]{1,0}", 0),
        ("token[]", 0),
        ("(f32[10]{0}, (bf16[2]{0}, pred[]), /*index=2*/s8[3]{0})", 48),
        ("()", 0),
        ("f32[10]{0:T(128)S(1)}", 0),  # a TPU's vector memory
        ("f32[10]{0:S(1)}", 40),  # a GPU's memory for collectives
        ("f32[10]{0:T(128)S(5)}", 0),  # the host's
    ],
)
def test_types(made: str, size: float) -> None:
    assert once(f'  ROOT %r = {made} custom-call(), custom_call_target="Some"').bytes == size


def test_an_asynchronous_copy_counts_in_the_memory_it_leaves_and_the_one_it_reaches() -> None:
    there = "f32[8,16]{1,0:T(8,128)S(1)}"
    into = (
        f"  %s = ({there}, f32[8,16]{{1,0:T(8,128)}}, u32[]{{:S(2)}}) copy-start(%p)\n  ROOT %d = {there} copy-done(%s)"
    )
    assert once(into).bytes == X
    assert once("  ROOT %c = f32[8,16]{1,0} copy(%p)").bytes == 2 * X
    there = "f32[2,16]{1,0:T(8,128)S(1)}"
    part = f"  %s = ((f32[8,16]{{1,0}}), {there}, s32[]{{:S(2)}}) slice-start(%p), slice={{[0:2], [0:16]}}\n"
    assert once(f"{part}  ROOT %d = {there} slice-done(%s)").bytes == X / 4


SLICED = """
%slices (p0: f32[8,16], i: s32[]) -> f32[1,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %view = f32[8,16]{1,0} bitcast(%p0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,16]{1,0} dynamic-slice(%view, %i, %zero), dynamic_slice_sizes={1,16}
  ROOT %out = f32[1,16]{1,0} negate(%one)
}
%whole (p0: f32[8,16], i: s32[]) -> f32[1,16] {
  %p0 = f32[8,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %minus = f32[8,16]{1,0} negate(%p0)
  ROOT %out = f32[1,16]{1,0} dynamic-slice(%minus, %i, %zero), dynamic_slice_sizes={1,16}
}
%inner (q: f32[8,16], j: s32[]) -> f32[1,16] {
  %q = f32[8,16]{1,0} parameter(0)
  %j = s32[] parameter(1)
  ROOT %n = f32[1,16]{1,0} fusion(%q, %j), kind=kLoop, calls=%slices
}
%updates (p0: f32[8,16], u: f32[1,16], i: s32[]) -> (f32[8,16], f32[1,16], f32[8,16]) {
  %p0 = f32[8,16]{1,0} parameter(0)
  %u = f32[1,16]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %new = f32[1,16]{1,0} negate(%u)
  %d = f32[8,16]{1,0} dynamic-update-slice(%p0, %new, %i, %i)
  ROOT %t = (f32[8,16]{1,0}, f32[1,16]{1,0}, f32[8,16]{1,0}) tuple(%d, %new, %p0)
}
"""
ROW, INDEX = 16 * 4.0, 4.0


@pytest.mark.parametrize(
    ("line", "bytes_moved"),
    [
        ("f32[1,16]{1,0} fusion(%p, %k), kind=kLoop, calls=%slices", ROW + INDEX + ROW),
        ("f32[1,16]{1,0} fusion(%p, %k), kind=kLoop, calls=%inner", ROW + INDEX + ROW),
        ("f32[1,16]{1,0} fusion(%p, %k), kind=kLoop, calls=%whole", X + INDEX + ROW),
        ("f32[1,16]{1,0} dynamic-slice(%p, %k, %k), dynamic_slice_sizes={1,16}", 2 * ROW + 2 * INDEX),
        ("f32[8,16]{1,0} dynamic-update-slice(%p, %u, %k, %k)", 2 * ROW + 2 * INDEX),
        ("f32[8,16]{1,0} negate(%p)", 2 * X),
        ("f32[8,16]{1,0} bitcast(%p)", 0),
    ],
)
def test_slices_and_updates_count_as_what_they_touch(line: str, bytes_moved: float) -> None:
    made = "  %k = s32[]{:T(128)} constant(3)\n  %u = f32[1,16]{1,0} bitcast(%p)\n"
    assert once(f"{made}  ROOT %r = {line}", SLICED).bytes == bytes_moved


def test_a_fusion_that_updates_in_place_and_passes_on() -> None:
    entry = """
  %k = s32[] constant(3)
  %u = f32[1,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %f = (f32[8,16]{1,0}, f32[1,16]{1,0}, f32[8,16]{1,0}) fusion(%p, %u, %k), kind=kLoop, calls=%updates"""
    assert once(entry, SLICED).bytes == ROW + INDEX + ROW + ROW  # read update and index; write row and tuple's part
    near = "f32[1,16]{1,0:T(1,128)S(1)}"
    assert (
        once(entry.replace("(f32[8,16]{1,0}, f32[1,16]{1,0}", f"(f32[8,16]{{1,0}}, {near}"), SLICED).bytes
        == 2 * ROW + INDEX
    )
    assert once(entry.replace("%u = f32[1,16]{1,0}", f"%u = {near}"), SLICED).bytes == INDEX + 2 * ROW


# --- collectives ------------------------------------------------------------------------------------------------------

ALL = "channel_id=1, use_global_device_ids=true"


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1},{2,3}}, use_global_device_ids=true", 2),
        ("{{0,1,2},{3,4}}, use_global_device_ids=true", 3),
        ("[2,4]<=[8], use_global_device_ids=true", 4),
        ("[4,2]<=[2,2,2]T(0,2,1), use_global_device_ids=true", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, use_global_device_ids=true", 4),
        ("mesh[a=2,b=2,c=2] {a,c}, use_global_device_ids=true", 4),
        ("mesh[a=2,b=4], device_ids=([8]<=[2,4]T(1,0)) {b:(1)2}, use_global_device_ids=true", 2),
        ("{}, use_global_device_ids=true", 8),
    ],
)
def test_groups(groups: str, n: int) -> None:
    line = f"  ROOT %r = f32[8,16]{{1,0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert once(line).collectives == {"all-reduce": Collective(1, 2 * X * (n - 1) / n)}


FOUR = f"{ALL}, replica_groups={{{{0,1,2,3}},{{4,5,6,7}}}}"
LOCAL = "f32[8,16]{1,0}"
WIDE, THIN = "f32[32,16]{1,0}", "f32[2,16]{1,0}"
PAIR = "channel_id=1, source_target_pairs={{0,1},{1,0}}"


@pytest.mark.parametrize(
    ("result", "call", "sent"),
    [
        (WIDE, f"all-gather(%p), {FOUR}, dimensions={{0}}", 4 * X * 3 / 4),
        (f"({WIDE}, {WIDE})", f"all-gather(%p, %p), {FOUR}, dimensions={{0}}", 2 * 4 * X * 3 / 4),
        (LOCAL, f"all-reduce(%p), {FOUR}, to_apply=%add", 2 * X * 3 / 4),
        (f"({LOCAL}, {LOCAL})", f"all-reduce(%p, %p), {FOUR}, to_apply=%add", 2 * 2 * X * 3 / 4),
        (THIN, f"reduce-scatter(%p), {FOUR}, dimensions={{0}}, to_apply=%add", X * 3 / 4),
        (LOCAL, f"all-to-all(%p), {FOUR}, dimensions={{0}}", X * 3 / 4),
        (LOCAL, f"collective-permute(%p), {PAIR}", X),
    ],
)
def test_each_collective_at_once_and_in_two_halves(result: str, call: str, sent: float) -> None:
    kind, _, rest = call.partition("(")
    expected = {kind: Collective(1, sent)}
    assert once(f"  ROOT %r = {result} {call}").collectives == expected
    begun = f"  %s = (({LOCAL}), {result}, u32[]{{:S(2)}}) {kind}-start({rest}"
    halves = once(f"{begun}\n  ROOT %r = {result} {kind}-done(%s)")
    assert halves.collectives == expected
    assert halves.bytes == once(f"  ROOT %r = {result} {call}").bytes
    assert once(begun.replace("  %s", "  ROOT %s")).collectives == {}  # it counts at its end


@pytest.mark.parametrize(
    "line",
    [
        f"{LOCAL} all-reduce(%p), {ALL}, replica_groups={{{{0}},{{1}}}}, to_apply=%add",
        f"{LOCAL} all-gather(%p), {ALL}, replica_groups=[8,1]<=[8], dimensions={{0}}",
        f"{LOCAL} collective-permute(%p), channel_id=1, source_target_pairs={{{{0,0}},{{1,1}}}}",
        f"{LOCAL} collective-permute(%p), channel_id=1, source_target_pairs={{}}",
        f"({LOCAL}, u32[], token[]) send(%p, %p), channel_id=1, is_host_transfer=true",
    ],
)
def test_alone_a_device_sends_nothing(line: str) -> None:
    assert once(f"  ROOT %r = {line}").collectives == {}


@pytest.mark.parametrize(
    ("groups", "n", "nodes", "between"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4, "00001111", 0),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, "00001111", 1),
        ("{{0,1,4,5},{2,3,6,7}}", 4, "00001111", 1 / 2),  # of four steps around, two leave a node
        ("[1,8]<=[8]", 8, "00001111", 1 / 4),
        ("[1,8]<=[8]", 8, "00112233", 1 / 2),
        ("[4,2]<=[2,4]T(1,0)", 2, "00001111", 1),
        ("[4,2]<=[8]", 2, "00001111", 0),
        ("mesh[a=2,b=4] {b}", 4, "00001111", 0),
        ("mesh[a=2,b=4] {a}", 2, "00001111", 1),
        ("mesh[a=4,b=2], device_ids=([2,4]T(1,0)) {b}", 2, "00001111", 1),
        ("mesh[a=4,b=2], device_ids=([2,4]T(1,0)) {a}", 4, "00001111", 0),
        ("mesh[a=4,b=2], device_ids=([8]<=[2,4]T(1,0)) {a}", 4, "00001111", 0),
        ("mesh[a=2,b=4], device_ids=([8]0,4,1,5,2,6,3,7) {a}", 2, "00001111", 0),
        ("mesh[a=2,b=4], device_ids=([8]0,4,1,5,2,6,3,7) {b}", 4, "00001111", 1 / 2),
        ("mesh[a=8] {a:(1)2}", 2, "00001111", 1),  # a half of the axis
        ("mesh[a=8] {a:(2)4}", 4, "00001111", 0),
        ("mesh[a=8] {a:(2)2}", 2, "00110011", 1),
    ],
)
def test_between_nodes(groups: str, n: int, nodes: str, between: float) -> None:
    line = f"  ROOT %r = {LOCAL} all-reduce(%p), {ALL}, replica_groups={groups}, to_apply=%add"
    found = moved(module(line), [int(node) for node in nodes]).collectives
    total = 2 * X * (n - 1) / n
    expected = {"all-reduce": total * (1 - between), "all-reduce between nodes": total * between}
    assert found == {kind: Collective(1, size) for kind, size in expected.items() if size}


@pytest.mark.parametrize(("pairs", "kind"), [("{0,1},{1,0}", ""), ("{0,1},{3,4}", " between nodes"), ("{0,0}", None)])
def test_permutes_between_nodes(pairs: str, kind: str | None) -> None:
    line = f"  ROOT %r = {LOCAL} collective-permute(%p), channel_id=1, source_target_pairs={{{pairs}}}"
    found = moved(module(line), [0, 0, 0, 0, 1, 1, 1, 1]).collectives
    assert found == ({} if kind is None else {f"collective-permute{kind}": Collective(1, X)})


def to_slices(kind: str, target: str) -> str:
    return (
        "%t = token[] after-all()\n"
        f"  ROOT %r = ({LOCAL}, u32[], token[]) send(%p, %t), channel_id=1, is_host_transfer=true, frontend_attributes={{"
        '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.7_0",'
        f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
    )


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        # Half of the sum goes there, half of the result back.
        (to_slices("ALL_REDUCE", '"{1,2}x{0:3}"'), "all-reduce", X),
        (to_slices("ALL_REDUCE", '"{1,2,3,4}x{0:3}"'), "all-reduce", 2 * X * 3 / 4),
        # What is handed over is this device's part.
        (to_slices("ALL_GATHER", '"{1,2,3,4}x{0:3}"'), "all-gather", 3 * X),
        (to_slices("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"'), "reduce-scatter", X * 3 / 4),
        (to_slices("ALL_TO_ALL", "{{100000,200000},{100001,200001}}"), "all-to-all", X / 2),
        # a group of two slices with two devices each
        (to_slices("ALL_TO_ALL", "{{100000,100001,200000,200001},{100003,100002,200003,200002}}"), "all-to-all", X / 2),
        (to_slices("ONE_TO_ONE", "{{100000->200000},{200000->100000}}"), "collective-permute", X),
    ],
)
def test_between_slices(line: str, kind: str, sent: float) -> None:
    assert once(f"  {line}").collectives == {f"{kind} between slices": Collective(1, sent)}


@pytest.mark.parametrize(
    "line",
    [
        to_slices("SOMETHING_NEW", '"{1,2}x{0:3}"'),
        to_slices("ALL_REDUCE", '"{1:4}x{0:3}"'),
        to_slices("ALL_REDUCE", "{{100000,100001}}"),
        to_slices("ALL_REDUCE", '"{1,2}x{0:3}"').replace("_transfer_type", "_kind"),
    ],
)
def test_between_slices_what_cannot_be_read_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not (a transfer between )?slices that can be read"):
        once(f"  {line}")


def test_an_asynchronous_pair_counts_once() -> None:
    body = f"""
%wrapped (q: {LOCAL.split("{")[0]}) -> f32[2,16] {{
  %q = {LOCAL} parameter(0)
  ROOT %rs = {THIN} reduce-scatter(%q), {FOUR}, dimensions={{0}}, to_apply=%add
}}, execution_thread="sparsecore"
"""
    entry = f"""
  %s = (({LOCAL}), {THIN}, u32[]) async-start(%p), calls=%wrapped
  %u = (({LOCAL}), {THIN}, u32[]) async-update(%s), calls=%wrapped
  ROOT %d = {THIN} async-done(%u), calls=%wrapped"""
    pair = once(entry, body)
    assert pair.collectives == {"reduce-scatter": Collective(1, X * 3 / 4)}
    assert pair.bytes == X + X / 4
    called = entry.replace("async-start", "call-start").replace("calls=", 'async_execution_thread="t", to_apply=')
    assert once(called.replace("async-", "call-"), body) == pair


# A TPU's collective that other work hides: it starts in one fusion, goes on beside products, and ends in a third.
STATE = "(bf16[64]{0:T(256)(128)(2,1)}, bf16[256]{0:T(256)(128)(2,1)}, s32[2]{0:S(4)})"
GATHER = (
    "bf16[256]{0:T(256)(128)(2,1)} all-gather(%a), channel_id=8, replica_groups=mesh['axis_0'=4] {'axis_0'}, "
    'dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}'
)
CHAIN = f"""
%start (a: bf16[64]) -> (bf16[64], bf16[256], s32[2]) {{
  %a = bf16[64]{{0:T(256)(128)(2,1)}} parameter(0)
  %g = {GATHER}
  ROOT %c = {STATE} custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}
%middle (a: bf16[64], b: bf16[256], f: s32[2], x: f32[8,16]) -> (f32[8,8], bf16[64], bf16[256], s32[2]) {{
  %a = bf16[64]{{0:T(256)(128)(2,1)}} parameter(0)
  %b = bf16[256]{{0:T(256)(128)(2,1)}} parameter(1)
  %f = s32[2]{{0:S(4)}} parameter(2)
  %x = f32[8,16]{{1,0:T(8,128)}} parameter(3)
  %dot = f32[8,8]{{1,0:T(8,128)}} convolution(%x, %x), dim_labels=bf_oi->bf
  %g = {GATHER}
  ROOT %t = (f32[8,8]{{1,0}}, bf16[64]{{0}}, bf16[256]{{0}}, s32[2]{{0:S(4)}}) tuple(%dot, %a, %g, %f)
}}
%done (a: bf16[64], b: bf16[256], f: s32[2]) -> bf16[256] {{
  %a = bf16[64]{{0:T(256)(128)(2,1)}} parameter(0)
  %b = bf16[256]{{0:T(256)(128)(2,1)}} parameter(1)
  %f = s32[2]{{0:S(4)}} parameter(2)
  %g = {GATHER}
  ROOT %c = bf16[256]{{0:T(256)(128)(2,1)}} custom-call(%a, %b, %g, %f), custom_call_target="AsyncCollectiveDone"
}}
"""
CHAINED = """
  %part = bf16[64]{0:T(256)(128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %s = (bf16[64]{0}, bf16[256]{0}, s32[2]{0:S(4)}) fusion(%part), kind=kCustom, calls=%start
  %s0 = bf16[64]{0} get-tuple-element(%s), index=0
  %s1 = bf16[256]{0} get-tuple-element(%s), index=1
  %s2 = s32[2]{0:S(4)} get-tuple-element(%s), index=2
  %m = (f32[8,8]{1,0}, bf16[64]{0}, bf16[256]{0}, s32[2]{0:S(4)}) fusion(%s0, %s1, %s2, %p), kind=kOutput, calls=%middle
  %m2 = bf16[256]{0} get-tuple-element(%m), index=2
  ROOT %d = bf16[256]{0} fusion(%s0, %m2, %s2), kind=kCustom, calls=%done"""


def test_a_collective_spread_over_fusions_counts_once() -> None:
    found = once(CHAINED, CHAIN)
    assert found.collectives == {"all-gather": Collective(1, 512 * 3 / 4)}
    assert found.bytes == 128 + 512 + X + 8 * 8 * 4  # the gather's part and whole, the product's operand and result
    other = CHAIN.replace("channel_id=8", "channel_id=9", 1)  # the start is of another collective than the rest
    assert once(CHAINED, other).collectives == {"all-gather": Collective(2, 2 * 512 * 3 / 4)}


SCATTER = f"""
%all-reduce-scatter.1 (q: f32[8,16]) -> (f32[2,16], f32[2,16]) {{
  %q = {LOCAL} parameter(0)
  %ar = ({LOCAL}, {LOCAL}) all-reduce(%q, %q), {FOUR}, to_apply=%add
  %i = s32[] constant(2)
  %g0 = {LOCAL} get-tuple-element(%ar), index=0
  %g1 = {LOCAL} get-tuple-element(%ar), index=1
  %d0 = {THIN} dynamic-slice(%g0, %i, %i), dynamic_slice_sizes={{2,16}}
  %d1 = {THIN} dynamic-slice(%g1, %i, %i), dynamic_slice_sizes={{2,16}}
  ROOT %t = ({THIN}, {THIN}) tuple(%d0, %d1)
}}
"""


def test_a_sliced_all_reduce_in_a_fusion_is_a_reduce_scatter() -> None:
    entry = f"  ROOT %f = ({THIN}, {THIN}) fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    assert once(entry, SCATTER).collectives == {"reduce-scatter": Collective(1, 2 * X * 3 / 4)}
    whole = SCATTER.replace(f"%d1 = {THIN} dynamic-slice(%g1, %i, %i)", f"%d1 = {LOCAL} negate(%g1)")
    assert set(once(entry, whole).collectives) == {"all-reduce"}
    outside = f"""
  %ar = {LOCAL} all-reduce(%p), {FOUR}, to_apply=%add
  %i = s32[] constant(2)
  ROOT %d = {THIN} dynamic-slice(%ar, %i, %i), dynamic_slice_sizes={{2,16}}"""
    assert set(once(outside).collectives) == {"all-reduce"}


# --- loops and branches -----------------------------------------------------------------------------------------------

LOOP = """
%test (c: (s32[], f32[8,16], s32[])) -> pred[] {
  %c = (s32[], f32[8,16]{1,0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[]{:T(128)} constant(6)
  ROOT %f = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%body (c.1: (s32[], f32[8,16], s32[])) -> (s32[], f32[8,16], s32[]) {
  %c.1 = (s32[], f32[8,16]{1,0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%c.1), index=0
  %x.1 = f32[8,16]{1,0} get-tuple-element(%c.1), index=1
  %n.1 = s32[] get-tuple-element(%c.1), index=2
  %held = s32[]{:T(128)S(6)} copy(%i.1)
  %step = s32[] constant(1)
  %next = s32[] add(%held, %step)
  %d = f32[8,16]{1,0} collective-permute(%x.1), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8,16]{1,0}, s32[]) tuple(%next, %d, %n.1)
}
"""
RUN = """
  %from = s32[] constant(0)
  %first = s32[] copy(%from)
  %most = s32[] constant(9)
  %start = (s32[], f32[8,16]{1,0}, s32[]) tuple(%first, %p, %most)
  ROOT %w = (s32[], f32[8,16]{1,0}, s32[]) while(%start), condition=%test, body=%body"""
NOTE = ', backend_config={"known_trip_count":{"n":"5"},"known_induction_variable":{"tuple_index":"0"}}'


@pytest.mark.parametrize(
    ("loop", "run", "times"),
    [
        (LOOP, RUN, 6),
        (LOOP, RUN.replace("constant(0)", "constant(6)"), 0),
        (LOOP, RUN.replace("constant(0)", "constant(-2)"), 8),
        (LOOP, RUN + NOTE, 5),
        # not known: no constant at the start or the end, another step, another test
        (LOOP, RUN.replace("%from = s32[] constant(0)", "%from = s32[] negate(%most)"), None),
        (LOOP.replace("%n = s32[]{:T(128)} constant(6)", "%n = s32[] get-tuple-element(%c), index=2"), RUN, None),
        (LOOP.replace("%step = s32[] constant(1)", "%step = s32[] constant(4)"), RUN, None),
        (LOOP.replace("add(%held, %step)", "multiply(%held, %step)"), RUN, None),
        (LOOP.replace("direction=LT", "direction=GT"), RUN, None),
        (LOOP.replace("compare(%i, %n), direction=LT", 'custom-call(%i), custom_call_target="t"'), RUN, None),
    ],
)
def test_how_often_a_loop_runs(loop: str, run: str, times: int | None) -> None:
    """Where its text does not tell, it counts as one iteration; that is then the step of the program."""
    count = 1 if times is None else times
    assert once(run, loop).collectives == ({"collective-permute": Collective(count, count * X)} if count else {})
    steps = moved(module(run, loop), steps=True)
    assert steps.collectives == ({"collective-permute": Collective(1, X)} if times is None else {})


def test_the_dearest_branch_counts() -> None:
    branches = """
%cheap (c: f32[8,16]) -> f32[8,16] {
  ROOT %c = f32[8,16]{1,0} parameter(0)
}
%dear (e: f32[8,16]) -> f32[8,16] {
  %e = f32[8,16]{1,0} parameter(0)
  %d = f32[8,8]{1,0} dot(%e, %e), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %n = f32[8,16]{1,0} negate(%e)
}
"""
    for how in (
        "(s32[] %k, %p, %p), branch_computations={%cheap, %dear}",
        "(%k, %p, %p), true_computation=%dear, false_computation=%cheap",
    ):
        entry = f"  %k = s32[] constant(0)\n  ROOT %r = f32[8,16]{{1,0}} conditional{how}"
        found = once(entry, branches)
        assert found.bytes == (X + X + 256) + 2 * X
        assert found.parts == {"other: product": X + X + 256, "other: negate": 2 * X}


def test_kernels_count_as_their_operands_and_results() -> None:
    """Their metadata run over several lines."""
    entry = """  ROOT %k = f32[8,16]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={kernel={
"xprof_metadata":"{\\"block\\": 128}"
}}, metadata={op_name="k"}, backend_config={"custom_call_config":{"body":"TUz(v","x":true}}"""
    assert once(entry).bytes == 2 * X


def test_called_computations_run_and_reductions_do_not() -> None:
    called = f"""
%sub (e: f32[8,16]) -> f32[8,16] {{
  %e = {LOCAL} parameter(0)
  ROOT %d = {LOCAL} collective-permute(%e), {PAIR}
}}
"""
    permuted = {"collective-permute": Collective(1, X)}
    assert once(f"  ROOT %r = {LOCAL} call(%p), to_apply=%sub", called).collectives == permuted
    other = f'  ROOT %r = {LOCAL} custom-call(%p), custom_call_target="t", called_computations={{%sub}}'
    assert once(other, called).collectives == permuted
    assert once(f"  ROOT %r = {LOCAL} reduce(%p, %p), dimensions={{1}}, to_apply=%sub", called).collectives == {}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("  ROOT %r = f32[8,16] all-reduce %p", "instruction that can be read: ROOT %r = f32.8,16. all-reduce %p"),
        ("  ROOT %r = what[8] negate(%p)", "instruction that can be read: ROOT %r = what"),
        ("  ROOT %r = f32[8,16] negate(%q)", r"instruction that can be read: .*negate\(%q\)"),
        ("  ROOT %r = f32[8,16] fusion(%p), calls=%none", "instruction that can be read: .*calls=%none"),
        ("  ROOT %r = f32[8,16] conditional(%p)", "instruction that can be read: .*conditional"),
        ("  ROOT %r = f32[8,16] all-reduce(%p), replica_groups=odd[8]", "replica groups that can be read: .*odd"),
        ("  ROOT %r = f32[8,16] all-gather(%p), dimensions={0}", "replica groups that can be read: .*all-gather"),
        ("  ROOT %r = f32[8,16] collective-permute(%p), source_target_pairs=[2]", "pairs that can be read: .*permute"),
        ("  ROOT %r = f32[8,16] all-shuffle(%p), replica_groups={}", "a collective that can be read: .*all-shuffle"),
    ],
)
def test_what_cannot_be_read_is_named(line: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        moved(module(line))


def test_no_module() -> None:
    for text, why in (("", "no entry"), ("%r = f32[] add(%a)", "computation that can be read"), (ADD, "no entry")):
        with pytest.raises(ValueError, match=why):
            moved(text)


# --- products of programs --------------------------------------------------------------------------------------------

ONE = 2.0 * 64 * 128 * 128  # FLOPs of a product in these programs
x, w = jnp.zeros((64, 128)), jnp.zeros((6, 128, 128))


def chain(x: Any, w: Any, unroll: bool = False) -> Any:
    return lax.scan(lambda c, m: (c @ m, None), x, w, unroll=unroll)[0]


def counted(function: Any, *arguments: Any) -> float:
    return products(jax.jit(function).trace(*arguments).jaxpr.jaxpr) / ONE


def test_products_are_counted_as_often_as_they_run() -> None:
    assert counted(chain, x, w) == 6
    # The compiler's own analysis agrees where there is no loop, and counts a loop's body once.
    flat: Any = jax.jit(chain, static_argnums=2).lower(x, w, True).cost_analysis()
    looped: Any = jax.jit(chain).lower(x, w).cost_analysis()
    assert flat["flops"] == 6 * ONE
    assert looped["flops"] < 2 * ONE
    assert counted(lambda x, w: lax.scan(lambda c, _: (chain(c, w), None), x, None, length=3)[0], x, w) == 18
    assert counted(jax.grad(lambda x, w: chain(x, w).sum(), argnums=(0, 1)), x, w) == 18
    again = jax.checkpoint(lambda c, m: jnp.tanh(jnp.tanh(c @ m) @ m))
    assert counted(jax.grad(lambda x, w: again(x, w[0]).sum()), x, w) == 2 + 2 + 2
    assert counted(lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x @ w[0]), x, w) == 2
    assert counted(lambda x, w: lax.while_loop(lambda c: c.sum() < 10, lambda c: chain(c, w), x), x, w) == 6
    assert counted(lambda x, w: jnp.einsum("btd,bde->bte", x.reshape(2, 32, 128), w[:2]), x, w) == 1


# --- programs compiled for four simulated CPUs ------------------------------------------------------------------------

PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax import lax, shard_map
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from esjax.runtime.programs import products

mesh = Mesh(np.array(jax.devices()), ("x",))
out = {}
def add(name, function, *arguments, **how):
    traced = jax.jit(function, **how).trace(*arguments)
    out[name] = [traced.lower().compile().as_text(), products(traced.jaxpr.jaxpr)]
def s(*shape, spec=None, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=None if spec is None else NamedSharding(mesh, spec))

def around(c, _):
    whole = lax.all_gather(c, "x", tiled=True)
    c = c + lax.psum_scatter(2 * whole, "x", tiled=True)
    c = c + lax.psum(c, "x") + lax.ppermute(c, "x", [(i, (i + 1) % 4) for i in range(4)])
    return c + lax.all_to_all(c, "x", 0, 0, tiled=True), None
sharded = shard_map(lambda c: lax.scan(around, c, None, length=5)[0], mesh=mesh, in_specs=P("x"), out_specs=P("x"))
add("collectives", sharded, s(256, 64))
everywhere = NamedSharding(mesh, P())
product = shard_map(lambda x, w: lax.psum(x @ w, "x"), mesh=mesh, in_specs=(P(None, "x"), P("x")), out_specs=P())
add("by hand", product, s(64, 128), s(128, 32))
add("contracted", lambda x, w: x @ w, s(64, 128, spec=P(None, "x")), s(128, 32, spec=P("x")), out_shardings=everywhere)

write = lambda cache, row, n: lax.fori_loop(0, n, lambda i, c: lax.dynamic_update_slice(c, (row * i)[None], (i, 0)), cache)
add("cache", write, s(1000, 64), s(64), s(dtype=jnp.int32), donate_argnums=0)
print(json.dumps(out))
"""


@cache
def programs() -> dict[str, tuple[str, float]]:
    """Compiled texts, and the FLOPs of all devices."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAMS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: tuple(made) for name, made in json.loads(done.stdout.splitlines()[-1]).items()}


def compiled(name: str) -> Moved:
    return moved(programs()[name][0])


def test_collectives_of_a_sharded_program() -> None:
    part, n, loops = 64 * 64 * 4.0, 4, 5
    assert compiled("collectives").collectives == {
        "all-gather": Collective(loops, loops * part * (n - 1)),
        "reduce-scatter": Collective(loops, loops * part * n * (n - 1) / n),
        "all-reduce": Collective(loops, loops * 2 * part * (n - 1) / n),
        "collective-permute": Collective(loops, loops * part),
        "all-to-all": Collective(loops, loops * part * (n - 1) / n),
    }
    for name in ("contracted", "by hand"):
        assert programs()[name][1] == 2 * 64 * 32 * 128
        assert compiled(name).collectives == {"all-reduce": Collective(1, 2 * (64 * 32 * 4) * (n - 1) / n)}


def test_a_cache_that_is_written_in_a_loop() -> None:
    row, whole = 64 * 4, 1000 * 64 * 4
    assert row <= moved(programs()["cache"][0], steps=True).bytes <= 3 * row < whole


# --- programs compiled for TPUs ---------------------------------------------------------------------------------------

TPU = """
import json, os
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import jax, jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
out = {}
def add(name, function, *arguments, mesh, spec=None):
    placed = [jax.ShapeDtypeStruct(a, jnp.bfloat16, sharding=NamedSharding(mesh, p)) for a, p in arguments]
    to = None if spec is None else NamedSharding(mesh, spec)
    out[name] = jax.jit(function, out_shardings=to).lower(*placed).compile().as_text()

four = Mesh(np.array(devices), ("x",))
def chain(w, x):
    return lax.scan(lambda c, m: (jnp.tanh(c @ m), None), x, w)[0]
loss = lambda w, x: chain(w, x).astype(jnp.float32).sum()
add("gradient", jax.grad(loss), ((6, 512, 512), P(None, "x")), ((256, 512), P("x")), mesh=four, spec=P(None, "x"))
slices = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2).devices
both = Mesh(np.array(slices).reshape(2, 4), ("slice", "x"))
def between(v):
    over = dict(axis_name="slice", tiled=True)
    swapped = lax.ppermute(v, "slice", [(0, 1), (1, 0)])
    return lax.psum(v, "slice"), lax.all_gather(v, **over), lax.psum_scatter(v, scatter_dimension=0, **over), swapped
each = jax.shard_map(between, mesh=both, in_specs=P(("slice", "x")), out_specs=P(("slice", "x")), check_vma=False)
add("slices", each, ((1024, 256), P(("slice", "x"))), mesh=both)
kinds = {}
for name in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x2", "v6e:2x2", "tpu7x:2x2x1"):
    kinds[name] = topologies.get_topology_desc(name, platform="tpu").devices[0].device_kind
print(json.dumps([out, kinds]))
"""


@cache
def for_tpus() -> Any:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", TPU], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_sharded_gradient_on_a_tpu() -> None:
    """Weights are gathered forwards and backwards, half of that behind products, and gradients scattered, in fusions."""
    pytest.importorskip("libtpu")
    text = for_tpus()[0]["gradient"]
    assert "AsyncCollectiveStart" in text
    assert "all-reduce-scatter" in text
    weight, n, layers = 512 * 512 * 2, 4, 6
    assert moved(text, steps=True) == Moved()
    assert moved(text).collectives == {
        "all-gather": Collective(2 * layers, 2 * layers * weight * (n - 1) / n),
        "reduce-scatter": Collective(layers, layers * weight * (n - 1) / n),
    }


def test_what_goes_between_slices() -> None:
    """Of 64 KiB a device, with the one other slice; nothing goes within one."""
    pytest.importorskip("libtpu")
    part = 128 * 256 * 2
    found = moved(for_tpus()[0]["slices"]).collectives
    assert found == {
        "all-reduce between slices": Collective(1, part),
        "all-gather between slices": Collective(1, part),
        "reduce-scatter between slices": Collective(1, part / 2),
        "collective-permute between slices": Collective(1, part),
    }


def test_the_kinds_of_tpus_are_known() -> None:
    pytest.importorskip("libtpu")
    found = {topology: chip_of(kind).name for topology, kind in for_tpus()[1].items()}
    for topology, name in found.items():
        assert topology.split(":")[0].removeprefix("tpu") in name


# --- chips ------------------------------------------------------------------------------------------------------------


def test_the_part_of_a_gpu_that_programs_get(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert gpu_share() == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert gpu_share() == 0.5
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(InputError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=most: give a part of a GPU's memory"):
        gpu_share()


def test_chips() -> None:
    assert set(KINDS.values()) == set(CHIPS)
    assert chip_of("TPU v5 lite") is chip_of("TPU v5e") is CHIPS["v5e"]
    assert chip_of("TPU v5") is chip_of("TPU v5p") is CHIPS["v5p"]
    for chip in CHIPS.values():
        # Products outrun memory, and memory outruns links.
        assert chip.flops > 100 * chip.hbm_bandwidth
        assert chip.hbm_bandwidth > chip.interconnect
        assert chip.interconnect > 8 * (chip.between or 0)
        assert chip.hbm > 2**33
    for name, gpu in GPUS.items():
        assert KINDS[gpu.kind] == name
        assert gpu.memory == pytest.approx(CHIPS[name].hbm, rel=0.08)
        assert gpu.bandwidth == pytest.approx(CHIPS[name].hbm_bandwidth, rel=0.05)
        # Its tensor cores' rate is a whole multiple of that of its float units.
        plain = 2 * gpu.cores * gpu.float_units * gpu.ghz * 1e9
        assert 14 < CHIPS[name].flops / plain < 33
    with pytest.raises(InputError, match=r"device kind 'NVIDIA H100 PCIe': .*known are TPU v4, .*NVIDIA B200"):
        chip_of("NVIDIA H100 PCIe")


# --- what the bytes are moved for -------------------------------------------------------------------------------------

PARTED = """
%fused (a: f32[8,16], b: f32[16,8]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  ROOT %d = f32[8,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%turned (a: f32[8,16]) -> bf16[16,8] {
  %a = f32[8,16]{1,0} parameter(0)
  %t = f32[16,8]{1,0} transpose(%a), dimensions={1,0}
  ROOT %c = bf16[16,8]{1,0} convert(%t)
}
"""


@pytest.mark.parametrize(
    ("instruction", "traced", "part"),
    [
        ("f32[8,8] fusion(%p, %p), kind=kOutput, calls=%fused", "jit(f)/while/q_proj/dot", "q_proj: product"),
        ("bf16[16,8] fusion(%p), kind=kLoop, calls=%turned", "jit(f)/transpose(jvp(head))/t", "head: convert"),
        ("f32[8,16] copy(%p)", "jit(f)/attend/norm/mul", "norm: copy"),
        ("f32[8,16] copy(%p)", "jit(f)/headache/mul", "other: copy"),
        ('f32[8,16] custom-call(%p), custom_call_target="__cublas$gemm"', "a/down_proj/dot", "down_proj: product"),
        ('f32[8,16] custom-call(%p), custom_call_target="tpu_kernel"', "a/attend/k", "attend: kernel tpu_kernel"),
        ("f32[8] reduce(%p, %p), dimensions={1}, to_apply=%add", "a/draw/max", "draw: reduction"),
    ],
)
def test_bytes_by_part(instruction: str, traced: str, part: str) -> None:
    line = f'%x = {instruction}, metadata={{op_name="{traced}"}}'
    found = once(f"  {line}\n  ROOT %r = f32[8,16]{{1,0}} bitcast(%p)", PARTED)
    assert found.parts == {part: found.bytes}
    assert found.bytes > 0


def test_a_compiler_s_copy_belongs_to_what_uses_it() -> None:
    used = '%y = f32[8,16] add(%x, %x), metadata={op_name="jit(f)/embed/add"}'
    found = once(f"  %x = f32[8,16] copy(%p)\n  {used}\n  ROOT %r = f32[8,16]{{1,0}} bitcast(%p)")
    assert set(found.parts) == {"embed: copy", "embed: add"}


def test_parts_of_a_real_program_add_up() -> None:
    """A loop of 5 layers: the parts of its body count five times."""

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        with jax.named_scope("gate_proj"):
            x = x @ w
        with jax.named_scope("norm"):
            return x / jnp.linalg.norm(x, axis=1, keepdims=True), None

    x, w = jnp.ones((64, 128)), jnp.ones((5, 128, 128))
    text = compile_named(jax.jit(lambda x, w: lax.scan(layer, x, w)[0]).lower(x, w)).as_text()
    found = moved(text)
    assert sum(found.parts.values()) == pytest.approx(found.bytes)
    product = sum(size for part, size in found.parts.items() if part.startswith("gate_proj"))
    assert product >= 5 * 4 * (128 * 128 + 2 * 64 * 128)
    assert {part.partition(":")[0] for part in found.parts} >= {"gate_proj", "norm"}
    assert found.largest(1)[0][1] == max(found.parts.values())
