"""``esjax study``: what is done with a study, by the action that is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from esjax.errors import InputError
from esjax.settings.files import Overrides
from esjax.study import collect as table
from esjax.study import make
from esjax.study.spec import read_study

# Options beside the study's file, by the actions that make use of them.
OPTIONS = {
    "topology": ("plan",),
    "target": ("emit",),
    "out": ("emit", "fit", "report"),
    "x": ("fit",),
    "y": ("fit",),
    "curve": ("fit",),
    "at": ("fit",),
    "far": ("fit",),
}


def study(args: argparse.Namespace, given: Overrides, show: Callable[..., None]) -> None:
    """Do it; ``show`` prints tables and lines. Raises InputError for options that do not go together."""
    for name, actions in OPTIONS.items():
        if getattr(args, name) and args.action not in actions:
            option = "--for" if name == "target" else f"--{name}"
            raise InputError(f"{option}: only esjax study {' and '.join(actions)} makes use of it; leave it out")
    if given.file is not None:
        raise InputError("--config: a study's file names its config; leave it out")
    read = read_study(args.file, args.folder)
    if args.action == "run":
        make.make(read)
        show(str(table.collect(read)[0]), plain=True)
    elif args.action == "collect":
        show(str(table.collect(read)[0]), plain=True)
    elif args.action == "plan":
        from esjax.study.cost import plan

        show(*plan(read, args.topology))
    elif args.action == "emit":
        from esjax.study.emit import emit

        emit(read, args.target, args.out, show)
    elif args.action == "fit":
        from esjax.study.fits import fit

        fit(read, args, show)
    else:
        from esjax.eval.compare import title
        from esjax.eval.table import tables
        from esjax.study.page import write
        from esjax.study.summary import records

        place = write(read, args.out)
        show(*tables(records(read), title))
        show(str(place), plain=True)
