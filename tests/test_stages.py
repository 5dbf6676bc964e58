"""``esjax plan --round``: how often each program runs, what the stages come to, and what is refused before anything compiles."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_overrides

from esjax.cli import main
from esjax.errors import InputError
from esjax.plan import outcome
from esjax.plan.chips import CHIPS, GIB
from esjax.plan.jobs import asked_bytes, sampler_shapes
from esjax.plan.measure import WAITING, Needs
from esjax.plan.report import Hardware
from esjax.plan.stages import BUSY, BYTES, FULL, HOST, Round, at_lengths, check_round, of_a_round, seen, texts
from esjax.sample.prefills import FILLED
from esjax.settings.files import load
from esjax.settings.schema import Config


@pytest.fixture(scope="module")
def config(tiny_folder: Path) -> Config:
    return load(None, tiny_overrides(tiny_folder))


def needs(name: str, **times: float) -> Needs:
    bound = max((k for k in times if k != WAITING), key=lambda k: times[k])
    return Needs(name, 0.0, {"base": 1.0}, 2.0, seconds=times[bound], bound=bound, times=times)


FOUND = [
    needs("prefill", FLOPs=0.2, memory=0.1),
    needs("decode", memory=0.03, waiting=0.04),
    needs("score", memory=0.5),
    needs("sft", memory=9.0),
    needs("dpo", FLOPs=2.0, network=1.0),
]


def test_programs_run_as_often_as_their_work_asks(config: Config) -> None:
    made, e = of_a_round(config, "cpu", 2, 1000), config.evolve
    train = texts(config, "train", config.context_room)
    drawn = e.draft.max_tokens + 3 * e.reflection.field_tokens + e.refinement.max_tokens
    assert made["decode"] == math.ceil(1000 * drawn / e.batch / BUSY)
    asks = sum(asked_bytes(config).values()) / BYTES + e.draft.max_tokens + 3 * e.reflection.field_tokens
    tokens = 1000 * (asks + 2 * train.dialogues / train.contexts)
    shapes = sampler_shapes(config, "cpu")
    assert made["prefill"] == math.ceil(tokens / (shapes.windows * shapes.width * 2 * FILLED))
    pairs = 1000 * (train.context + 2 * e.refinement.max_tokens) / FULL
    assert made["dpo"] == math.ceil(pairs / (config.dpo.batch_rows * config.dpo.row_length)) * config.dpo.epochs
    more = of_a_round(config, "cpu", 4, 4000)
    assert more["prefill"] == pytest.approx(2 * made["prefill"], rel=0.01)  # on twice the devices
    assert more["decode"] == pytest.approx(4 * made["decode"], rel=0.01)  # with as many lanes
    bare = load(None, ["--evolve.reflect", "false"]).evolve
    without = of_a_round(config.model_copy(update={"evolve": bare}), "cpu", 2, 1000)
    assert without["decode"] == math.ceil(
        1000 * (bare.draft.max_tokens + bare.refinement.max_tokens) / bare.batch / BUSY
    )


def test_a_stage_takes_at_least_its_longest_part(config: Config) -> None:
    hardware = Hardware.of(None, 1)
    made = Round.of(config, hardware, FOUND, 1000)
    runs = of_a_round(config, hardware.platform, 1, 1000)
    by_program = {s.program: s for s in made.stages}
    assert list(by_program) == ["prefill", "decode", "score", "dpo"]  # a round has no SFT
    for found in (n for n in FOUND if n.name != "sft"):
        stage, n = by_program[found.name], runs[found.name]
        assert stage.runs == n
        assert stage.least == pytest.approx(n * max(t for k, t in found.times.items() if k != WAITING))
        assert stage.serial == pytest.approx(n * sum(found.times.values()))
    assert [s.bound for s in made.stages] == ["FLOPs", "memory", "memory", "FLOPs"]
    assert made.host == pytest.approx(1000 * HOST)
    cpu = [replace(n, seconds=None, times={}) for n in FOUND]  # of a CPU no rates are stated
    assert {(s.least, s.serial) for s in Round.of(config, hardware, cpu, 1000).stages} == {(None, None)}


def test_a_kernel_reads_what_is_seen(config: Config) -> None:
    """Counted by hand for the default lengths; and only what the cache makes of a step's traffic grows less."""
    e, made = config.evolve, sampler_shapes(config, "cpu")
    asks = {name: size / BYTES for name, size in asked_bytes(config).items()}
    reflection = 3 * e.reflection.field_tokens
    ends = [0.0, asks["reflect"], asks["refine"] + e.draft.max_tokens + reflection]
    drawn = [e.draft.max_tokens, reflection, e.refinement.max_tokens]
    steps = [
        (end + place) for end, new in zip(ends, drawn, strict=True) for place in range(new)
    ]  # what each token sees
    of = made.slots + made.lanes * made.new
    context = texts(config, "train", config.context_room).context
    expected = (context + made.lanes * sum(steps) / len(steps)) / of
    assert seen(config, "cpu") == pytest.approx(expected, rel=0.01)
    assert 0 < expected < 1
    hardware = Hardware.of(None, 1)
    step = needs("decode", memory=3.0, FLOPs=2.0)
    step = replace(step, memory={"base": 4.0, "cache": 8.0}, traffic=16 * GIB, decoding="triton, or plain if faster")
    (less,), share = at_lengths(config, hardware, [step])
    assert share == seen(config, "cpu")
    assert less.traffic == pytest.approx((8 + 8 * share) * GIB)
    assert less.times["memory"] == pytest.approx(3 * (8 + 8 * share) / 16)
    assert (less.seconds, less.bound) == (
        max(2.0, less.times["memory"]),
        "memory" if less.times["memory"] > 2 else "FLOPs",
    )
    plain = replace(step, decoding="plain")
    assert at_lengths(config, hardware, [plain]) == ([plain], 1.0)
    others = [n for n in FOUND if n.name != "decode"]
    by_kernel, plainly = (Round.of(config, hardware, [*others, n], 1000) for n in (step, plain))
    assert (by_kernel.seen, plainly.seen) == (share, 1.0)
    stages = [{s.program: s for s in made.stages} for made in (by_kernel, plainly)]
    assert stages[0]["decode"].serial < stages[1]["decode"].serial
    assert stages[0]["prefill"] == stages[1]["prefill"]


