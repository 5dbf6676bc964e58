"""The method, read from top to bottom: phase 1 makes M_0; every round drafts, reflects, refines, filters and trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

from esjax.config import SamplingSettings
from esjax.corpus.dialogue import Message
from esjax.evolve.filters import Filters
from esjax.evolve.lab import Lab, adapter_folder
from esjax.evolve.pairs import Context, contexts, draw, length_ratio, sift
from esjax.evolve.phases import counted, dpo, sft, write_references
from esjax.evolve.reflect import Instructions, automaton, parse
from esjax.model.lora import Adapter
from esjax.rows import prompt_with_replies
from esjax.runlog import RunDir, RunError, append_in_batches, bundled_hash, read_jsonl, say, sha256, write_jsonl
from esjax.sample.constrain import Automaton
from esjax.sample.generate import Generator, row_seed

Row = dict[str, Any]


def evolve(lab: Lab, run: RunDir) -> None:
    """Phase 1, then all rounds of phase 2. Stages that the manifest calls done are skipped."""
    sft(lab, run)
    generator = Generator(lab.backbone, lab.config.evolve.batch, lab.tokenizer.end_of_turn)
    for t in range(1, lab.config.evolve.rounds + 1):
        Round(lab, run, generator, t).improve()


class Round:
    """Round t of phase 2: M_(t-1) drafts, reflects and refines; DPO towards its refinements gives M_t."""

    def __init__(self, lab: Lab, run: RunDir, generator: Generator, t: int) -> None:
        self.lab, self.run, self.generator, self.t = lab, run, generator, t
        self.config = lab.config
        self.before = adapter_folder(run.path, t - 1)
        self.teacher = {"model": f"m{t - 1}", "adapter_sha256": sha256(self.before)}
        self.instructions, self.filters = Instructions.load(lab.config), Filters.load(lab.config.filters)
        names = ("drafts", "reflections", "refinements", "pairs", "dropped")
        self.files = {name: run.path / f"round{t}" / f"{name}.jsonl" for name in names}

    @cached_property
    def adapter(self) -> Adapter:
        """M_(t-1)'s adapter, read once, and only when a stage of this round has work to do."""
        return self.lab.adapter(self.before)

    @cached_property
    def constraint(self) -> tuple[Automaton, int]:
        """The form of reflections, and the most tokens that one takes; compiled when first needed."""
        return automaton(self.lab.tokenizer, self.config.evolve.reflection.field_tokens, self.lab.backbone.arch.vocab)

    def improve(self) -> None:
        """All stages of the round, in order."""
        c, prompts = self.config, self.config.prompts
        self.lab.encoder.counts.clear()
        pool = contexts(self.lab.train, self.lab.encoder, c.context_room)
        chosen = draw(pool, c.evolve.contexts_per_round, (c.seed, self.t))
        cut = counted(self.lab.encoder.counts)
        say(f"round {self.t}: {len(chosen)} of {len(pool)} contexts{', of all ' + cut if cut else ''}")

        self._generate("drafts", len(chosen), [c.data.train, prompts.system], lambda i, j: self._drafts(chosen[i:j]))
        drafts = read_jsonl(self.files["drafts"])
        asked = [prompts.reflect, prompts.principles]
        self._generate("reflections", len(drafts), asked, lambda i, j: self._reflections(drafts[i:j]), after="drafts")
        both = list(zip(drafts, read_jsonl(self.files["reflections"]), strict=True))
        asked = [prompts.refine, prompts.principles]
        self._generate("refinements", len(both), asked, lambda i, j: self._refinements(both[i:j]), after="reflections")

        inputs = {name: sha256(self.files[name]) for name in ("drafts", "reflections", "refinements")}
        inputs |= {path: bundled_hash(path) for path in (c.filters.crisis_patterns, c.filters.scaffolding_patterns)}
        outputs = [self.files["pairs"], self.files["dropped"]]
        self.run.stage(f"round{self.t}/pairs", outputs, self.teacher | inputs, self._pairs)
        dpo(self.lab, self.run, self.files["pairs"], f"round{self.t}/dpo", lambda: self.adapter)

    def _generate(
        self, name: str, total: int, read: list[str], batch: Callable[[int, int], list[Row]], after: str | None = None
    ) -> None:
        """One generation stage: rows ``batch(start, stop)`` gather in the stage's file."""

        def work() -> Row:
            rows = append_in_batches(self.files[name], total, self.config.evolve.batch, batch, f"round {self.t} {name}")
            return {
                "rows": len(rows),
                "tokens": sum(r["num_tokens"] for r in rows),
                "programs": self.generator.programs,
            }

        inputs = self.teacher | {path: bundled_hash(path) for path in read}
        if after is not None:
            inputs[after] = sha256(self.files[after])
        self.run.stage(f"round{self.t}/{name}", [self.files[name]], inputs, work)

    def _drafts(self, part: list[Context]) -> list[Row]:
        replies = self._reply([x.id for x in part], [x.messages for x in part], "draft", self.config.evolve.draft)
        return [{"id": x.id, "prompt": x.messages, **reply} for x, reply in zip(part, replies, strict=True)]

    def _reflections(self, drafts: list[Row]) -> list[Row]:
        prompts = [self.lab.tokenizer.prompt(self.instructions.reflection_prompt(d["prompt"])) for d in drafts]
        seeds = [row_seed(self.config.seed, f"round{self.t}/reflection", d["id"]) for d in drafts]
        table, most = self.constraint
        made = self.generator.generate(self.adapter, prompts, seeds, self.config.evolve.reflection, most, table)
        return [
            {
                "id": d["id"],
                "reflection": parse(self.lab.tokenizer.decode(m.token_ids)),
                "num_tokens": len(m.token_ids),
                "seed": seed,
            }
            for d, m, seed in zip(drafts, made, seeds, strict=True)
        ]

    def _refinements(self, both: list[tuple[Row, Row]]) -> list[Row]:
        asked = [self.instructions.refinement_prompt(d["prompt"], r["reflection"], d["text"]) for d, r in both]
        ids = [d["id"] for d, _ in both]
        replies = self._reply(ids, asked, "refinement", self.config.evolve.refinement)
        return [{"id": i, **reply} for i, reply in zip(ids, replies, strict=True)]

    def _reply(self, ids: list[str], chats: list[list[Message]], stage: str, how: SamplingSettings) -> list[Row]:
        seeds = [row_seed(self.config.seed, f"round{self.t}/{stage}", i) for i in ids]
        prompts = [self.lab.tokenizer.prompt(chat) for chat in chats]
        made = self.generator.generate(self.adapter, prompts, seeds, how, how.max_tokens)
        texts = [self.lab.tokenizer.decode(m.token_ids).strip() for m in made]
        return [
            {"text": text, "finish_reason": m.finish, "num_tokens": len(m.token_ids), "seed": seed}
            for text, m, seed in zip(texts, made, seeds, strict=True)
        ]

    def _pairs(self) -> Row:
        """Filter, then score the kept pairs under M_(t-1): the reference of this round's DPO."""

        def fits(prompt: list[Message], chosen: str, rejected: str) -> bool:
            ids, replies = self.lab.encoder.pair(prompt, chosen, rejected)
            return len(prompt_with_replies(ids, replies).tokens) <= self.config.dpo.row_length

        drafts, reflections, refinements = (read_jsonl(self.files[n]) for n in ("drafts", "reflections", "refinements"))
        kept, dropped = sift(drafts, reflections, refinements, self.filters, fits, {"round": self.t, **self.teacher})
        write_jsonl(self.files["dropped"], dropped)
        reasons = Counter(d["reason"] for d in dropped)
        say(f"  kept {len(kept)} of {len(drafts)} pairs; dropped: {counted(reasons) or 'none'}")
        if not kept:
            where = self.files["dropped"]
            raise RunError(
                f"round {self.t}: every pair was dropped ({counted(reasons)}); see {where} and the filters section"
            )
        write_references(self.lab, self.adapter, kept, self.files["pairs"], f"round {self.t} scoring")
        return {"kept": len(kept), "dropped": dict(reasons), "length_ratio": round(length_ratio(kept), 4)}
