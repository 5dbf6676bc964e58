"""Log-probs and greedy replies of small models, on one device and on meshes; prints one JSON object a job.

A job is a JSON list: the model's folder, the mesh's sizes (empty: one device), how its linear layers are kept.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import jax
import numpy as np

from esjax.model.linear import Lora
from esjax.model.weights import Choice, load_backbone
from esjax.rows import prompt_with_replies
from esjax.runtime.mesh import make_mesh
from esjax.sample.generate import Generator
from esjax.sample.score import Scorer
from esjax.settings.schema import SamplingSettings


def main(*jobs: str) -> None:
    for job in jobs:
        folder, shape, linears, kernels = json.loads(job)
        with jax.set_mesh(make_mesh(jax.devices(), tuple(shape))) if shape else contextlib.nullcontext():
            lora = Lora(tuple(linears), 4, 2.0)
            backbone = load_backbone(Path(folder), lora, np.dtype("float32"), Choice(kernels=kernels))
            rng = np.random.default_rng(0)
            leaves, tree = jax.tree.flatten(backbone.fresh_adapter(0))
            drawn = [rng.normal(size=x.shape).astype(np.float32) * 0.1 for x in leaves]
            placed = [jax.device_put(x, like.sharding) for x, like in zip(drawn, leaves, strict=True)]
            adapter = jax.tree.unflatten(tree, placed)
            prompts = [rng.integers(2, 90, n).tolist() for n in range(20, 36)]
            rows = [prompt_with_replies(p, [rng.integers(2, 90, n).tolist() for n in (5, 9)]) for p in prompts[:8]]
            scored = Scorer(backbone, 64, 8).score(adapter, rows)
            greedy = SamplingSettings(temperature=0.0)
            made = Generator(backbone, 8, end_of_turn=1).generate(adapter, prompts, range(16), greedy, 16)
        score = [x.tolist() for branches in scored for x in branches]
        print(json.dumps({"score": score, "tokens": [m.token_ids for m in made]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
