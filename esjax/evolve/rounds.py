"""The method, read from top to bottom: phase 1 makes M_0, then every round drafts, reflects, refines, filters and trains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esjax.config import SamplingSettings
from esjax.corpus.dialogue import Message
from esjax.corpus.sources import read_conversations
from esjax.evolve.filters import Filters
from esjax.evolve.lab import Lab, adapter_folder
from esjax.evolve.pairs import contexts, draw, length_ratio, pair_rows, read_pairs, sift
from esjax.evolve.reflect import Instructions, automaton, parse
from esjax.model.lora import Adapter, save_adapter
from esjax.rows import Rows
from esjax.runlog import (
    RunDir,
    RunError,
    append_in_batches,
    bundled_hash,
    read_jsonl,
    replacing,
    say,
    sha256,
    write_jsonl,
)
from esjax.sample.generate import Generator, row_seed
from esjax.sample.score import Scorer
from esjax.train.loop import Phase, train
from esjax.train.losses import dpo_loss, sft_loss

Row = dict[str, Any]


def evolve(lab: Lab, run: RunDir) -> None:
    """Phase 1, then all rounds of phase 2. Stages that the manifest calls done are skipped."""
    sft(lab, run)
    generator = Generator(lab.backbone, lab.config.evolve.batch, lab.tokenizer.end_of_turn)
    for t in range(1, lab.config.evolve.rounds + 1):
        improve(lab, run, generator, t)


# --- phase 1 ---------------------------------------------------------------------------------------------------------


def sft(lab: Lab, run: RunDir) -> None:
    """Phase 1: LoRA supervised fine-tuning on every supporter turn, with replay. Writes sft/adapter, M_0."""
    c = lab.config
    inputs = {
        "weights": lab.weights_hash,
        "data.train": bundled_hash(c.data.train),
        "data.valid": bundled_hash(c.data.valid),
    }
    inputs["prompts.system"] = bundled_hash(c.prompts.system)
    if c.data.replay:
        inputs["data.replay"] = bundled_hash(c.data.replay)

    def work() -> Row:
        examples, facts = sft_rows(lab)
        valid = [row for d in lab.valid for row in lab.encoder.dialogue(d)]
        scorer = Scorer(lab.backbone, c.sft.row_length, c.sft.micro_rows)

        def validate(adapter: Adapter) -> float:
            return -float(np.concatenate([x for branches in scorer.score(adapter, valid) for x in branches]).mean())

        fresh = lab.backbone.fresh_adapter(c.seed)
        say(
            f"  {len(examples)} examples, {facts['target_tokens']} target tokens; the backbone's loss {validate(fresh):.3f}"
        )
        phase = Phase(
            name="sft",
            folder=run.path / "sft",
            board=run.path / "tensorboard" / "sft",
            settings=c.sft,
            examples=examples,
            loss=sft_loss,
            seed=c.seed,
            remat=c.model.remat == "full",
            validate=validate,
            validate_every=c.sft.validate_every,
        )
        _save(lab, adapter_folder(run.path, 0), train(phase, lab.backbone, fresh))
        return facts

    run.stage("sft", [adapter_folder(run.path, 0)], inputs, work)


def sft_rows(lab: Lab) -> tuple[list[Rows], Row]:
    """Phase 1's examples: all training dialogues, and enough replay conversations to make up their share."""
    c, encoder = lab.config, lab.encoder
    encoder.counts.clear()
    examples = [row for d in lab.train for row in encoder.dialogue(d)]
    facts: Row = {"dialogues": len(lab.train), "dialogue_rows": len(examples)}
    if c.data.replay is not None and c.data.replay_share > 0:
        replay = [row for _, messages in read_conversations(c.data.replay) for row in encoder.chat(messages)]
        want = round(len(examples) * c.data.replay_share / (1 - c.data.replay_share))
        order = np.random.default_rng((c.seed, 1)).permutation(len(replay))
        examples += [replay[order[i % len(replay)]] for i in range(want)]
        facts["replay_rows"] = want
    facts |= {"history": dict(encoder.counts), "target_tokens": int(sum((e.weight != 0).sum() for e in examples))}
    if encoder.counts:
        say(f"  histories: {_counted(encoder.counts)} (window {c.data.window})")
    return examples, facts


# --- phase 2 ---------------------------------------------------------------------------------------------------------


