"""The method's switches: what each changes in prompts, replies, pairs or reference, and where DPO then starts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Refused, chat, tiny_overrides

from esjax.eval.judges.ask import rater
from esjax.evolve.alarms import alarms
from esjax.evolve.choose import Candidates, Side, choose, other_people, weights
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.evolve.pairs import Context, trunks
from esjax.evolve.reflect import Instructions
from esjax.evolve.rounds import Round, warm_up
from esjax.report.gather import Examples
from esjax.run.directory import RunDir
from esjax.run.jsonl import read_jsonl
from esjax.sample.score import Scorer
from esjax.settings.files import load
from esjax.settings.schema import DpoSettings
from esjax.tokens.encode import Prompt

LN2 = math.log(2)
Rows = list[dict[str, Any]]
Improve = Callable[..., Path]


@pytest.fixture(scope="module")
def opened(tiny_folder: Path) -> Experiment:
    return Experiment.open(load(None, tiny_overrides(tiny_folder)))


@pytest.fixture
def improve(opened: Experiment, tiny_run: Path, tiny_folder: Path, tmp_path: Path) -> Improve:
    """Runs rounds with other settings from the tiny run's M_0; gives the run directory."""

    def go(*rounds: int, **settings: Any) -> Path:
        overrides = [x for k, v in settings.items() for x in (f"--{k.replace('__', '.')}", str(v))]
        config = load(None, [*tiny_overrides(tiny_folder), "--evolve.contexts_per_round", "8", *overrides])
        run_dir = tmp_path / "run"
        shutil.copytree(tiny_run / "sft", run_dir / "sft")
        manifest = json.loads((tiny_run / "manifest.json").read_text())
        manifest["stages"] = {"sft": manifest["stages"]["sft"]}
        (run_dir / "manifest.json").write_text(json.dumps(manifest))
        shutil.copy(tiny_run / "config.yaml", run_dir / "config.yaml")
        experiment = opened.again(config)
        with RunDir(run_dir, config) as run:
            if config.evolve.warmup_contexts:
                warm_up(experiment, run)
            for t in rounds or (1,):
                Round(experiment, run, t, rater(config)).improve()
        return run_dir

    return go


def rows(run: Path, name: str, t: int = 1) -> Rows:
    return [dict(r) for r in read_jsonl(run / f"round{t}" / f"{name}.jsonl")]


def first_step(run: Path, t: int = 1) -> dict[str, float]:
    made: dict[str, float] = read_jsonl(run / f"round{t}" / "dpo" / "metrics.jsonl")[0]
    return made


def texts(rows: Rows) -> list[str]:
    return [r["text"] for r in rows]


def test_by_default_the_round_is_the_runs_own(improve: Improve, tiny_run: Path) -> None:
    """The control: the same settings give the same pairs, so what differs below is the switch's."""
    run = improve(evolve__contexts_per_round=16)
    for name in ("drafts", "reflections", "refinements"):
        assert rows(run, name) == rows(tiny_run, name)
    mine, theirs = ([(p["id"], p["chosen"], p["rejected"]) for p in rows(r, "pairs")] for r in (run, tiny_run))
    assert mine == theirs
    assert first_step(run)["loss"] == pytest.approx(LN2, abs=1e-4)


# --- what is asked ---------------------------------------------------------------------------------------------------


KNOWN = {"profile": "They are dry.", "emotional_state": "They feel low.", "situation": "They moved."}


