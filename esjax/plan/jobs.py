"""The programs of a run, with the shapes that its config implies and every argument in its place; nothing is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax.evolve.reflect import FIELDS, Instructions
from esjax.evolve.replies import Lengths, sampling_need
from esjax.model.attention import KERNELS
from esjax.model.cache import Chunk, cache_shapes
from esjax.model.costs import attention_flops
from esjax.model.decoder import ROOM, Decoder, Execution, forms
from esjax.model.families import Architecture
from esjax.model.lora import lora_from
from esjax.model.weights import FLOAT32, as_dtype
from esjax.plan import needed
from esjax.plan.needed import Needed
from esjax.rows import Rows
from esjax.runtime.mesh import batch_groups, mesh_sizes, rows_at_once, with_batch_shardings, with_shardings
from esjax.sample.compiled import sampling_programs
from esjax.sample.constrain import free
from esjax.sample.decode import Asked, idle_lanes
from esjax.sample.score import SCORE
from esjax.sample.shapes import Need, Shapes, shapes
from esjax.settings.schema import Config, DpoSettings, OptimSettings
from esjax.train.losses import Pairs, dpo_loss, sft_loss
from esjax.train.optim import optimiser
from esjax.train.step import Objective, make_step

Name = Literal["prefill", "decode", "score", "sft", "dpo"]
NAMES: tuple[Name, ...] = get_args(Name)
STATES = 128  # of a reflection's automaton; the sample run's has 96
SEGMENT, PAIR = 32, 16  # fewest tokens of an example packed into a row, and of a pair's two replies
TOKEN = 2  # fewest bytes of a prompt file that a token stands for, on average; a large vocabulary's has four


@dataclass(frozen=True)
class Job:
    """One program: how it is traced, and its arguments by kind."""

    name: Name
    trace: Callable[[], Any]  # gives a jax.stages.Traced
    held: dict[str, Any]  # kind -> shapes in their places: base, adapter, optimiser, cache, rows
    needed: Needed
    kernel_flops: float = 0.0  # of attention on one device where a kernel computes it, which states no cost
    remat: str = ""  # of training
    decoding: str = ""  # how a decoding step attends
    room: float = 1.0  # the share of a device's memory up to which it is taken ...
    lighter: Job | None = None  # ... before this one, which needs less


def jobs(config: Config, arch: Architecture, how: Execution, dtype: jnp.dtype, platform: str) -> Iterator[Job]:
    """All programs of a run of this config on the mesh of the context.

    Sizes that only data could tell are bounded from above: every token of a row is a target, prompts fill the window, and a
    prompt file has a token every two bytes. Both phases score; the larger of the two batches is planned.
    """
    whole = config.train.what == "all"
    lora = None if whole else lora_from(config.lora, arch)
    abstract = nnx.eval_shape(lambda: Decoder(arch, lora, dtype, nnx.Rngs(params=0, lora=0)))
    mesh = jax.sharding.get_mesh()
    definition, adapter, base = nnx.split(abstract, nnx.LoRAParam, ...)  # type: ignore[misc]
    if whole:  # what is trained is all there is, and it is kept in float32
        adapter, base = base, nnx.State({})
    adapter, base = with_shardings(adapter, mesh), with_shardings(base, mesh)
    trained = with_shardings(jax.eval_shape(lambda x: as_dtype(x, FLOAT32), adapter), mesh)
    yield from _sampling(config, arch, how, dtype, platform, (definition, adapter, base))

    sft, dpo = ((rows_at_once(n, s), s.row_length) for n, s in (("sft", config.sft), ("dpo", config.dpo)))
    score_size = max(sft, dpo, key=math.prod)
    score_rows = _rows(*score_size)
    score_how = how._replace(layout="branched" if score_size == dpo else "packed", remat="none")
    held = {"base": base, "adapter": adapter, "rows": score_rows}
    attention = partial(kernel_flops, arch, how)
    flops = attention(*score_size, passes=1)
    weights = needed.multiplied(base, adapter)
    needs = needed.scoring(arch, score_size, weights)
    yield Job("score", lambda: SCORE.trace(definition, score_how, adapter, base, score_rows), held, needs, flops)

    def training(name: Literal["sft", "dpo"], s: OptimSettings, how: Execution) -> Job:
        loss = dpo_loss(s) if isinstance(s, DpoSettings) else sft_loss
        tx = optimiser(s, 100)
        state = with_shardings(jax.eval_shape(tx.init, trained), mesh)
        micro_rows = rows_at_once(name, s)
        batch_rows = max(s.batch_rows, micro_rows)
        rows = _rows(batch_rows, s.row_length)
        extra: Any = None
        dropout = config.lora.dropout if name == "sft" else 0.0
        if dropout > 0:
            extra = with_batch_shardings(_array((batch_rows, 2), np.uint32), mesh)
        if isinstance(s, DpoSettings):
            shape = (batch_rows, s.row_length // SEGMENT, s.row_length // PAIR)
            extra = with_batch_shardings(Pairs(_array((*shape, 2), np.float32), _array(shape, np.float32)), mesh)
        targets = micro_rows // batch_groups() * s.row_length
        mine = how._replace(layout="packed" if name == "sft" else "branched")
        copied = dtype if whole and dtype != FLOAT32 else None
        step: Any = make_step(Objective(definition, loss, targets, mine, copied, dropout), tx, micro_rows)
        held = {"base": base, "adapter": trained, "optimiser": state, "rows": (rows, extra)}
        # The backward pass makes the scores again, and two products more for each of the forward pass' two.
        again = 0 if how.remat == "none" else 1
        flops = attention(batch_rows, s.row_length, passes=1 + again + 2.5)
        needs = needed.training(
            arch, needed.Step(batch_rows, s.row_length, micro_rows, lora, dtype.itemsize), weights, trained, state
        )
        return Job(name, lambda: step.trace(trained, state, base, rows, extra), held, needs, flops, how.remat)

    *faster, last = forms(how, platform)
    phases: tuple[tuple[Literal["sft", "dpo"], OptimSettings], ...] = (("sft", config.sft), ("dpo", config.dpo))
    for name, s in phases:
        job = training(name, s, last)
        for form in reversed(faster):
            job = replace(training(name, s, form), room=ROOM[platform], lighter=job)
        yield job


def _sampling(
    config: Config,
    arch: Architecture,
    how: Execution,
    dtype: jnp.dtype,
    platform: str,
    model: tuple[nnx.GraphDef[Decoder], nnx.State, nnx.State],
) -> Iterator[Job]:
    """Prefill and decode; ``model`` is its definition, adapter and base."""
    definition, adapter, base = model
    made = sampler_shapes(config, platform)
    rows, lanes, slots, new, count, _, width = made
    kept = dtype if config.model.cache_dtype == "auto" else jnp.dtype(config.model.cache_dtype)
    programs = sampling_programs(definition, dtype, how)
    weights: Any = (adapter, base)
    if how.weights == "apart":
        places = jax.jit(programs.weights).lower(adapter, base).compile().output_shardings
        copies = jax.eval_shape(programs.weights, adapter, base)
        weights = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), copies, places)
    cache = cache_shapes(arch, rows, lanes, slots, new, kept)
    first, table = _array((count * batch_groups(),), np.int32), _array((count * batch_groups(), width), np.int32)
    valid = _array(table.shape, np.bool_)
    seen = _array((count * batch_groups(), slots), np.int32)
    chunk = _everywhere(Chunk(first, first, table, table, valid, seen, seen, seen))
    state = _everywhere(jax.eval_shape(lambda: idle_lanes(rows, lanes)))
    waiting = _everywhere(jax.tree.map(lambda x: _array((rows, 4 * lanes), x.dtype), state.leaf))
    counts, stop, patience = _everywhere((_array((rows,), np.int32), _array((1,), np.int32), _array((), np.int32)))
    constraint = _everywhere(jax.tree.map(lambda x: _array((STATES, *x.shape[1:]), x.dtype), free(arch.vocab)))
    held = {"base": weights[1], "adapter": weights[0]} if how.weights == "shared" else {"base": (weights.layers, base)}
    held = {**held, "cache": cache}
    layers, head = needed.multiplied(base, adapter)
    layers = weights.layers if how.weights == "apart" else layers
    attend = KERNELS[platform] if how.decoding == "auto" else how.decoding  # a run times both: the better case
    kernel = attention_flops(arch, rows * lanes * (slots + new)) / needed.devices() if attend != "plain" else 0.0
    yield Job(
        "prefill",
        lambda: programs.prefill.trace(weights, cache, chunk),
        {**held, "rows": chunk},
        needed.prefilling(arch, made, layers, kept.itemsize),
    )
    yield Job(
        "decode",
        lambda: programs.decode.trace(
            weights, cache, state, Asked(waiting, counts, stop, constraint, patience, patience), attend
        ),
        {**held, "constraint": constraint, "rows": (state, waiting, counts, stop, patience)},
        needed.decoding(arch, made, (layers, head), cache, dtype.itemsize),
        kernel,
        decoding=f"{attend}, or plain if faster" if how.decoding == "auto" else attend,
    )


def kernel_flops(arch: Architecture, how: Execution, rows: int, length: int, passes: float) -> float:
    """FLOPs of attention on one device where a kernel does it: full causal rows, so an upper bound for packed ones."""
    if how.attention not in ("splash", "pallas", "cudnn"):
        return 0.0
    sizes = mesh_sizes()
    share = rows / (sizes["data"] * sizes["fsdp"]) * arch.heads / sizes["tensor"]
    return passes * arch.layers * share * 2.0 * length**2 * arch.head_size


def sampler_shapes(config: Config, platform: str) -> Shapes:
    """The sampler's shapes for the longest texts that these settings allow.

    Contexts of the closing table may be longer than a round's rows; then rows grow for them and what they do not share.
    """
    e = config.evolve
    asked = {name: -(-size // TOKEN) for name, size in asked_bytes(config).items()}
    labels = _tokens("\n".join(f"{label} {opening}" for label, opening in FIELDS.values()))
    drawn = len(FIELDS) * e.reflection.field_tokens
    lengths = Lengths(config.context_room, asked["reflect"], asked["refine"], labels, drawn + labels + 1)
    need = sampling_need(config, lengths)
    made = shapes(e.batch, need, platform)
    answered = config.data.window - config.reply.max_tokens
    if answered > config.context_room + (e.draft.max_tokens + drawn) * (
        made.lanes + 1
    ):  # what a round's rows have at least
        closing = shapes(e.batch, Need(answered, answered // 2, config.reply.max_tokens), platform)
        made = made._replace(slots=max(made.slots, closing.slots))
    return made


def asked_bytes(config: Config) -> dict[str, int]:
    """Bytes of what is added to a context to ask for a reflection and for a refinement, without what was drawn."""
    ask = Instructions.load(config)
    blank = dict.fromkeys(FIELDS, "") if config.evolve.reflects else {}
    refine = ask.refine.render(**blank, **({"draft": ""} if config.evolve.show_draft else {}))
    each = {"reflect": ask.reflect.render(), "refine": refine}
    return {name: len(ask.principles.encode()) + len(text.encode()) for name, text in each.items()}


def _tokens(text: str) -> int:
    return -(-len(text.encode()) // TOKEN)


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _rows(count: int, length: int) -> Rows:
    whole, weight = _array((count, length), np.int32), _array((count, length), np.float32)
    return with_batch_shardings(Rows(whole, whole, whole, whole, whole, weight), jax.sharding.get_mesh())


def _everywhere(tree: Any) -> Any:
    return with_shardings(tree, jax.sharding.get_mesh())
