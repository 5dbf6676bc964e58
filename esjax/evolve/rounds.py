"""The method, read from top to bottom: phase 1 makes M_0; every round drafts, reflects, refines, filters and trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from esjax.corpus.dialogue import Message
from esjax.errors import RunError
from esjax.evolve.choose import Candidates, Rate, agreement, build_pairs, candidates, measure, measures
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.evolve.filters import pattern_hashes
from esjax.evolve.models import KEPT_AS
from esjax.evolve.pairs import Context, counted, draw, length_ratio
from esjax.evolve.phases import Start, dpo, sft, sft_on
from esjax.evolve.references import write_references
from esjax.evolve.replies import DRAFTS, Asked, Replies
from esjax.model.lora import Adapter
from esjax.rows import Rows, prompt_with_replies
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import publish_jsonl, sha256
from esjax.run.jsonl import read_jsonl
from esjax.run.progress import say
from esjax.tokens.encode import Pair

Row = dict[str, Any]
# What replies hang on: of evolve all but what is made of them.
DRAWN_BY = (
    *("seed", "model", "lora", "data", "screen"),
    *(f"evolve.{name}" for name in ("contexts_per_round", "context_tokens", "draft", "reflection", "refinement")),
    *(f"evolve.{name}" for name in ("reflect", "show_draft", "drafts", "refinements", "chosen", "warmup_contexts")),
)
PAIRED_BY = ("seed", "model", "lora", "filters", "screen", "dpo", "evolve")


def evolve(experiment: Experiment, run: RunDir, rate: Rate | None = None) -> None:
    """Phase 1, then all rounds of phase 2. Stages that the manifest calls done are skipped.

    ``rate``: who gives marks, where the settings want a judge's.
    """
    sft(experiment, run)
    if experiment.config.evolve.warmup_contexts:
        warm_up(experiment, run)
    for t in range(1, experiment.config.evolve.rounds + 1):
        Round(experiment, run, t, rate).improve()


def warmed(run: RunDir, what: str) -> Path:
    """Where the model lies that the warm-up made."""
    return run.path / "warmup" / KEPT_AS[what]


def warm_up(experiment: Experiment, run: RunDir) -> None:
    """Teach M_0 to refine: it drafts and reflects, and SFT goes from (I, C_n, u, s, y) to the corpus' own reply."""
    c, before = experiment.config, adapter_folder(run.path, 0)
    chosen = draw(experiment.corpora.pool[0], c.evolve.warmup_contexts, (c.seed, 0))
    asked = Asked.of(run.path / "warmup", c, refine=False)
    read = {f"prompts.{k}": bundled_hash(v) for k, v in c.prompts.model_dump().items()}
    inputs = {"adapter_sha256": sha256(before)} | experiment.corpora.inputs("train") | read

    def reply() -> Row:
        replies = Replies(experiment, "warmup", chosen, asked)
        return replies.make(lambda: experiment.adapter(before), longest(experiment)) | {"contexts": len(chosen)}

    run.stage("warmup/replies", list(asked.files.values()), inputs, reply, DRAWN_BY)

    def examples() -> tuple[list[Rows], Row]:
        files = {name: read_jsonl(file) for name, file in asked.files.items()}
        rows, left = list[Rows](), Counter[str]()
        for i, context in enumerate(chosen):
            reflection = files["reflections"][i]["reflection"] if "reflections" in files else None
            chat = experiment.instructions.refinement_prompt(context.messages, reflection, files[DRAFTS][i]["text"])
            prompt = experiment.tokenizer.prompt(chat)
            reply = experiment.tokenizer.reply(prompt, [*chat, {"role": "assistant", "content": context.reference}])
            fault = experiment.filters.reply_fault(context.messages, context.reference, "stop")
            row = prompt_with_replies(prompt, [reply])
            fault = fault or ("row_too_long" if len(row.tokens) > c.sft.row_length else None)
            if fault is None:
                rows.append(row)
            left.update([fault] if fault else [])
        say(f"  warmup: {len(rows)} of {len(chosen)} contexts{f'; left out: {counted(left)}' if left else ''}")
        if not rows:
            raise RunError(
                f"warmup: no context is left ({counted(left)}); raise sft.row_length, or set evolve.warmup_contexts to 0"
            )
        return rows, {"examples": len(rows), "left_out": dict(left)}

    inputs = {name: sha256(file) for name, file in asked.files.items()} | pattern_hashes(c.filters, c.screen) | inputs
    settings = (*DRAWN_BY, "train", "sft", "filters")

    def teach() -> Row:
        return sft_on(experiment, run.path / "warmup", examples, lambda: experiment.adapter(before))

    run.stage("warmup/sft", [warmed(run, c.train.what)], inputs, teach, settings)


