"""Export a model: a merged folder, a PEFT adapter or a GGUF file, reloaded and compared before it is called done."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from esjax import __version__, rows
from esjax.errors import InputError, RunError
from esjax.eval.compare import BACKBONE, title
from esjax.eval.results import HEADLINE
from esjax.evolve.experiment import Experiment
from esjax.evolve.folders import copy_tokenizer, write_model
from esjax.evolve.models import run_model
from esjax.hub.card import Card, card_text
from esjax.hub.fetch import RECORD, public_name
from esjax.hub.gguf_export import Stored, tokenizer_keys, write_gguf
from esjax.hub.gguf_import import convert
from esjax.hub.push import check_push, push
from esjax.model.gguf_form import Described, describe, gguf_shapes, gguf_tensors
from esjax.model.lora import Adapter, load_adapter, peft_tensors, save_adapter
from esjax.model.weights import FLOAT32, Backbone, bind, load_backbone
from esjax.run.files import check_new, replacing, write_text
from esjax.run.jsonl import json_text
from esjax.run.manifest import read_manifest
from esjax.run.progress import say
from esjax.settings.schema import Sources
from esjax.tokens.tokenizer import ChatTokenizer

CHECK = "I lost my job this morning, and I have not told my family yet."


SHARD_GIB = 4.0
STORED: dict[str, Stored] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}  # in a GGUF file


class Form(NamedTuple):
    """How a model is written."""

    format: Literal["merged", "peft", "gguf"] = "merged"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"  # auto: model.dtype's; of GGUF float16
    shard_gib: float | None = None  # the largest file of merged weights; None: 4
    push_to: str | None = None  # a repository of the hub


class Words(NamedTuple):
    """What a GGUF file says: its name, the model in its words, and all its keys."""

    name: str
    said: Described
    keys: dict[str, Any]


class Job(NamedTuple):
    """What is written where: base + adapter, whose logits on ``prompt`` the written folder must give again."""

    experiment: Experiment
    backbone: Backbone  # the original weights
    adapter: Adapter
    out: Path
    form: Form
    prompt: list[int]
    words: Words | None  # of a GGUF file


def export(experiment: Experiment, adapter: Adapter, out: Path, form: Form, spec: str) -> None:
    """Write base + adapter, the model ``spec`` (RUN:mT, or a PEFT folder), to the folder ``out``, which must not exist.

    What is written whole is read again to be compared; the experiment's own weights are given back before, so that memory
    for one model is enough, and nothing can be computed with them any more.

    Raises InputError when it does, RunError when the reloaded folder does not give the model's logits.
    """
    _check(experiment, out, form)
    backbone = experiment.backbone
    if backbone.arch.kernels != "plain":
        kept = backbone.arch.kernels
        say(f"the adapter was trained on a base kept in {kept}; it is written with, or into, the original weights")
        backbone = load_backbone(backbone.folder, backbone.lora, backbone.dtype)
    words = _words(experiment, out, form) if form.format == "gguf" else None
    chat = experiment.encoder.with_system([{"role": "user", "content": CHECK}])
    job = Job(experiment, backbone, adapter, out, form, experiment.tokenizer.prompt(chat), words)
    say(f"writing {out} ({form.format})")
    ours = _logits(backbone, adapter, job.prompt)
    with replacing(out) as folder:
        folder.mkdir(parents=True)
        theirs, share = WRITERS[form.format](job, folder)
        (folder / "README.md").write_text(card_text(_card(job, spec)), encoding="utf-8")
        worst = float(np.abs(ours - theirs).max())
        exact = share is None and backbone.dtype == FLOAT32
        most = EXACT if exact else (share or SHARES["bfloat16"] or 0.0) * float(np.abs(ours).max())
        if not worst <= most:
            raise RunError(
                f"{out}: the reloaded model's logits differ by {worst:.2e} (allowed {most:.2e}); nothing was written"
            )
    say(f"wrote {out}; reloaded logits agree to {worst:.1e}")
    if form.push_to is not None:
        say(f"pushed to {push(out, form.push_to, f'{spec} by esjax {__version__}')}")


# By how much logits may differ: where all is float32, and otherwise as a share of the largest of them. Rounding grows with a
# model's depth: 32 random layers of Llama-3-8B's shape in bfloat16 differ by 8%. A tensor in a wrong place gives 100%.
EXACT = 2e-3
SHARES = {"float32": None, "float16": 0.02, "bfloat16": 0.15, "q8_0": 0.1}


def _merged(job: Job, folder: Path) -> tuple[np.ndarray, float | None]:
    """Write a whole Hugging Face folder. Returns the logits of what was written, and by how much they may differ."""
    backbone, form = job.backbone, job.form
    dtype = backbone.dtype if form.dtype == "auto" else jnp.dtype(form.dtype)
    write_model(folder, backbone, job.adapter, dtype, int((form.shard_gib or SHARD_GIB) * 2**30))
    copy_tokenizer(backbone.folder, folder, job.experiment.tokenizer)
    _release(job)
    return _logits(load_backbone(folder, None, backbone.dtype), nnx.State({}), job.prompt), SHARES[dtype.name]


def _peft(job: Job, folder: Path) -> tuple[np.ndarray, float | None]:
    """Write an adapter as PEFT has it, and the base beside it where no name would find that."""
    backbone, source = job.backbone, job.experiment.config.model.source
    if backbone.lora is None:
        raise AssertionError("_check refuses it")
    base, revision = public_name(source, backbone.folder)
    place = str((job.out / "base").absolute())
    save_adapter(folder, peft_tensors(job.adapter, backbone.arch), backbone.lora, base or place, revision)
    write_text(folder / RECORD, json_text({"base": job.experiment.identity}, indent=1) + "\n")
    if base is None:  # converted from a file, so no name would do: the base goes along
        shutil.copytree(backbone.folder, folder / "base", ignore=shutil.ignore_patterns(RECORD))
        say(f"the base lies in {place}; where that is moved, adapter_config.json must say its new place")
    elif not source.startswith("hf:"):
        say(
            f"the base is {base}, a folder that only this machine has; on another one, adapter_config.json must name the "
            "base there (model.source=hf:ORG/NAME would name it everywhere)"
        )
    copy_tokenizer(backbone.folder, folder, job.experiment.tokenizer)
    return _logits(backbone, load_adapter(folder, job.adapter), job.prompt), None


def _release(job: Job) -> None:
    job.backbone.release()
    job.experiment.backbone.release()
    if job.backbone.start is not None:  # what was trained is a whole model
        for array in jax.tree.leaves(job.adapter):
            array.delete()


def _gguf(job: Job, folder: Path) -> tuple[np.ndarray, float | None]:
    """Write one GGUF file, and read it back as it would be read as a backbone."""
    if job.words is None:
        raise AssertionError("export makes them for this format")
    backbone, (name, said, keys) = job.backbone, job.words
    stored = STORED[_gguf_dtype(job.form)]
    tensors = gguf_tensors(backbone, job.adapter, said)
    kept = write_gguf(folder / name, keys, gguf_shapes(backbone.arch, said), tensors, stored)
    if kept:
        say(f"{len(kept)} tensors, {kept[0]} the first, are kept in F16: {stored} needs rows of a multiple of 32")
    _release(job)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        read = Path(scratch) / "read"
        convert(folder / name, read)
        tokenizer = ChatTokenizer(read)
        if tokenizer.ids(tokenizer.hf.decode(job.prompt)) != job.prompt:
            raise RunError(f"{job.out}: the reloaded tokenizer splits a chat in another way; nothing was written")
        again = load_backbone(read, None, backbone.dtype)
        return _logits(again, nnx.State({}), job.prompt), SHARES[_gguf_dtype(job.form)]


def _gguf_dtype(form: Form) -> str:
    return "float16" if form.dtype == "auto" else form.dtype


def _words(experiment: Experiment, out: Path, form: Form) -> Words:
    """All that a GGUF file says beside its tensors. Raises InputError where it has no words for the model or its tokenizer."""
    backbone, tokenizer = experiment.backbone, experiment.tokenizer
    name = f"{out.name}-{STORED[_gguf_dtype(form)]}.gguf"
    said = describe(backbone.arch, backbone.folder, tokenizer.end_of_turn, out / name)
    keys = said.keys | {"general.name": out.name}
    keys |= tokenizer_keys(tokenizer.hf, tokenizer.end_of_turn, backbone.arch.vocab, keys, out / name)
    if more := {*tokenizer.stops} - {keys[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot")}:
        others = ", ".join(map(str, tokenizer.hf.convert_ids_to_tokens(sorted(more))))
        say(f"a GGUF file names two tokens that end a reply; {others} would end it as well, where llama.cpp knows that")
    return Words(name, said, keys)


WRITERS = {"merged": _merged, "peft": _peft, "gguf": _gguf}


def _check(experiment: Experiment, out: Path, form: Form) -> None:
    """All that can be known before anything is computed. Raises InputError, TransientError."""
    check_new(out, "folder")
    backbone = experiment.backbone
    if backbone.start is not None and form.format == "peft":
        raise InputError("all parameters were trained (train.what=all), so there is no adapter: give --format merged")
    if backbone.lora is None and backbone.start is None:
        raise InputError(
            "only a run's model or an adapter can be exported: --run-dir RUN --model m1, or --model PEFT-FOLDER"
        )
    if form.format == "peft" and form.dtype != "auto":
        raise InputError(
            f"--dtype {form.dtype}: an adapter is written in float32; leave it out, or give --format merged"
        )
    if form.format == "merged" and form.dtype == "q8_0":
        raise InputError("--dtype q8_0: only a GGUF file holds such numbers; give --format gguf, or another --dtype")
    if form.format != "merged" and form.shard_gib is not None:
        raise InputError(f"--shard-gib: {form.format} is written as one file; leave it out, or give --format merged")
    if form.shard_gib is not None and not 0 < form.shard_gib < 1e6:
        raise InputError(f"--shard-gib {form.shard_gib}: give a number above 0, the largest file of weights in GiB")
    if form.push_to is not None:
        check_push(form.push_to)


def _card(job: Job, spec: str) -> Card:
    """Of a run's model all that the run knows; of an adapter from elsewhere, of what and in which form it is."""
    experiment, c, named = job.experiment, job.experiment.config, run_model(spec)
    of_hub = c.model.source.startswith("hf:")
    base, _ = public_name(c.model.source, experiment.backbone.folder)
    plain = Card(
        name=Path(spec).name,
        form=job.words.name if job.words else job.form.format,
        base=base if of_hub else None,
        backbone=Path(c.model.source).name if base and not of_hub else c.model.source,
        system=experiment.encoder.system,
        version=__version__,
    )
    if named is None:
        return plain
    run, t = named
    replay = c.data.replay if c.data.replay_share > 0 else None
    sources = {"phase 1": c.data.train, "replay": replay, "validation": c.data.valid, "evaluation": c.data.test}
    sections = ("train", "lora", "sft", *(("evolve", "filters", "dpo") if t else ()))
    tree = c.model_dump(mode="json", include={*sections}, exclude={"lora": {"start"}})
    measured = run / "eval" / "results.json"
    records = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else []
    shown = {name: title(name) for name in (BACKBONE, *(f"m{i}" for i in range(t + 1)))}
    return replace(
        plain,
        name=f"M_{t}",
        rounds=t,
        data={what: _named(source) for what, source in sources.items() if source is not None},
        formats=read_manifest(run)["stages"].get("sft", {}).get("formats", [c.data.format]),  # older runs noted none
        settings={"seed": c.seed} | tree,
        scores=[r | {"model": shown[r["model"]]} for r in records if r["metric"] in HEADLINE and r["model"] in shown],
    )


def _named(source: Sources) -> str:
    """A source without the folders of this machine."""
    parts = [source] if isinstance(source, str) else [s.source for s in source]
    out = []
    for part in parts:
        kind, colon, place = (
            part.rpartition(":") if not part.startswith(("hf:", "tfds:", "bundled:")) else ("", "", part)
        )
        out.append(f"{kind}{colon}{Path(place).name}" if colon or place.startswith(("/", "~", ".")) else place)
    return ", ".join(out)


def _logits(backbone: Backbone, adapter: Adapter, prompt: list[int]) -> np.ndarray:
    probe = rows.stack([rows.trunk(prompt)])
    # XLA's CPU backend computes in float32, and would convert all layers of a base before it loops over them.
    hoisted = jax.default_backend() == "cpu" and backbone.dtype != FLOAT32
    options = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"} if hoisted else None

    @partial(jax.jit, compiler_options=options)
    def run(adapter: Adapter, base: nnx.State) -> jax.Array:
        model = bind(backbone.definition, adapter, base)
        return model.logits(model(probe, backbone.execution))

    return np.asarray(run(backbone.computed(adapter), backbone.base))
