"""The comparison of the backbone, M_0, M_1, ... on held-out dialogues: their replies, all metrics, intervals, and the tables."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from esjax.errors import InputError
from esjax.eval.identify import candidates
from esjax.eval.judges.ask import judged, prompts_folder
from esjax.eval.judges.open import check_judge, open_judge
from esjax.eval.measure import embedder, measure
from esjax.eval.metrics import BITS, PERPLEXITY, REPLAY
from esjax.eval.reflections import reflect, reflection_values
from esjax.eval.replies import from_run
from esjax.eval.results import OVER, Value, ratio_values, summarise, write_parquet
from esjax.eval.seekers import Speaker, people, seeker_prompts, talk, talk_values
from esjax.evolve.experiment import Experiment, adapter_folder, model_hash, open_model
from esjax.evolve.filters import pattern_hashes
from esjax.evolve.models import named_model
from esjax.hub.fetch import resolve
from esjax.hub.identity import identity
from esjax.model.lora import Adapter
from esjax.rows import Rows
from esjax.run import buckets
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import publish_text, replacing, sha256
from esjax.run.journal import gather
from esjax.run.jsonl import json_text, read_jsonl
from esjax.run.manifest import check_base, read_manifest
from esjax.run.progress import progress
from esjax.runtime.context import current
from esjax.runtime.mesh import rows_at_once
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion
from esjax.sample.score import Scorer
from esjax.settings.files import bundled
from esjax.settings.schema import Config

BACKBONE = "backbone"
HANGS_ON = ("seed", "model", "lora", "data", "filters", "screen", "reply", "eval")


def compare(experiment: Experiment, home: RunDir, run: Path, rounds: int) -> list[dict[str, Any]]:
    """Let every model of ``run`` answer and score the test dialogues, one stage a model, then measure all, one stage more.

    Results go to ``home``, which may be the run itself: eval/results.parquet holds every value, eval/results.json the summary,
    whose records are returned.
    """
    models: dict[str, Path | None] = {BACKBONE: None} if experiment.config.eval.backbone else {}
    models |= {f"m{t}": adapter_folder(run, t) for t in range(rounds + 1)}
    seeker = open_seeker(experiment)
    for name, folder in models.items():
        _answers(experiment, home, name, folder)
        if experiment.config.eval.reflections:
            _reflections(experiment, home, name, folder)
        if experiment.config.eval.seekers.count:
            _talks(experiment, home, name, folder, seeker)
    return _results(experiment, home, list(models), adapter_folder(run, 0))


def check(experiment: Experiment, run: Path | None = None) -> None:
    """All that can be known before anything is computed: files are there and fit. Raises InputError.

    ``run``: where the models are, if they are to be those of a finished run.
    """
    with current().processes.in_step():
        _ = experiment.corpora.asked, experiment.corpora.test_rows, experiment.corpora.eval_replay_rows
        if experiment.config.eval.embedding is not None:
            embedder(experiment.config)
        if experiment.config.eval.judge.source is not None:
            prompts_folder(experiment.config.eval.judge.prompts)
            check_judge(experiment.config.eval.judge, experiment.identity)
        if count := experiment.config.eval.seekers.count:
            people(experiment.corpora.test, count)
            seeker_prompts(experiment.config.eval.seekers.prompts)
            if (named := experiment.config.eval.seekers.model) is not None:
                named_model(named, experiment.config.eval.seekers.sha256)
        if run is not None:
            _ = experiment.corpora.leaks  # other test dialogues than the run's may stand in what it was trained on
            check_base(run, read_manifest(run), experiment.identity)


def title(name: str) -> str:
    """How tables call a model."""
    return OVER.join(f"M_{n[1:]}" if re.fullmatch(r"m\d+", n) else n for n in name.split(OVER))


def _adapter(experiment: Experiment, folder: Path | None) -> Adapter:
    return experiment.backbone.fresh_adapter(0) if folder is None else experiment.adapter(folder)


def _answers(experiment: Experiment, home: RunDir, name: str, folder: Path | None) -> None:
    """One model's replies, and its log-probs of the reference replies and of held-out replay data."""
    c, corpora = experiment.config, experiment.corpora
    predictions, scores = _files(home, name)

    def work() -> None:
        adapter = _adapter(experiment, folder)
        made = {"reference": _score(experiment, adapter, corpora.test_rows, f"{name} reference scoring")}
        if corpora.eval_replay_rows:
            made["replay"] = _score(experiment, adapter, corpora.eval_replay_rows, f"{name} replay scoring")
        _reply(experiment, adapter, predictions, name)
        publish_text(scores, json_text(made, indent=1) + "\n")

    inputs = {"adapter": "none" if folder is None else sha256(folder)}
    inputs |= {"prompts.system": bundled_hash(c.prompts.system)}
    inputs |= corpora.inputs("test") | pattern_hashes(c.filters, c.screen) | corpora.eval_inputs()
    home.stage(f"eval/{name}", [predictions, scores], inputs, work, HANGS_ON)


