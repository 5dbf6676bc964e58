"""The programs that ``esjax plan`` compiles are a run's own: their arguments have the shapes of those of a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_overrides

import esjax.evolve.experiment
import esjax.plan.jobs
import esjax.sample.compiled
import esjax.sample.score
import esjax.train.loop
import esjax.train.step
from esjax.cli import main
from esjax.evolve.experiment import Experiment
from esjax.evolve.replies import lengths, sampling_need
from esjax.model.cache import Cache
from esjax.model.families import read_architecture
from esjax.model.weights import Choice, choose_execution
from esjax.plan.jobs import jobs, sampler_shapes
from esjax.runtime.mesh import make_mesh
from esjax.sample.rowbook import Request
from esjax.sample.shapes import Need, shapes
from esjax.settings.files import load

Sizes = dict[str, tuple[tuple[int, ...], str]]  # path -> shape and dtype


class Call(NamedTuple):
    """How a program was called."""

    static: tuple[Any, ...]
    sizes: Sizes
    tree: Any


class Recorded:
    """A program that writes down what it is called with, or lowered or traced for."""

    def __init__(self, calls: list[Call], program: Any, static: int = 0) -> None:
        self.calls, self.program, self.static = calls, program, static

    def note(self, arguments: tuple[Any, ...]) -> None:
        # The slots of a row are part of the cache's tree; they are compared as sizes.
        words = tuple(x for x in arguments if isinstance(x, str))
        given = jax.tree.map(
            lambda x: replace(x, slots=0) if isinstance(x, Cache) else x,
            tuple(x for x in arguments[self.static :] if not isinstance(x, str)),
            is_leaf=lambda x: isinstance(x, Cache),
        )
        leaves, tree = jax.tree_util.tree_flatten_with_path(given)
        sizes = {jax.tree_util.keystr(path): (x.shape, str(x.dtype)) for path, x in leaves}
        self.calls.append(Call((*arguments[: self.static], *words), sizes, tree))

    def __call__(self, *arguments: Any) -> Any:
        self.note(arguments)
        return self.program(*arguments)

    def lower(self, *arguments: Any) -> Any:
        self.note(arguments)
        return self.program.lower(*arguments)

    def trace(self, *arguments: Any) -> Any:
        self.note(arguments)
        return self.program.trace(*arguments)


class Log:
    """All programs that are made while it is watching, and what they were made of."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = {}
        self.made: dict[str, list[tuple[Any, ...]]] = {}

    def watch(self, patch: pytest.MonkeyPatch, runs: bool) -> None:
        """From now on; ``runs`` false compiles no program, but for the one whose result the planner has to know."""
        program, scored = esjax.train.step.program, esjax.sample.score.SCORE

        def recorded(name: str, function: Any, **how: Any) -> Any:
            made = program(name, function, **how) if runs or name == "weights" else Nothing()
            return Recorded(self.calls.setdefault(name, []), made)

        for module in (esjax.sample.compiled, esjax.train.step):
            patch.setattr(module, "program", recorded)
        score = Recorded(self.calls.setdefault("score", []), scored if runs else Nothing(), 2)
        for module in (esjax.sample.score, esjax.plan.jobs):
            patch.setattr(module, "SCORE", score)
        for module, name in (
            (esjax.train.loop, "make_step"),
            (esjax.plan.jobs, "make_step"),
            (esjax.evolve.experiment, "sampling_programs"),
            (esjax.plan.jobs, "sampling_programs"),
        ):
            patch.setattr(module, name, self.noting(name, getattr(module, name)))

    def noting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            self.made.setdefault(name, []).append(arguments)
            return function(*arguments)

        return noted


