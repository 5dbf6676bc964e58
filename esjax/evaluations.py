"""What ``esjax eval`` does beside a run's own comparison: others' replies, several seeds, multiple choice, a judge checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esjax.errors import InputError
from esjax.opened import Model, devices, open_model
from esjax.settings.files import Overrides
from esjax.settings.schema import Config


def evaluation_config(run_dir: str, given: Overrides, out: object) -> Config:
    """A run's settings with what was given over them. Raises InputError where these need a folder of their own."""
    from esjax.evolve.models import run_settings
    from esjax.settings.identity import differing

    config = run_settings(f"{run_dir}:m0", given.settings())
    own = run_settings(f"{run_dir}:m0", {})
    if config is None or own is None:
        raise AssertionError("the name says that it is a run's")
    if out is None and (changed := differing(own, config)):
        raise InputError(
            f"{', '.join(changed)}: the run was evaluated with other values; give --out for a folder of its own"
        )
    return config


def evaluate_predictions(
    predictions: Sequence[str], source: str, out: str | Path, given: Overrides, model: str | None = None
) -> list[dict[str, Any]]:
    """Compare systems' replies to the dialogues of a source, each with the first; the command `eval --predictions`.

    Args:
        predictions: files of {"id": DIALOGUE/TURN, "text"}, as FILE or NAME=FILE.
        source: the dialogues, as ``data.test``.
        out: a folder for results.parquet and results.json; it must not exist.
        given: settings.
        model: under which specificity is measured; left out, it is not.

    Returns the records of results.json. Raises InputError.
    """
    from esjax.eval import others
    from esjax.eval.judges.ask import judged, prompts_folder
    from esjax.eval.judges.open import check_judge, open_judge
    from esjax.eval.measure import measure
    from esjax.evolve.filters import Filters
    from esjax.evolve.models import USED, uses
    from esjax.run.files import check_new

    check_new(Path(out), "folder")
    config, asked = given.load(together=False), given.settings()
    judge = config.eval.judge if config.eval.judge.source is not None else None
    if judge is not None:
        check_judge(judge)
        folder = prompts_folder(judge.prompts)
    opened = None if model is None else open_model(model, {k: v for k, v in asked.items() if uses(USED, k)})
    systems = others.read_systems(others.named(predictions), source, config)
    with devices(config):
        filters = Filters.load(config.filters, config.screen)
        values = measure(systems, config, filters, None if opened is None else opened.opened)
        if judge is not None:
            pairs = [(name, next(iter(systems))) for name in list(systems)[1:]]
            values += judged(open_judge(judge), judge.asks, folder, systems, pairs)
    return others.write(Path(out), values, list(systems), config)


def evaluate_seeds(runs: Sequence[str], out: str | Path | None = None) -> list[dict[str, Any]]:
    """The evaluations of runs that differ in their seed alone, as one: intervals over seeds and dialogues; `eval --seeds`.

    Args:
        runs: three or more evaluated runs, or folders of ``evaluate``'s ``out``.
        out: a JSON file for the records; it must not exist. None writes none.

    Returns records as those of a run, with each seed's own numbers. Raises InputError.
    """
    from esjax.eval.seeds import summarised
    from esjax.run.files import check_new

    if out is not None:
        check_new(Path(out), "file")
    return summarised(runs, None if out is None else Path(out))


def evaluate_choices(
    choices: str | Path, model: str, given: Overrides, out: str | Path | None = None
) -> list[dict[str, Any]]:
    """How often a model finds the right one of a few answers likeliest; the command `eval --choices`.

    Args:
        choices: a file in EmoBench's format (EA.jsonl or EU.jsonl).
        model: as for ``open_model``.
        given: settings.
        out: a JSON file for the records; it must not exist. None writes none.

    Returns a record for each task and category, with Wilson's interval. Raises InputError.
    """
    from esjax.eval.choices import accuracies, read_items
    from esjax.run.files import check_new, write_text
    from esjax.run.jsonl import json_text

    if out is not None:
        check_new(Path(out), "file")
    items = read_items(Path(choices))
    opened = Model(model, given)
    with devices(opened.config):
        records = [a._asdict() for a in accuracies(*opened.opened, items)]
    if out is not None:
        write_text(Path(out), json_text(records, indent=1) + "\n")
    return records


def judge_agreement(ratings: str | Path, given: Overrides) -> list[dict[str, Any]]:
    """How far the judge of ``eval.judge`` agrees with people; the command `eval judge-check`.

    Args:
        ratings: JSON Lines of {"id", "messages", "reply", "rubric", "rating"} or {"id", "messages", "replies", "preferred"}.
        given: settings.

    Returns a record for pairs and for each rubric: weighted kappa with its interval over dialogues, the share of equal
    answers, the share of one verdict in both orders, and of answers without a verdict. Raises InputError, TransientError.
    """
    from esjax.eval.judges import check
    from esjax.eval.judges.ask import prompts_folder
    from esjax.eval.judges.open import open_judge
    from esjax.evolve.models import uses

    config = given.load(together=False)
    for key in given.single:
        if not uses(("eval.judge", "eval.resamples", "seed"), key):
            raise InputError(f"--{key}: judge-check makes no use of it; leave it out")
    if config.eval.judge.source is None:
        raise InputError("eval.judge.source is not set: name the judge that is to be checked")
    rows, folder = check.read_ratings(Path(ratings)), prompts_folder(config.eval.judge.prompts)
    with devices(config):
        made = check.agreement(open_judge(config.eval.judge), folder, rows, config.eval.resamples, config.seed)
    return check.records(made)
