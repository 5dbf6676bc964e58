"""What one device or a mesh of simulated ones computes: a process of its own, for their number is fixed when JAX starts.

``python mesh_numbers.py FOLDER JOB...`` prints a JSON object for each JOB, a JSON list [mesh, options]: mesh is [data, fsdp,
tensor], or [] for one device. Options: what (some of sft, dpo, score, sample), attention, weights (what decoding reads),
unroll (layers are not looped over), broken (the rows' limits are wrong).
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from definition import remasked

from esjax import rows
from esjax.model.attention import KERNELS
from esjax.model.families import LINEARS
from esjax.model.linear import Lora
from esjax.model.lora import Adapter, flatten, unflatten
from esjax.model.weights import Backbone, load_backbone
from esjax.rows import Rows
from esjax.runtime.mesh import batch_groups, make_mesh, shard_batch, to_host
from esjax.sample.generate import Generator
from esjax.sample.score import Scorer
from esjax.settings.schema import DpoSettings, SamplingSettings, SftSettings
from esjax.train.losses import Pairs, dpo_loss, sft_loss
from esjax.train.optim import init_optimiser, optimiser
from esjax.train.step import Objective, make_step

ROWS, LENGTH, MICRO = 16, 64, 8


def filled(adapter: Adapter) -> Adapter:
    """An adapter that changes something: fixed random values in the places of a fresh one."""
    rng = np.random.default_rng(1)
    flat = {
        path: like.replace(jax.device_put(0.3 * rng.normal(size=like.shape).astype(np.float32), like[...].sharding))
        for path, like in flatten(adapter).items()
    }
    return unflatten(flat)


def batch() -> Rows:
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(i) for i in rng.integers(3, 1000, n)]

    def row() -> Rows:
        d = ids(int(rng.integers(8, 24)))
        replies = [(n, ids(int(rng.integers(1, 7)))) for n in (5, 5, len(d), len(d))]
        return rows.pack([rows.trunk_with_replies(d, replies)], LENGTH)

    return rows.stack([row() for _ in range(ROWS)])


def trained(backbone: Backbone, task: str, made: Rows) -> dict[str, Any]:
    """Two optimiser steps of two micro-batches each."""
    adapter = filled(backbone.fresh_adapter(0))
    extra = None
    if task == "dpo":
        extra = Pairs(
            np.random.default_rng(2).normal(size=(ROWS, 1, 2, 2)).astype(np.float32), np.ones((ROWS, 1, 2), bool)
        )
    settings = SftSettings(learning_rate=1e-3, warmup_fraction=0.0)
    tx = optimiser(settings, 4)
    share = MICRO // batch_groups()
    targets = max(int((w != 0).sum()) for w in np.split(made.weight, ROWS // share))
    how = backbone.execution._replace(layout="branched")
    loss = dpo_loss(DpoSettings()) if task == "dpo" else sft_loss
    step = make_step(Objective(backbone.definition, loss, targets, how), tx, MICRO)
    state = init_optimiser(tx, adapter)
    placed = shard_batch((made, extra))
    text = step.lower(adapter, state, backbone.base, *placed).compile().as_text()  # type: ignore[attr-defined]
    where = [describe(adapter), describe(state)]
    metrics = []
    for _ in range(2):
        adapter, state, computed = step(adapter, state, backbone.base, *placed)
        metrics.append({k: float(v) for k, v in computed.items()})
    assert where == [describe(adapter), describe(state)], "a step moved what it trains"
    values = np.concatenate([np.ravel(to_host(x)) for x in jax.tree.leaves(adapter)])
    width = backbone.arch.width
    return {
        "metrics": metrics,
        "adapter": values.tolist(),
        "placed": {
            "adapter": describe(adapter),
            "optimiser": describe(state),
            "rows": describe(jax.device_put(placed)),
        },
        # Activations of all rows of a micro-batch, and of one device's share of them, in the program of one device.
        "activations": {rows: f"f32[{rows},{LENGTH},{width}]" in text for rows in (MICRO, MICRO // batch_groups())},
    }


def describe(tree: Any) -> dict[str, list[Any]]:
    """Path -> shape, and shape of one device's part."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): [
            list(x.shape),
            list(x.sharding.shard_shape(x.shape)),
        ]
        for path, x in leaves
    }


def sampled(backbone: Backbone) -> dict[str, Any]:
    """Greedy replies to prompts that share beginnings; lanes are refilled, for there are more prompts than lanes."""
    rng = np.random.default_rng(3)
    stem = [int(i) for i in rng.integers(3, 1000, 150)]
    prompts = [[*stem[:n], *(int(i) for i in rng.integers(3, 1000, 5))] for n in rng.integers(5, 150, 40)]
    generator = Generator(backbone, 16, end_of_turn=1)
    cache: dict[str, Any] = {}
    decode = generator.programs.decode

    def watched(weights: Any, given: Any, *rest: Any) -> Any:
        cache["before"] = describe(given)
        made = decode(weights, given, *rest)
        cache["after"] = describe(made.cache)
        return made

    generator.programs = generator.programs._replace(decode=watched)
    adapter = filled(backbone.fresh_adapter(0))
    made = generator.generate(adapter, prompts, range(40), SamplingSettings(temperature=0.0), 24)
    return {
        "tokens": [m.token_ids for m in made],
        "logprobs": [m.logprobs for m in made],
        "cache": cache,
        "attends": generator.attends,
    }


def main(folder: str, *jobs: str) -> None:
    KERNELS["cpu"] = "triton"  # for a job that times it
    for job in jobs:
        shape, options = json.loads(job)
        context = jax.set_mesh(make_mesh(jax.devices(), tuple(shape))) if shape else contextlib.nullcontext()
        with context:
            backbone = load_backbone(Path(folder), Lora(LINEARS, 4, 2.0), np.dtype("float32"))
            how = backbone.execution._replace(
                attention=options.get("attention", "chunked"),
                weights=options.get("weights", "apart"),
                decoding=options.get("decoding", "plain"),
                unroll=options.get("unroll", False),
                interpret=True,
            )
            backbone = replace(backbone, execution=how)
            made = batch()
            if options.get("broken"):
                made = remasked(made, -1)
            out: dict[str, Any] = {"base": describe(backbone.base)}
            what = options.get("what", ["sft", "dpo", "score", "sample"])
            for task in ("sft", "dpo"):
                if task in what:
                    out[task] = trained(backbone, task, made)
            if "score" in what:
                examples = [Rows(*(x[i] for x in made)) for i in range(ROWS)]
                scored = Scorer(backbone, LENGTH, MICRO).score(filled(backbone.fresh_adapter(0)), examples)
                out["score"] = [x.tolist() for branches in scored for x in branches]
            if "sample" in what:
                out["sample"] = sampled(backbone)
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
