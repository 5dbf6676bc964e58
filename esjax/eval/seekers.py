"""Simulated seekers: people with a profile card who talk with a model for some turns, and say how they feel.

A conversation is a chain of steps: how the seeker feels at first; a reply of the model; how the seeker feels then and what they
say next, which is one answer, begun with a digit; at the end the seeker's mark. All conversations go on at once, in the sampler
that a run uses; a step is asked for as soon as the one before it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from esjax.corpus.dialogue import Dialogue, Message
from esjax.errors import InputError
from esjax.eval.metrics.talks import END, FELT_AFTER, GAIN, HELPED, SUCCESS, WORSE
from esjax.eval.results import Value
from esjax.evolve.experiment import Experiment
from esjax.model.lora import Adapter
from esjax.run.journal import Journal
from esjax.run.progress import progress
from esjax.sample.constrain import START, Field, Template, compile_template
from esjax.sample.generate import Generator
from esjax.sample.rowbook import Request, row_seed
from esjax.sample.schedule import Completion
from esjax.sample.shapes import Need
from esjax.settings.files import bundled
from esjax.settings.schema import SeekerSettings

FILES = ("card", "opening", "answer", "feeling", "grade")
SCALE, SAID = "[1-5]", r"[^\n]*[^\s][^\n]*"
Kind = Literal["feeling", "reply", "answer", "grade"]
FELT = ("feeling", "answer")
Row = dict[str, Any]


class Speaker(NamedTuple):
    """A model that takes part."""

    experiment: Experiment
    adapter: Adapter


def seeker_prompts(setting: str) -> dict[str, jinja2.Template]:
    """The prompts of a folder. Raises InputError where one is missing or is no template."""
    folder, out = bundled(setting), {}
    for name in FILES:
        file = folder / f"{name}.txt"
        if not file.is_file():
            raise InputError(
                f"eval.seekers.prompts={setting}: {name}.txt is missing in it; copy it from bundled:prompts/seeker"
            )
        try:
            out[name] = jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(
                file.read_text(encoding="utf-8")
            )
        except jinja2.TemplateError as e:
            raise InputError(f"{file}: not a Jinja template ({e})") from e
    return out


def people(dialogues: Sequence[Dialogue], count: int) -> list[Dialogue]:
    """Whose cards are played: evenly spread over those dialogues that a seeker opens. Raises InputError for too few."""
    able = [d for d in dialogues if d.turns and d.turns[0].role == "seeker"]
    if len(able) < count:
        raise InputError(
            f"eval.seekers.count={count}: only {len(able)} test dialogues begin with the seeker; lower it, or give more in "
            "data.test"
        )
    return [able[i * len(able) // count] for i in range(count)]


def steps(turns: int) -> list[Kind]:
    """The steps of a conversation: how the seeker feels at first, then turns, then how they feel and their mark."""
    each: list[Kind] = ["reply", "answer"]
    return ["feeling", *(each * turns)[:-1], "feeling", "grade"]


class Talks:
    """Conversations of one model with all seekers, as far as they have come."""

    def __init__(
        self,
        model: Speaker,
        seeker: Speaker | None,
        cards: Sequence[Dialogue],
        settings: SeekerSettings,
        journal: Journal,
    ) -> None:
        """``seeker``: who plays the seekers; None for the model itself."""
        self.model, self.seeker, self.cards, self.settings = model, seeker or model, cards, settings
        self.prompts, self.order, self.journal = seeker_prompts(settings.prompts), steps(settings.turns), journal
        tokenizer = self.seeker.experiment.tokenizer
        parts: list[str | Field] = [Field(SCALE, 4), "\n", Field(SAID, max(4, settings.max_tokens))]
        self.form: Template = compile_template(parts, tokenizer, self.seeker.experiment.backbone.arch.vocab)
        self.longest: dict[bool, int] = {}  # prompts of each side
        mine, theirs = self._generator(self.model, False), self._generator(self.seeker, True)
        self.generators = {False: theirs if self.seeker is self.model else mine, True: theirs}
        self.waiting: dict[bool, list[Request]] = {True: [], False: []}  # by whether the seeker's model is asked

    def _generator(self, speaker: Speaker, seekers: bool) -> Generator:
        """A sampler with a lane for each conversation, and room for the longest prompt.

        With half of the room, prompts that push each other out of a row are computed again, which costs more than it saves.
        """
        e, c = speaker.experiment, speaker.experiment.config
        made = replace(e.generator, replies=min(c.evolve.batch, len(self.cards)), lanes=0, slots=0, new=0)
        new = max(self.model.experiment.config.reply.max_tokens, self.form.max_tokens if seekers else 0)
        said = self.settings.turns * (c.reply.max_tokens + self.settings.max_tokens)
        first = [
            self._as_seeker(i, [], "answer") if seekers else self._as_supporter(i, []) for i in range(len(self.cards))
        ]
        longest = max(len(e.tokenizer.prompt(chat)) for chat in first) + said
        # Beside what one side sees of a conversation lies what the other does, where a model plays both.
        self.longest[seekers] = min(longest, room(e))
        both = self.longest[False] if seekers and speaker is self.model else 0
        made.reserve(Need(self.longest[seekers] + both, 0, new), shared=False)
        return made

    def finish(self, advance: Any) -> None:
        """All steps that are missing. Raises InputError where a conversation does not fit the model."""
        for i in range(len(self.cards)):
            self._next(i)
        alike = self.seeker is self.model
        while any(self.waiting.values()):
            for seekers in (True, False):
                asked, self.waiting[seekers] = self.waiting[seekers], []
                if not asked:
                    continue
                speaker = self.seeker if seekers else self.model

                def done(request: Request, made: Completion) -> list[list[Request]]:
                    i, step, _ = request.key
                    self.journal.add(i * len(self.order) + step, self._row(request, made))
                    advance(1, len(made.token_ids))
                    self._next(i)
                    if not alike:  # the other model is asked when all of this one's are done
                        return []
                    ready = [*self.waiting[True], *self.waiting[False]]
                    self.waiting = {True: [], False: []}
                    return [[r] for r in ready]

                constraint = self.form.automaton if seekers or alike else None
                groups = [[r] for r in asked]
                self.generators[seekers].work(speaker.adapter, groups, done, constraint, more_may_follow=alike)

    def _next(self, i: int) -> None:
        """Ask for the step after those that a conversation has."""
        made = self._made(i)
        if len(made) == len(self.order):
            return
        kind = self.order[len(made)]
        seekers = kind != "reply"
        speaker = self.seeker if seekers else self.model
        chat = self._as_seeker(i, made, kind) if seekers else self._as_supporter(i, made)
        c = speaker.experiment.config
        how = self.settings if seekers else c.reply
        most = {"answer": self.form.max_tokens, "reply": c.reply.max_tokens}.get(kind, 1)  # a digit is a token
        prompt = fitting(speaker.experiment, chat, most)
        name = self.cards[i].id
        seed = row_seed(self.model.experiment.config.seed, "seekers", f"{name}/{len(made)}")
        state = START if seekers else 0
        request = Request((i, len(made), seekers), prompt, seed, how, most, state, name, self.longest[seekers])
        self.waiting[seekers].append(request)

    def _made(self, i: int) -> list[Row]:
        first = i * len(self.order)
        out: list[Row] = []
        while (row := self.journal.rows.get(first + len(out))) is not None and len(out) < len(self.order):
            out.append(row)
        return out

    def _row(self, request: Request, made: Completion) -> Row:
        i, step, seekers = request.key
        kind = self.order[step]
        tokenizer = (self.seeker if seekers else self.model).experiment.tokenizer
        text = tokenizer.decode(made.token_ids).strip()
        row: Row = {"id": self.cards[i].id, "step": step, "kind": kind}
        if not seekers:
            return row | {"text": text or "...", "finish_reason": made.finish}
        digit, _, said = text.partition("\n")
        return row | {"value": int(digit)} | ({"text": said.strip()} if kind == "answer" else {})

    def _turns(self, i: int, made: Sequence[Row]) -> list[tuple[str, str]]:
        """What was said: who, and what."""
        said = [("seeker", self.cards[i].turns[0].text)]
        names = {"reply": "supporter", "answer": "seeker"}
        return said + [(names[r["kind"]], r["text"]) for r in made if r["kind"] in names]

    def _as_supporter(self, i: int, made: Sequence[Row]) -> list[Message]:
        roles = {"seeker": "user", "supporter": "assistant"}
        chat = [Message(role=roles[who], content=text) for who, text in self._turns(i, made)]
        return self.model.experiment.encoder.with_system(chat)

    def _as_seeker(self, i: int, made: Sequence[Row], kind: Kind) -> list[Message]:
        """The same with changed places; the card stands where a system message would, and the question in the last message."""
        d, turns = self.cards[i], self._turns(i, made)
        card = self.prompts["card"].render(
            profile=d.profile, situation=d.situation, problem=d.problem, emotion=d.emotion
        )
        chat = [Message(role="user", content=f"{card.strip()}\n\n{self.prompts['opening'].render().strip()}")]
        roles = {"seeker": "assistant", "supporter": "user"}
        chat += [Message(role=roles[who], content=text) for who, text in turns]
        felt = [r["value"] for r in made if r["kind"] in FELT]
        before = str(felt[-1]) if felt else "not known"
        last = chat.pop()["content"] if chat[-1]["role"] == "user" else "..."
        asked = self.prompts[kind].render(reply=last, feeling=before).strip()
        return [*chat, Message(role="user", content=asked)]


def room(experiment: Experiment) -> int:
    """Tokens of a prompt and its reply, at most."""
    return min(experiment.config.data.window, experiment.backbone.arch.max_positions)


def fitting(experiment: Experiment, chat: list[Message], most: int) -> list[int]:
    """A prompt of at most the window's tokens less ``most`` new ones, without as few of the oldest turns as possible.

    What stands first, a system message or a card, stays. Raises InputError where that is too long by itself.
    """
    left = room(experiment) - most
    head = 1 if chat[0]["role"] == "system" else 0
    kept = list(chat)
    while len(prompt := experiment.tokenizer.prompt(kept)) > left:
        first = head if head else 1  # without a system message the first user message holds the card
        if len(kept) - first < 3:
            raise InputError(
                f"a simulated conversation needs {len(prompt)} tokens and {most} new ones, and the window has {left + most}; "
                "raise data.window, or lower eval.seekers.max_tokens or reply.max_tokens"
            )
        del kept[first : first + 2]
    return prompt


def talk(
    file: Path, name: str, model: Speaker, seeker: Speaker | None, cards: Sequence[Dialogue], settings: SeekerSettings
) -> None:
    """Let a model talk with all seekers; steps gather in a file, so that a killed command goes on."""
    total = len(cards) * len(steps(settings.turns))
    with Journal(file, total) as journal:
        if journal.missing:
            with progress(f"{name} with seekers", total, done=len(journal.rows)) as advance:
                Talks(model, seeker, cards, settings, journal).finish(advance)
        journal.finish()


def talk_values(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Value]:
    """What the seekers felt: at the end, by how much more than at first, their marks, and how it went turn by turn."""
    out: list[Value] = []
    for person in dict.fromkeys(r["id"] for r in rows):
        mine = [r for r in rows if r["id"] == person]
        felt = [r["value"] for r in mine if r["kind"] in FELT]
        (mark,) = (r["value"] for r in mine if r["kind"] == "grade")
        gain = felt[-1] - felt[0]
        made = {END: felt[-1], GAIN: gain, HELPED: mark, SUCCESS: gain > 0, WORSE: gain < 0}
        out += [Value(name, metric.name, person, f"{person}/talk", -1, float(x)) for metric, x in made.items()]
        out += [Value(name, FELT_AFTER.name, person, f"{person}/{n}", -1, float(x)) for n, x in enumerate(felt)]
    return out
