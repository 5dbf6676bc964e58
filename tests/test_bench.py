"""``esjax bench``: what it counts, what it refuses, and what a step's memory does not depend on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Refused
from families import llama
from oracles import BARE

from esjax import rows
from esjax.bench import sampling
from esjax.bench import training as bench
from esjax.bench import workload as sizes
from esjax.cli import main
from esjax.errors import InputError
from esjax.model import cached
from esjax.model.attention import Path as AttentionPath
from esjax.model.attention import choose_path
from esjax.model.cache import cache_shapes
from esjax.model.cached import layered
from esjax.model.costs import training_flops
from esjax.model.decoder import Execution
from esjax.model.joined import turned
from esjax.model.lora import lora_from
from esjax.model.weights import Backbone, Choice, bind, choose_execution
from esjax.sample.constrain import free
from esjax.sample.decode import Asked, idle_lanes, run
from esjax.sample.generate import Generator
from esjax.settings.schema import LoraSettings
from esjax.train.losses import sft_loss

WORKLOAD = "bundled:configs/workload.json"
FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")


def test_one_line_for_each_training_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["bench", "--profile", "tiny", "--tasks", "dpo,sft", "--compare", "naive", "--trace", str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    jobs = [(x["task"], x["variant"], x["unit"]) for x in lines]
    assert jobs == [
        ("dpo", "lora", "pairs/s"),
        ("dpo", "lora, unshared", "pairs/s"),
        ("sft", "lora", "tokens/s"),
        ("sft", "full", "tokens/s"),
    ]
    for x in lines:
        assert x["system"] == "esjax"
        assert all(x[k] > 0 for k in ("figure", "mem_gib", "tflop_formula", "tflop_program", "mfu", "step_s"))
    shared, unshared = lines[:2]
    assert shared["loss"] == pytest.approx(unshared["loss"], abs=1e-4)  # the same pairs from the same seed
    assert shared["tflop_formula"] < unshared["tflop_formula"]
    assert {d.name for d in tmp_path.iterdir()} == {"dpo-lora", "dpo-lora-unshared", "sft-lora", "sft-full"}
    assert all(list(d.rglob("*.xplane.pb")) for d in tmp_path.iterdir())


def test_one_line_for_each_sampling_job(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The workload's meaning: so many tokens drawn and no fewer, prompts computed once where they are shared."""
    main(["bench", "--profile", "tiny", "--tasks", "sample,round", "--compare", "naive", "--trace", str(tmp_path)])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    jobs = [(x["task"], x["variant"], x["unit"]) for x in lines]
    assert jobs == [
        ("sample", "bare", "new tokens/s"),
        ("round", "shared", "pairs/s"),
        ("round", "unshared", "pairs/s"),
    ]
    for x in lines:
        assert x["mem_gib"] + 0.01 >= x["step_gib"]  # what is held, of which a step reads a part
        assert all(x[k] > 0 for k in ("figure", "mem_gib", "prefill_mfu", "step_ms", "step_limit_ms", "compile_s"))
        assert x["padded_tokens"] >= 0
    assert {d.name for d in tmp_path.iterdir()} == {"sample-bare", "round-shared", "round-unshared"}
    assert all(list(d.rglob("*.xplane.pb")) for d in tmp_path.iterdir())
    sample, shared, unshared = lines
    work = sizes.read_workload(WORKLOAD, "tiny")
    s, r = work.sample, work.round
    assert sample["figure"] == pytest.approx(s.batch * s.new_tokens / sample["seconds"], rel=0.05)
    assert (sample["steps"], sample["occupancy"]) == (s.new_tokens, 1.0)
    assert sample["prefill_tokens"] == s.batch * (s.prompt - 1)  # the last token of each is the first to be fed
    prompts = r.context, r.context + r.instruction, r.context + r.draft + r.reflection + r.instruction
    assert unshared["unshared_tokens"] == shared["unshared_tokens"] == r.contexts * sum(prompts)
    assert unshared["prefill_tokens"] == r.contexts * sum(n - 1 for n in prompts)
    branches = (r.instruction - 1) + (r.draft + r.reflection + r.instruction - 1)
    assert shared["prefill_tokens"] <= r.contexts * (r.context + branches + 1) < 0.6 * unshared["prefill_tokens"]
    assert (unshared["steps"], shared["steps"]) == (r.draft + r.reflection + r.refinement, r.draft + r.refinement)


