"""What can be known of a run before anything runs or is written: files, templates, sizes. Each command checks what it uses."""

from __future__ import annotations

import re

from esjax.errors import InputError
from esjax.evolve.choose import SPECIFICITY, measures
from esjax.evolve.experiment import Experiment
from esjax.evolve.pairs import draw, trunks
from esjax.evolve.references import apart
from esjax.evolve.replies import lengths
from esjax.run.directory import RunDir
from esjax.run.jsonl import Line
from esjax.run.metrics import check_tracked
from esjax.runtime.context import current
from esjax.runtime.mesh import check_split, rows_at_once
from esjax.settings.schema import DpoSettings


def check_sft(experiment: Experiment, run: RunDir) -> None:
    """Phase 1's files are read and encoded, and fit. Raises InputError, in all processes of the run."""
    run.check_base(experiment.identity, experiment.revision)
    with current().processes.in_step():
        _check_sft(experiment, run)


def check_evolve(experiment: Experiment, run: RunDir) -> None:
    """The same for phase 1, all rounds and the closing table."""
    run.check_base(experiment.identity, experiment.revision)
    c, corpora = experiment.config, experiment.corpora
    with current().processes.in_step():
        rounds = [int(found[1]) for name in run.manifest["stages"] if (found := re.match(r"round(\d+)/", name))]
        begun = max((t for t in rounds if run.made(f"round{t}/replies")), default=0)
        if begun > c.evolve.rounds:
            raise InputError(
                f"{run.path}: evolve.rounds={c.evolve.rounds}, but round {begun} was begun; set it to {begun} or more"
            )
        _check_sft(experiment, run)
        rows_at_once("dpo", c.dpo)
        _check_replay(experiment)
        check_split("evolve.batch", c.evolve.batch)
        _ = corpora.leaks, corpora.asked, corpora.test_rows
        if all(_done(run, f"round{t}/replies") for t in range(1, c.evolve.rounds + 1)):
            return
        pool, _ = corpora.pool
        if SPECIFICITY in measures(c):
            for t in range(1, c.evolve.rounds + 1):
                names = {x.id.rpartition("/")[0] for x in draw(pool, c.evolve.contexts_per_round, (c.seed, t))}
                if len(names) < 2:
                    raise InputError(
                        f"round {t}: all contexts are of one dialogue, and specificity needs other people's; raise "
                        "evolve.contexts_per_round, or give more dialogues"
                    )
        longest, most = max(x.tokens for x in pool), experiment.backbone.arch.max_positions
        _, reflect, refine, *reflection = lengths(experiment, longest)
        drawn = c.evolve.draft.max_tokens + sum(reflection)
        asked = longest + max(reflect + drawn, refine + drawn + c.evolve.refinement.max_tokens)
        if asked > most:
            raise InputError(
                f"a context of {longest} tokens, its reflection, its draft and its refinement take {asked} positions, and the "
                f"model has {most}; set evolve.context_tokens to {longest - (asked - most)} or less, or shorten the prompts"
            )


def _check_sft(experiment: Experiment, run: RunDir) -> None:
    c, most = experiment.config, experiment.backbone.arch.max_positions
    if c.data.window > most:
        raise InputError(
            f"data.window={c.data.window} exceeds the model's {most} positions; lower it to {most} or less"
        )
    rows_at_once("sft", c.sft)
    check_tracked(c.train.wandb)
    if not _done(run, "sft"):
        _ = experiment.corpora.leaks, experiment.corpora.sft_rows, experiment.corpora.valid_rows


def _check_replay(experiment: Experiment) -> None:
    """What DPO trains on beside its pairs is read, and fits."""
    if experiment.config.dpo.replay_weight > 0:
        _ = experiment.corpora.replay_rows


def _done(run: RunDir, name: str) -> bool:
    return bool(run.manifest["stages"].get(name, {}).get("status") == "done")


def check_dpo(experiment: Experiment, run: RunDir, pairs: list[Line]) -> None:
    """Each pair of a file is encoded, and fits a row and the model's positions. Raises InputError naming its line."""
    run.check_base(experiment.identity, experiment.revision)
    c, most = experiment.config.dpo, experiment.backbone.arch.max_positions
    with current().processes.in_step():
        rows_at_once("dpo", c)
        check_tracked(experiment.config.train.wandb)
        _check_replay(experiment)
        apart(pairs, c, 0)
        if c.validate_every > 0:
            _ = experiment.corpora.valid_rows
        for pair in pairs if c.pair_weights != "none" else ():
            if (
                isinstance(weight := pair.get("weight"), bool)
                or not isinstance(weight, int | float)
                or not 0 < weight < 1e6
            ):
                raise InputError(
                    f"{pair.where}: the weight is {weight!r:.40}, and dpo.pair_weights={c.pair_weights} wants a number above "
                    "0; set it to none, or give a run's pairs.jsonl"
                )
        alone = trunks(pairs, experiment.encoder, DpoSettings(trunk="prompt"))
        for pair, (_, rows) in zip(pairs, alone, strict=True):
            tokens, positions = len(rows.tokens), int(rows.position.max()) + 1
            if tokens > c.row_length:
                raise InputError(
                    f"{pair.where}: the pair has {tokens} tokens and a row {c.row_length}; set dpo.row_length to {tokens} "
                    "or more, or shorten the pair"
                )
            if positions > most:
                raise InputError(
                    f"{pair.where}: prompt and reply take {positions} positions, and the model has {most}; shorten them"
                )
