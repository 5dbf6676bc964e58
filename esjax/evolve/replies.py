"""What a model is asked for each context of a round: drafts and reflections at once, refinements as soon as they can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from esjax.corpus.dialogue import Message
from esjax.evolve.experiment import Experiment
from esjax.evolve.pairs import Context
from esjax.model.lora import Adapter
from esjax.run.journal import Journal
from esjax.run.progress import progress, say
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion, Usage
from esjax.sample.shapes import Need
from esjax.settings.schema import Config, SamplingSettings

Row = dict[str, Any]
DRAFTS, REFLECTIONS, REFINEMENTS = "drafts", "reflections", "refinements"


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
    bare = len(tokenizer.prompt(empty))
    reflect = len(tokenizer.prompt(ask.reflection_prompt(empty))) - bare
    blank = {"profile": "", "emotional_state": "", "situation": ""} if experiment.config.evolve.reflects else None
    refine = len(tokenizer.prompt(ask.refinement_prompt(empty, blank, ""))) - bare
    return Lengths(longest, reflect, refine, len(form.opening), form.max_tokens)


def sampling_need(config: Config, x: Lengths) -> Need:
    """What the sampler's shapes follow from, for all rounds: the longest context with what asks for a reflection, beside it
    the requests of a few refinements, and the longest reply of any kind."""
    e = config.evolve
    refining = x.refine + e.draft.max_tokens + x.opening + x.reflection
    new = max(e.draft.max_tokens, e.refinement.max_tokens, x.reflection, config.reply.max_tokens)
    return Need(x.context + x.reflect, max(x.reflect + x.opening, refining), new)


class Asked(NamedTuple):
    """Which replies are made: how many of each kind for a context, by the file that they go to."""

    files: dict[str, Path]  # the first of them drafts
    counts: dict[str, int]

    @classmethod
    def of(cls, folder: Path, config: Config, refine: bool = True) -> Asked:
        """What a round of these settings asks for; or, without ``refine``, what refining needs."""
        e = config.evolve
        counts = {DRAFTS: e.drafts if refine else 1}
        if e.reflects:
            counts[REFLECTIONS] = 1
        if refine and e.refines:
            counts[REFINEMENTS] = e.refinements
        return cls({name: folder / f"{name}.jsonl" for name in counts}, counts)


@dataclass
class Replies:
    """Replies of one model to a stage's contexts, all in one stream of work."""

    experiment: Experiment
    name: str  # of the stage, on which the seeds hang
    chosen: Sequence[Context]
    asked: Asked
    journals: dict[str, Journal] = field(default_factory=dict)
    drawn: dict[str, float] = field(default_factory=dict)  # log-probs of first drafts, as the sampler saw them
    group_of: dict[int, int] = field(default_factory=dict)  # context -> the group of contexts refined together
    left: Counter[int] = field(default_factory=Counter)  # drafts and reflections that a group still waits for
    members: list[list[int]] = field(default_factory=list)

    def make(self, adapter: Callable[[], Adapter], longest: int) -> Row:
        """Write all files; ``longest`` is the longest context's size in tokens in any round. Returns what the sampler did."""
        generator = self.experiment.generator
        generator.usage = Usage()
        total = len(self.chosen) * sum(self.asked.counts.values())
        with ExitStack() as stack:
            for kind, file in self.asked.files.items():
                journal = Journal(file, len(self.chosen) * self.asked.counts[kind])
                self.journals[kind] = stack.enter_context(journal)
            done = sum(len(j.rows) for j in self.journals.values())
            self.advance = stack.enter_context(progress(f"{self.name.replace('round', 'round ')} replies", total, done))
            if done < total:
                self._make(adapter(), longest)
            for journal in self.journals.values():
                journal.finish()
        if not generator.usage.steps:
            return {}
        say(f"  {generator.usage}")
        return {"usage": generator.usage.facts()}

    def _make(self, adapter: Adapter, longest: int) -> None:
        drafts = [self._draft(n) for n in self.journals[DRAFTS].missing]
        reflections = [self._reflection(i) for i in self._missing(REFLECTIONS)]
        generator = self.experiment.generator
        generator.reserve(sampling_need(self.experiment.config, lengths(self.experiment, longest)))
        groups = generator.grouped([*drafts, *reflections])  # of a dialogue in one row, which then has it once
        if REFINEMENTS in self.asked.counts:
            self._plan(groups)
        ready = [g for number in range(len(self.members)) if not self.left[number] and (g := self._refinements(number))]
        automaton = self.experiment.form.automaton if REFLECTIONS in self.asked.counts else None
        generator.work(adapter, [*ready, *groups], self._done, automaton, more_may_follow=True)

    def _plan(self, groups: list[list[Request]]) -> None:
        """Contexts whose prompts share a trunk are refined together; those that are ready already, at once."""
        self.members = [list(dict.fromkeys(r.key[1] for r in group)) for group in groups]
        known: set[int] = set()
        for members in self.members:
            members[:] = [i for i in members if i not in known]
            known.update(members)
        wanted = dict.fromkeys(n // self.asked.counts[REFINEMENTS] for n in self._missing(REFINEMENTS))
        self.members += [[i] for i in wanted if i not in known]
        for number, members in enumerate(self.members):
            for i in members:
                self.group_of[i] = number
                self.left[number] += sum(not self._has(kind, i) for kind in (DRAFTS, REFLECTIONS))

    def _missing(self, kind: str) -> list[int]:
        return self.journals[kind].missing if kind in self.journals else []

    def _has(self, kind: str, i: int) -> bool:
        """Whether what refining context i needs of a kind is there: the first draft, the reflection if one is made."""
        return kind not in self.journals or i * self.asked.counts[kind] in self.journals[kind].rows

    def _done(self, request: Request, made: Completion) -> list[list[Request]]:
        kind, i, k = request.key
        row: Row = {"id": self.chosen[i].id} | ({"sample": k} if self.asked.counts[kind] > 1 else {})
        if kind == REFLECTIONS:
            row |= {"reflection": self.experiment.reflection(made.token_ids)}
        else:
            text = self.experiment.tokenizer.decode(made.token_ids).strip()
            if kind == DRAFTS:
                row["prompt"] = self.chosen[i].messages
                answered: list[Message] = [*self.chosen[i].messages, {"role": "assistant", "content": text}]
                same = self.experiment.tokenizer.reply(request.prompt, answered) == made.token_ids
                if same and k == 0:  # what DPO will train on
                    self.drawn[row["id"]] = sum(made.logprobs)
            row |= {"text": text, "finish_reason": made.finish}
        row |= {"num_tokens": len(made.token_ids), "seed": request.seed}
        self.journals[kind].add(i * self.asked.counts[kind] + k, row)
        self.advance(1, len(made.token_ids))
        if kind == REFINEMENTS or k > 0 or i not in self.group_of:
            return []
        number = self.group_of[i]
        self.left[number] -= 1
        refinements = [] if self.left[number] else self._refinements(number)
        return [refinements] if refinements else []

    def _draft(self, n: int) -> Request:
        i, k = divmod(n, self.asked.counts[DRAFTS])
        return self._request((DRAFTS, i, k), self.chosen[i].prompt.ids.tolist(), self.experiment.config.evolve.draft)

    def _reflection(self, i: int) -> Request:
        context, key = self.chosen[i], (REFLECTIONS, i, 0)
        return self.experiment.reflection_request(key, context.messages, self._seed(*key), context.id)

    def _refinements(self, number: int) -> list[Request]:
        """The requests of a group of contexts whose drafts and reflections are there."""
        rows, count = self.journals[REFINEMENTS].rows, self.asked.counts[REFINEMENTS]
        wanted = [(i, k) for i in self.members[number] for k in range(count) if i * count + k not in rows]
        prompts = {i: self.experiment.tokenizer.prompt(self._chat(i)) for i in dict.fromkeys(i for i, _ in wanted)}
        how = self.experiment.config.evolve.refinement
        return [self._request((REFINEMENTS, i, k), prompts[i], how) for i, k in wanted]

    def _chat(self, i: int) -> list[Message]:
        reflections = self.journals[REFLECTIONS].rows if REFLECTIONS in self.journals else None
        draft = self.journals[DRAFTS].rows[i * self.asked.counts[DRAFTS]]["text"]
        reflection = None if reflections is None else reflections[i]["reflection"]
        return self.experiment.instructions.refinement_prompt(self.chosen[i].messages, reflection, draft)

    def _request(self, key: tuple[str, int, int], prompt: list[int], how: SamplingSettings) -> Request:
        return Request(key, prompt, self._seed(*key), how, how.max_tokens, name=self.chosen[key[1]].id)

    def _seed(self, kind: str, i: int, k: int) -> int:
        name = f"{self.name}/{kind.removesuffix('s')}"
        return row_seed(self.experiment.config.seed, name, self.chosen[i].id, *([k] if k else []))
