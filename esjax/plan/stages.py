"""How often each program of a run runs, and what a whole round comes to: the time of each stage, and what bounds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
from rich.table import Table

from esjax.corpus.sources import read
from esjax.errors import InputError
from esjax.plan.chips import GIB
from esjax.plan.jobs import asked_bytes, sampler_shapes
from esjax.plan.measure import Needs, longest
from esjax.plan.report import Hardware
from esjax.runtime.mesh import AXES, make_mesh, mesh_shape
from esjax.sample.prefills import FILLED
from esjax.settings.schema import Config, Sources

BYTES = 4  # of text a token, as of English with a large vocabulary
MESSAGE = 8  # tokens that a template writes around a message
FULL = 0.9  # of a packed row
BUSY = 0.8  # of the lanes, with replies of different lengths
HOST = 0.7e-3  # seconds of a process' time that a context's replies cost, measured on one core (esjax/bench/README.md)


class Texts(NamedTuple):
    """Tokens of a corpus, estimated."""

    dialogues: int  # of all of them
    contexts: int  # how many there are
    context: float  # tokens of one, on average, cut to the room that it has


def texts(config: Config, name: str, room: int) -> Texts:
    """Of data.train or data.test. Raises InputError where it is not at hand."""
    source = getattr(config.data, name)
    return _texts(source, config.data.format, room, config.data.window)


@cache
def _texts(source: Sources, format: str, room: int, window: int) -> Texts:
    dialogues = read(source, format, 0).dialogues
    total, sizes = 0, []
    for d in dialogues:
        so_far = 0
        for turn in d.turns:
            if turn.role == "supporter":
                sizes.append(min(so_far, room))
            so_far += len(turn.text.encode()) // BYTES + MESSAGE
        total += min(so_far, window)
    return Texts(total, len(sizes), sum(sizes) / max(1, len(sizes)))


class Kind(NamedTuple):
    """A kind of reply that a context asks for."""

    number: int  # for each context
    new: int  # tokens drawn of each
    own: float  # tokens of its prompt behind the context


def kinds(config: Config) -> list[Kind]:
    """Drafts, reflections and refinements of full length."""
    e = config.evolve
    reflection = 3 * e.reflection.field_tokens if e.reflects else 0
    asks = {name: size / BYTES for name, size in asked_bytes(config).items()}
    made = [Kind(e.drafts, e.draft.max_tokens, 0.0)]
    if e.reflects:
        made.append(Kind(1, reflection, asks["reflect"]))
    if e.refines:
        own = asks["refine"] + e.draft.max_tokens * e.show_draft + reflection
        made.append(Kind(e.refinements, e.refinement.max_tokens, own))
    return made


def of_a_round(config: Config, platform: str, devices: int, contexts: int) -> dict[str, float]:
    """How often each program runs in a round of so many contexts, of the lengths of data.train's, with replies of full length.

    A dialogue's contexts share a trunk, computed once for drafts and reflections and once for refinements.
    """
    e, train, asked = config.evolve, texts(config, "train", config.context_room), kinds(config)
    trunk = train.dialogues / max(1, train.contexts)
    shapes = sampler_shapes(config, platform)
    chunk = shapes.windows * shapes.width * devices * FILLED
    pair = train.context + 2 * e.refinement.max_tokens
    scored = max(config.sft.micro_rows * config.sft.row_length, config.dpo.micro_rows * config.dpo.row_length)
    return {
        "prefill": math.ceil(contexts * (sum(k.own for k in asked) + trunk * (1 + e.refines)) / chunk),
        "decode": math.ceil(contexts * sum(k.number * k.new for k in asked) / e.batch / BUSY),
        "score": math.ceil(contexts * pair / scored / FULL),
        "dpo": math.ceil(contexts * pair / config.dpo.batch_rows / config.dpo.row_length / FULL) * config.dpo.epochs,
    }


def seen(config: Config, platform: str) -> float:
    """The share of a row's slots and rings that its lanes see in a decoding step of a round, on average.

    They see one context of the lengths of data.train's, and each lane what is its own: its prompt's end, and half of its reply.
    """
    made, asked = sampler_shapes(config, platform), kinds(config)
    drawn = sum(k.number * k.new for k in asked)
    own = sum(k.number * k.new * (k.own + k.new / 2) for k in asked) / drawn
    context = texts(config, "train", config.context_room).context
    return min(1.0, (context + made.lanes * own) / (made.slots + made.lanes * made.new))


def at_lengths(config: Config, hardware: Hardware, needs: Sequence[Needs]) -> tuple[list[Needs], float]:
    """What programs need in a round, and the share of the cache that a decoding step reads.

    Where our kernel attends that is what is seen; ``needs`` are of all slots.
    """
    if all(found.decoding in ("", "plain") for found in needs):
        return list(needs), 1.0
    with jax.set_mesh(_mesh(config, hardware)):
        share = seen(config, hardware.platform)
    return [_seeing(found, share) if found.decoding else found for found in needs], share


def _seeing(found: Needs, share: float) -> Needs:
    traffic = max(0.0, found.traffic - (1 - share) * found.memory["cache"] * GIB)
    if not found.times:
        return replace(found, traffic=traffic)
    times = found.times | {"memory": found.times["memory"] * traffic / found.traffic}
    bound = longest(times)
    return replace(found, traffic=traffic, times=times, bound=bound, seconds=times[bound])


def steps(config: Config, platform: str, devices: int) -> dict[str, dict[str, float]]:
    """How often each program runs in a whole run, by phase."""
    e, reply = config.evolve, config.reply
    train = texts(config, "train", config.context_room)
    test = texts(config, "test", config.data.window - config.reply.max_tokens)
    contexts = min(e.contexts_per_round or train.contexts, train.contexts)
    asked = min(reply.max_contexts or test.contexts, test.contexts)
    shapes = sampler_shapes(config, platform)
    chunk = shapes.windows * shapes.width * devices * FILLED
    sft = config.sft.batch_rows * config.sft.row_length * FULL
    sft_tokens = train.dialogues / (1 - config.data.replay_share)
    models = e.rounds + 1 + config.eval.backbone
    scoring = max(config.sft.micro_rows * config.sft.row_length, config.dpo.micro_rows * config.dpo.row_length) * FULL
    a_round = of_a_round(config, platform, devices, contexts)
    return {
        "sft": {"sft": math.ceil(sft_tokens / sft) * config.sft.epochs},
        "rounds": {name: e.rounds * n for name, n in a_round.items()},
        "evaluation": {
            "prefill": models * math.ceil(asked * test.context / chunk),
            "decode": models * math.ceil(asked * reply.max_tokens / e.batch / BUSY),
            "score": models * math.ceil(test.dialogues / scoring),
        },
    }


def counted(config: Config, hardware: Hardware) -> dict[str, dict[str, float]]:
    """How often each program runs on this hardware, by phase. Raises InputError."""
    with jax.set_mesh(mesh := _mesh(config, hardware)):
        return steps(config, hardware.platform, _groups(mesh))


def _mesh(config: Config, hardware: Hardware) -> jax.sharding.Mesh:
    return make_mesh(hardware.devices, mesh_shape(config.mesh, len(hardware.devices)))


def _groups(mesh: jax.sharding.Mesh) -> int:
    """Devices that share the batch."""
    return math.prod(mesh.shape[axis] for axis in AXES[:2])


class Stage(NamedTuple):
    """One stage of a round; seconds are None where a rate is not known."""

    name: str
    program: str
    runs: int
    least: float | None  # seconds, if all that can be done at once is
    serial: float | None  # and if nothing is: FLOPs, memory, network and waiting for it one after the other
    bound: str


NAMES = {"prefill": "prompts", "decode": "replies", "score": "reference log-probs", "dpo": "training"}


def check_round(config: Config, contexts: int, programs: str) -> None:
    """Raise InputError unless a round of so many contexts can be estimated: data.train says how long they are.

    Args:
        programs: those that are planned, as given on the command line.
    """
    if contexts < 1:
        raise InputError(f"--round {contexts}: a round has at least 1 context")
    if missing := [name for name in NAMES if name not in programs.split(",")]:
        raise InputError(
            f"--programs {programs}: --round needs {', '.join(NAMES)}, and {', '.join(missing)} is left out"
        )
    texts(config, "train", config.context_room)


class Round(NamedTuple):
    """What a round of so many contexts comes to."""

    contexts: int
    seen: float  # the share of the cache that a decoding step is counted with
    stages: list[Stage]
    host: float  # seconds that the host plans replies; hidden behind the devices where these take longer

    @classmethod
    def of(cls, config: Config, hardware: Hardware, needs: Sequence[Needs], contexts: int) -> Round:
        """From what each of its programs, all of ``NAMES``, needs for full rows. Raises InputError."""
        with jax.set_mesh(mesh := _mesh(config, hardware)):
            runs = of_a_round(config, hardware.platform, _groups(mesh), contexts)
        needs, share = at_lengths(config, hardware, needs)
        by_name, stages = {n.name: n for n in needs}, []
        for program, n in runs.items():
            found = by_name[program]
            least = None if found.seconds is None else n * found.seconds
            serial = None if found.seconds is None else n * sum(found.times.values())
            stages.append(Stage(NAMES[program], program, int(n), least, serial, found.bound))
        return cls(contexts, share, stages, contexts * HOST)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return self._asdict() | {"stages": [stage._asdict() for stage in self.stages]}

    def table(self) -> Table:
        """For people."""
        out = Table(title=f"a round of {self.contexts:,} contexts", title_justify="left")
        for column in ("stage", "program", "runs", "seconds, at least", "if nothing overlaps", "bound by"):
            out.add_column(column, justify="left" if column in ("stage", "program", "bound by") else "right")
        for s in self.stages:
            cells = ("-", "-") if s.least is None or s.serial is None else (f"{s.least:.3g}", f"{s.serial:.3g}")
            out.add_row(s.name, s.program, f"{s.runs:,}", *cells, s.bound)
        out.add_row("replies, host", "", "", f"{self.host:.3g}", "", "one core, beside prefill and decode")
        if self.seen < 1:
            out.caption = f"a decoding step reads {self.seen:.0%} of the cache: what is seen at these lengths"
        return out
