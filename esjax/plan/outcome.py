"""``esjax plan`` as a whole: what was planned, what came of it, and how it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from esjax.errors import InputError
from esjax.model.families import Architecture
from esjax.plan.jobs import NAMES
from esjax.plan.measure import Needs
from esjax.plan.report import Change, Hardware, plan, remedies, table, traffic, words
from esjax.plan.shape import shape_of
from esjax.plan.stages import Round
from esjax.run.jsonl import json_text
from esjax.runtime.mesh import AXES, mesh_shape
from esjax.settings.schema import Config


@dataclass(frozen=True)
class Outcome:
    """What a run's programs need of the hardware, and a change under which those that do not fit would."""

    config: Config
    arch: Architecture
    hardware: Hardware
    found: Sequence[Needs]
    change: Change | None
    changed: Sequence[Needs]
    round: Round | None = None

    @classmethod
    def of(
        cls,
        config: Config,
        shape: str | None,
        topology: str | None,
        slices: int,
        programs: str,
        tries: int,
    ) -> Outcome:
        """Compile everything; arguments as on the command line. Raises InputError."""
        asked = programs.split(",")
        names = [n for n in NAMES if n in asked]
        if len(names) < len(asked):
            raise InputError(f"--programs {programs}: allowed: {', '.join(NAMES)}")
        if slices < 1:
            raise InputError(f"--slices {slices}: at least 1")
        if slices > 1 and topology is None:
            raise InputError(f"--slices {slices}: slices of what? give a --topology, too")
        if tries < 0:
            raise InputError(f"--tries {tries}: at least 0")
        arch, hardware = shape_of(shape, config), Hardware.of(topology, slices)
        found = list(plan(config, arch, hardware, names))
        failed = [name for name, n in zip(names, found, strict=True) if not n.fits]
        ways = remedies(config, arch, hardware, names, failed, tries) if failed else iter(())
        change, changed = next(ways, (None, []))
        return cls(config, arch, hardware, found, change, changed)

    def with_round(self, contexts: int) -> Outcome:
        """Also what a round of so many contexts comes to."""
        return replace(self, round=Round.of(self.config, self.hardware, self.found, contexts))

    def tables(self) -> list[Table]:
        """For people."""
        mesh = " x ".join(map(str, mesh_shape(self.config.mesh, len(self.hardware.devices))))
        model = f"{self.arch.family}, {self.arch.layers} layers of {self.arch.width}"
        title = f"{model}, on {self.hardware.name} as {mesh} (data x fsdp x tensor)"
        lanes = self.config.evolve.batch
        out = [table(title, self.found, lanes), traffic(self.found)]
        if self.round is not None:
            out.append(self.round.table())
        if self.change is not None:
            out.append(
                table(f"it fits with {words(self.change)}", self.changed, self.change.get("evolve.batch", lanes))
            )
        return out

    def json(self) -> str:
        """For programs: one object."""
        hardware = {"hardware": self.hardware.name, "devices": len(self.hardware.devices)}
        shape = mesh_shape(self.config.mesh, len(self.hardware.devices))
        fits = {"mesh": dict(zip(AXES, shape, strict=True)), "fits": all(n.fits for n in self.found)}
        more = {"change": self.change, "changed": [n.as_json() for n in self.changed]}
        whole = {} if self.round is None else {"round": self.round.as_json()}
        return json_text({**hardware, **fits, **whole, "programs": [n.as_json() for n in self.found], **more})

    @property
    def misfit(self) -> str | None:
        """One line on what does not fit and what would; None where everything does."""
        why = [f"{n.name}: {n.refused or f'{n.total:.4g} GiB of {n.limit:.4g}'}" for n in self.found if not n.fits]
        if not why:
            return None
        known = f"it does with {words(self.change)}" if self.change else "no change tried is enough: take more devices"
        return f"does not fit {self.hardware.name} ({'; '.join(why)}); {known}"
