"""The two training phases as stages of a run: SFT that makes M_0, and DPO on pairs with stored reference log-probs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esjax.errors import RunError
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.evolve.filters import screen_hashes
from esjax.evolve.pairs import Trunk, read_pairs, screened_pairs, trunks
from esjax.hub.fetch import public_name
from esjax.hub.shards import INDEX, SINGLE
from esjax.model.lora import Adapter, peft_tensors, save_adapter
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import publish_jsonl, replacing, sha256
from esjax.run.journal import gather
from esjax.run.progress import say
from esjax.runtime.context import current
from esjax.runtime.mesh import rows_at_once
from esjax.sample.rowbook import row_seed
from esjax.sample.score import Scorer
from esjax.tokens.batches import schedule
from esjax.train.loop import Phase, train
from esjax.train.losses import dpo_loss, reply_sums, sft_loss

Row = dict[str, Any]


def sft(experiment: Experiment, run: RunDir) -> None:
    """Phase 1: LoRA supervised fine-tuning on every supporter turn, with replay. Writes sft/adapter, M_0."""
    c, corpora = experiment.config, experiment.corpora
    inputs = {
        "weights": experiment.identity.get(SINGLE) or experiment.identity[INDEX],
        "prompts.system": bundled_hash(c.prompts.system),
    } | corpora.inputs("train", "valid", "replay")

    def work() -> Row:
        (examples, facts), valid = corpora.sft_rows, corpora.valid_rows
        corpora.write_screened(run)
        if facts["history"]:
            say(f"  histories: {counted(facts['history'])} (window {c.data.window})")
        scorer = Scorer(experiment.backbone, c.sft.row_length, rows_at_once("sft", c.sft))

        def validate(adapter: Adapter) -> float:
            return -float(np.concatenate([x for branches in scorer.score(adapter, valid) for x in branches]).mean())

        fresh = experiment.backbone.fresh_adapter(c.seed)
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
        _save(experiment, adapter_folder(run.path, 0), train(phase, experiment.backbone, fresh))
        return facts

    run.stage("sft", [adapter_folder(run.path, 0)], inputs, work, ("seed", "model", "lora", "data", "screen", "sft"))


def dpo(experiment: Experiment, run: RunDir, pairs: Path, name: str, start: Callable[[], Adapter]) -> None:
    """DPO on pairs whose reference log-probs are stored with them. Writes NAME/adapter."""
    folder = run.path / name

    def work() -> Row:
        rows = read_pairs(pairs)
        shared = trunks(rows, experiment.encoder, experiment.config.dpo)
        say(f"  {name}: {sharing(shared)}")
        if experiment.encoder.counts["unshared"]:
            say(
                f"  {experiment.encoder.counts['unshared']} prompts share no trunk, for the chat template is not prefix-stable"
            )
        reference = [
            np.asarray([[rows[i]["reference"][side] for side in ("chosen", "rejected")] for i in t.members], np.float32)
            for t in shared
        ]
        phase = Phase(
            name="dpo",
            folder=folder,
            board=run.path / "tensorboard" / name.replace("/", "-"),
            settings=experiment.config.dpo,
            examples=[t.rows for t in shared],
            loss=dpo_loss(experiment.config.dpo),
            seed=_seed(experiment, name),
            reference=reference,
            check_first=lambda metrics: check_start(metrics, experiment.backbone.dtype),
        )
        _save(experiment, folder / "adapter", train(phase, experiment.backbone, start()))
        return {"pairs": len(rows), "trunks": len(shared)}

    run.stage(name, [folder / "adapter"], {"pairs": sha256(pairs)}, work, ("seed", "model", "lora", "dpo"))


def sharing(shared: list[Trunk]) -> str:
    """How many tokens the trunks save, against a row for each reply."""
    pairs = sum(len(t.members) for t in shared)
    tokens = sum(len(t.rows.tokens) for t in shared)
    opening = [t.rows.branch > np.concatenate([[0], t.rows.branch[:-1]]) for t in shared]  # where a branch begins
    single = sum(
        int((t.rows.branch > 0).sum() + t.rows.position[o].sum()) for t, o in zip(shared, opening, strict=True)
    )
    return f"{pairs} pairs on {len(shared)} trunks, {tokens} tokens: {tokens / single:.0%} of one row a reply"


# By item size of the dtype: nats a token by which a model's log-probs of a reply may differ from its own reference. In the
# rows that the reference was computed in SmolLM2 differs by 6e-8 (float32) and 0 (bfloat16), in other rows (another packing,
# trunk or row length) by 1e-6 and 2e-3; M_0 and M_1 of the quickstart differ by 6e-2, M_0 and the backbone by 4e-1.
ROUNDING = {4: 2e-5, 2: 2e-2}


def check_start(metrics: dict[str, float], dtype: np.dtype) -> None:
    """DPO begins where the reference is: the first step's loss is ln 2 and its margin 0, to rounding. Raises RunError.

    What is checked is the cause: by how much the log-probs of the replies differ from their reference, in nats a token,
    whatever beta and the replies' lengths are.
    """
    if not metrics["drift"] <= ROUNDING[dtype.itemsize]:
        raise RunError(
            f"DPO does not start at its reference: log-probs are {metrics['drift']:.5f} nats a token away from it (loss "
            f"{metrics['preference_loss']:.5f} instead of ln 2, margin {metrics['margin']:.5f} instead of 0); the reference "
            "log-probs were made by another model"
        )


def write_references(experiment: Experiment, adapter: Adapter, pairs: Sequence[Row], path: Path, name: str) -> None:
    """Write pairs with the log-probs of both replies under the model that DPO, the stage ``name``, starts from.

    They are computed in the rows of DPO's first epoch and summed as its loss sums: where a reply lies in a row and what lies
    beside it moves its log-prob by rounding, in bfloat16 by tenths.
    """
    c = experiment.config.dpo
    at_once = rows_at_once("dpo", c)
    scorer = Scorer(experiment.backbone, c.row_length, at_once)
    shared = trunks(pairs, experiment.encoder, c)
    examples = [t.rows for t in shared]
    steps = schedule([len(e.tokens) for e in examples], c.row_length, c.batch_rows, 1, _seed(experiment, name))
    parts = [step[i : i + at_once] for step in steps for i in range(0, len(step), at_once)]
    most, branches = max(len(row) for step in steps for row in step), 2 * max(len(t.members) for t in shared)

    def work(missing: list[int], add: Callable[..., None]) -> None:
        wanted = set(missing)
        needed = [part for part in parts if any(i in wanted for row in part for t in row for i in shared[t].members)]
        for packed, rows, logprobs in scorer.batches(adapter, examples, needed):
            sums = np.asarray(reply_sums(rows.weight * logprobs, rows, most, branches))
            for r, row in enumerate(packed):
                for segment, trunk in enumerate(row):
                    for p, i in enumerate(shared[trunk].members):
                        if i in wanted:
                            chosen, rejected = (float(x) for x in sums[r, segment, 2 * p : 2 * p + 2])
                            add(i, pairs[i] | {"reference": {"chosen": chosen, "rejected": rejected}})

    gather(path, len(pairs), f"{name}: reference scoring", work)


def score_pairs(experiment: Experiment, run: RunDir, source: Path, start: Adapter, start_hash: str) -> Path:
    """Copy foreign pairs into the run directory with reference log-probs under the model that DPO starts from."""
    target = run.path / "pairs.jsonl"
    rows, dropped, found = screened_pairs(read_pairs(source), experiment.filters.screen)

    def work() -> Row:
        if dropped:
            say(f"  kept {len(rows)} of {len(rows) + dropped.total()} pairs; dropped: {counted(dropped)}")
        write_references(experiment, start, rows, target, "dpo")
        publish_jsonl(run.path / "screened.jsonl", found)
        return {"kept": len(rows), "dropped": dict(dropped)} if dropped else {}

    c = experiment.config
    inputs = {"pairs": sha256(source), "start": start_hash} | screen_hashes(c.filters, c.screen)
    run.stage("pairs", [target], inputs, work, ("seed", "model", "lora", "screen", "dpo"))
    return target


def _seed(experiment: Experiment, name: str) -> int:
    """Of the order in which the DPO stage ``name`` takes its pairs."""
    return row_seed(experiment.config.seed, name)


def _save(experiment: Experiment, folder: Path, adapter: Adapter) -> None:
    if experiment.backbone.lora is None:
        raise AssertionError("a bare backbone has no adapter to save")
    tensors = peft_tensors(adapter, experiment.backbone.arch)
    if current().processes.writer:
        with replacing(folder) as temporary:
            source = experiment.config.model.source
            base, revision = public_name(source, experiment.backbone.folder)
            # A converted file's source at least says what it is; `esjax export` writes a base that PEFT opens.
            save_adapter(temporary, tensors, experiment.backbone.lora, base or source, revision)


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
