"""The decoder and its import, against transformers in float32.

Real weights: logits of SmolLM2-135M on real ESConv dialogues, and greedy continuations token for token. Small random
models that transformers made and saved (Llama with Llama 3.1's rotary scaling, Mistral, Qwen2 with biases, Llama in
several shards with its own head): logits of the plain, the left-padded and the cached forward pass. Config options that
esjax does not implement are refused by name. ``token_logprobs`` against torch's log_softmax.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import context, examples
from definition import remasked
from families import FAMILIES, SMALL, save
from oracles import (
    BARE,
    Ours,
    model_of,
    perturbed,
    random_adapter,
    real_dialogues,
    torch_logits,
    torch_logprobs,
    torch_model,
    worst,
)
from transformers import LlamaConfig

from esjax.errors import InputError
from esjax.model.cache import Fed, empty_cache
from esjax.model.cached import layered, prefill, step
from esjax.model.decoder import Execution, token_logprobs
from esjax.model.families import read_architecture
from esjax.model.joined import joined, merged, turned
from esjax.model.layers import softcap
from esjax.model.linear import Lora, linear_sizes
from esjax.model.lora import lora_from
from esjax.model.weights import Backbone, bind, load_backbone
from esjax.rows import Rows, pack, prompt_with_replies, stack, trunk
from esjax.runtime.programs import products
from esjax.sample.generate import Generator
from esjax.sample.prefills import stack_windows
from esjax.sample.rowbook import Placed, Run, windows
from esjax.settings.schema import LoraSettings, SamplingSettings
from esjax.tokens.encode import Encoder
from esjax.tokens.tokenizer import ChatTokenizer

FLOAT32 = jnp.dtype("float32")

# --- SmolLM2 on real dialogues ----------------------------------------------------------------------------------------

WINDOW = 256
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def smollm(smollm_folder: Path) -> Backbone:
    return load_backbone(smollm_folder, None, FLOAT32)


@pytest.fixture(scope="module")
def smollm_torch(smollm_folder: Path) -> Any:
    return torch_model(smollm_folder)


@pytest.fixture(scope="module")
def encoder(smollm_folder: Path) -> Encoder:
    return Encoder(ChatTokenizer(smollm_folder), WINDOW, "")


def test_logits_of_real_weights_agree_on_real_dialogues(
    smollm: Backbone, smollm_torch: Any, encoder: Encoder, esconv: Path
) -> None:
    dialogues = [examples(encoder, d)[0].tokens.tolist() for d in real_dialogues(esconv)[:8]]
    assert len({len(tokens) for tokens in dialogues}) > 1
    ours = Ours(smollm)
    differences = []
    for tokens in dialogues:
        theirs = torch_logits(smollm_torch, tokens)
        differences.append(worst(ours.sequence(tokens, WINDOW), theirs))
    print(f"worst differences: {[f'{d:.1e}' for d in differences]}")
    assert max(differences) <= TOLERANCE
    wrong = perturbed(smollm, layer=15)  # one of 210 kernels, 0.05 off
    assert worst(ours.sequence(tokens, WINDOW, base=wrong.base), theirs) > TOLERANCE


def test_greedy_continuations_in_one_batch_are_transformers_token_for_token(
    smollm: Backbone, smollm_torch: Any, encoder: Encoder, esconv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = (1, 3)
    contexts = [
        context(encoder, d, d.supporter_turns()[n]) for d, n in zip(real_dialogues(esconv)[8:], turns, strict=False)
    ]
    prompts = [encoder.tokenizer.prompt(c) for c in contexts]
    assert len({len(p) for p in prompts}) == len(turns)
    greedy = SamplingSettings(temperature=0)
    theirs = []
    for prompt in prompts:  # one at a time, so that the oracle needs no padding; no token ends the text
        ids = torch.tensor([prompt])
        made = smollm_torch.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=None,
            pad_token_id=0,
        )
        theirs.append(made[0, len(prompt) :].tolist())

    generator = Generator(smollm, len(prompts), end_of_turn=-1)

    def continued() -> list[list[int]]:
        return [m.token_ids for m in generator.generate(BARE, prompts, [0] * len(prompts), greedy, 64)]

    ours = continued()
    assert [len(t) for t in ours] == [64] * len(prompts)
    assert ours == theirs

    def without_the_last(self: Placed) -> tuple[int, int, int, int]:
        return (self.trunk.start, self.trunk.start + self.seen - 1, 0, 0) if self.trunk else (0, 0, 0, 0)

    monkeypatch.setattr(Placed, "spans", property(without_the_last))
    assert continued() != theirs


# --- small random models of every family ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """The same small model on both sides."""

    name: str
    folder: Path
    torch: Any
    ours: Ours

    @property
    def backbone(self) -> Backbone:
        return self.ours.backbone


@pytest.fixture(scope="module", params=[*FAMILIES, "sharded"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("small") / request.param
    if request.param == "sharded":
        save("llama-biases", folder, max_shard_size="40KB")
    else:
        save(request.param, folder)
    return Pair(request.param, folder, torch_model(folder), Ours(load_backbone(folder, None, FLOAT32)))


def sequences() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(2, SMALL["vocab_size"], n).tolist() for n in (64, 41, 7)]


LENGTH = 64


def test_imported_logits_agree(pair: Pair) -> None:
    for tokens in sequences():
        assert worst(pair.ours.sequence(tokens, LENGTH), torch_logits(pair.torch, tokens)) <= 1e-3
    wrong = perturbed(pair.backbone, layer=1)
    assert worst(pair.ours.sequence(tokens, LENGTH, base=wrong.base), torch_logits(pair.torch, tokens)) > 1e-3


def test_packed_rows_agree(pair: Pair) -> None:
    length = sum(map(len, sequences())) + 3
    rows = stack([pack([trunk(tokens) for tokens in sequences()], length)])
    model = model_of(pair.backbone)

    @jax.jit
    def forward(rows: Rows) -> jax.Array:
        return model.logits(model(rows, pair.backbone.execution))

    logits = np.asarray(forward(rows))[0]
    leaky = np.asarray(forward(remasked(rows, segment=np.ones_like(rows.segment))))[0]
    start = 0
    for tokens in sequences():
        theirs, mine = torch_logits(pair.torch, tokens), slice(start, start + len(tokens))
        assert worst(logits[mine], theirs) <= 1e-3
        if start:  # segments that see each other would not do
            assert worst(leaky[mine], theirs) > 1e-3
        start += len(tokens)


@pytest.mark.parametrize("attention", ["chunked", "dense"])
def test_cached_decoding_agrees(pair: Pair, attention: Any) -> None:
    """A trunk, a branch that leaves it and a second trunk in one row of two lanes, each token fed on its own afterwards.

    The branch lies before its trunk, in another block of slots.
    """
    stem, other, _ = sequences()
    branch = [*stem[:20], *other[:12]]
    whole = [stem, branch]
    if attention == "dense" and pair.name not in ("llama31", "mistral-window", "gemma2", "gemma3"):
        pytest.skip("families do not differ in how they attend beyond windows and caps")
    arch, how = pair.backbone.arch, pair.backbone.execution._replace(attention=attention)
    form = turned if attention == "chunked" else joined
    weights = jax.jit(lambda base: layered(bind(pair.backbone.definition, BARE, base), form))(pair.backbone.base)
    loading = jax.jit(lambda cache, chunk: prefill(weights, cache, chunk, how))
    runs = [Run(133, stem[:25], 0, (133, 133)), Run(40, branch[20:27], 20, (133, 153)), Run(60, other, 0, (60, 60))]
    chunks = windows(0, runs, 32, 160)
    cache = loading(empty_cache(arch, 1, 2, 160, 64, jnp.dtype("float32")), stack_windows([chunks], 4))

    @jax.jit
    def following(fed: Any, clock: Any, cache: Any) -> Any:
        x, cache = step(weights, cache, fed, clock, how)
        return softcap(x @ weights.head.T, arch.logits_cap), cache

    def decoded(error: int, cache: Any) -> np.ndarray:
        logits = []
        at = np.asarray([[25, 27]], np.int32)
        for n in range(5):
            token = np.asarray([[t[p + n] for t, p in zip(whole, at[0], strict=True)]], np.int32)
            ends = np.asarray([[158, 153]], np.int32) - error
            own = np.asarray([[0, 40]], np.int32), np.asarray([[0, 47]], np.int32)
            starts, newest = np.full((1, 2), 133, np.int32), np.full((1, 2), n + 1, np.int32)
            fed = Fed(token, at + n, starts, ends, *own, newest)
            out, cache = following(fed, np.int32(62 + n), cache)  # the ring's end is met on the way
            logits.append(np.asarray(out))
        return np.stack(logits, axis=1)

    logits, blind = decoded(0, cache), decoded(1, cache)
    for i, (tokens, start) in enumerate(zip(whole, (25, 27), strict=True)):
        theirs = torch_logits(pair.torch, tokens)[start : start + 5]
        assert worst(logits[i], theirs) <= 1e-3
        assert worst(blind[i], theirs) > 1e-3  # a trunk token that is not seen would not do


FORMS: dict[str, Any] = {"stored": None, "merged": merged, "turned": turned, "joined": joined}


@pytest.mark.parametrize(
    "targets", [("all-linear",), ("q_proj", "v_proj", "up_proj", "down_proj"), ("k_proj",)], ids=len
)
@pytest.mark.parametrize("name", FORMS)
def test_what_decoding_reads_computes_what_the_decoder_does(
    tiny_folder: Path, targets: tuple[str, ...], name: str
) -> None:
    """Laid out for decoding, base + adapter computes what the stacked decoder computes; without its adapter it does not."""
    tiny = load_backbone(tiny_folder, lora_from(LoraSettings(rank=4, targets=targets)), FLOAT32)
    adapter = random_adapter(tiny, 5)
    tokens = np.random.default_rng(1).integers(2, tiny.arch.vocab, 40).tolist()
    expected = Ours(tiny).sequence(tokens, 40, adapter)[-1]

    def last(adapter: Any) -> np.ndarray:
        weights = layered(bind(tiny.definition, adapter, tiny.base), FORMS[name])
        assert weights.arch.fused == (name == "joined")
        linears = weights.layers[0].linears(weights.arch.linears)
        assert any(linear.lora_a is not None for linear in linears) == (name in ("stored", "joined"))
        assert all(linear.turned for linear in linears) == (name == "turned")
        assert any(linear.beneath for linear in linears) == (name == "joined")
        cache = empty_cache(tiny.arch, 1, 1, 64, 8, jnp.dtype("float32"))
        chunk = stack_windows([windows(0, [Run(0, tokens[:-1], 0, (0, 0))], 64, 64)], 1)
        cache = prefill(weights, cache, chunk, tiny.execution)
        one = np.ones((1, 1), np.int32)
        fed = Fed(tokens[-1] * one, 39 * one, 0 * one, 39 * one, 0 * one, 0 * one, one)
        x, _ = step(weights, cache, fed, jnp.int32(0), tiny.execution)
        return np.asarray(x @ weights.head.T)[0]

    assert worst(last(adapter), expected) <= 1e-4
    assert worst(last(tiny.fresh_adapter(0)), expected) > 1e-3


def test_several_shards_were_written(pair: Pair, tmp_path: Path) -> None:
    shards = list(pair.folder.glob("model-*.safetensors"))
    assert (len(shards) > 2) == (pair.name == "sharded")
    if pair.name == "sharded":
        assert not pair.backbone.arch.tied_head
        folder = tmp_path / "broken"
        shutil.copytree(pair.folder, folder)
        (folder / shards[1].name).unlink()
        with pytest.raises(InputError, match=shards[1].name):
            load_backbone(folder, None, FLOAT32)


def test_bfloat16_checkpoint_imports(pair: Pair, tmp_path: Path) -> None:
    if pair.name not in ("sharded", "qwen2", "gemma2"):
        pytest.skip("the import of another dtype hangs on no family")
    model = torch_model(pair.folder).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    exact = torch_model(tmp_path)  # the rounded weights, computed with in float32
    tokens = sequences()[0]
    theirs = torch_logits(exact, tokens)
    ours = Ours(load_backbone(tmp_path, None, FLOAT32))
    assert worst(ours.sequence(tokens, LENGTH), theirs) <= 1e-3
    assert worst(pair.ours.sequence(tokens, LENGTH), theirs) > 1e-3  # the unrounded weights
    kept = load_backbone(tmp_path, None, jnp.dtype("bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(kept.base)} == {jnp.dtype("bfloat16")}
    # In bfloat16 arithmetic every order of sums gives other bits: no further from float32 than torch is, on average.
    allowed = 2 * float(np.abs(torch_logits(model, tokens) - theirs).mean())
    assert 0 < float(np.abs(Ours(kept).sequence(tokens, LENGTH) - theirs).mean()) <= allowed
    wrong = perturbed(kept, layer=1, amount=0.5)
    assert float(np.abs(Ours(wrong).sequence(tokens, LENGTH) - theirs).mean()) > allowed


# --- what is not implemented is refused -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = LlamaConfig(**SMALL, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    config.architectures = ["LlamaForCausalLM"]
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    written: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return written


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
    "sliding_window": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    "rope_type": (
        {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 4.0}},
        "rope.type.*'proportional'",
    ),
    "rope_type, older": ({"rope_scaling": {"type": "ntk", "factor": 4.0}, "rope_parameters": None}, "rope.type.*'ntk'"),
    "llama3 without factor": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    "model_type": ({"model_type": "gpt2"}, "model_type='gpt2'.*llama"),
    "quantization_config": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "layer_types": (
        {"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"]},
        "layer_types.*full_attention or sliding_attention",
    ),
    "fewer layers": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers"),
    "gemma3 caps": ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping=5.0"),
    "both ways": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention=True",
    ),
    "gelu": ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation='gelu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_options_are_refused_by_name(plain_config: dict[str, Any], name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(plain_config))
    assert read_architecture(tmp_path).family == "llama"  # what is refused below is the change, nothing else
    if "rope_parameters" in change and change["rope_parameters"] is None:
        change = change | {"rope_theta": 1e4}
    file.write_text(json.dumps(plain_config | change))
    with pytest.raises(InputError, match=message):
        read_architecture(tmp_path)


# --- the one primitive ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Backbone:
    return load_backbone(tiny_folder, Lora(("q_proj", "down_proj"), 4, 2.0), FLOAT32)


@pytest.fixture(scope="module")
def tiny_torch(tiny_folder: Path) -> Any:
    return torch_model(tiny_folder)


def test_token_logprobs_are_gathered_log_softmax(tiny: Backbone, tiny_torch: Any) -> None:
    """Two packed pairs in two rows, 45 targets; whatever the chunk, the bound and rematerialisation."""
    draw = np.random.default_rng(3)
    examples, expected = [], []
    for sizes in ((9, 4, 7), (5, 1, 12), (20, 10, 3), (6, 5, 3)):
        prompt, *replies = (draw.integers(2, tiny.arch.vocab, n).tolist() for n in sizes)
        examples.append(prompt_with_replies(prompt, replies))
        expected += [torch_logprobs(tiny_torch, prompt, reply) for reply in replies]
    rows = stack([pack(examples[:2], 64), pack(examples[2:], 64)])
    wanted = rows.weight != 0
    assert wanted.sum() == 45
    theirs = np.concatenate(expected)
    adapter = tiny.fresh_adapter(0)

    @partial(jax.jit, static_argnums=(1, 2, 3))
    def program(rows: Rows, targets: int, remat: Any, chunk: int) -> jax.Array:
        how = tiny.execution._replace(remat=remat, logits=chunk * tiny.arch.vocab)
        return token_logprobs(bind(tiny.definition, adapter, tiny.base), rows, targets, how)

    for targets, chunk, remat in (
        (45, 512, "none"),
        (45, 7, "full"),
        (45, 45, "dots"),
        (50, 16, "none"),
        (4000, 16, "full"),
    ):
        ours = np.asarray(program(rows, targets, remat, chunk))
        assert worst(ours[wanted], theirs) <= 1e-4, (targets, chunk)
        assert not ours[~wanted].any()
    # One target to the left is another token's log-prob; a bound that is too small loses targets.
    assert worst(np.roll(ours, 1, axis=1)[wanted], theirs) > 1e-2
    assert worst(np.asarray(program(rows, 44, "none", 512))[wanted], theirs) > 1e-2


def test_the_ways_of_a_gpu_do_not_change_the_gradient(tiny_folder: Path) -> None:
    """Base and adapter in one product, layers without a loop, and the kernel: all but the devices' own arithmetic."""
    model = load_backbone(tiny_folder, Lora(("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"), 4, 2.0), FLOAT32)
    draw = np.random.default_rng(5)
    ids = [draw.integers(2, model.arch.vocab, n).tolist() for n in (30, 9, 12)]
    rows = jax.tree.map(jnp.asarray, stack([pack([prompt_with_replies(ids[0], ids[1:])], 64)]))
    adapter = random_adapter(model, 1, size=0.1)

    def gradient(how: Execution, factor: float = 1.0) -> list[np.ndarray]:
        def total(adapter: Any) -> jax.Array:
            logprobs = token_logprobs(bind(model.definition, adapter, model.base), rows, 21, how)
            return jnp.sum(jnp.arange(64) * rows.weight * logprobs)

        given = jax.tree.map(lambda x: factor * x, adapter)
        return [np.asarray(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(given))]

    def apart(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        return max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in zip(a, b, strict=True))

    expected = gradient(Execution("dense"))
    assert len(expected) == 10
    for remat, unroll in (("none", False), ("full", False), ("dots", True)):
        how = Execution("pallas", remat=remat, unroll=unroll, interpret=True)  # type: ignore[arg-type]
        assert apart(gradient(how), expected) <= 1e-5
    assert apart(gradient(how, 1.001), expected) > 1e-5  # control: an adapter larger by a thousandth