@pytest.mark.parametrize("prompt", ["refine.txt", "brief/refine.txt"])
def test_prompts_hold_only_what_is_known(prompt: str) -> None:
    def asked(**settings: Any) -> str:
        given = {f"evolve.{k}": v for k, v in settings.items()} | {"prompts.refine": f"bundled:prompts/{prompt}"}
        config = load(None, given)
        reflection = KNOWN if config.evolve.reflects else None
        made = Instructions.load(config).refinement_prompt(chat("I am sad."), reflection, "DRAFT")
        return made[-1]["content"]

    whole = asked()
    assert all(text in whole for text in (*KNOWN.values(), "DRAFT"))
    alone = asked(reflect=False)
    assert "DRAFT" in alone
    assert not any(text in alone for text in KNOWN.values())
    assert "rofile" not in alone
    blind = asked(show_draft=False)
    assert "DRAFT" not in blind
    assert "draft" not in blind.lower()
    assert all(text in blind for text in KNOWN.values())


def test_a_template_that_prints_what_is_left_out_is_refused(
    tmp_path: Path, refused: Refused, tiny_folder: Path
) -> None:
    (tmp_path / "refine.txt").write_text("About me: {{ profile }}. Better than {{ draft }}!")
    more = ["--prompts.refine", tmp_path / "refine.txt", "--run-dir", tmp_path / "run", *tiny_overrides(tiny_folder)]
    line = refused("evolve", "--evolve.reflect", "false", *more)
    assert "'profile' is undefined" in line
    assert "evolve.reflect and evolve.show_draft leave out profile, emotional_state, situation" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("switch", "file"), [("reflect", "reflections"), ("show_draft", "")])
def test_without_reflection_or_draft_only_refinements_change(
    improve: Improve, tiny_run: Path, switch: str, file: str
) -> None:
    run = improve(evolve__contexts_per_round=16, **{f"evolve__{switch}": "false"})
    assert rows(run, "drafts") == rows(tiny_run, "drafts")
    assert texts(rows(run, "refinements")) != texts(rows(tiny_run, "refinements"))
    assert (run / "round1" / "reflections.jsonl").exists() == (file != "reflections")
    assert all(("reflection" in p) == (file != "reflections") for p in rows(run, "pairs"))
    assert first_step(run)["loss"] == pytest.approx(LN2, abs=1e-4)


# --- which replies become pairs ----------------------------------------------------------------------------------------


def test_the_gold_reply_is_chosen(improve: Improve, opened: Experiment, tiny_run: Path) -> None:
    run = improve(evolve__contexts_per_round=16, evolve__chosen="gold")
    gold = {c.id: c.reference for c in opened.corpora.pool[0]}
    pairs = rows(run, "pairs")
    assert pairs
    assert all(p["chosen"][0]["content"] == gold[p["id"]] for p in pairs)
    drafts = {d["id"]: d["text"] for d in rows(tiny_run, "drafts")}
    assert all(p["rejected"][0]["content"] == drafts[p["id"]] for p in pairs)
    assert sorted(f.name for f in (run / "round1").glob("re*.jsonl")) == []  # nothing reflected on, nothing refined
    assert first_step(run)["loss"] == pytest.approx(LN2, abs=1e-4)
    assert json.loads((run / "manifest.json").read_text())["stages"]["round1/pairs"]["kept"] == len(pairs)


def scored(experiment: Experiment, adapter: Any, pairs: Rows) -> np.ndarray:
    """float64 [pairs, 2]: log-probs of chosen and rejected, each pair in a row of its own."""
    examples = [t.rows for t in trunks(pairs, experiment.encoder, DpoSettings(trunk="prompt"))]
    scorer = Scorer(experiment.backbone, experiment.config.dpo.row_length, experiment.config.dpo.micro_rows)
    return np.asarray([[x.sum(dtype=np.float64) for x in both] for both in scorer.score(adapter, examples)])


def sizes(experiment: Experiment, pairs: Rows) -> np.ndarray:
    """int [pairs, 2]: tokens of chosen and rejected."""
    found = [t.rows for t in trunks(pairs, experiment.encoder, DpoSettings(trunk="prompt"))]
    return np.asarray([[((r.branch == b) & (r.weight != 0)).sum() for b in (1, 2)] for r in found])


