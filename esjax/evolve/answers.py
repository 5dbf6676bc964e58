"""Answers of any model to any prompts: what ``esjax sample`` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esjax.config import Config
from esjax.corpus.sources import check_messages
from esjax.errors import InputError
from esjax.evolve.lab import Lab
from esjax.mesh import batch_groups
from esjax.model.lora import Adapter
from esjax.runlog import gather, read_jsonl, say
from esjax.sample.constrain import LONGEST, START, Field, compile_template
from esjax.sample.generate import Completion, Request, row_seed


def read_questions(file: Path) -> list[dict[str, Any]]:
    """Rows with an id and messages that await an answer. Raises InputError naming file and row."""
    asked = read_jsonl(file, ("id", "messages"))
    if not asked:
        raise InputError(f"{file}: empty; expected one JSON object a line with id and messages")
    for number, row in enumerate(asked, start=1):
        row["messages"] = check_messages(row["messages"], f"{file}, row {number}", last="user")
    _check_ids(asked, file)
    return asked


def _check_ids(rows: list[dict[str, Any]], file: Path) -> None:
    """Raise InputError for an id that is no text or integer, or that two rows have: their answers would share their noise."""
    lines = (i for i, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1) if line.strip())
    first: dict[str, int] = {}
    for line, row in zip(lines, rows, strict=True):
        name = row["id"]
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise InputError(f"{file}, line {line}: the id {name!r} must be a text or an integer")
        if first.setdefault(str(name), line) != line:
            raise InputError(
                f'{file}, lines {first[str(name)]} and {line}: both have the id {str(name)!r} (1 and "1" are the same); '
                "give each row an id of its own"
            )


def answer(
    lab: Lab,
    adapter: Adapter,
    questions: list[dict[str, Any]],
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
        field = Field(pattern, min(max(1, most - 1), LONGEST), min_tokens=0)
        try:
            form = compile_template([field], tokenizer, lab.backbone.arch.vocab)
        except InputError as e:
            raise InputError(f"--regex or --json-schema, in reply.max_tokens={most}: {e}") from e
    prompts = [tokenizer.prompt(lab.encoder.with_system(q["messages"])) for q in questions]
    generator = lab.generator
    devices = batch_groups()
    generator.lanes = min(how.batch, -(-count * len(prompts) // devices) * devices)

    def work(missing: list[int], add: Callable[..., None]) -> None:
        requests = []
        for i in missing:
            n, k = divmod(i, count)
            seed = row_seed(config.seed, "sample", questions[n]["id"], *([k] if k else []))
            requests.append(Request(i, prompts[n], seed, how, most, START if form else 0, str(questions[n]["id"])))

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
