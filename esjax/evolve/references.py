"""Reference log-probs: data that is stored with the pairs, computed in the rows of DPO's first epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esjax.errors import InputError
from esjax.evolve.experiment import Experiment
from esjax.evolve.filters import screen_hashes
from esjax.evolve.pairs import counted, read_pairs, screened_pairs, trunks
from esjax.model.lora import Adapter
from esjax.run.directory import RunDir
from esjax.run.files import publish_jsonl, sha256
from esjax.run.journal import gather
from esjax.run.progress import say
from esjax.runtime.mesh import rows_at_once
from esjax.sample.rowbook import row_seed
from esjax.sample.score import Scorer
from esjax.settings.schema import DpoSettings
from esjax.tokens.batches import schedule
from esjax.train.losses import reply_sums

Row = dict[str, Any]


def order_seed(experiment: Experiment, name: str) -> int:
    """Of the order in which the DPO stage ``name`` takes its pairs."""
    return row_seed(experiment.config.seed, name)


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


def write_references(experiment: Experiment, adapter: Adapter, pairs: Sequence[Row], path: Path, name: str) -> None:
    """Write pairs with the log-probs of both replies under the model that DPO, the stage ``name``, starts from.

    They are computed in the rows of DPO's first epoch and summed as its loss sums: where a reply lies in a row and what lies
    beside it moves its log-prob by rounding, in bfloat16 by tenths.
    """

    def work(missing: list[int], add: Callable[..., None]) -> None:
        for which in apart(pairs, experiment.config.dpo, order_seed(experiment, name)):
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
    steps = schedule([len(e.tokens) for e in examples], c.row_length, rows_a_step, 1, order_seed(experiment, name))
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
