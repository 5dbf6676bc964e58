"""The two training phases as stages of a run: SFT that makes M_0, and DPO on pairs with stored reference log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from esjax.errors import RunError
from esjax.evolve.alarms import alarms
from esjax.evolve.experiment import Experiment
from esjax.evolve.folders import write_trained
from esjax.evolve.models import KEPT_AS
from esjax.evolve.pairs import Trunk, counted, length_ratio, read_pairs, trunks
from esjax.evolve.references import apart, order_seed
from esjax.hub.fetch import public_name
from esjax.hub.shards import INDEX, SINGLE
from esjax.model.lora import Adapter, peft_tensors, save_adapter
from esjax.rows import Rows
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import replacing, sha256
from esjax.run.jsonl import read_jsonl
from esjax.run.progress import say
from esjax.runtime.context import current
from esjax.runtime.mesh import rows_at_once
from esjax.sample.score import Scorer, mean_divergence
from esjax.settings.schema import DpoSettings
from esjax.train.keep import Best
from esjax.train.loop import Phase, Replay, train
from esjax.train.losses import dpo_loss, preference, sft_loss

Row = dict[str, Any]


def sft(experiment: Experiment, run: RunDir) -> None:
    """Phase 1: LoRA supervised fine-tuning on every supporter turn, with replay. Writes sft/adapter, M_0."""
    c, corpora = experiment.config, experiment.corpora
    inputs = {
        "weights": experiment.identity.get(SINGLE) or experiment.identity[INDEX],
        "prompts.system": bundled_hash(c.prompts.system),
    } | corpora.inputs("train", "valid", "replay")
    if c.lora.start is not None:
        inputs["lora.start"] = experiment.start[1]

    def work() -> Row:
        (examples, facts), valid = corpora.sft_rows, corpora.valid_rows
        corpora.write_screened(run)
        if facts["history"]:
            say(f"  histories: {counted(facts['history'])} (window {c.data.window})")
        scorer = Scorer(experiment.backbone, c.sft.row_length, rows_at_once("sft", c.sft))

        def validate(adapter: Adapter) -> dict[str, float]:
            each = [x for branches in scorer.score(adapter, valid) for x in branches]
            return {"valid_loss": -float(np.concatenate(each).mean())}

        first, _ = experiment.start
        loss = validate(first)["valid_loss"]
        say(f"  {len(examples)} examples, {facts['target_tokens']} target tokens; the loss at first {loss:.3f}")
        phase = _sft_phase(experiment, run.path / "sft", examples)
        phase = replace(phase, validate=validate, validate_every=c.sft.validate_every)
        _save(experiment, place, train(phase, experiment.backbone, first))
        return facts | experiment.backbone.sizes | {"tokens": _tokens(examples) * c.sft.epochs}

    place = run.path / "sft" / KEPT_AS[c.train.what]
    run.stage("sft", [place], inputs, work, ("seed", "model", "train", "lora", "data", "screen", "sft"))


def _sft_phase(experiment: Experiment, folder: Path, examples: Sequence[Rows]) -> Phase:
    c = experiment.config
    return Phase(
        name="sft",
        folder=folder,
        board=folder.parent / "tensorboard" / folder.name,
        settings=c.sft,
        examples=examples,
        loss=sft_loss,
        seed=c.seed,
        dropout=c.lora.dropout,
        wandb=c.train.wandb,
    )


def sft_on(
    experiment: Experiment, folder: Path, examples: Callable[[], tuple[list[Rows], Row]], start: Callable[[], Adapter]
) -> Row:
    """SFT on other examples than the corpus' own, with the same settings, from ``start``. Writes FOLDER/adapter."""
    rows, facts = examples()
    trained = train(_sft_phase(experiment, folder, rows), experiment.backbone, start())
    _save(experiment, folder / KEPT_AS[experiment.config.train.what], trained)
    return facts | {"tokens": _tokens(rows) * experiment.config.sft.epochs}


