"""Export a model to Hugging Face: a merged folder or a PEFT adapter, reloaded and compared before it is called done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax import rows
from esjax.errors import InputError, RunError
from esjax.evolve.experiment import Experiment
from esjax.hub.fetch import RECORD, public_name
from esjax.hub.shards import write_shards
from esjax.model.families import config_of
from esjax.model.lora import Adapter, load_adapter, peft_tensors, save_adapter
from esjax.model.weights import Backbone, bind, load_backbone, merged_tensors
from esjax.rows import Rows
from esjax.run.files import check_writable, replacing
from esjax.run.progress import say

# What belongs to a tokenizer, beside the files that its own class names.
COPIED = (
    *("tokenizer*", "chat_template*", "additional_chat_templates/*.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json", "generation_config.json"),
)
CHECK = "I lost my job this morning, and I have not told my family yet."


def export(experiment: Experiment, adapter: Adapter, format: Literal["merged", "peft"], out: Path) -> None:
    """Write base + adapter to the folder ``out``, which must not exist.

    Raises InputError when it does, RunError when the reloaded folder does not give the model's logits.
    """
    if out.exists():
        raise InputError(f"{out} exists; give a new folder as --out")
    check_writable(out, "--out")
    backbone = experiment.backbone
    if backbone.lora is None:
        raise InputError("only a run's model can be exported: --run-dir RUN --model m1")
    say(f"writing {out} ({format})")
    probe = rows.stack(
        [rows.trunk(experiment.tokenizer.prompt(experiment.encoder.with_system([{"role": "user", "content": CHECK}])))]
    )
    ours = _logits(backbone, adapter, probe)
    with replacing(out) as folder:
        if format == "merged":
            folder.mkdir(parents=True)
            write_shards(folder, merged_tensors(backbone, adapter))
            config = config_of(backbone.arch, json.loads((backbone.folder / "config.json").read_text(encoding="utf-8")))
            config |= {"dtype": backbone.dtype.name, "torch_dtype": backbone.dtype.name}  # transformers 5 and 4
            (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        else:
            base, revision = public_name(experiment.config.model.source, backbone.folder)
            place = str((out / "base").absolute())
            save_adapter(folder, peft_tensors(adapter, backbone.arch), backbone.lora, base or place, revision)
            if base is None:  # converted from a file, so no name would do: the base goes along
                shutil.copytree(backbone.folder, folder / "base", ignore=shutil.ignore_patterns(RECORD))
                say(f"the base lies in {place}; where that is moved, adapter_config.json must say its new place")
        for pattern in {*COPIED, *experiment.tokenizer.hf.vocab_files_names.values()}:
            for file in backbone.folder.glob(pattern):
                to = folder / file.relative_to(backbone.folder)
                to.parent.mkdir(exist_ok=True)
                shutil.copy(file, to)
        if format == "merged":
            theirs = _logits(load_backbone(folder, None, backbone.dtype), nnx.State({}), probe)
        else:
            theirs = _logits(backbone, load_adapter(folder, adapter), probe)
        worst = float(np.abs(ours - theirs).max())
        # Merging rounds W + scale A B to the base's dtype: float32 keeps logits to 2e-3, bfloat16 to its 8 bits.
        allowed = 2e-3 if backbone.dtype == jnp.float32 else 0.02 * float(np.abs(ours).max())
        if not worst <= allowed:
            raise RunError(
                f"{out}: the reloaded model's logits differ by {worst:.2e} (allowed {allowed:.2e}); nothing was written"
            )
    say(f"wrote {out}; reloaded logits agree to {worst:.1e}")


def _logits(backbone: Backbone, adapter: Adapter, probe: Rows) -> np.ndarray:
    @jax.jit
    def run(adapter: Adapter, base: nnx.State) -> jax.Array:
        model = bind(backbone.definition, adapter, base)
        return model.logits(model(probe, backbone.execution))

    return np.asarray(run(adapter, backbone.base))