def open_seeker(experiment: Experiment) -> Speaker | None:
    """Who plays the seekers, where the settings name one. Raises InputError."""
    c = experiment.config
    if not c.eval.seekers.count or c.eval.seekers.model is None:
        return None
    given = named_model(c.eval.seekers.model, c.eval.seekers.sha256)
    settings = given.model_copy(update={"data": c.data, "reply": c.reply, "evolve": c.evolve})
    return Speaker(*open_model(c.eval.seekers.model, settings))


def _reflections(experiment: Experiment, home: RunDir, name: str, folder: Path | None) -> None:
    """One model's reflections on the contexts that it answers."""
    c, file = experiment.config, home.path / "eval" / f"{name}.reflections.jsonl"
    inputs = {"adapter": "none" if folder is None else sha256(folder)} | experiment.corpora.inputs("test")
    inputs |= {f"prompts.{k}": bundled_hash(v) for k, v in c.prompts.model_dump().items()}

    def work() -> None:
        reflect(experiment, _adapter(experiment, folder), file, name)

    home.stage(f"eval/{name}/reflections", [file], inputs, work, (*HANGS_ON, "evolve.reflection"))


def _talks(experiment: Experiment, home: RunDir, name: str, folder: Path | None, seeker: Speaker | None) -> None:
    """One model's conversations with all simulated seekers."""
    c, file = experiment.config, home.path / "eval" / f"{name}.talks.jsonl"

    def work() -> None:
        cards = people(experiment.corpora.test, c.eval.seekers.count)
        talk(file, name, Speaker(experiment, _adapter(experiment, folder)), seeker, cards, c.eval.seekers)

    inputs = {"adapter": "none" if folder is None else sha256(folder), "prompts.system": bundled_hash(c.prompts.system)}
    inputs |= {"eval.seekers.prompts": sha256(bundled(c.eval.seekers.prompts))} | experiment.corpora.inputs("test")
    if seeker is not None:
        inputs["eval.seekers.model"] = model_hash(str(c.eval.seekers.model), seeker.experiment)
    home.stage(f"eval/{name}/talks", [file], inputs, work, HANGS_ON)


def _files(home: RunDir, name: str) -> tuple[Path, Path]:
    return home.path / "eval" / f"{name}.jsonl", home.path / "eval" / f"{name}.scores.json"


def _score(
    experiment: Experiment, adapter: Adapter, rows: Sequence[tuple[str, Rows]], what: str
) -> list[dict[str, Any]]:
    """Of each dialogue's targets the log-prob, and how many tokens and bytes they are."""
    c = experiment.config
    scorer = Scorer(experiment.backbone, c.sft.row_length, rows_at_once("sft", c.sft))
    with progress(what, len(rows)) as advance:
        made = scorer.score(adapter, [row for _, row in rows], lambda *_: advance(1))
    out: dict[str, dict[str, Any]] = {}
    for (dialogue, row), branches in zip(rows, made, strict=True):
        mine = out.setdefault(dialogue, {"dialogue": dialogue, "logprob": 0.0, "tokens": 0, "bytes": 0})
        targets = row.tokens[1:][row.weight[:-1] != 0].tolist()
        mine["logprob"] += float(sum(x.sum(dtype=np.float64) for x in branches))
        mine["tokens"] += len(targets)
        mine["bytes"] += len(experiment.tokenizer.decode(targets).encode())
    return list(out.values())


def _reply(experiment: Experiment, adapter: Adapter, file: Path, name: str) -> None:
    c, asked = experiment.config, experiment.corpora.asked

    def answer(missing: list[int], add: Callable[..., None]) -> None:
        # The same seeds for every model: differences in the table are the models', not the draws'.
        prompts = {i: asked[i].prompt.ids.tolist() for i in missing}
        requests = [
            Request(i, p, row_seed(c.seed, "eval", asked[i].id), c.reply, c.reply.max_tokens, name=asked[i].id)
            for i, p in prompts.items()
        ]

        def done(request: Request, made: Completion) -> tuple[()]:
            x = asked[request.key]
            row = {
                "id": x.id,
                "messages": x.messages,
                "reference": x.reference,
                "prediction": experiment.tokenizer.decode(made.token_ids).strip(),
                "finish_reason": made.finish,
            }
            add(request.key, row, len(made.token_ids))
            return ()

        experiment.generator.work(adapter, experiment.generator.grouped(requests), done)

    gather(file, len(asked), f"{name} replies", answer)