def improve(lab: Lab, run: RunDir, generator: Generator, t: int) -> None:
    """Round t of phase 2: M_(t-1) drafts, reflects and refines; DPO towards its refinements gives M_t."""
    c, folder = lab.config, run.path / f"round{t}"
    before = adapter_folder(run.path, t - 1)
    teacher = {"model": f"m{t - 1}", "adapter_sha256": sha256(before)}
    instructions, filters = Instructions.load(c), Filters.load(c.filters)
    files = {name: folder / f"{name}.jsonl" for name in ("drafts", "reflections", "refinements", "pairs", "dropped")}
    loaded: list[Adapter] = []

    def model() -> Adapter:  # read once, and only when a stage of this round has work to do
        if not loaded:
            loaded.append(lab.adapter(before))
        return loaded[0]

    def generated(stage: str, total: int, batch: Callable[[int, int], list[Row]]) -> Callable[[], Row]:
        def work() -> Row:
            rows = append_in_batches(files[stage], total, c.evolve.batch, batch, f"round {t} {stage}")
            return {"rows": len(rows), "tokens": sum(r["num_tokens"] for r in rows), "programs": generator.programs}

        return work

    lab.encoder.counts.clear()
    pool = contexts(lab.train, lab.encoder, c.context_room)
    chosen = draw(pool, c.evolve.contexts_per_round, (c.seed, t))
    total = len(chosen)
    say(
        f"round {t}: {total} of {len(pool)} contexts{', ' + _counted(lab.encoder.counts) if lab.encoder.counts else ''}"
    )

    def drafts(start: int, stop: int) -> list[Row]:
        part = chosen[start:stop]
        prompts = [lab.tokenizer.prompt(x.messages) for x in part]
        made = _replies(lab, generator, model(), prompts, [x.id for x in part], f"round{t}/draft", c.evolve.draft)
        return [{"id": x.id, "prompt": x.messages, **reply} for x, reply in zip(part, made, strict=True)]

    inputs = teacher | {"data.train": bundled_hash(c.data.train), "prompts.system": bundled_hash(c.prompts.system)}
    run.stage(f"round{t}/drafts", [files["drafts"]], inputs, generated("drafts", total, drafts))

    constraint: list[Any] = []  # compiled when first needed

    def reflections(start: int, stop: int) -> list[Row]:
        if not constraint:
            constraint.extend(automaton(lab.tokenizer, c.evolve.reflection.field_tokens, lab.backbone.arch.vocab))
        part = read_jsonl(files["drafts"])[start:stop]
        prompts = [lab.tokenizer.prompt(instructions.reflection_prompt(r["prompt"])) for r in part]
        seeds = [row_seed(c.seed, f"round{t}/reflection", r["id"]) for r in part]
        table, most = constraint
        made = generator.generate(model(), prompts, seeds, c.evolve.reflection, most, table)
        texts = [lab.tokenizer.decode(m.token_ids) for m in made]
        return [
            {"id": r["id"], "reflection": parse(text), "num_tokens": len(m.token_ids), "seed": seed}
            for r, m, text, seed in zip(part, made, texts, seeds, strict=True)
        ]

    inputs = teacher | {"drafts": sha256(files["drafts"]), "prompts.reflect": bundled_hash(c.prompts.reflect)}
    inputs |= {"prompts.principles": bundled_hash(c.prompts.principles)}
    run.stage(f"round{t}/reflections", [files["reflections"]], inputs, generated("reflections", total, reflections))

    def refinements(start: int, stop: int) -> list[Row]:
        part = list(
            zip(read_jsonl(files["drafts"])[start:stop], read_jsonl(files["reflections"])[start:stop], strict=True)
        )
        asked = [instructions.refinement_prompt(d["prompt"], r["reflection"], d["text"]) for d, r in part]
        prompts, ids = [lab.tokenizer.prompt(m) for m in asked], [d["id"] for d, _ in part]
        made = _replies(lab, generator, model(), prompts, ids, f"round{t}/refinement", c.evolve.refinement)
        return [{"id": i, **reply} for i, reply in zip(ids, made, strict=True)]

    inputs = teacher | {"reflections": sha256(files["reflections"]), "prompts.refine": bundled_hash(c.prompts.refine)}
    run.stage(f"round{t}/refinements", [files["refinements"]], inputs, generated("refinements", total, refinements))

    def pairs() -> Row:
        def fits(prompt: list[Message], chosen: str, rejected: str) -> bool:
            return len(lab.encoder.pair(prompt, chosen, rejected).tokens) <= c.dpo.row_length

        drafted, reflected, refined = (read_jsonl(files[name]) for name in ("drafts", "reflections", "refinements"))
        kept, dropped = sift(drafted, reflected, refined, filters, fits, {"round": t, **teacher})
        write_jsonl(files["dropped"], dropped)
        reasons = Counter(d["reason"] for d in dropped)
        say(f"  kept {len(kept)} of {total} pairs; dropped: {_counted(reasons) or 'none'}")
        if not kept:
            raise RunError(
                f"round {t}: every pair was dropped ({_counted(reasons)}); see {files['dropped']} and the filters section"
            )
        _reference(lab, model(), kept, files["pairs"], f"round {t} scoring")
        return {"kept": len(kept), "dropped": dict(reasons), "length_ratio": round(length_ratio(kept), 4)}

    inputs = teacher | {name: sha256(files[name]) for name in ("drafts", "reflections", "refinements")}
    inputs |= {k: bundled_hash(v) for k, v in c.filters.model_dump().items() if isinstance(v, str)}
    run.stage(f"round{t}/pairs", [files["pairs"], files["dropped"]], inputs, pairs)
    dpo(lab, run, files["pairs"], f"round{t}/dpo", model)


