"""The two training phases as stages of a run: SFT that makes M_0, and DPO on pairs with stored reference log-probs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from esjax.errors import InputError, RunError
from esjax.evolve.experiment import Experiment
from esjax.evolve.filters import screen_hashes
from esjax.evolve.folders import write_trained
from esjax.evolve.models import KEPT_AS
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
from esjax.sample.score import Scorer, mean_divergence
from esjax.settings.schema import DpoSettings
from esjax.tokens.batches import schedule
from esjax.train.keep import Best
from esjax.train.loop import Phase, Replay, train
from esjax.train.losses import dpo_loss, preference, reply_sums, sft_loss

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
            dropout=c.lora.dropout,
            wandb=c.train.wandb,
        )
        _save(experiment, place, train(phase, experiment.backbone, first))
        return facts

    place = run.path / "sft" / KEPT_AS[c.train.what]
    run.stage("sft", [place], inputs, work, ("seed", "model", "train", "lora", "data", "screen", "sft"))


def dpo(
    experiment: Experiment,
    run: RunDir,
    pairs: Path,
    name: str,
    start: Callable[[], Adapter],
    first: Callable[[], Adapter],
) -> None:
    """DPO on pairs whose reference log-probs are stored with them. Writes NAME/adapter.

    ``start`` gives what training starts from, ``first`` the model that divergence is measured from (M_0).
    """
    folder = run.path / name

    def work() -> Row:
        read = read_pairs(pairs)
        rows, held = ([read[i] for i in which] for which in apart(read, experiment.config.dpo, _seed(experiment, name)))
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
            watch=watch_start(experiment.backbone.dtype),
            replay=replay(experiment),
            validate=held_out(experiment, held, first) if experiment.config.dpo.validate_every else None,
            validate_every=experiment.config.dpo.validate_every,
            best=best,
            wandb=experiment.config.train.wandb,
        )
        _save(experiment, place, train(phase, experiment.backbone, start()))
        if best is not None:
            best.forget()
        return {"pairs": len(rows), "trunks": len(shared)} | ({"held_out": len(held)} if held else {})

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


def apart(pairs: Sequence[Row], c: DpoSettings, seed: int) -> tuple[list[int], list[int]]:
    """The numbers of the pairs to train on, and of those, of whole dialogues, that are held out.

    Raises InputError where one side would be empty.
    """
    if c.valid_share == 0:
        return list(range(len(pairs))), []
    by_dialogue: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        name = str(pair.get("id", i))  # people's own pairs need none
        by_dialogue.setdefault(name.rpartition("/")[0] or name, []).append(i)
    names, count = list(by_dialogue), max(1, round(c.valid_share * len(by_dialogue)))
    if count >= len(names):
        raise InputError(
            f"dpo.valid_share={c.valid_share}: the {len(pairs)} pairs are of one dialogue, so none can be held out; set it to 0, "
            "or ask for more contexts"
        )
    order = np.random.default_rng([seed, 1]).permutation(len(names))
    held = {i for n in order[:count] for i in by_dialogue[names[n]]}
    return [i for i in range(len(pairs)) if i not in held], sorted(held)


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


def write_references(experiment: Experiment, adapter: Adapter, pairs: Sequence[Row], path: Path, name: str) -> None:
    """Write pairs with the log-probs of both replies under the model that DPO, the stage ``name``, starts from.

    They are computed in the rows of DPO's first epoch and summed as its loss sums: where a reply lies in a row and what lies
    beside it moves its log-prob by rounding, in bfloat16 by tenths.
    """

    def work(missing: list[int], add: Callable[..., None]) -> None:
        for which in apart(pairs, experiment.config.dpo, _seed(experiment, name)):
            number = {i: n for n, i in enumerate(which)}
            if wanted := {number[i] for i in missing if i in number}:
                for i, reference in _references(experiment, adapter, [pairs[i] for i in which], wanted, name):
                    add(which[i], pairs[which[i]] | {"reference": reference})

    gather(path, len(pairs), f"{name}: reference scoring", work)


def _references(
    experiment: Experiment, adapter: Adapter, pairs: Sequence[Row], wanted: set[int], name: str
) -> Iterator[tuple[int, dict[str, float]]]:
    """The log-probs of the ``wanted`` ones of pairs that are trained on together, each with its number."""
    c = experiment.config.dpo
    at_once = rows_at_once("dpo", c)
    scorer = Scorer(experiment.backbone, c.row_length, at_once)
    shared = trunks(pairs, experiment.encoder, c)
    examples = [t.rows for t in shared]
    rows_a_step = c.batch_rows - c.replay_rows(experiment.config.data.replay_share)
    steps = schedule([len(e.tokens) for e in examples], c.row_length, rows_a_step, 1, _seed(experiment, name))
    parts = [step[i : i + at_once] for step in steps for i in range(0, len(step), at_once)]
    most, branches = max(len(row) for step in steps for row in step), 2 * max(len(t.members) for t in shared)
    needed = [part for part in parts if any(i in wanted for row in part for t in row for i in shared[t].members)]
    for packed, rows, logprobs in scorer.batches(adapter, examples, needed):
        sums = np.asarray(reply_sums(rows.weight * logprobs, rows, most, branches))
        for r, row in enumerate(packed):
            for segment, trunk in enumerate(row):
                for p, i in enumerate(shared[trunk].members):
                    if i in wanted:
                        chosen, rejected = (float(x) for x in sums[r, segment, 2 * p : 2 * p + 2])
                        yield i, {"chosen": chosen, "rejected": rejected}


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
    inputs = {"pairs": sha256(source), "start": start_hash} | screen_hashes(c.screen)
    run.stage("pairs", [target], inputs, work, ("seed", "model", "train", "lora", "screen", "dpo"))
    return target


def _seed(experiment: Experiment, name: str) -> int:
    """Of the order in which the DPO stage ``name`` takes its pairs."""
    return row_seed(experiment.config.seed, name)


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


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in sorted(counts.items()))