def _results(experiment: Experiment, home: RunDir, names: Sequence[str], base: Path) -> list[dict[str, Any]]:
    """All metrics of all models."""
    c = experiment.config
    table, summary = (home.path / "eval" / f"results.{kind}" for kind in ("parquet", "json"))

    def work() -> None:
        problems = {d.id: d.problem for d in experiment.corpora.test}
        systems = {n: from_run(read_jsonl(_files(home, n)[0]), problems) for n in names}
        values = measure(systems, c, experiment.filters, (experiment, experiment.adapter(base)))
        values += [
            v for n in names for v in _likelihoods(n, json.loads(_files(home, n)[1].read_text(encoding="utf-8")))
        ]
        if c.eval.reflections:
            emotions = {d.id: d.emotion for d in experiment.corpora.test}
            others = candidates(systems[names[0]], c.eval.candidates, c.seed)
            for n in names:
                rows = read_jsonl(home.path / "eval" / f"{n}.reflections.jsonl")
                values += reflection_values(n, rows, systems[n], others, emotions)
        if c.eval.seekers.count:
            values += [v for n in names for v in talk_values(n, read_jsonl(home.path / "eval" / f"{n}.talks.jsonl"))]
        pairs = compared(names)
        if c.eval.judge.source is not None:
            values += judged(
                open_judge(c.eval.judge), c.eval.judge.asks, prompts_folder(c.eval.judge.prompts), systems, pairs
            )
        _publish(table, summary, values, pairs, c)

    inputs = {n: sha256(file) for n in names for file in _files(home, n)[:1]}
    inputs |= {f"{n}.scores": sha256(_files(home, n)[1]) for n in names}
    if c.eval.embedding is not None:
        folder = resolve(c.eval.embedding, c.eval.embedding_sha256)
        inputs |= {f"eval.embedding/{file}": digest for file, digest in identity(folder).items()}
    if c.eval.reflections:
        inputs |= {f"{n}.reflections": sha256(home.path / "eval" / f"{n}.reflections.jsonl") for n in names}
    if c.eval.seekers.count:
        inputs |= {f"{n}.talks": sha256(home.path / "eval" / f"{n}.talks.jsonl") for n in names}
    if c.eval.judge.source is not None:
        inputs["eval.judge.prompts"] = sha256(prompts_folder(c.eval.judge.prompts))
    inputs |= {"adapter": sha256(base)} | pattern_hashes(c.filters, c.screen)
    home.stage("eval/results", [table, summary], inputs, work, HANGS_ON)
    rows: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))
    return rows


def _publish(table: Path, summary: Path, values: Sequence[Value], pairs: Sequence[tuple[str, str]], c: Config) -> None:
    made = summarise(values, pairs, c.eval.resamples, c.seed)
    if current().processes.writer:
        table.parent.mkdir(parents=True, exist_ok=True)
        with replacing(table) as temporary:
            write_parquet(temporary, values)
    buckets.publish(table)
    publish_text(summary, json_text(made.rows(), indent=1) + "\n")


def compared(names: Sequence[str]) -> list[tuple[str, str]]:
    """Which models are compared: each with M_0, with the one before it, and M_0 with the backbone."""
    trained = [n for n in names if n != BACKBONE]
    pairs = [(n, trained[0]) for n in trained[1:]]
    pairs += [(n, before) for before, n in itertools.pairwise(trained)]
    return [(trained[0], BACKBONE), *pairs] if BACKBONE in names else pairs


def _likelihoods(name: str, scores: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Value]:
    """Perplexity, bits a byte and replay loss, with the parts that their intervals need."""

    def ratio(metric: str, part: str, bottom: str, shape: Callable[[float], float]) -> list[Value]:
        rows = scores[part]
        units = [str(row["dialogue"]) for row in rows]
        tops, bottoms = (np.asarray([row[key] for row in rows], float) for key in ("logprob", bottom))
        return ratio_values(name, metric, units, tops, bottoms, shape)

    out = ratio(PERPLEXITY.name, "reference", "tokens", lambda x: math.exp(-x))
    out += ratio(BITS.name, "reference", "bytes", lambda x: -x / math.log(2))
    return out + (ratio(REPLAY.name, "replay", "tokens", lambda x: -x) if "replay" in scores else [])


def finished(run: Path) -> int:
    """T of a run's last model M_T. Raises InputError where it has none."""
    made = [t for t in range(1000) if adapter_folder(run, t).exists()]
    if not made:
        raise InputError(
            f"{run}: there is no finished model to evaluate; run `esjax sft` or `esjax evolve` on it first"
        )
    return made[-1]
