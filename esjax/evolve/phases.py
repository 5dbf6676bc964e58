"""The two training phases as stages of a run: SFT that makes M_0, and DPO on pairs with stored reference log-probs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from esjax.corpus.sources import read_conversations
from esjax.errors import InputError, RunError
from esjax.evolve.lab import Lab, adapter_folder
from esjax.evolve.pairs import Trunk, read_pairs, trunks
from esjax.hosts import hosts
from esjax.hub.fetch import public_name
from esjax.model.lora import Adapter, peft_tensors, save_adapter
from esjax.rows import Rows
from esjax.rundir import RunDir, bundled_hash
from esjax.runlog import gather, replacing, say, sha256
from esjax.sample.generate import row_seed
from esjax.sample.score import Scorer
from esjax.train.loop import Phase, train
from esjax.train.losses import dpo_loss, sft_loss

Row = dict[str, Any]


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
        if not valid:
            raise InputError(f"{c.data.valid}: no dialogue fits data.window={c.data.window} tokens; raise it")
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
    if not examples:
        raise InputError(f"{c.data.train}: no dialogue fits data.window={c.data.window} tokens; raise it")
    facts: Row = {"dialogues": len(lab.train), "dialogue_rows": len(examples)}
    if c.data.replay is not None and c.data.replay_share > 0:
        replay = [row for _, messages in read_conversations(c.data.replay) for row in encoder.chat(messages)]
        if not replay:
            raise InputError(f"{c.data.replay}: no conversation fits data.window={c.data.window} tokens; raise it")
        want = round(len(examples) * c.data.replay_share / (1 - c.data.replay_share))
        order = np.random.default_rng((c.seed, 1)).permutation(len(replay))
        examples += [replay[order[i % len(replay)]] for i in range(want)]
        facts["replay_rows"] = want
    facts |= {"history": dict(encoder.counts), "target_tokens": int(sum((e.weight != 0).sum() for e in examples))}
    if encoder.counts:
        say(f"  histories: {counted(encoder.counts)} (window {c.data.window})")
    return examples, facts


def dpo(lab: Lab, run: RunDir, pairs: Path, name: str, start: Callable[[], Adapter]) -> None:
    """DPO on pairs whose reference log-probs are stored with them. Writes NAME/adapter."""
    folder = run.path / name

    def work() -> Row:
        rows = read_pairs(pairs)
        shared = trunks(rows, lab.encoder, lab.config.dpo)
        say(f"  {name}: {sharing(shared)}")
        if lab.encoder.counts["unshared"]:
            say(
                f"  {lab.encoder.counts['unshared']} prompts share no trunk, for the chat template is not prefix-stable"
            )
        reference = [
            np.asarray([[rows[i]["reference"][side] for side in ("chosen", "rejected")] for i in t.members], np.float32)
            for t in shared
        ]
        phase = Phase(
            name="dpo",
            folder=folder,
            board=run.path / "tensorboard" / name.replace("/", "-"),
            settings=lab.config.dpo,
            examples=[t.rows for t in shared],
            loss=dpo_loss(lab.config.dpo),
            seed=row_seed(lab.config.seed, name),
            reference=reference,
            check_first=lambda metrics: check_start(metrics, lab.backbone.dtype.itemsize == 4),
        )
        _save(lab, folder / "adapter", train(phase, lab.backbone, start()))
        return {"pairs": len(rows), "trunks": len(shared)}

    run.stage(name, [folder / "adapter"], {"pairs": sha256(pairs)}, work)


def sharing(shared: list[Trunk]) -> str:
    """How many tokens the trunks save, against a row for each reply."""
    pairs = sum(len(t.members) for t in shared)
    tokens = sum(len(t.rows.tokens) for t in shared)
    opening = [t.rows.branch > np.concatenate([[0], t.rows.branch[:-1]]) for t in shared]  # where a branch begins
    single = sum(int((t.rows.branch > 0).sum() + t.rows.limit[o].sum()) for t, o in zip(shared, opening, strict=True))
    return f"{pairs} pairs on {len(shared)} trunks, {tokens} tokens: {tokens / single:.0%} of one row a reply"


def check_start(metrics: dict[str, float], float32: bool) -> None:
    """DPO begins where the reference is: the first step's loss is ln 2 and its margin 0, to rounding. Raises RunError."""
    tolerance = 1e-3 if float32 else 5e-2
    loss, margin = metrics["preference_loss"], metrics["margin"]
    if abs(loss - math.log(2)) > tolerance or abs(margin) > tolerance:
        raise RunError(
            f"DPO does not start at its reference: loss {loss:.5f} instead of ln 2, margin {margin:.5f} instead of 0; "
            "the reference log-probs were made by another model"
        )


def write_references(lab: Lab, adapter: Adapter, pairs: list[Row], path: Path, label: str) -> None:
    """Write pairs with the log-probs of both replies under the model that DPO starts from; those of one trunk together."""
    c = lab.config.dpo
    scorer = Scorer(lab.backbone, c.row_length, c.micro_rows)
    shared = trunks(pairs, lab.encoder, c)
    order = [(t, p) for t, trunk in enumerate(shared) for p in range(len(trunk.members))]  # trunk and place on it
    batch = 8 * c.micro_rows

    def work(missing: list[int], add: Callable[..., None]) -> None:
        for start in range(0, len(missing), batch):
            part = missing[start : start + batch]
            needed = sorted({order[i][0] for i in part})
            scored = dict(zip(needed, scorer.score(adapter, [shared[t].rows for t in needed]), strict=True))
            for i in part:
                t, p = order[i]
                chosen, rejected = (float(x.sum()) for x in scored[t][2 * p : 2 * p + 2])
                add(i, pairs[shared[t].members[p]] | {"reference": {"chosen": chosen, "rejected": rejected}})

    gather(path, len(pairs), label, work)


def score_pairs(lab: Lab, run: RunDir, source: Path, start: Adapter, start_hash: str) -> Path:
    """Copy foreign pairs into the run directory with reference log-probs under the model that DPO starts from."""
    target = run.path / "pairs.jsonl"
    rows = read_pairs(source)
    run.stage(
        "pairs",
        [target],
        {"pairs": sha256(source), "start": start_hash},
        lambda: write_references(lab, start, rows, target, "scoring"),
    )
    return target


def _save(lab: Lab, folder: Path, adapter: Adapter) -> None:
    if lab.backbone.lora is None:
        raise AssertionError("a bare backbone has no adapter to save")
    tensors = peft_tensors(adapter, lab.backbone.arch)
    if hosts.writer:
        with replacing(folder) as temporary:
            source = lab.config.model.source
            base, revision = public_name(source, lab.backbone.folder)
            # A converted file's source at least says what it is; `esjax export` writes a base that PEFT opens.
            save_adapter(temporary, tensors, lab.backbone.lora, base or source, revision)


def counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
