"""The closing comparison of M_0, M_1, ... on the held-out dialogues."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from esjax.eval.metrics import distinct, mean_words
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.evolve.filters import KINDS, REPLY_REASONS, pattern_hashes
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import publish_text, sha256
from esjax.run.journal import gather
from esjax.run.jsonl import json_text
from esjax.run.progress import progress
from esjax.runtime.mesh import rows_at_once
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion
from esjax.sample.score import Scorer


def compare(experiment: Experiment, run: RunDir) -> list[dict[str, Any]]:
    """Score and answer the test dialogues with every model of the run; one stage a model. Returns a row a model."""
    return [_model(experiment, run, t) for t in range(experiment.config.evolve.rounds + 1)]


def _model(experiment: Experiment, run: RunDir, t: int) -> dict[str, Any]:
    c, asked, folder = experiment.config, experiment.corpora.asked, adapter_folder(run.path, t)
    predictions, scores = run.path / "eval" / f"m{t}.jsonl", run.path / "eval" / f"m{t}.scores.json"

    def work() -> None:
        adapter = experiment.adapter(folder)
        rows = experiment.corpora.test_rows
        scorer = Scorer(experiment.backbone, c.sft.row_length, rows_at_once("sft", c.sft))
        with progress(f"m{t} reference scoring", len(rows)) as advance:
            logprobs = np.concatenate(
                [x for branches in scorer.score(adapter, rows, lambda *_: advance(1)) for x in branches]
            )

        def answer(missing: list[int], add: Callable[..., None]) -> None:
            # The same seeds for every model: differences in the table are the models', not the draws'.
            prompts = {i: asked[i].prompt.ids.tolist() for i in missing}
            requests = [
                Request(i, p, row_seed(c.seed, "eval", asked[i].id), c.reply, c.reply.max_tokens, name=asked[i].id)
                for i, p in prompts.items()
            ]

            def done(request: Request, made: Completion) -> tuple[()]:
                x = asked[request.key]
                row = {
                    "id": x.id,
                    "messages": x.messages,
                    "reference": x.reference,
                    "prediction": experiment.tokenizer.decode(made.token_ids).strip(),
                    "finish_reason": made.finish,
                }
                add(request.key, row, len(made.token_ids))
                return ()

            experiment.generator.work(adapter, experiment.generator.grouped(requests), done)

        replies = gather(predictions, len(asked), f"m{t} replies", answer)
        texts = [r["prediction"] for r in replies]
        faults = Counter(
            experiment.filters.reply_fault(r["messages"], r["prediction"], r["finish_reason"]) for r in replies
        )
        row = {
            "model": f"M_{t}",
            "perplexity": math.exp(-float(logprobs.mean())),
            "words": mean_words(texts),
            "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2),
            "replies": len(texts),
            "would_drop": {reason: faults[reason] / len(texts) for reason in REPLY_REASONS},
        }
        publish_text(scores, json_text(row, indent=1) + "\n")

    inputs = {
        "adapter": sha256(folder),
        "prompts.system": bundled_hash(c.prompts.system),
    }
    inputs |= experiment.corpora.inputs("test") | pattern_hashes(c.filters, c.screen)
    run.stage(
        f"eval/m{t}",
        [predictions, scores],
        inputs,
        work,
        ("seed", "model", "lora", "data", "filters", "screen", "reply"),
    )
    row: dict[str, Any] = json.loads(scores.read_text())
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """The comparison as a plain table."""
    out = Table(title=f"Held-out dialogues, {rows[0]['replies']} replies a model", title_justify="left")
    out.add_column("")
    for row in rows:
        out.add_column(row["model"], justify="right")
    lines = {
        "reference perplexity": "perplexity",
        "words a reply": "words",
        "Distinct-1": "distinct_1",
        "Distinct-2": "distinct_2",
    }
    for label, key in lines.items():
        out.add_row(label, *(f"{row[key]:.{2 if key in ('perplexity', 'words') else 3}f}" for row in rows))
    for reason in REPLY_REASONS:
        if reason in KINDS[1:] and not any(row["would_drop"][reason] for row in rows):
            continue  # screened for only where the settings say so
        out.add_row(f"would be dropped: {reason}", *(f"{100 * row['would_drop'][reason]:.0f}%" for row in rows))
    return out
