"""``esjax export`` on a finished run: transformers and PEFT load what it wrote and give the run's own logits.

The merged folder loads as a plain model, the PEFT folder on the base; both are compared with base + adapter_1 computed
here, and with each other. The other way round, an adapter that PEFT made loads into esjax.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import Refused, tiny_overrides
from oracles import Ours, torch_logits, torch_model, worst
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from esjax.cli import main
from esjax.errors import InputError
from esjax.evolve.experiment import Experiment, adapter_folder, open_model
from esjax.export import Form, export
from esjax.model.lora import load_adapter, read_lora
from esjax.model.weights import load_backbone
from esjax.run.files import write_jsonl
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import load
from esjax.tokens.tokenizer import ChatTokenizer

LENGTH = 384
TOKENS = [5, 900, 2, 40, 41, 42, 7, 7, 190, 3]
TOLERANCE = 2e-3  # what is promised
TIGHT = 1e-4  # float32 keeps this small model's logits closer than that


@dataclass(frozen=True)
class Run:
    """A finished run's M_0 and M_1 as esjax computes them, on the tokens of a real context of its second round."""

    tokens: list[int]
    m0: np.ndarray
    m1: np.ndarray


@pytest.fixture(scope="module")
def run(tiny_run: Path) -> Run:
    experiment, m1 = open_model(f"{tiny_run}:m1", load(str(tiny_run / "config.yaml")))
    pair = read_jsonl(tiny_run / "round2" / "pairs.jsonl")[0]
    tokens = experiment.tokenizer.prompt(pair["prompt"])[-LENGTH:]
    ours = Ours(experiment.backbone)
    m0 = experiment.adapter(adapter_folder(tiny_run, 0))
    return Run(tokens, *(ours.sequence(tokens, LENGTH, adapter) for adapter in (m0, m1)))