def compiled_step(donate: int = 1, attention: AttentionPath = "chunked") -> str:
    """The compiled loop of a small model with six lanes, and with rows of 640 slots and rings of 320."""
    work = sizes.read_workload(WORKLOAD, "tiny")
    arch = replace(work.architecture, vocab=512)
    definition, make = sizes.parts(arch, None, FLOAT32, bare=True)
    weights = jax.eval_shape(lambda: layered(bind(definition, BARE, make()[1]), turned))
    rows_, lanes = 3, 2
    cache = cache_shapes(arch, rows_, lanes, 640, 320, FLOAT32)
    state = jax.eval_shape(lambda: idle_lanes(rows_, lanes))
    waiting = jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows_, 4), x.dtype), state.leaf)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    some = jax.ShapeDtypeStruct((rows_,), jnp.int32)

    def decode(weights: Any, *rest: Any) -> Any:
        return run(lambda: weights, *rest, steps=8, execution=Execution(attention))

    program = jax.jit(decode, donate_argnums=donate)
    asked = Asked(waiting, some, jax.ShapeDtypeStruct((1,), jnp.int32), free(512), number, number)
    return program.lower(weights, cache, state, asked).compile().as_text()


def test_a_decoding_step_copies_no_cache() -> None:
    """The compiled loop writes the rings in place: no copy of an array as large as a layer's rows or rings."""
    heads, size = 2, 16
    rows = 3 * heads * size * (640 + 2 * 320)

    def large_copies(donate: int) -> int:
        shapes = re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled_step(donate))
        return sum(int(np.prod([int(d) for d in s.split(",")])) >= rows for s in shapes)

    assert large_copies(donate=1) == 0
    assert large_copies(donate=2) > 0  # control: a cache that is not given away must be copied


def test_a_step_on_a_cpu_turns_once_and_reads_weights_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary tables are computed once for both layers, and the left operand of every product with weights is the weights."""

    def cosines(text: str) -> int:
        return len(re.findall(r" cosine\(", text))

    def left(text: str) -> set[str]:
        """The sizes of what products of six tokens give: [out, 6] where the weights came first."""
        return set(re.findall(r"f32\[((?:\d+,6)|(?:6,\d+))\]\S* dot\(", text))

    first = {"32,6", "64,6", "128,6", "512,6", "6,8"}  # keys and values, width, hidden, vocabulary; and the tables'
    text = compiled_step()
    assert (cosines(text), left(text)) == (1, first)
    usual = compiled_step(attention="dense")  # control: the head as a right operand, as elsewhere
    assert left(usual) == {*first - {"512,6"}, "6,512"}
    monkeypatch.setattr(cached, "_through_a_product", lambda x: x)
    assert cosines(compiled_step()) > 1  # control: what the compiler makes of tables that stand alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "dpo,chat"], "--tasks chat: no such task; allowed: sample, round, dpo, sft"),
        (["--profile", "huge"], "no profile 'huge'"),
        (["--workload", "/absent.json"], "/absent.json: cannot be read"),
        (["--profile", "tiny", "--micro-rows", "3"], "--micro-rows 3: it must divide the 2 rows of the dpo step"),
        (["--model.attention", "splash"], "model.attention=splash does not run on cpu: choose auto, dense, chunked"),
        (["--model.remat", "offload"], "model.remat=offload needs a device with memory of its own"),
    ],
)
def test_refusals(options: list[str], message: str, refused: Refused) -> None:
    assert message in refused("bench", *options)


def test_a_workload_that_is_wrong_is_refused(tmp_path: Path) -> None:
    good = json.loads((Path(__file__).parent.parent / "configs" / "workload.json").read_text())["tiny"]
    file = tmp_path / "w.json"
    for change, message in (
        ({"dtype": "float8"}, "dtype"),
        ({"dpo": {**good["dpo"], "beta": 1}}, r"dpo\.beta"),
        ({"sft": {k: v for k, v in good["sft"].items() if k != "length"}}, r"sft\.length"),
        ({"round": {}}, r"round\.contexts"),
    ):
        file.write_text(json.dumps({"tiny": good | change}))
        with pytest.raises(InputError, match=message):
            sizes.read_workload(str(file), "tiny")
    file.write_text(json.dumps({"tiny": good}))
    assert sizes.read_workload(str(file), "tiny").sft.length == 64


def test_auto_attention() -> None:
    for platform, dtype, path in (
        ("cpu", FLOAT32, "chunked"),
        ("tpu", BFLOAT16, "splash"),
        ("gpu", BFLOAT16, "cudnn"),
        ("gpu", FLOAT32, "pallas"),
    ):
        assert choose_path("auto", platform, dtype) == path
        assert choose_path(path, platform, dtype) == path
        other = "gpu" if platform == "tpu" else "tpu"
        if path != "chunked":  # which runs anywhere
            with pytest.raises(InputError, match=f"{path} does not run on {other}"):
                choose_path(path, other, dtype)
    with pytest.raises(InputError, match="bfloat16 only"):
        choose_path("cudnn", "gpu", FLOAT32)


def test_flops_by_formula_are_close_to_the_compilers() -> None:
    """For causal rows dense attention counts each pair of tokens twice, so the two differ by half of attention."""
    arch = llama(512, 256, 3, 4, 2, 64, 512)
    batch = rows.stack([rows.trunk([1] * 128, [1.0] * 127 + [0.0])] * 4)
    for lora in (lora_from(LoraSettings(rank=8)), None):
        formula = training_flops(arch, lora, batch)
        attention = 3 * 4.0 * arch.layers * arch.heads * arch.head_size * 4 * (128 * 129 / 2)
        counted = bench.program_flops(arch, lora, FLOAT32, sft_loss, Execution(layout="causal"), (batch, None))
        assert counted == pytest.approx(formula + attention, rel=0.06)
        full = Execution(layout="causal", remat="full")
        assert bench.program_flops(arch, lora, FLOAT32, sft_loss, full, (batch, None)) > 1.15 * counted


@pytest.mark.slow
def test_three_times_the_vocabulary_costs_its_embedding_and_no_more() -> None:
    """SmolLM2's shape, a DPO step: from 49k to 152k words peak memory grows by the embedding and under 10%."""
    work = sizes.read_workload(WORKLOAD, "cpu")
    (job,) = bench.jobs(work, ["dpo"], naive=False)
    example, extra = job.batch(np.random.default_rng(0))

    def peak(vocab: int) -> float:
        arch = replace(work.architecture, vocab=vocab)
        definition, make = sizes.parts(arch, job.lora, FLOAT32)
        trained, frozen = jax.eval_shape(make)
        how = choose_execution(Choice("chunked"), FLOAT32)
        step, opt_state = bench.build(definition, job, trained, example, 4, how)
        return float(sizes.planned(step.lower(trained, opt_state, frozen, example, extra).compile())["mem_gib"])

    small, large = peak(49152), peak(152064)
    embedding = (152064 - 49152) * work.architecture.width * 4 / 2**30
    print(f"{small:.3f} GiB, {large:.3f} GiB, of which the embedding's growth {embedding:.3f}")
    assert large - embedding < 1.1 * small
    logits = example.weight.astype(bool).sum() * (152064 - 49152) * 4 / 2**30
    assert large - embedding + logits > 1.1 * small  # what holding all logits at once would add is more than that