def test_the_best_refinement_and_a_low_draft_are_taken(improve: Improve, opened: Experiment) -> None:
    run = improve(
        evolve__refinements=3,
        evolve__drafts=5,
        evolve__rejected="low",
        evolve__measure="likelihood",
        evolve__contexts_per_round=6,
    )
    drafts, refinements, values = rows(run, "drafts"), rows(run, "refinements"), rows(run, "measures")
    assert [(d["id"], d["sample"]) for d in drafts[:6]] == [(drafts[0]["id"], k) for k in range(5)] + [
        (drafts[5]["id"], 0)
    ]
    assert len({d["text"] for d in drafts[:5]}) > 1
    assert (len(drafts), len(refinements), len(values)) == (30, 18, 6)
    measured = {v["id"]: v["likelihood"] for v in values}
    pairs = rows(run, "pairs")
    assert pairs
    faultless = opened.filters.reply_fault
    for p in pairs:
        better, worse = ([r for r in rows_ if r["id"] == p["id"]] for rows_ in (refinements, drafts))
        fine = [
            [faultless(p["prompt"], r["text"], r["finish_reason"]) is None for r in side] for side in (better, worse)
        ]
        mine = np.where(fine[0], measured[p["id"]][:3], -np.inf)
        assert p["chosen"][0]["content"] == better[int(mine.argmax())]["text"]
        theirs = np.asarray(measured[p["id"]][3:])
        goal = theirs[fine[1]].mean() - 2 * theirs[fine[1]].std()
        far = np.where(fine[1], abs(theirs - goal), np.inf)
        assert p["rejected"][0]["content"] == worse[int(far.argmin())]["text"]
        n = int(mine.argmax()), int(far.argmin())
        assert p["seeds"]["refinement"] == better[n[0]]["seed"]
    shown = {e["id"]: e["rounds"] for e in examples_of(run)}  # in the report: a context once, with its pair's replies
    assert all(len(rounds) == 1 for rounds in shown.values())
    for p in pairs:
        assert shown[p["id"]][0]["refinement"] == p["chosen"][0]["content"]
        assert shown[p["id"]][0]["draft"] == p["rejected"][0]["content"]
    # What was measured is what the scoring of pairs says, a token.
    own = scored(opened, opened.adapter(adapter_folder(run, 0)), pairs) / sizes(opened, pairs)
    chosen = [
        max(
            x
            for x, r in zip(measured[p["id"]][:3], [r for r in refinements if r["id"] == p["id"]], strict=True)
            if r["text"] == p["chosen"][0]["content"]
        )
        for p in pairs
    ]
    assert own[:, 0] == pytest.approx(chosen, abs=1e-4)
    assert any(p["chosen"][0]["content"] != next(r["text"] for r in refinements if r["id"] == p["id"]) for p in pairs)
    assert first_step(run)["loss"] == pytest.approx(LN2, abs=1e-4)


@pytest.mark.parametrize(
    ("marks", "taken", "fault"),
    [
        ([1.0, 3.0, 2.0], "the second of all three", None),
        ([None, None, 2.0], "the third one, measured alone", None),
        ([None, None, None], None, ("refinement", "not_measured")),
    ],
)
def test_what_nobody_could_measure_is_not_chosen(opened: Experiment, marks: list[Any], taken: Any, fault: Any) -> None:
    """A judge without a verdict on any of several refinements: no pair, instead of the first that comes."""
    texts = ["this is the first reply", "the second of all three", "the third one, measured alone"]
    made = [{"id": "d/1", "text": text, "finish_reason": "stop"} for text in texts]
    draft = {"id": "d/1", "text": "something else was drafted before", "finish_reason": "stop"}
    context = Context("d/1", Prompt(0, chat("I moved.", "Oh."), 1, 0, np.zeros(1, np.int32)))
    config = load(None, {"evolve.refinements": 3, "evolve.measure": "judge", "eval.judge.source": "rule:first"})
    given = Candidates(context, Side("refinement", made), Side("draft", [draft]), None)
    found = choose(given, {"judge": [*marks, 0.0]}, config, opened.filters)
    assert found.fault == fault
    assert taken is None or found.chosen["text"] == taken