class Nothing:
    """A program that is never compiled."""

    def trace(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Log:
    """What a real run on one device calls its programs with."""
    log = Log()
    with pytest.MonkeyPatch.context() as patch:
        log.watch(patch, runs=True)
        folder = tmp_path_factory.mktemp("runs") / "recorded"
        given = ["--evolve.rounds", "1", "--model.remat", "full"]
        main(["evolve", "--run-dir", str(folder), *tiny_overrides(tiny_folder), *given])
    return log


class Planned(NamedTuple):
    """What the planner traces each program for, and makes them of."""

    calls: dict[str, Call]
    made: dict[str, list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def planned(tiny_folder: Path) -> Planned:
    log = Log()
    out: dict[str, Call] = {}
    config = load(None, tiny_overrides(tiny_folder))
    how = choose_execution(Choice(), jnp.dtype("float32"))
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(make_mesh(jax.devices(), (1, 1, 1))):
        log.watch(patch, runs=False)
        for job in jobs(config, read_architecture(tiny_folder), how, jnp.dtype("float32"), "cpu"):
            job.trace()
            out[job.name] = log.calls["train" if job.name in ("sft", "dpo") else job.name][-1]
    return Planned(out, log.made)


# Sizes that data decides, by argument: these axes may be larger in a plan.
FREE = {
    r"\[1\]\.keys\[\d+\]": (3,),  # slots of a row, tokens of replies
    r"\[1\]\.values\[\d+\]": (2,),
    r"\[2\]\.(since|until|slot_position)": (1,),  # slots of a row
    r"\[3\]\.constraint\.(next|cost|part|most|least)": (0,),  # its states
    r"\[4\]\.(reference|weight)": (1, 2),  # examples of a row, pairs of an example
}


def may_grow(path: str) -> tuple[int, ...]:
    return next((axes for pattern, axes in FREE.items() if re.fullmatch(pattern, path)), ())


def faults(plan: Call, real: Call) -> list[str]:
    """Where a plan is not what it is a plan of."""
    if plan.tree != real.tree:
        return ["the trees differ"]
    out = []
    for path, (shape, dtype) in real.sizes.items():
        mine, kind = plan.sizes[path]
        if (kind, len(mine)) != (dtype, len(shape)):
            out.append(f"{path}: {mine} {kind}, not {shape} {dtype}")
        for axis, (a, b) in enumerate(zip(mine, shape, strict=False)):
            if a < b or (a > b and axis not in may_grow(path)):
                out.append(f"{path}: {a} instead of {b} on axis {axis}")
    return out


@pytest.mark.parametrize("name", ["prefill", "decode", "sft", "dpo"])
def test_a_run_calls_its_programs_as_they_were_planned(run: Log, planned: Planned, name: str) -> None:
    plan = planned.calls[name]
    paired = any("reference" in path for path in plan.sizes)
    assert paired == (name == "dpo")
    calls = run.calls["train" if name in ("sft", "dpo") else name]
    calls = [c for c in calls if any("reference" in path for path in c.sizes) == paired]
    assert len(calls) >= (30 if name in ("prefill", "decode") else 1)
    for call in calls:
        assert faults(plan, call) == []
        assert call.static == plan.static == (("plain",) if name == "decode" else ())
    # The comparison sees what is smaller, larger, of another dtype, or something else.
    for path, (shape, dtype) in plan.sizes.items():
        wrong = [(shape, "float16")]
        for axis, n in enumerate(shape):
            wrong.append(((*shape[:axis], n - 1, *shape[axis + 1 :]), dtype))
            if axis not in may_grow(path):
                wrong.append(((*shape[:axis], n + 1, *shape[axis + 1 :]), dtype))
        for size in wrong:
            assert len(faults(plan._replace(sizes=plan.sizes | {path: size}), plan)) == 1
    assert faults(planned.calls["score"], calls[0]) == ["the trees differ"]
    assert sum(bool(may_grow(path)) for path in plan.sizes) == {"prefill": 7, "decode": 9, "sft": 0, "dpo": 2}[name]


def test_scoring_is_planned_for_its_largest_batch(run: Log, planned: Planned) -> None:
    """SFT's validation and the closing table score as well as DPO does, here with more tokens."""
    plan = planned.calls["score"]

    def tokens(call: Call) -> int:
        return math.prod(call.sizes["[2].tokens"][0])

    same = [c for c in run.calls["score"] if not faults(plan, c)]
    others = [c for c in run.calls["score"] if faults(plan, c)]
    assert same
    assert all(c.static == plan.static for c in same)
    assert max(tokens(c) for c in others) == 2 * 640
    assert min(tokens(c) for c in others) < 2 * 640  # specificity: fewer rows, each with all replies to a context
    assert tokens(plan) == 2 * 768
    assert all(c.static != plan.static for c in others)  # they have branches


def test_steps_and_sampler_are_made_as_in_a_run(run: Log, planned: Planned) -> None:
    made = planned.made
    assert made["sampling_programs"][0] == run.made["sampling_programs"][0]
    sft, dpo = run.made["make_step"]
    for plan, real, other in zip(made["make_step"], (sft, dpo), (dpo, sft), strict=True):
        objective, _, micro_rows = plan
        assert micro_rows == real[2]
        assert objective._replace(loss=None, targets=0) == real[0]._replace(loss=None, targets=0)
        assert objective.targets >= real[0].targets
        assert objective.execution != other[0].execution  # packed rows and branched ones
    assert [plan[0].targets for plan in made["make_step"]] == [2 * 768, 2 * 640]


# What decides how long rows are, and a row that is wider than what a round asks for.
ROWS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "short": {
        "data.window": 256,
        "evolve.context_tokens": 96,
        "evolve.draft.max_tokens": 16,
        "evolve.refinement.max_tokens": 16,
    },
    "form": {"evolve.reflection.field_tokens": 60, "evolve.draft.max_tokens": 4, "evolve.refinement.max_tokens": 4},
    "closing": {"data.window": 1024, "sft.row_length": 1024, "evolve.context_tokens": 96},
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_sampler_hold_what_a_run_asks_for(
    tiny_folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the run's own reckoning, with a tokenizer so coarse that hardly any is coarser."""
    options = [part for key, value in ROWS[name].items() for part in (f"--{key}", str(value))]
    config = load(None, [*tiny_overrides(tiny_folder), *options])
    experiment = Experiment.open(config)
    generator = experiment.generator
    made = generator.reserve(sampling_need(config, lengths(experiment, config.context_room)))
    answered = config.data.window - config.reply.max_tokens  # the closing table's longest contexts, half of them shared
    half = [*range(answered // 2)]
    prompts = [half + [i] * (answered - len(half)) for i in (1, 2)]
    asked = [Request(i, p, 0, config.reply, config.reply.max_tokens, 0) for i, p in enumerate(prompts)]
    before = generator.slots
    generator.fit([asked])
    assert (generator.slots > before) == (name == "closing")
    planned = sampler_shapes(config, "cpu")
    assert planned._replace(slots=0, new=0) == made._replace(slots=0, new=0)
    assert generator.slots <= planned.slots <= 1.5 * generator.slots
    assert generator.new <= planned.new <= 1.5 * generator.new
    if name in ("short", "form"):
        monkeypatch.setattr(esjax.plan.jobs, "TOKEN", 4)  # as of a large vocabulary
        assert generator.slots > sampler_shapes(config, "cpu").slots


@pytest.mark.parametrize(("platform", "tile"), [("gpu", 64), ("tpu", 128)])
@pytest.mark.parametrize("new", [1, 31, 32, 155])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_keys_lie_in_whole_tiles_where_that_is_faster(platform: str, tile: int, new: int, lanes: int) -> None:
    made = shapes(12, Need(longest=300, new=new), platform, lanes)
    assert made.lanes == lanes
    assert (made.slots + made.lanes * made.new) % tile == 0
    assert new <= made.new < new + (tile // 2 if lanes == 2 else tile)
    assert shapes(16, Need(longest=300, new=new), "cpu").new == new
