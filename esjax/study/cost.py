"""What a study needs before anything runs: FLOPs, memory and the least hours of each run, by compiling its programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.table import Table

from esjax.model.families import Architecture
from esjax.opened import prepare_jax
from esjax.plan.jobs import NAMES
from esjax.plan.measure import Needs
from esjax.plan.report import Hardware
from esjax.plan.report import plan as plan_programs
from esjax.plan.shape import shape_of
from esjax.plan.stages import BYTES, at_lengths, counted
from esjax.run.progress import say
from esjax.study.emit import leaders
from esjax.study.spec import Cell, Study

# What programs' shapes follow from.
SHAPED_BY = ("model", "mesh", "train", "lora", "sft", "dpo", "evolve", "reply", "prompts")
# Settings of evolve that say how often programs run, and do not shape them.
COUNTS = frozenset("rounds contexts_per_round chosen rejected reference pairs_of measure drafts refinements".split())


class Cost(NamedTuple):
    """What one run needs."""

    flops: dict[str, float]  # by phase: sft, rounds, evaluation
    seconds: dict[str, float] | None  # the least, at stated rates; None where a rate is not known
    memory: float  # GiB of a device, of the largest program
    fits: bool

    @property
    def hours(self) -> float | None:
        """All of them."""
        return None if self.seconds is None else sum(self.seconds.values()) / 3600


def cost(counts: dict[str, dict[str, float]], needs: Sequence[Needs], devices: int) -> Cost:
    """What a run needs, by how often each of its programs runs and what it does."""
    by_name = {n.name: n for n in needs}
    flops = {phase: sum(n * by_name[p].flops * devices for p, n in each.items()) for phase, each in counts.items()}
    known = all(n.seconds is not None for n in needs)
    seconds = {phase: sum(n * (by_name[p].seconds or 0.0) for p, n in each.items()) for phase, each in counts.items()}
    return Cost(flops, seconds if known else None, max(n.total for n in needs), all(n.fits for n in needs))


def plan(study: Study, topology: str | None) -> list[Table]:
    """Tables of all runs and of what they sum up to. Programs of one shape are compiled once. Raises InputError."""
    prepare_jax()
    hardware = Hardware.of(topology, 1)
    counts = {cell.name: counted(cell.config, hardware) for cell in study.cells}  # before anything is compiled
    known: dict[str, list[Needs]] = {}
    rows: dict[str, tuple[list[Cell], Cost, Architecture]] = {}
    for cell in study.cells:
        arch = shape_of(cell.shape, cell.config)
        settings = cell.config.model_dump(mode="json")
        asked = {name: settings[name] for name in SHAPED_BY} | {"window": cell.config.data.window}
        asked["evolve"] = {k: v for k, v in asked["evolve"].items() if k not in COUNTS}
        asked["model"] = {k: v for k, v in asked["model"].items() if k not in ("source", "sha256")}
        key = json.dumps([repr(arch), asked], sort_keys=True)
        label = ", ".join(f"{a} {v}" for a, v in cell.labels.items()) or study.name
        if label in rows:
            rows[label][0].append(cell)
            continue
        if key not in known:
            say(f"compiling for {hardware.name}: {label}")
            known[key] = list(plan_programs(cell.config, arch, hardware, NAMES))
            jax.clear_caches()  # of programs that are not run; a ladder of models holds gigabytes of them
        needs, _ = at_lengths(cell.config, hardware, known[key])
        rows[label] = ([cell], cost(counts[cell.name], needs, len(hardware.devices)), arch)
        say(f"  {label}: {sum(rows[label][1].flops.values()):.2g} FLOPs, {_hours(rows[label][1])}")
    return [_runs(study, hardware, rows), _total(study, rows)]


def _runs(study: Study, hardware: Hardware, rows: dict[str, tuple[list[Cell], Cost, Architecture]]) -> Table:
    made = Table(title=f"{study.name} on {hardware.name}: what each run needs, at the least", title_justify="left")
    for column in ("runs", "model", "seeds", "FLOPs: SFT", "rounds", "evaluation", "GiB a device", "fits", "hours"):
        made.add_column(column, overflow="fold")
    for label, (cells, c, arch) in rows.items():
        model = f"{arch.family}, {arch.layers} layers of {arch.width}"
        flops = [f"{c.flops[phase]:.2g}" for phase in ("sft", "rounds", "evaluation")]
        fits = "yes" if c.fits else "no"
        made.add_row(label, model, str(len(cells)), *flops, f"{c.memory:.3g}", fits, _hours(c).removesuffix(" hours"))
    made.caption = (
        "Hours are the longest of FLOPs, memory and network at stated rates, for replies of full length; tokens are estimated at "
        f"{BYTES} bytes. `esjax plan` shows a run's programs one by one."
    )
    return made


def _hours(c: Cost) -> str:
    return "rates not known" if c.hours is None else f"{c.hours:.3g} hours"


def _total(study: Study, rows: dict[str, tuple[list[Cell], Cost, Architecture]]) -> Table:
    """All runs, with every M_0 made once."""
    costs = {cell.name: c for cells, c, _ in rows.values() for cell in cells}
    first, rest = leaders(study.cells)
    flops: Counter[str] = Counter()
    hours: Any = 0.0
    for cell in study.cells:
        c, shared = costs[cell.name], cell in rest
        flops.update({phase: int(x) for phase, x in c.flops.items() if not (shared and phase == "sft")})
        spent = None if c.seconds is None else {k: v for k, v in c.seconds.items() if not (shared and k == "sft")}
        hours = None if hours is None or spent is None else hours + sum(spent.values()) / 3600
    made = Table(title=f"all {len(study.cells)} runs, with {len(first)} M_0 made once each", title_justify="left")
    for column in ("FLOPs", "hours one after the other"):
        made.add_column(column)
    made.add_row(f"{sum(flops.values()):.3g}", "rates not known" if hours is None else f"{hours:.3g}")
    return made