def examples_of(run: Path) -> Rows:
    found = Examples()
    found.add(run, "", {}, {})
    return found.rows()


def test_only_more_specific_replies_are_kept(improve: Improve) -> None:
    run = improve(filters__more_specific="true", evolve__contexts_per_round=16)
    values = {v["id"]: v["specificity"] for v in rows(run, "measures")}
    kept, dropped = rows(run, "pairs"), [d["id"] for d in rows(run, "dropped") if d["reason"] == "less_specific"]
    assert kept
    assert dropped
    assert all(values[p["id"]][0] > values[p["id"]][1] for p in kept)
    assert all(values[name][0] <= values[name][1] for name in dropped)


def test_other_people_are_of_other_dialogues() -> None:
    names = ["a/1", "a/3", "b/1", "c/5", "c/7"]
    found = other_people(names, 2, 0)
    for name, others in zip(names, found, strict=True):
        people = [names[i].split("/")[0] for i in others]
        assert len(set(people)) == 2
        assert name.split("/")[0] not in people
    assert other_people(names, 2, 0) == found
    assert [other_people(names, 1, seed) for seed in range(9)] != [other_people(names, 1, 0)] * 9
    assert other_people(["a/1", "a/2"], 2, 0) == [[], []]


# --- references and rounds ---------------------------------------------------------------------------------------------


def test_m0s_drafts_are_rejected_and_m0_is_the_reference(improve: Improve, opened: Experiment) -> None:
    """In round 2, which M_1 starts: DPO's first loss is then what the margin of M_1 over M_0 makes it."""
    run = improve(1, 2, evolve__rejected="first", evolve__reference="first", dpo__learning_rate="1e-3")
    assert not (run / "round1" / "first.jsonl").exists()  # M_0 drafts there anyway
    first, drafts, pairs = rows(run, "first", 2), rows(run, "drafts", 2), rows(run, "pairs", 2)
    told = {r["id"]: r for r in first}
    assert all(p["rejected"][0]["content"] == told[p["id"]]["text"] for p in pairs)
    assert texts(first) != texts(drafts)
    m0, m1 = (opened.adapter(adapter_folder(run, t)) for t in (0, 1))
    e = opened.config.evolve.draft
    asked = [opened.tokenizer.prompt(d["prompt"]) for d in drafts]
    drawn = opened.generator.generate(m0, asked, [r["seed"] for r in first], e, e.max_tokens)
    assert [opened.tokenizer.decode(x.token_ids).strip() for x in drawn] == texts(first)
    reference = np.asarray([[p["reference"][side] for side in ("chosen", "rejected")] for p in pairs])
    assert reference == pytest.approx(scored(opened, m0, pairs), abs=1e-3)
    policy = scored(opened, m1, pairs)
    assert np.abs(policy - reference).max() > 0.05
    change = policy - reference
    loss = np.log1p(np.exp(-0.1 * (change[:, 0] - change[:, 1])))
    steps = read_jsonl(run / "round2" / "dpo" / "metrics.jsonl")
    metrics = first_step(run, 2)
    if len(steps) == 1:  # all pairs in one step
        assert metrics["loss"] == pytest.approx(float(loss.mean()), abs=1e-4)
    assert metrics["drift"] > 1e-3
    assert first_step(run, 1)["loss"] == pytest.approx(LN2, abs=1e-4)