def test_remat_dots_computes_no_product_again(tiny: Backbone) -> None:
    """Of a training step's products: none again but LoRA's narrow ones, while full computes the whole forward pass again."""
    rows = stack([trunk(list(range(2, 66)), [1.0] * 63 + [0.0])] * 4)
    adapter = tiny.fresh_adapter(0)

    def flops(remat: Any) -> float:
        def total(adapter: Any) -> jax.Array:
            how = tiny.execution._replace(remat=remat, attention="dense")
            return jnp.sum(token_logprobs(bind(tiny.definition, adapter, tiny.base), rows, 252, how))

        return products(jax.jit(jax.grad(total)).trace(adapter).jaxpr.jaxpr)

    none, dots, full = (flops(remat) for remat in ("none", "dots", "full"))
    # Dense attention is products too, which take little here, and the narrow products of two of seven layers.
    assert none <= dots <= 1.05 * none
    assert full >= 1.15 * none


def test_chunks_do_not_change_the_gradient(tiny: Backbone) -> None:
    tokens = np.random.default_rng(4).integers(2, tiny.arch.vocab, 40).tolist()
    rows = jax.tree.map(jnp.asarray, stack([trunk(tokens, [0.0] * 5 + [1.0] * 20 + [0.5] * 14 + [0.0])]))
    adapter = tiny.fresh_adapter(0)

    def gradient(chunk: int, weight: float = 1.0) -> np.ndarray:
        def total(adapter: Any) -> jax.Array:
            how = tiny.execution._replace(logits=chunk * tiny.arch.vocab)
            logprobs = token_logprobs(bind(tiny.definition, adapter, tiny.base), rows, 34, how)
            return jnp.sum(weight * rows.weight * logprobs)

        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.jit(jax.grad(total))(adapter))])

    whole = gradient(512)
    size = float(np.linalg.norm(whole))
    assert size > 0.1
    assert float(np.linalg.norm(gradient(8) - whole)) <= 1e-5 * size
    assert float(np.linalg.norm(gradient(8, 1.001) - whole)) > 1e-5 * size


