"""Chat templates whose text hangs on their messages alone, not on the day or on chance."""

from __future__ import annotations

import re
from datetime import datetime
from functools import cache

from esjax.errors import InputError
from esjax.runlog import say

TODAY = datetime(2025, 1, 1)  # what a template that prints the date or the time is told, in every phase of every run
DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in "aAbBcdDeFHIjmMpSTuUwWxXyYzZ"]


@cache
def stable(template: str) -> str:
    """A chat template that gives the same text whenever it is asked; says so once where that takes a fixed date.

    Raises InputError for one that draws random numbers.
    """
    if chance := re.search(r"\|\s*(random)\b|\b(lipsum)\b", template):
        raise InputError(
            f"the chat template uses {chance[1] or chance[2]}: its text would be another one at every call; take that out"
        )
    if "strftime_now" not in template:
        return template
    say(
        f"the chat template prints the date: it is told {TODAY:%Y-%m-%d %H:%M}, always, so that all phases see one prompt"
    )
    # A macro, because transformers takes no functions from outside. "+%}" keeps the line break that a template may begin with.
    replaced = "".join(f"|replace({d!r}, {TODAY.strftime(d)!r})" for d in DIRECTIVES)
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro +%}" + template