def test_pairs_of_earlier_rounds_are_trained_on_again(improve: Improve, opened: Experiment) -> None:
    run = improve(1, 2, evolve__pairs_of=2, dpo__learning_rate="1e-3")
    old, both = rows(run, "pairs", 1), rows(run, "pairs", 2)
    assert [p["round"] for p in both] == [1] * len(old) + [2] * (len(both) - len(old))
    assert len(both) > len(old)
    assert [p["chosen"] for p in both[: len(old)]] == [p["chosen"] for p in old]
    assert [p["reference"] for p in both[: len(old)]] != [p["reference"] for p in old]  # made anew, under M_1
    m1 = opened.adapter(adapter_folder(run, 1))
    reference = np.asarray([[p["reference"][side] for side in ("chosen", "rejected")] for p in both])
    assert reference == pytest.approx(scored(opened, m1, both), abs=1e-3)
    assert first_step(run, 2)["loss"] == pytest.approx(LN2, abs=1e-4)


def test_a_warm_up_teaches_refining(improve: Improve, opened: Experiment, tiny_run: Path) -> None:
    run = improve(evolve__warmup_contexts=6)
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert list(stages) == ["sft", "warmup/replies", "warmup/sft", "round1/replies", "round1/pairs", "round1/dpo"]
    assert stages["warmup/sft"]["examples"] + sum(stages["warmup/sft"]["left_out"].values()) == 6
    assert {f.name for f in (run / "warmup").glob("*.jsonl")} == {"drafts.jsonl", "reflections.jsonl", "metrics.jsonl"}
    assert {p["model"] for p in rows(run, "pairs")} == {"warmup"}
    assert first_step(run)["loss"] == pytest.approx(LN2, abs=1e-4)  # its reference is the model that was warmed up
    assert texts(rows(run, "drafts")) != texts(rows(tiny_run, "drafts"))[:8]
    steps = read_jsonl(run / "warmup" / "metrics.jsonl")
    assert steps[0]["loss"] > 0


# --- losses and weights ------------------------------------------------------------------------------------------------


def test_nll_trains_on_chosen_replies_alone(improve: Improve, opened: Experiment) -> None:
    run = improve(dpo__loss="nll", dpo__batch_rows=8, dpo__micro_rows=8, dpo__trunk="prompt", dpo__row_length=1024)
    pairs, m0 = rows(run, "pairs"), opened.adapter(adapter_folder(run, 0))
    nll = -scored(opened, m0, pairs)[:, 0] / sizes(opened, pairs)[:, 0]
    (step,) = read_jsonl(run / "round1" / "dpo" / "metrics.jsonl")
    assert step["loss"] == pytest.approx(float(nll.mean()), abs=1e-3)
    assert step["margin"] == pytest.approx(0, abs=1e-3)


def test_weights_are_twice_the_logistic_of_the_preference() -> None:
    made = weights(np.asarray([0.0, np.log(3), -np.log(3), np.nan]))
    assert made == pytest.approx(np.asarray([1.0, 1.5, 0.5, 1.0]))
    assert weights(np.asarray([2.0, 2.0])) == pytest.approx([1, 1])


def test_reflections_weigh_pairs(improve: Improve, opened: Experiment) -> None:
    run = improve(dpo__pair_weights="reflection", dpo__batch_rows=8, dpo__micro_rows=8, dpo__row_length=1024)
    pairs, m0 = rows(run, "pairs"), opened.adapter(adapter_folder(run, 0))
    informed = [p | {"prompt": opened.instructions.informed(p["prompt"], p["reflection"])} for p in pairs]
    assert all(p["reflection"]["situation"] in q["prompt"][-1]["content"] for p, q in zip(pairs, informed, strict=True))
    marks = scored(opened, m0, informed) / sizes(opened, informed)
    assert [p["weight"] for p in pairs] == pytest.approx(weights(marks[:, 0] - marks[:, 1]).tolist(), abs=1e-4)
    assert np.std([p["weight"] for p in pairs]) > 1e-4
    steps = read_jsonl(run / "round1" / "dpo" / "metrics.jsonl")
    if len(steps) == 1:
        assert steps[0]["loss"] == pytest.approx(LN2, abs=1e-4)  # the weights' mean is 1
    assert steps[0]["preference_loss"] == pytest.approx(LN2, abs=1e-4)