def test_without_a_loop_the_last_layer_makes_the_targets_alone(tiny: Backbone) -> None:
    """What follows attention in the last layer is computed for 16 of 64 tokens a row, where no other ones are targets."""
    adapter, sizes = tiny.fresh_adapter(0), linear_sizes(tiny.arch)

    def flops(targets: int, unroll: bool) -> float:
        rows = stack([trunk(list(range(2, 66)), [0.0] * (63 - targets) + [1.0] * targets + [0.0])] * 4)
        how = tiny.execution._replace(unroll=unroll, attention="dense")

        def total(adapter: Any) -> jax.Array:
            return jnp.sum(token_logprobs(bind(tiny.definition, adapter, tiny.base), rows, 4 * targets, how))

        return products(jax.jit(total).trace(adapter).jaxpr.jaxpr)

    assert tiny.lora is not None
    after = 0
    for name in ("o_proj", "gate_proj", "up_proj", "down_proj"):
        after += math.prod(sizes[name]) + (name in tiny.lora.targets) * tiny.lora.rank * sum(sizes[name])
    assert flops(16, unroll=False) - flops(16, unroll=True) == 2 * after * 4 * (64 - 16)
    assert flops(60, unroll=False) == flops(60, unroll=True)  # taking nearly all of them would cost more than it saves