def _tokens(examples: Sequence[Rows]) -> int:
    return sum(len(e.tokens) for e in examples)


class Start(NamedTuple):
    """Where DPO starts."""

    adapter: Callable[[], Adapter]  # what is trained
    first: Callable[[], Adapter]  # M_0, from which divergence is measured
    at_reference: bool = True  # whether the pairs' reference is the model that is trained


def dpo(experiment: Experiment, run: RunDir, pairs: Path, name: str, start: Start) -> None:
    """DPO on pairs whose reference log-probs are stored with them. Writes NAME/adapter."""
    folder = run.path / name

    def work() -> Row:
        read = read_pairs(pairs)
        rows, held = (
            [read[i] for i in which] for which in apart(read, experiment.config.dpo, order_seed(experiment, name))
        )
        c = experiment.config.dpo
        shared = trunks(rows, experiment.encoder, c)
        say(f"  {name}: {sharing(shared)}")
        if experiment.encoder.counts["unshared"]:
            say(
                f"  {experiment.encoder.counts['unshared']} prompts share no trunk, for the chat template is not prefix-stable"
            )
        reference = [np.asarray([_reference(rows[i], c) for i in t.members], np.float32) for t in shared]
        phase = Phase(
            name="dpo",
            folder=folder,
            board=run.path / "tensorboard" / name.replace("/", "-"),
            settings=experiment.config.dpo,
            examples=[t.rows for t in shared],
            loss=dpo_loss(experiment.config.dpo),
            seed=order_seed(experiment, name),
            reference=reference,
            watch=watch_start(experiment.backbone.dtype) if start.at_reference else None,
            replay=replay(experiment),
            validate=held_out(experiment, held, start.first) if experiment.config.dpo.validate_every else None,
            validate_every=experiment.config.dpo.validate_every,
            best=best,
            wandb=experiment.config.train.wandb,
        )
        _save(experiment, place, train(phase, experiment.backbone, start.adapter()))
        if best is not None:
            best.forget()
        facts: Row = {"pairs": len(rows), "trunks": len(shared)} | ({"held_out": len(held)} if held else {})
        facts["tokens"] = _tokens([t.rows for t in shared]) * c.epochs
        found = alarms(read_jsonl(folder / "metrics.jsonl"), length_ratio(rows))
        for alarm in found:
            say(f"  {name}: {alarm}")
        return facts | ({"alarms": found} if found else {})

    place, best = folder / KEPT_AS[experiment.config.train.what], None
    if experiment.config.dpo.keep == "best":
        save, load = partial(_save, experiment), experiment.adapter
        best = Best(folder / "best", "valid_loss", save, load)

    inputs = {"pairs": sha256(pairs)}
    settings: tuple[str, ...] = ("seed", "model", "train", "lora", "dpo")
    if experiment.config.dpo.replay_weight > 0:
        inputs |= experiment.corpora.inputs("replay")
        settings += ("data.replay", "data.replay_share", "data.window", "screen")
    if experiment.config.dpo.validate_every > 0:
        inputs |= experiment.corpora.inputs("valid")
    run.stage(name, [place], inputs, work, settings)


def _reference(pair: Row, c: DpoSettings) -> tuple[float, float, float]:
    """A pair's log-probs under the reference, and its weight: 1, but where the settings made it another."""
    weight = 1.0 if c.pair_weights == "none" else float(pair["weight"])
    return pair["reference"]["chosen"], pair["reference"]["rejected"], weight