@pytest.fixture(scope="module")
def exported(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both exports of M_1, and the merged export of M_0."""
    out = tmp_path_factory.mktemp("exported")
    for model, form in (("m1", "merged"), ("m1", "peft"), ("m0", "merged")):
        words = ["export", "--run-dir", tiny_run, "--model", model, "--format", form, "--out", out / f"{model}-{form}"]
        main([str(x) for x in words])
    return out


def test_both_exports_give_the_run_s_logits(run: Run, exported: Path, tiny_folder: Path) -> None:
    merged = torch_logits(torch_model(exported / "m1-merged"), run.tokens)
    peft = torch_logits(PeftModel.from_pretrained(torch_model(tiny_folder), exported / "m1-peft"), run.tokens)
    differences = {"merged": worst(merged, run.m1), "peft": worst(peft, run.m1), "each other": worst(merged, peft)}
    print({k: f"{d:.1e}" for k, d in differences.items()}, f"M_0 to M_1: {worst(run.m0, run.m1):.1e}")
    assert max(differences.values()) <= TIGHT <= TOLERANCE
    # Another round's model or the bare backbone would not pass for M_1.
    assert worst(run.m0, run.m1) > TOLERANCE
    assert worst(torch_logits(torch_model(exported / "m0-merged"), run.tokens), run.m0) <= TIGHT
    assert worst(torch_logits(torch_model(exported / "m0-merged"), run.tokens), run.m1) > TOLERANCE
    assert worst(torch_logits(torch_model(tiny_folder), run.tokens), run.m1) > TOLERANCE


def test_exports_bring_their_tokenizer_and_say_their_base(exported: Path, tiny_folder: Path) -> None:
    chat = [{"role": "user", "content": "I lost my job this morning."}]
    expected = ChatTokenizer(tiny_folder).prompt(chat)
    for name in ("m1-merged", "m1-peft"):
        tokenizer: Any = AutoTokenizer.from_pretrained(exported / name)
        assert tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == expected
    config = json.loads((exported / "m1-peft" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == tiny_folder
    assert not list((exported / "m1-peft").glob("model*.safetensors"))


@pytest.mark.parametrize("form", ["merged", "peft"])
def test_an_existing_folder_is_left_alone(tiny_run: Path, tmp_path: Path, form: str, refused: Refused) -> None:
    out = tmp_path / "there"
    out.mkdir()
    (out / "model.safetensors").write_bytes(b"somebody's work")
    assert str(out) in refused("export", "--run-dir", tiny_run, "--model", "m1", "--format", form, "--out", out)
    assert (out / "model.safetensors").read_bytes() == b"somebody's work"
    assert [p.name for p in tmp_path.rglob("*")] == ["there", "model.safetensors"]  # nothing half-written beside it


def test_a_model_that_is_not_there_is_bad_input(tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    export = ["export", "--run-dir", tiny_run, "--model", "m7", "--format", "peft", "--out", tmp_path / "o"]
    assert "m0, m1, m2" in refused(*export)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]]
)
def test_an_adapter_of_peft_loads(tiny_folder: Path, tmp_path: Path, targets: list[str]) -> None:
    torch.manual_seed(2)
    config = LoraConfig(r=6, lora_alpha=9, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(torch_model(tiny_folder), config).eval()
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(2, 1000, 48).tolist()
    theirs = torch_logits(model, tokens)
    lora = read_lora(tmp_path)
    assert (lora.rank, lora.scale, set(lora.targets)) == (6, 1.5, set(targets))
    backbone = load_backbone(tiny_folder, lora, jnp.dtype("float32"))
    fresh = backbone.fresh_adapter(0)
    ours = Ours(backbone)
    assert worst(ours.sequence(tokens, 48, load_adapter(tmp_path, fresh)), theirs) <= TOLERANCE
    assert worst(ours.sequence(tokens, 48, fresh), theirs) > TOLERANCE
    halved = load_backbone(tiny_folder, lora._replace(scale=lora.scale / 2), jnp.dtype("float32"))
    assert worst(Ours(halved).sequence(tokens, 48, load_adapter(tmp_path, fresh)), theirs) > TOLERANCE


REFUSED = [
    ("use_dora", True),
    ("bias", "all"),
    ("peft_type", "IA3"),
    ("rank_pattern", {"q_proj": 1}),  # which the tensors are not of
    ("alora_invocation_tokens", [7, 8]),
    ("init_lora_weights", "pissa"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_an_adapter_that_esjax_cannot_compute_is_refused(
    tiny_folder: Path, tmp_path: Path, key: str, value: Any
) -> None:
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(torch_model(tiny_folder), config).save_pretrained(str(tmp_path))
    assert read_lora(tmp_path).rank == 2
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match="rank 1" if key == "rank_pattern" else key):
        read_lora(tmp_path)


def test_an_adapter_s_folder_is_a_model(tiny_run: Path, exported: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """It scores as the run's model does, and training starts from it: DPO at its reference, SFT at its loss."""
    adapter, chats = exported / "m1-peft", tmp_path / "chats.jsonl"
    pairs = tiny_run / "round2" / "pairs.jsonl"
    write_jsonl(chats, [{"id": p["id"], "messages": [*p["prompt"], *p["chosen"]]} for p in read_jsonl(pairs)])
    system = ["--prompts.system", str(load(str(tiny_run / "config.yaml")).prompts.system)]

    def scores(model: str, *more: str) -> list[float]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        main(["score", "--model", model, "--data", str(chats), "--out", str(out), *more])
        return [row["logprob"] for row in read_jsonl(out)]

    expected = scores(f"{tiny_run}:m1")
    assert scores(str(adapter), *system) == pytest.approx(expected, abs=1e-4)
    assert scores(str(tiny_folder), *system) != pytest.approx(expected, abs=1e-2)

    base = list(tiny_overrides(tiny_folder))
    where = base.index("--model.source")
    without = base[:where] + base[where + 4 :]  # neither source nor hash, nor the rank: the adapter brings them
    assert "--lora.rank" in without
    without = [w for i, w in enumerate(without) if i not in (j := without.index("--lora.rank"), j + 1)]
    main(["dpo", "--run-dir", str(tmp_path / "d"), "--pairs", str(pairs), "--model", str(adapter), *without])
    assert read_jsonl(tmp_path / "d" / "dpo" / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    saved = load(str(tmp_path / "d" / "config.yaml"))
    assert (saved.lora.rank, saved.lora.start, saved.model.source) == (4, str(adapter), str(tiny_folder))
    main(["sft", "--run-dir", str(tmp_path / "s"), "--model", str(adapter), *without, "--sft.learning_rate", "1e-30"])
    same = scores(f"{tmp_path / 's'}:m0")
    assert same == pytest.approx(expected, abs=1e-4)


def test_a_layer_that_is_gone_is_said(exported: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The configuration names it for all layers; zeros in its place would be another model."""
    folder = tmp_path / "adapter"
    shutil.copytree(exported / "m1-peft", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {key: x for key, x in tensors.items() if "layers.1.mlp.up_proj" not in key}
    assert len(kept) == len(tensors) - 2
    save_file(kept, folder / "adapter_model.safetensors")
    backbone = load_backbone(tiny_folder, read_lora(folder), jnp.dtype("float32"))
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.lora_[AB]\.weight is missing"):
        load_adapter(folder, backbone.adapter_shapes)


def test_another_base_than_an_adapter_s_own_is_said(
    exported: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Refused
) -> None:
    other, chats = tmp_path / "other", tmp_path / "chats.jsonl"
    shutil.copytree(tiny_folder, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    write_jsonl(
        chats, [{"id": "c", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )

    def said(base: Path, adapter: Path = exported / "m1-peft") -> str:
        out = tmp_path / f"{base.name}-{adapter.name}.jsonl"
        main(["score", "--model", str(adapter), "--model.source", str(base), "--data", str(chats), "--out", str(out)])
        return capsys.readouterr().err

    assert "another base" not in said(tiny_folder)
    line = next(line for line in said(other).splitlines() if "made on another base" in line)
    assert re.search(r"1 of \d+ files differ by their SHA-256: model\.safetensors$", line)
    broken = tmp_path / "broken"
    shutil.copytree(exported / "m1-peft", broken)
    (broken / "esjax.json").write_text("[]")
    ask = ["score", "--model", broken, "--data", chats, "--out", tmp_path / "broken.jsonl"]
    assert "esjax.json: not what esjax wrote" in refused(*ask)
    (broken / "esjax.json").unlink()  # as another tool's adapter: nothing is known, nothing is said
    assert "another base" not in said(other, broken)


def test_an_adapter_is_exported_without_a_run(
    exported: Path, tiny_run: Path, tiny_folder: Path, tmp_path: Path, refused: Refused
) -> None:
    """As the run's model is; and a run's model is named without --run-dir, too."""
    for name, model in (("adapter", exported / "m1-peft"), ("named", f"{tiny_run}:m1")):
        main(["export", "--model", str(model), "--format", "merged", "--out", str(tmp_path / name)])
    ours, theirs, named = (
        load_file(f / "model.safetensors") for f in (tmp_path / "adapter", exported / "m1-merged", tmp_path / "named")
    )
    assert ours.keys() == theirs.keys() == named.keys()
    assert all(np.array_equal(ours[k], theirs[k]) and np.array_equal(named[k], theirs[k]) for k in theirs)
    m0 = load_file(exported / "m0-merged" / "model.safetensors")
    assert not all(np.array_equal(ours[k], m0[k]) for k in theirs)
    ask = ["export", "--format", "merged", "--out", tmp_path / "none", "--model"]
    assert "only a run's model or an adapter" in refused(*ask, tiny_folder)
    assert "m1 does not exist" in refused(*ask, "m1")


def test_another_shape_beside_an_adapter_is_refused(exported: Path, tmp_path: Path, refused: Refused) -> None:
    start = ["--run-dir", tmp_path / "run", "--model", exported / "m1-peft", "--lora.rank", "8"]
    assert "lora.rank" in refused("sft", *start)
    assert "leave it out" in refused("evolve", *start)
    assert not (tmp_path / "run").exists()


def test_only_an_adapter_s_folder_starts_phase_1(tiny_folder: Path, tmp_path: Path, refused: Refused) -> None:
    line = refused("sft", "--run-dir", tmp_path / "run", "--model", tiny_folder, *tiny_overrides(tiny_folder))
    assert "give a PEFT folder to start from" in line


def test_an_export_is_the_model_however_odd_its_folder(tiny_folder: Path, tmp_path: Path) -> None:
    """A head behind tie_word_embeddings, rows beyond the tokenizer, scaling for transformers 4, templates in a folder."""
    folder, out = tmp_path / "odd", tmp_path / "out"
    shutil.copytree(tiny_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    for key in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[key] = np.concatenate([tensors[key], tensors[key][:64] * 0.5])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    config = json.loads((folder / "config.json").read_text()) | {"rope_scaling": rope, "rope_theta": 500.0}
    config |= {"tie_word_embeddings": True, "vocab_size": config["vocab_size"] + 64, "unk_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    experiment = Experiment.open(load(None, tiny_overrides(folder)))
    adapter = experiment.backbone.fresh_adapter(0)
    expected = torch_logits(torch_model(folder), TOKENS)
    assert worst(Ours(experiment.backbone).sequence(TOKENS, 16, adapter), expected) <= TIGHT
    assert worst(torch_logits(torch_model(tiny_folder), TOKENS), expected[:, :-64]) > TOLERANCE
    for form in ("peft", "merged"):
        export(experiment, adapter, out / form, Form(form), "odd")  # type: ignore[arg-type]
        assert set(ChatTokenizer(out / form).hf.chat_template) == {"default", "rag"}
    assert worst(torch_logits(torch_model(out / "merged"), TOKENS), expected) <= TIGHT
    again = load_backbone(out / "merged", None, jnp.dtype("float32"))
    assert again.arch == experiment.backbone.arch
    assert worst(Ours(again).sequence(TOKENS, 16), expected) <= TIGHT
    assert expected.shape[1] == again.arch.vocab == len(experiment.tokenizer.hf) + 64
    written = json.loads((out / "merged" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"], written["tie_word_embeddings"]) == (500.0, rope, False)
    assert written["dtype"] == written["torch_dtype"] == "float32"
    peft = PeftModel.from_pretrained(torch_model(folder), out / "peft")
    assert worst(torch_logits(peft, TOKENS), expected) <= TIGHT


def test_a_tokenizer_beyond_the_embedding_is_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "larger"
    shutil.copytree(tiny_folder, folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["čau"])
    tokenizer.save_pretrained(folder)
    rows = len(tokenizer) - 1
    with pytest.raises(InputError, match=f"larger: the tokenizer has {rows + 1} tokens, the embedding {rows} rows"):
        Experiment.open(load(None, tiny_overrides(folder)), adapted=False)


def test_every_end_of_generation_config_ends_a_sampled_reply(tiny_folder: Path, tmp_path: Path) -> None:
    """The same draws, up to whichever end comes first: as transformers stops, and not at that token without the list."""
    experiment, none = open_model(str(tiny_folder), load(None, tiny_overrides(tiny_folder)))
    prompt = experiment.tokenizer.prompt([{"role": "user", "content": "I lost my job."}])
    how = experiment.config.reply.model_copy(update={"temperature": 1.0})
    made = experiment.generator.generate(none, [prompt] * 8, range(8), how, 24)
    seed, long = max(enumerate(made), key=lambda pair: len(pair[1].token_ids))
    other = next(t for i, t in enumerate(long.token_ids[:-1]) if i >= 1 and t not in long.token_ids[:i])
    folder = tmp_path / "ends"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, other]}))
    experiment, none = open_model(str(folder), load(None, tiny_overrides(folder)))
    short = experiment.generator.generate(none, [prompt] * 8, range(8), how, 24)[seed]
    assert short.token_ids == long.token_ids[: long.token_ids.index(other) + 1]
    assert (short.finish, len(short.token_ids) < len(long.token_ids)) == ("stop", True)
    assert experiment.tokenizer.decode(short.token_ids) == experiment.tokenizer.decode(short.token_ids[:-1])