def test_a_judge_chooses_and_weighs(improve: Improve) -> None:
    """The rule that likes words of the context, as the judge."""
    run = improve(
        evolve__refinements=3, evolve__measure="judge", dpo__pair_weights="judge", eval__judge__source="rule:overlap"
    )
    marks = {v["id"]: v["judge"][:3] for v in rows(run, "measures")}
    refinements = rows(run, "refinements")
    for p in rows(run, "pairs"):
        mine = [r["text"] for r in refinements if r["id"] == p["id"]]
        taken = max(m for m, text in zip(marks[p["id"]], mine, strict=True) if text == p["chosen"][0]["content"])
        assert taken == max(marks[p["id"]])
    assert {len(v) for v in marks.values()} == {3}
    assert all("weight" in p for p in rows(run, "pairs"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evolve.rejected": "low"}, "evolve.rejected=low needs several drafts"),
        ({"evolve.drafts": 3}, "evolve.drafts=3 means nothing with evolve.rejected=draft"),
        ({"evolve.chosen": "gold", "evolve.refinements": 2}, "evolve.refinements=2 means nothing"),
        ({"evolve.chosen": "gold", "evolve.warmup_contexts": 2}, "evolve.warmup_contexts=2 means nothing"),
        ({"evolve.measure": "likelihood"}, "evolve.measure=likelihood means nothing"),
        ({"evolve.measure": "judge", "evolve.refinements": 2}, "evolve.measure=judge needs a judge"),
        ({"dpo.pair_weights": "judge"}, "dpo.pair_weights=judge needs a judge"),
        (
            {"dpo.pair_weights": "reflection", "evolve.reflect": "false"},
            "dpo.pair_weights=reflection needs reflections",
        ),
        ({"dpo.loss": "nll", "dpo.nll_weight": 0.5}, "dpo.nll_weight=0.5 adds to a loss"),
    ],
)
def test_switches_that_do_not_fit_are_refused(
    settings: dict[str, Any], words: str, refused: Refused, tmp_path: Path
) -> None:
    given = [x for k, v in settings.items() for x in (f"--{k}", v)]
    assert words in refused("evolve", "--run-dir", tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


# --- alarms ------------------------------------------------------------------------------------------------------------


def steps(margin: float, accuracy: float, kl: float | None = None) -> Rows:
    made: Rows = [{"margin": 0.0, "accuracy": 0.5} for _ in range(6)] + [{"margin": margin, "accuracy": accuracy}] * 2
    return made if kl is None else [*made[:-1], made[-1] | {"valid_kl": kl}]


def test_alarms_say_what_to_look_at() -> None:
    assert alarms(steps(0.2, 0.8, 0.01), 1.1) == []
    assert ["2.00 times as long" in a for a in alarms(steps(0.2, 0.8), 2.0)] == [True]
    assert ["0.50 of the length" in a for a in alarms(steps(0.2, 0.8), 0.5)] == [True]
    assert ["only 50%" in a for a in alarms(steps(0.2, 0.5), 1.0)] == [True]
    assert ["0.90 nats a token from M_0" in a for a in alarms(steps(0.2, 0.8, 0.9), 1.0)] == [True]
    assert len(alarms(steps(0.2, 0.5, 0.9), 2.0)) == 3


def test_a_rounds_alarms_are_in_the_manifest(improve: Improve, opened: Experiment) -> None:
    run = improve(evolve__chosen="gold", filters__max_length_ratio=50.0)
    stage = json.loads((run / "manifest.json").read_text())["stages"]
    ratio = stage["round1/pairs"]["length_ratio"]
    longer = [a for a in stage["round1/dpo"].get("alarms", []) if "which DPO may learn instead" in a]
    assert bool(longer) == (ratio > 1.3 or ratio < 1 / 1.3)
    assert longer
