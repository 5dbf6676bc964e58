"""How fast the sampler is: new tokens a second, and the generations of a round, with where the time goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax.bench.workload import (
    GIB,
    Ceilings,
    RoundWork,
    Workload,
    best_seconds,
    parts,
    peak_memory,
    spread,
    tracing,
    traffic,
)
from esjax.model.costs import prefill_flops, step_bytes
from esjax.model.decoder import Execution
from esjax.model.weights import Backbone
from esjax.runtime import programs
from esjax.sample.constrain import free
from esjax.sample.decode import permitted
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion, Usage
from esjax.sample.shapes import Need
from esjax.settings.schema import SamplingSettings

HOW = SamplingSettings(temperature=0.7, top_p=0.9)
BARE: nnx.State = nnx.State({})  # no adapter


def bench(
    work: Workload, task: str, how: Execution, ceilings: Ceilings, naive: bool, trace: Path | None
) -> dict[str, Any]:
    """Measure ``sample`` or ``round``: as many runs as the workload says, after one that compiles.

    Args:
        ceilings: what prefill and decoding are held against.
        naive: for ``round``, its unshared form: drafts, reflections and refinements each compute their whole prompts.
        trace: where a profiler trace of one more run goes.
    """
    arch, dtype = work.architecture, jnp.dtype(work.dtype)
    definition, make = parts(arch, None, dtype, bare=True)
    backbone = Backbone(Path(), arch, None, dtype, definition, make()[1], how)
    if task == "sample":
        units, unit = work.sample.batch * work.sample.new_tokens, "new tokens/s"
        generator = Generator(backbone, work.sample.batch, end_of_turn=-1, lanes=1)
        once = partial(_sample, work, generator)
    else:
        units, unit = work.round.contexts, "pairs/s"
        replies, lanes = (work.round.contexts, 1) if naive else (2 * work.round.contexts, 2)
        generator = Generator(backbone, replies, end_of_turn=-1, lanes=lanes)
        once = partial(_round_unshared if naive else _round, work, generator)
    before = programs.seconds()
    _timed(generator, once, 0)
    compile_seconds = programs.seconds() - before
    runs = sorted(_timed(generator, once, seed) for seed in range(1, 1 + work.runs))
    middle = runs[len(runs) // 2]
    generator.clocked = True
    _timed(generator, once, 0)  # where the time goes; that prefills are waited for takes some itself
    generator.clocked, u = False, generator.usage
    variant = "unshared" if naive else "shared" if task == "round" else "bare"
    if trace is not None:
        with tracing(trace, task, variant):
            generator.usage = Usage()
            once(np.random.default_rng(3))
    held, step = memory_held(generator, lambda: once(np.random.default_rng(0)))
    slots = generator.replies // generator.lanes * generator.slots + generator.replies * generator.new
    needed = step_bytes(arch, dtype.itemsize, slots)  # (a path may skip what nobody sees)
    flops = prefill_flops(arch, u.computed_tokens, u.seen)
    return {
        "system": "esjax",
        "task": task,
        "figure": round(units / middle, 2),
        "spread": spread(units, runs),
        "unit": unit,
        "variant": variant,
        "mem_gib": round(held / GIB, 2),
        **peak_memory(),
        "seconds": round(middle, 3),
        "compile_s": round(compile_seconds, 1),
        "prefill_s": round(u.prefill_seconds, 3),
        "prefill_tokens": u.computed_tokens,
        "padded_tokens": u.padded_tokens - u.computed_tokens,
        "unshared_tokens": u.prompt_tokens,
        "prefill_tflop": round(flops / 1e12, 4),
        "prefill_mfu": round(flops / u.prefill_seconds / ceilings.flops, 3),
        "decode_s": round(u.decode_seconds, 3),
        "steps": u.steps,
        "step_ms": round(u.decode_seconds / u.steps * 1e3, 2),
        "step_gib": round(needed / GIB, 3),
        **traffic(step, needed, steps=True),
        "step_limit_ms": round(needed / ceilings.bandwidth * 1e3, 2),
        "constraint_ms": round(constraint_seconds(arch.vocab, generator.replies) * 1e3, 2),
        "lanes": generator.replies,
        "occupancy": round(u.occupancy, 3),
        "attention": how.attention,
        "decoding_attention": generator.attends,
    }


def memory_held(generator: Generator, once: Callable[[], None]) -> tuple[int, Any]:
    """Bytes that sampling needs: all arrays that live while a task runs, and what the decoding program takes beside them.

    Also that program, compiled.
    """
    decode: Any = generator.programs.decode
    seen: list[int] = []
    shapes: list[Any] = []

    def watched(*arguments: Any) -> Any:
        seen.append(sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}.values()))
        *arrays, attend = arguments
        shapes[:] = [*jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays), attend]
        return decode(*arguments)

    usual = generator.programs
    generator.programs, generator.usage = usual._replace(decode=watched), Usage()
    once()
    generator.programs = usual
    compiled = programs.compile_named(decode.lower(*shapes))
    return max(seen) + programs.work_bytes(compiled), compiled


def _timed(generator: Generator, once: Any, seed: int) -> float:
    generator.usage = Usage()
    began = time.perf_counter()
    once(np.random.default_rng(seed))
    return time.perf_counter() - began


def _ids(rng: np.random.Generator, work: Workload, count: int, length: int) -> list[list[int]]:
    return rng.integers(10, work.architecture.vocab, (count, length)).tolist()


def _sample(work: Workload, generator: Generator, rng: np.random.Generator) -> None:
    s = work.sample
    prompts = _ids(rng, work, s.batch, s.prompt)
    made = generator.generate(BARE, prompts, range(s.batch), HOW, s.new_tokens)
    _check(made, s.new_tokens)


def _request(r: RoundWork, kind: str, i: int, prompt: list[int]) -> Request:
    most = {"draft": r.draft, "reflection": r.reflection, "refinement": r.refinement}[kind]
    return Request((kind, i), prompt, row_seed(kind, i), HOW, most)


def _round(work: Workload, generator: Generator, rng: np.random.Generator) -> None:
    """Draft and reflection grow side by side from one context; the refinement follows where the context still lies."""
    r = work.round
    contexts = _ids(rng, work, r.contexts, r.context)
    ask, ask_again = (_ids(rng, work, r.contexts, r.instruction) for _ in range(2))
    drawn: dict[tuple[str, int], list[int]] = {}

    def done(request: Request, made: Completion) -> list[list[Request]]:
        kind, i = request.key
        _check([made], request.max_tokens)
        drawn[kind, i] = made.token_ids
        if kind == "refinement" or ("draft", i) not in drawn or ("reflection", i) not in drawn:
            return []
        prompt = [*contexts[i], *drawn["draft", i], *drawn["reflection", i], *ask_again[i]]
        return [[_request(r, "refinement", i, prompt)]]

    groups = [
        [_request(r, "draft", i, contexts[i]), _request(r, "reflection", i, [*contexts[i], *ask[i]])]
        for i in range(r.contexts)
    ]
    refining = r.instruction + r.draft + r.reflection
    generator.reserve(Need(r.context, r.instruction, max(r.draft, r.reflection, r.refinement), least=refining))
    generator.work(BARE, groups, done, more_may_follow=True)
    if len(drawn) != 3 * r.contexts:
        raise AssertionError("a reply is missing")


def _round_unshared(work: Workload, generator: Generator, rng: np.random.Generator) -> None:
    """The same work, one generation after the other, each from its whole prompt."""
    r = work.round
    contexts = _ids(rng, work, r.contexts, r.context)
    ask, ask_again = (_ids(rng, work, r.contexts, r.instruction) for _ in range(2))
    seeds = range(r.contexts)
    generator.reserve(Need(r.context + r.draft + r.reflection + r.instruction, 0, max(r.draft, r.refinement)))
    drafts = generator.generate(BARE, contexts, seeds, HOW, r.draft)
    asked = [[*c, *a] for c, a in zip(contexts, ask, strict=True)]
    reflections = generator.generate(BARE, asked, seeds, HOW, r.reflection)
    asked = [
        [*c, *d.token_ids, *x.token_ids, *a]
        for c, d, x, a in zip(contexts, drafts, reflections, ask_again, strict=True)
    ]
    _check(generator.generate(BARE, asked, seeds, HOW, r.refinement), r.refinement)


def _check(made: list[Completion], length: int) -> None:
    if any(len(m.token_ids) != length for m in made):
        raise AssertionError("a reply ended early")


def constraint_seconds(vocab: int, lanes: int) -> float:
    """What masking the logits of a step by a constraint's table costs, beyond reading and writing them."""
    rng = np.random.default_rng(0)
    table = free(vocab)._replace(cost=rng.integers(-1, 40, (32, vocab)).astype(np.int16))
    constraint = jax.device_put(table)
    logits = jnp.ones((lanes, vocab), jnp.float32)
    state = jnp.asarray(rng.integers(0, 32, lanes), jnp.int32)

    def masked(logits: jax.Array, state: jax.Array) -> jax.Array:
        return jnp.where(permitted(constraint, state, state), logits, -jnp.inf)

    plain = best_seconds(jax.jit(lambda logits, state: logits * 2), logits, state)
    return max(0.0, best_seconds(jax.jit(masked), logits, state) - plain)