def test_families_without_a_loop(pair: Pair) -> None:
    """Log-probs of the last 16 tokens, and all parameters' gradients, where the last layer computes the targets alone."""
    if pair.name not in ("gemma2", "phi3", "qwen2", "smollm3"):
        pytest.skip(
            "norms after a layer, fused layers, biases, and layers without positions are what a last layer can have"
        )
    tokens = sequences()[0]
    rows = stack([trunk(tokens, [0.0] * 47 + [1.0] * 16 + [0.0])])
    wanted = rows.weight != 0

    @partial(jax.jit, static_argnums=1)
    def made(base: Any, unroll: bool) -> tuple[Any, jax.Array]:
        def total(base: Any) -> tuple[jax.Array, jax.Array]:
            how = pair.backbone.execution._replace(unroll=unroll, remat="dots")
            logprobs = token_logprobs(bind(pair.backbone.definition, BARE, base), rows, 16, how)
            return jnp.sum(jnp.arange(64) * logprobs), logprobs

        return jax.grad(total, has_aux=True)(base)

    gradient, logprobs = made(pair.backbone.base, True)
    theirs = torch.log_softmax(torch.from_numpy(torch_logits(pair.torch, tokens)), -1).numpy()
    expected = theirs[np.arange(63), tokens[1:]][47:]
    assert worst(np.asarray(logprobs)[wanted], expected) <= 1e-3
    assert worst(np.asarray(logprobs)[wanted], theirs[np.arange(63), tokens[1:]][46:62]) > 1e-2
    looped = made(pair.backbone.base, False)[0]
    for mine, loop in zip(*(jax.tree.leaves(g) for g in (gradient, looped)), strict=True):
        assert np.linalg.norm(mine - loop) <= 1e-4 * np.linalg.norm(loop)
        assert np.linalg.norm(1.001 * mine - loop) > 1e-4 * np.linalg.norm(loop)
