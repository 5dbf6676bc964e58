"""A judge by its name in the settings."""

from __future__ import annotations

from collections.abc import Mapping

from esjax.errors import InputError
from esjax.eval.judges.endpoint import Endpoint
from esjax.eval.judges.judge import Judge
from esjax.eval.judges.local import Local
from esjax.eval.judges.rules import Rule
from esjax.evolve.models import named_model
from esjax.hub.fetch import resolve
from esjax.hub.identity import identity
from esjax.run.progress import say
from esjax.settings.schema import JudgeSettings


def open_judge(settings: JudgeSettings) -> Judge:
    """The judge of ``eval.judge.source``; a model is loaded onto the devices. Raises InputError where there is none."""
    kind, _, name = str(settings.source).partition(":")
    if kind == "rule" and name:
        return Rule(name)
    if kind == "endpoint" and name:
        return Endpoint(name, settings)
    if kind != "model" or not name:
        raise InputError(
            f"eval.judge.source={settings.source}: expected endpoint:URL#MODEL, model:M (as of esjax sample --model) or "
            "rule:NAME"
        )
    return Local(name, settings.sha256)


def check_judge(settings: JudgeSettings, judged: Mapping[str, str] | None = None) -> None:
    """All that can be known of a judge before it is asked, without loading it.

    ``judged``: hashes of the files of the backbone whose replies it sees. Raises InputError: no such judge, or one that would
    judge itself or what was made of it.
    """
    kind, _, name = str(settings.source).partition(":")
    if kind != "model" or not name:
        open_judge(settings)
        return
    source = named_model(name, settings.sha256).model
    weights = identity(resolve(source.source, source.sha256)).items()
    if judged is None or not any(
        file.endswith(".safetensors") and judged.get(file) == digest for file, digest in weights
    ):
        return
    told = f"{settings.source} is the backbone of what it judges: models prefer their own replies"
    if settings.related == "error":
        raise InputError(f"eval.judge.source: {told}; name another model, or set eval.judge.related to allow")
    say(f"  {told} (eval.judge.related=allow)")
