"""Chat templates whose text hangs on their messages alone, not on the day or on chance."""

from __future__ import annotations

import re
from datetime import datetime
from functools import cache

import jinja2
from jinja2 import nodes

from esjax.errors import InputError
from esjax.run.progress import say

TODAY = datetime(2025, 1, 1)  # what a template that prints the date or the time is told, in every phase of every run
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"]
PERCENT = "\ue000"  # stands for %% meanwhile


@cache
def stable(template: str) -> str:
    """A chat template that gives the same text whenever it is asked; says so once where that takes a fixed date.

    Raises InputError for one that draws random numbers.
    """
    if chance := _chance(template):
        raise InputError(f"the chat template uses {chance}: its text would be another one at every call; take that out")
    if "strftime_now" not in template:
        return template
    say(
        f"the chat template prints the date: it is told {TODAY:%Y-%m-%d %H:%M}, always, so that all phases see one prompt"
    )
    # A macro, because transformers takes no functions from outside. "+%}" keeps the line break that a template may begin with.
    told = {"%%": PERCENT} | {d: TODAY.strftime(d) for d in DIRECTIVES} | {PERCENT: "%"}
    replaced = "".join(f"|replace({d!r}, {value!r})" for d, value in told.items())
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}" + template


def _chance(template: str) -> str | None:
    """What a template draws random numbers with, if it does; one that cannot be parsed is refused where it is used."""
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateError:
        return None
    for node in tree.find_all(nodes.Filter):
        if node.name == "random" or any(isinstance(a, nodes.Const) and a.value == "random" for a in node.args):
            return "random"
    return "lipsum" if any(node.name == "lipsum" for node in tree.find_all(nodes.Name)) else None