def test_the_figure_is_of_the_settings() -> None:
    """All parameters train in float32 and compute in the workload's dtype."""
    work = sizes.read_workload(WORKLOAD, "tiny")
    definition, make = sizes.parts(work.architecture, None, BFLOAT16)
    trained, frozen = make()
    assert {x.dtype for x in jax.tree.leaves(trained)} == {FLOAT32}
    assert not jax.tree.leaves(frozen)
    jobs: list[Any] = list(bench.jobs(work, ["sft"], naive=False))
    example, extra = jobs[1].batch(np.random.default_rng(0))
    how = Execution("dense")
    step, opt_state = bench.build(definition, jobs[1], trained, example, 2, how)
    moved, _, metrics = step(trained, opt_state, frozen, example, extra)
    assert {x.dtype for x in jax.tree.leaves(moved)} == {FLOAT32}
    assert float(metrics["loss"]) == pytest.approx(np.log(work.architecture.vocab), rel=0.05)


def test_memory_of_sampling_is_what_is_held_not_what_a_step_reads() -> None:
    """Base, its layers cut apart, rows and rings, and the program's own: by numpy from the arrays' shapes."""
    work = sizes.read_workload(WORKLOAD, "tiny")
    definition, make = sizes.parts(work.architecture, None, FLOAT32, bare=True)
    backbone = Backbone(
        Path(), work.architecture, None, FLOAT32, definition, make()[1], choose_execution(Choice(), FLOAT32)
    )
    generator = Generator(backbone, 4, end_of_turn=-1, lanes=1, slots=128, new=64)
    weights = sum(x.nbytes for x in jax.tree.leaves(backbone.base))
    a = work.architecture
    cache = 2 * a.layers * a.kv_heads * a.head_size * 4 * (128 + 64) * 4
    prompts = [[11, 12, 13]] * 4
    held, _ = sampling.memory_held(
        generator, lambda: generator.generate(BARE, prompts, range(4), sampling.HOW, 8) and None
    )
    assert held > weights + cache
    larger = Generator(backbone, 4, end_of_turn=-1, lanes=1, slots=128, new=64 + 4096)
    more, _ = sampling.memory_held(larger, lambda: larger.generate(BARE, prompts, range(4), sampling.HOW, 8) and None)
    rings = 2 * a.layers * a.kv_heads * a.head_size * 4 * 4096 * 4
    assert rings <= more - held < 2.5 * rings
