"""The evaluation on contexts: which own context a reply is found by, specificity, the embedding model, and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import Refused
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from esjax.cli import main
from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.eval.embed import Embedder
from esjax.eval.identify import bm25_scores, candidates, rank
from esjax.eval.reflections import names, reflection_values
from esjax.eval.replies import Reply
from esjax.eval.specific import specificity
from esjax.eval.statistics import mean_by_cluster
from esjax.evolve.experiment import Experiment, adapter_folder, open_model
from esjax.run.jsonl import read_jsonl
from esjax.settings.files import load

GENERIC = "I'm sorry to hear that. How can I help you today?"


def contexts(source: str, count: int) -> list[Reply]:
    """Gold replies, as evenly from the dialogues as may be."""
    dialogues = read(source, "sample", 0).dialogues
    made = [
        Reply(d.id, f"{d.id}/{turn}", d.messages(turn), d.turns[turn].text, d.turns[turn].text, d.problem)
        for d in dialogues
        for turn in d.supporter_turns()[2:]
    ]
    return made[:: max(1, len(made) // count)][:count]


def found(scores: np.ndarray, replies: list[Reply], others: list[list[int]]) -> Any:
    hits, _ = rank(scores, others)
    return mean_by_cluster(hits, [r.dialogue for r in replies], 500, 0)


def test_gold_replies_find_their_context_and_others_do_not(esconv: Path) -> None:
    gold = contexts(f"esconv:{esconv / 'valid.jsonl'}", 260)
    others = candidates(gold, 16, 0)
    assert {len(o) for o in others} == {15}
    assert all(gold[j].dialogue != gold[i].dialogue for i, o in enumerate(others) for j in o)
    same_problem = np.mean([gold[j].problem == gold[i].problem for i, o in enumerate(others) for j in o])
    assert same_problem > 0.5  # the hardest to tell apart come first
    chance = 1 / 16
    made = found(bm25_scores(gold), gold, others)
    assert made.low > 2 * chance
    generic = [replace(r, text=GENERIC) for r in gold]
    order = np.random.default_rng(0).permutation(len(gold))
    shuffled = [replace(r, text=gold[j].text) for r, j in zip(gold, order, strict=True)]
    for replies in (generic, shuffled):
        made = found(bm25_scores(replies), replies, others)
        assert made.low < chance < made.high, made


def test_candidates_are_the_same_for_all_and_hang_on_the_seed(esconv: Path) -> None:
    gold = contexts(f"esconv:{esconv / 'valid.jsonl'}", 60)
    assert candidates(gold, 8, 0) == candidates([replace(r, text="x") for r in gold], 8, 0)
    assert candidates(gold, 8, 0) != candidates(gold, 8, 1)


def test_ranks_by_hand() -> None:
    scores = np.asarray([[3.0, 1, 2, 3], [5, 1, 1, 0], [0, 0, 0, 0], [9, 9, 9, 1]])
    hits, reciprocal = rank(scores, [[1, 2, 3], [0, 2], [0, 1, 3], [0, 1, 2]])
    assert hits.tolist() == [0.5, 0, 0.25, 0]
    assert reciprocal.tolist() == pytest.approx(
        [(1 + 1 / 2) / 2, (1 / 2 + 1 / 3) / 2, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4, 1 / 4]
    )


def test_one_person_s_context_is_not_found_among_none() -> None:
    """Every context of a single dialogue would find itself."""
    own = contexts("bundled:data/sample/test.jsonl", 40)
    own = [r for r in own if r.dialogue == own[0].dialogue]
    assert len(own) > 1
    hits, ranks = rank(bm25_scores(own), candidates(own, 16, 0))
    assert np.isnan(hits).all()
    assert np.isnan(ranks).all()


def test_specificity_is_what_single_scores_give(tiny_run: Path) -> None:
    """The shared trunks, against each reply scored by itself in its own and in another context."""
    experiment, m0 = open_model(f"{tiny_run}:m0", load(str(tiny_run / "config.yaml")))
    gold = contexts("bundled:data/sample/test.jsonl", 5)
    systems = {"gold": gold, "generic": [replace(r, text=GENERIC) for r in gold[:-1]] + [replace(gold[-1], text="")]}
    others = candidates(gold, 3, 0)
    others[1] = []  # as of a context that is not among those chosen
    made = specificity(experiment, m0, systems, others)

    def alone(context: Reply, text: str) -> float:
        import esjax

        chat = [*context.messages, {"role": "assistant", "content": text}]
        score = esjax.open_model(f"{tiny_run}:m0").score(chat)
        return score.logprob / score.num_tokens

    for name, i in (("gold", 0), ("generic", 2)):
        text = systems[name][i].text
        expected = alone(gold[i], text) - np.mean([alone(gold[j], text) for j in others[i]])
        assert made[name][i] == pytest.approx(expected, abs=2e-5)
    assert np.isnan(made["generic"][-1])  # an empty reply has none
    assert [i for i, x in enumerate(made["gold"]) if np.isnan(x)] == [1]
    assert abs(made["gold"][0] - made["generic"][0]) > 1e-4


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    vocab = {
        w: i
        for i, w in enumerate(
            ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the cows leave on thursday i lost my job a".split()]
        )
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["mean_tokens", "cls_token"])
def test_embeddings_are_those_of_transformers(mode: str, bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{mode}": True, "pooling_mode_max_tokens": False})
    )
    texts = ["the cows leave on thursday", "i lost my job", "a", "the " * 100]
    ours = Embedder(folder)(texts)
    model: Any = BertModel.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for text, vector in zip(texts, ours, strict=True):
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=64).input_ids])
        with torch.no_grad():
            states = model(ids).last_hidden_state[0]
        pooled = states.mean(0) if mode == "mean_tokens" else states[0]
        assert np.abs(vector - (pooled / pooled.norm()).numpy()).max() <= 1e-5
    assert np.abs(ours[0] - ours[1]).max() > 2e-4


def test_another_kind_of_embedding_model_is_refused(bert: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_type=.llama..*allowed: bert"):
        Embedder(tiny_folder)
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(InputError, match="pooling_mode_max_tokens; allowed: mean_tokens or cls_token"):
        Embedder(folder)


# The command


def test_a_run_s_results(tiny_run: Path) -> None:
    table = parquet.read_table(tiny_run / "eval" / "results.parquet").to_pylist()
    records = json.loads((tiny_run / "eval" / "results.json").read_text())
    assert {r["model"] for r in records} == {"backbone", "m0", "m1", "m2"}
    for metric in ("specificity", "unhelpful", "rouge_l"):
        for model in ("m0", "m2"):
            values = [r["value"] for r in table if (r["metric"], r["model"]) == (metric, model)]
            (record,) = (r for r in records if (r["metric"], r["model"]) == (metric, model))
            assert record["value"] == pytest.approx(np.mean(values))
    (perplexity,) = (r for r in records if (r["metric"], r["model"]) == ("perplexity", "m1"))
    parts = json.loads((tiny_run / "eval" / "m1.scores.json").read_text())["reference"]
    nll = -sum(p["logprob"] for p in parts) / sum(p["tokens"] for p in parts)
    assert perplexity["value"] == pytest.approx(np.exp(nll))
    assert set(perplexity["differences"]) == {"m0"}
    (last,) = (r for r in records if (r["metric"], r["model"]) == ("words", "m2"))
    assert set(last["differences"]) == {"m0", "m1"}
    spoken = sum(
        len(t.text.encode())
        for d in read("bundled:data/sample/test.jsonl", "sample", 0).dialogues
        for t in d.turns
        if t.role == "supporter"
    )
    assert sum(p["bytes"] for p in parts) == pytest.approx(spoken, rel=0.2)  # histories that are cut lose some


def test_a_run_is_evaluated_anew_elsewhere(tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    other = ["--reply.max_contexts", "2", "--eval.candidates", "3"]
    line = refused("eval", "--run-dir", tiny_run, *other)
    assert "eval.candidates, reply.max_contexts" in line or "reply.max_contexts, eval.candidates" in line
    assert "give --out" in line
    one = ["--eval.specificity_contexts", "1"]
    main(["eval", "--run-dir", str(tiny_run), "--out", str(tmp_path / "out"), *other, *one])
    records = json.loads((tmp_path / "out" / "eval" / "results.json").read_text())
    assert {r["contexts"] for r in records if r["metric"] == "specificity"} == {1}
    assert {r["contexts"] for r in records if r["metric"] == "words"} == {2}
    assert len(read_jsonl(tmp_path / "out" / "eval" / "m2.jsonl")) == 2
    assert len(read_jsonl(tiny_run / "eval" / "m2.jsonl")) == 4
    assert "makes no use of it" in refused("eval", "--run-dir", tiny_run, "--sft.epochs", 3)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Predictions of two systems, in no order; the second lacks a context."""
    gold = contexts("bundled:data/sample/test.jsonl", 12)
    out = {}
    for name, replies in (("gold", gold[::-1]), ("generic", [replace(r, text=GENERIC) for r in gold[1:]])):
        out[name] = tmp_path / f"{name}.jsonl"
        out[name].write_text("".join(json.dumps({"id": r.context, "text": r.text}) + "\n" for r in replies))
    return out


