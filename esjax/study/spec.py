"""A study: one YAML file with a base config, what varies, and seeds; and the cells, one run each, that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from esjax.errors import InputError, within
from esjax.eval.metrics import ALL
from esjax.eval.results import HEADLINE
from esjax.settings.files import flat, load, read_yaml
from esjax.settings.identity import marked
from esjax.settings.schema import EXECUTION, Config

SHAPE = "shape"  # beside settings: the name of the model's shape, for planning without its files
MOST = 10_000  # cells of a study
DIGITS = 12  # of a cell's name


class _Spec(BaseModel):
    """The file, as it is written."""

    model_config = ConfigDict(extra="forbid", str_min_length=1)

    config: str
    """The base config: a path from the study's own folder, or bundled:configs/quickstart.yaml."""
    settings: dict[str, Any] = {}
    """Settings of all cells, over the base config's."""
    grid: dict[str, dict[str, dict[str, Any]]] = {}
    """What varies: an axis has named values, each of which is a few settings; every combination is a cell."""
    cells: dict[str, dict[str, Any]] = {}
    """Single cells by name, beside the grid's, each a few settings."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Every cell is run once a seed."""
    metrics: tuple[str, ...] = HEADLINE
    """What reports and tables show, among what evaluations measure."""


class Cell(NamedTuple):
    """One run of a study."""

    name: str  # the first digits of a hash of all its settings that define a result
    labels: dict[str, str]  # axis -> value; of a single cell {"cell": NAME}
    seed: int
    config: Config
    shape: str | None

    @property
    def words(self) -> str:
        """What people call it."""
        return ", ".join([*(f"{axis} {value}" for axis, value in self.labels.items()), f"seed {self.seed}"])


class Study(NamedTuple):
    """A study that was read."""

    name: str
    folder: Path  # where its runs lie
    cells: list[Cell]
    axes: list[str]
    metrics: tuple[str, ...]


def read_study(file: Path, folder: Path | None = None) -> Study:
    """Read a study; its runs lie in ``folder``, runs/NAME when left out. Raises InputError naming what is wrong in it."""
    tree = read_yaml(str(file))
    try:
        spec = _Spec.model_validate(tree)
    except ValidationError as e:
        first = e.errors()[0]
        where, known = ".".join(map(str, first["loc"])), ", ".join(_Spec.model_fields)
        if "[key]" in first["loc"]:
            raise InputError(
                f"{file}: {where.removesuffix('.[key]')}: a name must be a text; YAML takes on, off, yes, no and numbers for "
                "something else, so put them in quotes"
            ) from e
        raise InputError(f"{file}: {where or 'the file'}: {first['msg']}; a study has {known}") from e
    if unknown := [m for m in spec.metrics if m not in ALL]:
        raise InputError(
            f"{file}: metrics: {unknown[0]} is measured by no evaluation; known are {', '.join(sorted(ALL))}"
        )
    if len(set(spec.seeds)) < len(spec.seeds):
        raise InputError(f"{file}: seeds: {list(spec.seeds)} names one twice")
    cells = _cells(spec, file)
    axes = list(dict.fromkeys(axis for cell in cells for axis in cell.labels))
    return Study(file.stem, folder or Path("runs") / file.stem, cells, axes, spec.metrics)


def _cells(spec: _Spec, file: Path) -> list[Cell]:
    named = [dict(zip(spec.grid, values, strict=True)) for values in itertools.product(*spec.grid.values())]
    asked = [(labels, [spec.grid[a][v] for a, v in labels.items()]) for labels in named if labels or not spec.cells]
    asked += [({"cell": name}, [settings]) for name, settings in spec.cells.items()]
    if not asked:
        raise InputError(f"{file}: an axis of grid has no values, so there are no cells")
    if len(asked) * len(spec.seeds) > MOST:
        raise InputError(f"{file}: {len(asked) * len(spec.seeds)} cells are more than {MOST}; vary less at once")
    base = spec.config if spec.config.startswith("bundled:") else str(file.parent / spec.config)
    out: dict[str, Cell] = {}
    for labels, parts in asked:
        words = ", ".join(f"{a} {v}" for a, v in labels.items()) or "the one cell"
        settings = _joined([spec.settings, *parts], f"{file}: {words}")
        shape = settings.pop(SHAPE, None)
        for seed in spec.seeds:
            with within(f"{file}: {words}"):
                config = load(base, settings | {"seed": seed})
            name = cell_name(config)
            cell = Cell(name, labels, seed, config, shape)
            if name in out:
                raise InputError(f"{file}: {out[name].words} and {cell.words} are the same run; take one out")
            out[name] = cell
    return list(out.values())


def _joined(parts: list[Mapping[str, Any]], where: str) -> dict[str, Any]:
    """Settings of several parts; of what varies no two may say the same one."""
    out = dict(parts[0])
    said: set[str] = set()
    for part in parts[1:]:
        if twice := said & part.keys():
            raise InputError(f"{where}: {min(twice)} is set on two axes; a setting may vary on one alone")
        if "seed" in part:
            raise InputError(f"{where}: seed is a setting of its own; give seeds: [0, 1, ...]")
        said |= part.keys()
        out |= part
    return out


def cell_name(config: Config) -> str:
    """Names a run by what defines its result, and by how many rounds it has."""
    execution = marked(Config, EXECUTION) - {"evolve.rounds"}
    settings = {k: v for k, v in flat(config.model_dump(mode="json")) if k not in execution}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:DIGITS]
