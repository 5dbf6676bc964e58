"""The method, read from top to bottom: phase 1 makes M_0; every round drafts, reflects, refines, filters and trains."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from esjax.corpus.dialogue import Message
from esjax.errors import RunError
from esjax.evolve.experiment import Experiment, adapter_folder
from esjax.evolve.filters import pattern_hashes
from esjax.evolve.pairs import Context, build_pairs, draw, length_ratio
from esjax.evolve.phases import counted, dpo, sft, write_references
from esjax.model.lora import Adapter
from esjax.rows import prompt_with_replies
from esjax.run.directory import RunDir, bundled_hash
from esjax.run.files import publish_jsonl, sha256
from esjax.run.journal import Journal
from esjax.run.jsonl import read_jsonl
from esjax.run.progress import progress, say
from esjax.sample.constrain import Template
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion, Usage
from esjax.sample.shapes import Need
from esjax.settings.schema import Config, SamplingSettings
from esjax.tokens.encode import Pair

Row = dict[str, Any]
KINDS = ("drafts", "reflections", "refinements")


def evolve(experiment: Experiment, run: RunDir) -> None:
    """Phase 1, then all rounds of phase 2. Stages that the manifest calls done are skipped."""
    sft(experiment, run)
    for t in range(1, experiment.config.evolve.rounds + 1):
        Round(experiment, run, t).improve()


class Round:
    """Round t of phase 2: M_(t-1) drafts, reflects and refines; DPO towards its refinements gives M_t."""

    def __init__(self, experiment: Experiment, run: RunDir, t: int) -> None:
        self.experiment, self.run, self.t = experiment, run, t
        self.config = experiment.config
        self.before = adapter_folder(run.path, t - 1)
        self.teacher = {"model": f"m{t - 1}", "adapter_sha256": sha256(self.before)}
        self.drawn: dict[str, float] = {}  # log-probs of the drafts that this process drew, as the sampler saw them
        names = (*KINDS, "pairs", "dropped")
        self.files = {name: run.path / f"round{t}" / f"{name}.jsonl" for name in names}

    @cached_property
    def adapter(self) -> Adapter:
        """M_(t-1)'s adapter, read once, and only when a stage of this round has work to do."""
        return self.experiment.adapter(self.before)

    def improve(self) -> None:
        """All stages of the round, in order."""
        c, prompts = self.config, self.config.prompts
        pool, counts = self.experiment.corpora.pool
        chosen = draw(pool, c.evolve.contexts_per_round, (c.seed, self.t))
        cut = counted(counts)
        say(f"round {self.t}: {len(chosen)} of {len(pool)} contexts{', of all ' + cut if cut else ''}")

        read = {f"prompts.{k}": bundled_hash(v) for k, v in prompts.model_dump().items()}
        inputs = self.teacher | self.experiment.corpora.inputs("train") | read
        made = [self.files[name] for name in KINDS]
        stage, hangs_on = f"round{self.t}/replies", ("seed", "model", "lora", "data", "screen", "evolve")
        self.run.stage(stage, made, inputs, lambda: self._replies(chosen, pool), hangs_on)

        inputs = {name: sha256(self.files[name]) for name in KINDS}
        inputs |= pattern_hashes(c.filters, c.screen)
        outputs = [self.files["pairs"], self.files["dropped"]]
        inputs |= self.teacher
        self.run.stage(
            f"round{self.t}/pairs", outputs, inputs, self._pairs, ("seed", "model", "lora", "filters", "screen", "dpo")
        )
        dpo(self.experiment, self.run, self.files["pairs"], f"round{self.t}/dpo", lambda: self.adapter, self._first)

    def _first(self) -> Adapter:
        return self.experiment.adapter(adapter_folder(self.run.path, 0))

    def _replies(self, chosen: list[Context], pool: list[Context]) -> Row:
        """Draft, reflect on and refine every context, all in one stream of work."""
        generator = self.experiment.generator
        generator.usage = Usage()
        with ExitStack() as stack:
            journals = {name: stack.enter_context(Journal(self.files[name], len(chosen))) for name in KINDS}
            done = sum(len(j.rows) for j in journals.values())
            advance = stack.enter_context(progress(f"round {self.t} replies", len(KINDS) * len(chosen), done))
            if done < len(KINDS) * len(chosen):
                _Replies(self, chosen, generator, journals, advance).make(max(x.tokens for x in pool))
            for journal in journals.values():
                journal.finish()
        used: Row = {}
        if generator.usage.steps:
            say(f"  {generator.usage}")
            used = {"usage": generator.usage.facts()}
        return {"contexts": len(chosen)} | used | self.experiment.corpora.screen_facts()

    def _pairs(self) -> Row:
        """Filter, then score the kept pairs under M_(t-1): the reference of this round's DPO."""

        def fits(prompt: list[Message], chosen: str, rejected: str) -> bool:
            ((ids, replies),) = self.experiment.encoder.pairs([Pair(prompt, chosen, rejected, "a pair")])
            return len(prompt_with_replies(ids, replies).tokens) <= self.config.dpo.row_length

        drafts, reflections, refinements = (read_jsonl(self.files[n]) for n in ("drafts", "reflections", "refinements"))
        kept, dropped = build_pairs(
            drafts, reflections, refinements, self.experiment.filters, fits, {"round": self.t, **self.teacher}
        )
        publish_jsonl(self.files["dropped"], dropped)
        reasons = Counter(d["reason"] for d in dropped)
        say(f"  kept {len(kept)} of {len(drafts)} pairs; dropped: {counted(reasons) or 'none'}")
        if not kept:
            where = self.files["dropped"]
            raise RunError(
                f"round {self.t}: every pair was dropped ({counted(reasons)}); see {where} and the filters section"
            )
        write_references(self.experiment, self.adapter, kept, self.files["pairs"], f"round{self.t}/dpo")
        scored = {p["id"]: p["reference"]["rejected"] for p in read_jsonl(self.files["pairs"])}
        if self.config.dpo.tail_weight != 1:  # then a reference is no reply's whole log-prob
            scored = {}
        apart = [abs(self.drawn[i] - x) for i, x in scored.items() if i in self.drawn]
        if (
            apart
        ):  # M_(t-1) drew the drafts that it now scores: the same numbers by the sampler and by the training path
            say(f"  log-probs of {len(apart)} drafts by sampler and by scorer: at most {max(apart):.1e} apart")
        return {
            "kept": len(kept),
            **({"sampler_apart": round(max(apart), 5)} if apart else {}),
            "dropped": dict(reasons),
            "length_ratio": round(length_ratio(kept), 4),
        }


