"""Answers of any model to any prompts: what ``esjax sample`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esjax.config import Config
from esjax.corpus.sources import check_messages
from esjax.errors import InputError, within
from esjax.evolve.lab import Lab
from esjax.mesh import batch_groups
from esjax.model.lora import Adapter
from esjax.runlog import Line, gather, read_jsonl, say, where_of
from esjax.sample.constrain import START, Field, compile_template
from esjax.sample.generate import Completion, Request, row_seed


def read_questions(file: Path) -> list[Line]:
    """Rows with an id and messages that await an answer. Raises InputError naming file and line."""
    asked = read_jsonl(file, ("id", "messages"))
    if not asked:
        raise InputError(f"{file}: empty; expected one JSON object a line with id and messages")
    for row in asked:
        row["messages"] = check_messages(row["messages"], row.where, last="user")
    return asked


def answer(
    lab: Lab,
    adapter: Adapter,
    questions: Sequence[dict[str, Any]],
    count: int,
    pattern: str | None,
    config: Config,
    out: Path,
) -> None:
    """Write ``count`` answers to each question, drawn as ``config.reply`` says; all match ``pattern``, if there is one.

    An answer hangs on ``config.seed``, its question's id and its number alone; the first is that of a count of one.
    """
    how, most, tokenizer = config.reply, config.reply.max_tokens, lab.tokenizer
    form = None
    if pattern is not None:
        form = compile_template([Field(pattern, max(1, most - 1))], tokenizer, lab.backbone.arch.vocab)
    prompts = []
    for number, q in enumerate(questions, start=1):
        with within(where_of(q, number)):
            prompts.append(tokenizer.prompt(lab.encoder.with_system(q["messages"])))
    generator = lab.generator
    devices = batch_groups()
    generator.lanes = min(how.batch, -(-count * len(prompts) // devices) * devices)

    def work(missing: list[int], add: Callable[..., None]) -> None:
        requests = []
        for i in missing:
            n, k = divmod(i, count)
            seed = row_seed(config.seed, "sample", questions[n]["id"], *([k] if k else []))
            requests.append(Request(i, prompts[n], seed, how, most, START if form else 0))

        def done(request: Request, made: Completion) -> tuple[()]:
            n, k = divmod(request.key, count)
            row = {
                "id": questions[n]["id"],
                **({"sample": k} if count > 1 else {}),
                "text": tokenizer.decode(made.token_ids),
                "token_ids": made.token_ids,
                "logprobs": made.logprobs,
                "finish_reason": made.finish,
            }
            add(request.key, row, len(made.token_ids))
            return ()

        generator.work(adapter, generator.grouped(requests), done, form.automaton if form else None)

    gather(out, count * len(prompts), "replies", work)
    say(f"  {generator.usage}")