def test_collectives_wait_for_neighbours() -> None:
    assert CHIPS["v5p"].wait(1) == 0
    assert CHIPS["v5p"].wait(64) == pytest.approx(6e-6)  # 4 x 4 x 4: two hops around half of each of three rings
    assert CHIPS["v6e"].wait(64) == pytest.approx(8e-6)  # 8 x 8
    assert CHIPS["h100"].wait(2) == CHIPS["h100"].wait(8) == 5e-6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--round", "0"], "--round 0: a round has at least 1 context"),
        (
            ["--round", "9", "--programs", "sft"],
            "--round needs prefill, decode, score, dpo, and prefill, decode, score, dpo is left",
        ),
        (
            ["--round", "9", "--programs", "decode,score,dpo"],
            "--round needs prefill, decode, score, dpo, and prefill is left out",
        ),
        (["--round", "9", "--data.train", "esconv:no/such.jsonl"], "no/such.jsonl"),
    ],
)
def test_what_cannot_be_estimated_is_refused_first(
    given: list[str], words: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiles(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(outcome.Outcome, "of", compiles)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *tiny_overrides(tiny_folder), *given])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_check_round_takes_what_is_there(config: Config) -> None:
    check_round(config, 1, "prefill,decode,score,dpo")
    with pytest.raises(InputError):
        check_round(config, -1, "prefill,decode,score,dpo")


def test_the_command_tells_of_a_round(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", *tiny_overrides(tiny_folder), "--round", "500", "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["round"]["contexts"] == 500
    assert [s["program"] for s in made["round"]["stages"]] == ["prefill", "decode", "score", "dpo"]
    assert all(s["runs"] > 0 and s["least"] is None for s in made["round"]["stages"])