def test_predictions_of_any_systems(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    command = ["eval", "--predictions", f"truth={files['gold']}", str(files["generic"])]
    main([*command, "--reference-data", "bundled:data/sample/test.jsonl", "--out", str(tmp_path / "out"), "--all"])
    said = capsys.readouterr()
    assert "truth: 12 replies, of which 11 are compared" in said.err
    assert "generic - truth" in said.out
    records = {(r["metric"], r["model"]): r for r in json.loads((tmp_path / "out" / "results.json").read_text())}
    assert records["bleu_4", "truth"]["value"] == pytest.approx(100)
    assert records["bleu_4", "generic"]["value"] < 5
    assert records["generic", "generic"]["value"] == 1
    assert records["rouge_l", "generic"]["differences"]["truth"]["verdict"] == "lower"
    assert records["rouge_l", "generic"]["contexts"] == 11
    assert ("specificity", "truth") not in records
    assert records["rouge_l", "truth"]["source"] == "Lin 2004"


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"id": "sample-005/99", "text": "x"}], "line 1: id 'sample-005/99' is no context of the reference data"),
        ([{"id": "sample-005/1"}], "line 1: expected"),
        ([{"id": "sample-005/1", "text": "a"}] * 2, "line 2: a second reply with the id 'sample-005/1'"),
        ([], "no reply in it"),
    ],
)
def test_bad_predictions_are_named(rows: list[dict[str, str]], words: str, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = ["--reference-data", "bundled:data/sample/test.jsonl", "--out", tmp_path / "out"]
    assert words in refused("eval", "--predictions", tmp_path / "p.jsonl", *source)
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together(files: dict[str, Path], tiny_run: Path, tmp_path: Path, refused: Refused) -> None:
    file = files["gold"]
    assert "give one of --run-dir, --predictions" in refused("eval")
    assert "give one of --run-dir, --predictions" in refused("eval", "--run-dir", tiny_run, "--predictions", file)
    assert "needs --reference-data and --out" in refused("eval", "--predictions", file)
    assert "--model: --run-dir makes no use" in refused("eval", "--run-dir", tiny_run, "--model", f"{tiny_run}:m0")
    assert "--all: --judge-check makes no use" in refused("eval", "judge-check", file, "--all")
    assert "seed: --seeds sums up" in refused("eval", "--seeds", "a", "b", "c", "--seed", 3)
    assert "is not a run directory" in refused("eval", "--run-dir", tmp_path / "none")
    same = ["--predictions", f"a={file}", f"a={files['generic']}", "--reference-data", "bundled:data/sample/test.jsonl"]
    assert "two systems are called a" in refused("eval", *same, "--out", tmp_path / "out")
    (tmp_path / "out").mkdir()
    same[1] = f"b={file}"
    assert "exists; give a new folder" in refused("eval", *same, "--out", tmp_path / "out")


def test_the_backbone_is_the_model_without_its_adapter(tiny_run: Path) -> None:
    rows = read_jsonl(tiny_run / "eval" / "backbone.jsonl")
    experiment = Experiment.open(load(str(tiny_run / "config.yaml")))
    fresh, m0 = experiment.backbone.fresh_adapter(0), experiment.adapter(adapter_folder(tiny_run, 0))
    assert rows != read_jsonl(tiny_run / "eval" / "m0.jsonl")
    assert all(float(jnp.abs(x).max()) == 0 for x in leaves(fresh, "lora_b"))
    assert any(float(jnp.abs(x).max()) > 0 for x in leaves(m0, "lora_b"))


def leaves(adapter: Any, name: str) -> list[Any]:
    from esjax.model.lora import flatten

    return [value[...] for path, value in flatten(adapter).items() if path[-1] == name]


# Reflections


def test_a_true_reflection_finds_its_seeker(esconv: Path) -> None:
    """One made of the gold situation does, one that fits anybody does not; so for the gold emotion."""
    dialogues = {d.id: d for d in read(f"esconv:{esconv / 'valid.jsonl'}", "sample", 0).dialogues}
    gold = contexts(f"esconv:{esconv / 'valid.jsonl'}", 120)
    others, emotions = candidates(gold, 16, 0), {name: d.emotion for name, d in dialogues.items()}

    def measured(fields: Any) -> dict[str, float]:
        rows = [{"reflection": fields(dialogues[r.dialogue])} for r in gold]
        values = reflection_values("m", rows, gold, others, emotions)
        return {m: float(np.mean([v.value for v in values if v.metric == m])) for m in {v.metric for v in values}}

    true = measured(
        lambda d: {"profile": "They are tired.", "emotional_state": f"They feel {d.emotion}.", "situation": d.situation}
    )
    vague = {"profile": "They are tired.", "emotional_state": "They feel bad.", "situation": "They had a bad day."}
    made = measured(lambda d: vague)
    assert true["reflection_hit"] > 0.4 > 0.15 > made["reflection_hit"]
    assert true["reflection_rank"] > made["reflection_rank"]
    assert (true["reflection_emotion"], made["reflection_emotion"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("text", "label", "found"),
    [
        ("They feel anxious about it.", "anxiety", True),
        ("They feel depressed.", "depression", True),
        ("They feel sadness.", "sorrow", False),
        ("They feel guilty and alone", "guilt, loneliness", True),
        ("They are sad.", "sadness", True),
        ("They are so sad", "so", False),  # two letters say nothing
        ("They feel it.", "", False),
    ],
)
def test_an_emotion_is_named_in_any_form(text: str, label: str, found: bool) -> None:
    assert names(text, label) == found


def test_a_seeker_without_a_label_has_no_value() -> None:
    gold = contexts("bundled:data/sample/test.jsonl", 3)
    rows = [{"reflection": dict.fromkeys(("profile", "emotional_state", "situation"), "They feel sorrow.")}] * len(gold)
    values = reflection_values("m", rows, gold, candidates(gold, 4, 0), {gold[0].dialogue: "sorrow"})
    known = [v for v in values if v.metric == "reflection_emotion"]
    assert {v.dialogue for v in known} == {gold[0].dialogue}
    assert all(v.value == 1 for v in known)