class Lengths(NamedTuple):
    """Tokens of what a round's prompts are made of, at most."""

    context: int
    reflect: int  # what asking for a reflection adds to a context
    refine: int  # what asking for a refinement adds, but for the reflection and the draft
    opening: int  # of a reflection, given
    reflection: int  # drawn


def lengths(experiment: Experiment, longest: int) -> Lengths:
    """As the tokenizer counts; ``longest`` is the longest context's size."""
    ask, tokenizer, form = experiment.instructions, experiment.tokenizer, experiment.form
    empty: list[Message] = [{"role": "user", "content": "."}]
    blank = {"profile": "", "emotional_state": "", "situation": ""}
    bare = len(tokenizer.prompt(empty))
    reflect = len(tokenizer.prompt(ask.reflection_prompt(empty))) - bare
    refine = len(tokenizer.prompt(ask.refinement_prompt(empty, blank, ""))) - bare
    return Lengths(longest, reflect, refine, len(form.opening), form.max_tokens)


def sampling_need(config: Config, x: Lengths) -> Need:
    """What the sampler's shapes follow from, for all rounds: the longest context with what asks for a reflection, beside it
    the requests of a few refinements, and the longest reply of any kind."""
    e = config.evolve
    refining = x.refine + e.draft.max_tokens + x.opening + x.reflection
    new = max(e.draft.max_tokens, e.refinement.max_tokens, x.reflection, config.reply.max_tokens)
    return Need(x.context + x.reflect, max(x.reflect + x.opening, refining), new)