def held_out(
    experiment: Experiment, pairs: Sequence[Row], first: Callable[[], Adapter]
) -> Callable[[Adapter], dict[str, float]]:
    """Measures of what is trained: the loss, margin and accuracy of held-out pairs, and how far it is from ``first``."""
    c = experiment.config
    shared = trunks(pairs, experiment.encoder, c.dpo) if pairs else []
    scorer = Scorer(experiment.backbone, c.dpo.row_length, rows_at_once("dpo", c.dpo))
    valid, begun = experiment.corpora.valid_rows, first()

    def validate(adapter: Adapter) -> dict[str, float]:
        rows = rows_at_once("sft", c.sft)
        out = {"valid_kl": mean_divergence(experiment.backbone, (adapter, begun), valid, c.sft.row_length, rows)}
        sums, given, tokens = [], [], []
        for trunk, branches in zip(shared, scorer.score(adapter, [t.rows for t in shared]), strict=True):
            for p, i in enumerate(trunk.members):
                sides, w = branches[2 * p : 2 * p + 2], trunk.rows.weight
                weights = [w[(trunk.rows.branch == b) & (w != 0)] for b in (2 * p + 1, 2 * p + 2)]
                sums.append([(x * y).sum(dtype=np.float64) for x, y in zip(weights, sides, strict=True)])
                tokens.append([x.sum() for x in weights])
                given.append([pairs[i]["reference"][side] for side in ("chosen", "rejected")])
        if sums:
            loss, margin, _ = preference(c.dpo, *map(np.asarray, (sums, given, tokens)))
            out |= {"valid_loss": float(loss.mean()), "valid_margin": float(margin.mean())}
            out["valid_accuracy"] = float((margin > 0).mean())
        return out

    return validate


def replay(experiment: Experiment) -> Replay | None:
    """The general data that stands beside the pairs of a DPO round, if some is to."""
    c = experiment.config
    if not (rows := c.dpo.replay_rows(c.data.replay_share)):
        return None
    examples = experiment.corpora.replay_rows
    say(f"  replay: {rows} of a step's {c.dpo.batch_rows} rows, from {len(examples)} examples")
    return Replay(examples, rows, c.dpo.replay_weight)


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
    """DPO begins where the reference is: with the sigmoid the first loss is ln 2 and the margin 0, to rounding. Raises RunError.

    What is checked is the cause: by how much the log-probs of the replies differ from their reference, in nats a token,
    whatever beta and the replies' lengths are.
    """
    if not metrics["drift"] <= ROUNDING[dtype.itemsize]:
        raise RunError(
            f"DPO does not start at its reference: log-probs are {metrics['drift']:.5f} nats a token away from it (loss "
            f"{metrics['preference_loss']:.5f}, margin {metrics['margin']:.5f}); the reference log-probs were made by another "
            "model"
        )


def watch_start(dtype: np.dtype) -> Callable[[int, int, dict[str, float]], None]:
    """Checks DPO's first step, and warns once where a tenth of the steps (two at least) have left the model at its reference."""
    still = 0

    def watch(number: int, steps: int, metrics: dict[str, float]) -> None:
        nonlocal still
        if number == 0:
            check_start(metrics, dtype)
        still = still + 1 if metrics["drift"] <= ROUNDING[dtype.itemsize] else 0
        if still == max(3, -(-steps // 10) + 1):  # the first step is at the reference by right
            say(
                f"  dpo: after {number} steps the loss still is {metrics['preference_loss']:.4f}, as at the reference: nothing "
                "is learned; raise dpo.learning_rate, or try lora.init=a_zero"
            )

    return watch


def _save(experiment: Experiment, folder: Path, adapter: Adapter) -> None:
    backbone = experiment.backbone
    if backbone.start is not None:
        write_trained(folder, backbone, adapter, experiment.tokenizer)
        return
    if backbone.lora is None:
        raise AssertionError("a bare backbone has no adapter to save")
    tensors = peft_tensors(adapter, backbone.arch)
    if current().processes.writer:
        with replacing(folder) as temporary:
            source = experiment.config.model.source
            base, revision = public_name(source, backbone.folder)
            # A converted file's source at least says what it is; `esjax export` writes a base that PEFT opens.
            save_adapter(temporary, tensors, backbone.lora, base or source, revision)