def dpo(lab: Lab, run: RunDir, pairs: Path, name: str, start: Callable[[], Adapter]) -> None:
    """DPO on pairs whose reference log-probs are stored with them. Writes NAME/adapter."""
    folder = run.path / name

    def work() -> Row:
        rows = read_pairs(pairs)
        reference = [np.asarray([[r["reference"]["chosen"], r["reference"]["rejected"]]], np.float32) for r in rows]
        phase = Phase(
            name="dpo",
            folder=folder,
            board=run.path / "tensorboard" / name.replace("/", "-"),
            settings=lab.config.dpo,
            examples=pair_rows(rows, lab.encoder),
            loss=dpo_loss(lab.config.dpo),
            seed=row_seed(lab.config.seed, name),
            remat=lab.config.model.remat == "full",
            reference=reference,
            check_first=lambda metrics: check_start(metrics, lab.backbone.dtype.itemsize == 4),
        )
        _save(lab, folder / "adapter", train(phase, lab.backbone, start()))
        return {"pairs": len(rows)}

    run.stage(name, [folder / "adapter"], {"pairs": sha256(pairs)}, work)


def check_start(metrics: dict[str, float], float32: bool) -> None:
    """DPO begins where the reference is: the first step's loss is ln 2 and its margin 0, to rounding. Raises RunError."""
    tolerance = 1e-3 if float32 else 5e-2
    loss, margin = metrics["preference_loss"], metrics["margin"]
    if abs(loss - math.log(2)) > tolerance or abs(margin) > tolerance:
        raise RunError(
            f"DPO does not start at its reference: loss {loss:.5f} instead of ln 2, margin {margin:.5f} instead of 0; "
            "the reference log-probs were made by another model"
        )


# --- pieces ----------------------------------------------------------------------------------------------------------


def _replies(
    lab: Lab,
    generator: Generator,
    adapter: Adapter,
    prompts: list[list[int]],
    ids: list[str],
    stage: str,
    how: SamplingSettings,
) -> list[Row]:
    seeds = [row_seed(lab.config.seed, stage, i) for i in ids]
    made = generator.generate(adapter, prompts, seeds, how, how.max_tokens)
    return [
        {
            "text": lab.tokenizer.decode(m.token_ids).strip(),
            "finish_reason": m.finish,
            "num_tokens": len(m.token_ids),
            "seed": seed,
        }
        for m, seed in zip(made, seeds, strict=True)
    ]


def _reference(lab: Lab, adapter: Adapter, pairs: list[Row], path: Path, label: str) -> None:
    """Write pairs with the log-probs of both replies under the model that DPO starts from."""
    c = lab.config.dpo
    scorer = Scorer(lab.backbone, c.row_length, c.micro_rows)
    batch = 8 * c.micro_rows

    def work(start: int, stop: int) -> list[Row]:
        part = pairs[start:stop]
        sums = [[float(x.sum()) for x in branches] for branches in scorer.score(adapter, pair_rows(part, lab.encoder))]
        return [
            p | {"reference": {"chosen": chosen, "rejected": rejected}}
            for p, (chosen, rejected) in zip(part, sums, strict=True)
        ]

    append_in_batches(path, len(pairs), batch, work, label)


def score_pairs(lab: Lab, run: RunDir, source: Path, start: Adapter, start_hash: str) -> Path:
    """Copy foreign pairs into the run directory with reference log-probs under the model that DPO starts from."""
    target = run.path / "pairs.jsonl"
    rows = read_pairs(source)
    run.stage(
        "pairs",
        [target],
        {"pairs": sha256(source), "start": start_hash},
        lambda: _reference(lab, start, rows, target, "scoring"),
    )
    return target


def _save(lab: Lab, folder: Path, adapter: Adapter) -> None:
    if lab.backbone.lora is None:
        raise AssertionError("a bare backbone has no adapter to save")
    with replacing(folder) as temporary:
        save_adapter(temporary, adapter, lab.backbone.arch, lab.backbone.lora, lab.config.model.source)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