class _Replies:
    """A round's three replies to each context: drafts and reflections at once, refinements as soon as they can be."""

    def __init__(
        self, round_: Round, chosen: list[Context], generator: Generator, journals: dict[str, Journal], advance: Any
    ) -> None:
        self.round, self.chosen, self.generator, self.advance = round_, chosen, generator, advance
        self.drafts, self.reflections, self.refinements = (journals[name] for name in KINDS)
        self.experiment, self.settings = round_.experiment, round_.config.evolve
        self.form: Template = self.experiment.form
        self.group_of: dict[int, int] = {}  # context -> the group of contexts that are refined together
        self.left: Counter[int] = Counter()  # drafts and reflections that a group still waits for
        self.members: list[list[int]] = []

    def make(self, longest: int) -> None:
        """All that is missing; ``longest`` is the longest context's size in tokens."""
        drafts = [self._draft(i) for i in self.drafts.missing]
        reflections = [self._reflection(i) for i in self.reflections.missing]
        self.generator.reserve(sampling_need(self.round.config, lengths(self.experiment, longest)))
        plain = self.generator.grouped(drafts)
        asked = self.generator.grouped(reflections)
        # Contexts whose prompts share a trunk are refined together; those that are ready already, at once.
        self.members = [[r.key[1] for r in group] for group in asked]
        known = {i for group in self.members for i in group}
        self.members += [[i] for i in self.refinements.missing if i not in known]
        for number, members in enumerate(self.members):
            for i in members:
                self.group_of[i] = number
                self.left[number] += (i not in self.drafts.rows) + (i not in self.reflections.rows)
        ready = [g for number in range(len(self.members)) if not self.left[number] and (g := self._refinements(number))]
        both = chain.from_iterable(zip_longest(plain, asked, fillvalue=[]))
        groups = [*ready, *(group for group in both if group)]
        self.generator.work(self.round.adapter, groups, self._done, self.form.automaton, more_may_follow=True)

    def _done(self, request: Request, made: Completion) -> list[list[Request]]:
        kind, i = request.key
        row: Row = {"id": self.chosen[i].id}
        if kind == "reflection":
            reflection = self.experiment.reflection(made.token_ids)
            row |= {"reflection": reflection, "num_tokens": len(made.token_ids), "seed": request.seed}
            self.reflections.add(i, row)
        else:
            text = self.experiment.tokenizer.decode(made.token_ids).strip()
            if kind == "draft":
                row["prompt"] = self.chosen[i].messages
                answered: list[Message] = [*self.chosen[i].messages, {"role": "assistant", "content": text}]
                if (
                    self.experiment.tokenizer.reply(request.prompt, answered) == made.token_ids
                ):  # what DPO will train on
                    self.round.drawn[row["id"]] = sum(made.logprobs)
            row |= {"text": text, "finish_reason": made.finish, "num_tokens": len(made.token_ids), "seed": request.seed}
            (self.drafts if kind == "draft" else self.refinements).add(i, row)
        self.advance(1, len(made.token_ids))
        if kind == "refinement":
            return []
        number = self.group_of[i]
        self.left[number] -= 1
        refinements = [] if self.left[number] else self._refinements(number)
        return [refinements] if refinements else []

    def _draft(self, i: int) -> Request:
        return self._request("draft", i, self.chosen[i].prompt.ids.tolist(), self.settings.draft)

    def _reflection(self, i: int) -> Request:
        context, seed = self.chosen[i], self._seed("reflection", i)
        return self.experiment.reflection_request(("reflection", i), context.messages, seed, context.id)

    def _refinements(self, number: int) -> list[Request]:
        """The requests of a group of contexts whose drafts and reflections are there."""
        ask = self.experiment.instructions.refinement_prompt
        wanted = [i for i in self.members[number] if i not in self.refinements.rows]
        drafts, reflections = self.drafts.rows, self.reflections.rows
        chats = [ask(self.chosen[i].messages, reflections[i]["reflection"], drafts[i]["text"]) for i in wanted]
        prompts = map(self.experiment.tokenizer.prompt, chats)
        return [
            self._request("refinement", i, p, self.settings.refinement) for i, p in zip(wanted, prompts, strict=True)
        ]

    def _request(self, kind: str, i: int, prompt: list[int], how: SamplingSettings) -> Request:
        return Request((kind, i), prompt, self._seed(kind, i), how, how.max_tokens, name=self.chosen[i].id)

    def _seed(self, kind: str, i: int) -> int:
        return row_seed(self.round.config.seed, f"round{self.round.t}/{kind}", self.chosen[i].id)