def longest(experiment: Experiment) -> int:
    """Tokens of the longest context of phase 2."""
    return max(x.tokens for x in experiment.corpora.pool[0])


class Round:
    """Round t of phase 2: M_(t-1) drafts, reflects and refines; DPO towards its refinements gives M_t."""

    def __init__(self, experiment: Experiment, run: RunDir, t: int, rate: Rate | None) -> None:
        self.experiment, self.run, self.t, self.rate = experiment, run, t, rate
        c = self.config = experiment.config
        warm = t == 1 and c.evolve.warmup_contexts > 0
        self.first = adapter_folder(run.path, 0)
        self.before = warmed(run, c.train.what) if warm else adapter_folder(run.path, t - 1)
        self.teacher = {"model": "warmup" if warm else f"m{t - 1}", "adapter_sha256": sha256(self.before)}
        self.drawn: dict[str, float] = {}  # log-probs of the drafts that this process drew, as the sampler saw them
        self.name, folder = f"round{t}", run.path / f"round{t}"
        self.asked = Asked.of(folder, c)
        names = ("pairs", "dropped", "first", "measures")
        self.files = self.asked.files | {name: folder / f"{name}.jsonl" for name in names}

    @cached_property
    def adapter(self) -> Adapter:
        """M_(t-1)'s adapter, read once, and only when a stage of this round has work to do."""
        return self.experiment.adapter(self.before)

    @cached_property
    def first_adapter(self) -> Adapter:
        """M_0's."""
        return self.adapter if self.before == self.first else self.experiment.adapter(self.first)

    @cached_property
    def chosen(self) -> list[Context]:
        """The round's contexts."""
        c = self.config
        return draw(self.experiment.corpora.pool[0], c.evolve.contexts_per_round, (c.seed, self.t))

    def improve(self) -> None:
        """All stages of the round, in order."""
        c = self.config
        pool, counts = self.experiment.corpora.pool
        cut = counted(counts)
        say(f"round {self.t}: {len(self.chosen)} of {len(pool)} contexts{', of all ' + cut if cut else ''}")

        corpus = self.experiment.corpora.inputs("train")
        corpus |= {f"prompts.{k}": bundled_hash(v) for k, v in c.prompts.model_dump().items()}
        made = list(self.asked.files)
        self._stage("replies", made, self.teacher | corpus, self._replies, DRAWN_BY)
        if c.evolve.rejected == "first" and self.before != self.first:
            self._stage("first", ["first"], {"adapter_sha256": sha256(self.first)} | corpus, self._first, DRAWN_BY)
            made.append("first")
        inputs = {name: sha256(self.files[name]) for name in made}
        if not c.evolve.refines:  # then the corpus' own replies are chosen
            inputs |= corpus
        judged = () if self.rate is None else ("eval.judge",)
        if measures(c):
            asked = (*DRAWN_BY, "dpo.row_length", "filters.more_specific", "eval.others", "evolve", *judged)
            self._stage("measures", ["measures"], inputs | self.teacher, lambda: self._measures(made), asked)
            inputs["measures"] = sha256(self.files["measures"])
        inputs |= pattern_hashes(c.filters, c.screen) | self.teacher
        earlier = self._earlier()
        inputs |= {file.parent.name: sha256(file) for file in earlier}
        if c.evolve.reference == "first":
            inputs["reference_sha256"] = sha256(self.first)
        self._stage("pairs", ["pairs", "dropped"], inputs, lambda: self._pairs(made, earlier), (*PAIRED_BY, *judged))
        starts = c.evolve.reference == "before" or self.before == self.first
        dpo(
            self.experiment,
            self.run,
            self.files["pairs"],
            f"{self.name}/dpo",
            Start(lambda: self.adapter, lambda: self.first_adapter, starts),
        )

    def _stage(
        self, name: str, files: list[str], inputs: dict[str, str], work: Callable[[], Row], settings: tuple[str, ...]
    ) -> None:
        self.run.stage(f"{self.name}/{name}", [self.files[f] for f in files], inputs, work, settings)

    def _replies(self) -> Row:
        """Draft, reflect on and refine every context, all in one stream of work."""
        replies = Replies(self.experiment, self.name, self.chosen, self.asked)
        used = replies.make(lambda: self.adapter, longest(self.experiment))
        self.drawn = replies.drawn
        return {"contexts": len(self.chosen)} | used | self.experiment.corpora.screen_facts()

    def _first(self) -> Row:
        """M_0's drafts of the same contexts."""
        asked = Asked({DRAFTS: self.files["first"]}, {DRAFTS: 1})
        replies = Replies(self.experiment, f"{self.name}/first", self.chosen, asked)
        return replies.make(lambda: self.first_adapter, longest(self.experiment))

    def _candidates(self, made: list[str]) -> list[Candidates]:
        return list(candidates(self.config, self.chosen, {name: read_jsonl(self.files[name]) for name in made}))

    def _measures(self, made: list[str]) -> Row:
        publish_jsonl(self.files["measures"], measure(self.experiment, self.adapter, self._candidates(made), self.rate))
        return {}

    def _earlier(self) -> list[Path]:
        """Files with the pairs of the rounds before that are trained on again."""
        most = self.config.evolve.pairs_of
        begin = 1 if most is None else max(1, self.t - most + 1)
        return [self.run.path / f"round{t}" / "pairs.jsonl" for t in range(begin, self.t)]

    def _pairs(self, made: list[str], earlier: list[Path]) -> Row:
        """Choose and filter, then score the kept pairs under the reference of this round's DPO."""

        def fits(prompt: list[Message], chosen: str, rejected: str) -> bool:
            ((ids, replies),) = self.experiment.encoder.pairs([Pair(prompt, chosen, rejected, "a pair")])
            return len(prompt_with_replies(ids, replies).tokens) <= self.config.dpo.row_length

        c, all_ = self.config, self._candidates(made)
        values: Sequence[Row] = read_jsonl(self.files["measures"]) if measures(c) else [{}] * len(all_)
        model = {"round": self.t, **self.teacher}
        kept, dropped = build_pairs(all_, values, c, self.experiment.filters, fits, model)
        publish_jsonl(self.files["dropped"], dropped)
        reasons = Counter(d["reason"] for d in dropped)
        say(f"  kept {len(kept)} of {len(all_)} pairs; dropped: {counted(reasons) or 'none'}")
        if not kept:
            where = self.files["dropped"]
            raise RunError(
                f"round {self.t}: every pair was dropped ({counted(reasons)}); see {where} and the filters section"
            )
        if c.dpo.pair_weights != "none":
            for pair, weight in zip(kept, agreement(self.experiment, self.adapter, kept, self.rate), strict=True):
                pair["weight"] = round(float(weight), 6)
        ratio = length_ratio(kept)
        before = [dict(p) for file in earlier for p in read_jsonl(file) if f"round{p['round']}" == file.parent.name]
        if before:
            say(f"  and {len(before)} pairs of the rounds before")
        reference = self.adapter if c.evolve.reference == "before" else self.first_adapter
        write_references(self.experiment, reference, [*before, *kept], self.files["pairs"], f"{self.name}/dpo")
        return {
            "kept": len(kept),
            **({"of_rounds_before": len(before)} if before else {}),
            **self._apart(),
            "dropped": dict(reasons),
        } | {"length_ratio": round(ratio, 4)}

    def _apart(self) -> Row:
        """By how much the drafts' log-probs by the sampler and by the training path differ, which both are M_(t-1)'s."""
        c = self.config
        if (
            c.dpo.tail_weight != 1
            or (c.evolve.reference == "first" and self.before != self.first)
            or c.evolve.rejected != "draft"
        ):
            return {}  # then a reference is not of the whole draft, or not M_(t-1)'s
        pairs = [p for p in read_jsonl(self.files["pairs"]) if p["round"] == self.t]
        scored = {p["id"]: p["reference"]["rejected"] for p in pairs}
        apart = [abs(self.drawn[i] - x) for i, x in scored.items() if i in self.drawn]
        if not apart:
            return {}
        say(f"  log-probs of {len(apart)} drafts by sampler and by scorer: at most {max(apart):.1e} apart")
        return {"sampler_apart": round(max(apart), 5)}
