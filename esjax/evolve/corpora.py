"""An experiment's corpora: read, screened, checked for leaks, and encoded, each when first asked for, once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from esjax.corpus.dialogue import Dialogue
from esjax.corpus.leaks import Leak, find_leaks
from esjax.corpus.sources import Corpus, content, read
from esjax.errors import InputError
from esjax.evolve.filters import Filters, screen_hashes
from esjax.evolve.pairs import Context, contexts
from esjax.hub.fetch import cache_root
from esjax.rows import Rows
from esjax.run.directory import RunDir
from esjax.run.files import publish_jsonl
from esjax.run.progress import say
from esjax.safety.screen import Screened
from esjax.settings.schema import Config
from esjax.tokens.encode import Encoder


@dataclass
class Corpora:
    """The corpora that the settings name."""

    config: Config
    encoder: Encoder
    filters: Filters

    # --- what they hold ----------------------------------------------------------------------------------------------

    @cached_property
    def read_train(self) -> Corpus:
        return self._read("train")

    @cached_property
    def valid(self) -> list[Dialogue]:
        return self._read("valid").dialogues

    @cached_property
    def test(self) -> list[Dialogue]:
        return self._read("test").dialogues

    @cached_property
    def read_replay(self) -> Corpus | None:
        """The replay data, if some is to be mixed in."""
        d = self.config.data
        return self._read("replay", "messages") if d.replay is not None and d.replay_share > 0 else None

    def _read(self, name: str, format: str | None = None) -> Corpus:
        d = self.config.data
        source = getattr(d, name)
        corpus = read(source, format or d.format, self.config.seed)
        mended = ", ".join(f"{n} {what}" for what, n in sorted(corpus.counts.items()) if n and what != "rows")
        if mended:
            say(f"{corpus.origin}: {corpus.counts['rows']} rows; {mended}")
        return corpus

    @cached_property
    def read_eval_replay(self) -> Corpus | None:
        """Held-out replay data, if the loss on it is to be measured."""
        c = self.config
        return None if c.eval.replay is None else read(c.eval.replay, "messages", c.seed)

    def inputs(self, *names: str) -> dict[str, str]:
        """Hashes of what these settings of ``data`` name, and of what it is screened by: inputs of a stage."""
        keys = [f"data.{name}" for name in names if getattr(self.config.data, name) is not None]
        return {key: content(self.config, key) for key in keys} | screen_hashes(self.config.screen)

    def eval_inputs(self) -> dict[str, str]:
        """A hash of the held-out replay data, where there is some."""
        return {} if self.config.eval.replay is None else {"eval.replay": content(self.config, "eval.replay")}

    # --- screening and leaks -----------------------------------------------------------------------------------------

    @cached_property
    def screened(self) -> Screened:
        """The training dialogues, each up to its first turn that no phase trains on. Raises InputError when none is left."""
        return self._screen(self.read_train, "dialogue")

    @property
    def train(self) -> list[Dialogue]:
        return self.screened.kept

    @cached_property
    def screened_replay(self) -> Screened:
        """The same of the replay data; none where there is none."""
        return self._screen(self.read_replay, "conversation") if self.read_replay else Screened([], [], Counter(), [])

    def _screen(self, corpus: Corpus, what: str) -> Screened:
        made = self.filters.screen.screened(corpus.dialogues, cache_root() / "screen")
        for action in ("drop", "mark"):
            if counts := Counter(f.kind for f in made.found if f.action == action):
                named = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
                lost = f"; {sum(made.answers.values())} answers are not trained on" if action == "drop" else ""
                say(f"{corpus.origin}: found and {'dropped' if action == 'drop' else 'kept'}: {named}{lost} (screen)")
        if not made.kept:
            raise InputError(
                f"{corpus.origin}: every {what} holds what is dropped (screen.crisis, screen.personal, ...) before its first "
                "answer is over; give others, or set screen to mark or keep"
            )
        return made

    def screen_facts(self) -> dict[str, Any]:
        """For the manifest: what was read, and what was found by kind."""
        formats = {*self.read_train.formats, *(self.read_replay.formats if self.read_replay else ())}
        facts: dict[str, Any] = {"corpus": dict(+self.read_train.counts), "formats": sorted(formats)}
        parts = {"train": self.screened, "replay": self.screened_replay}
        found = {name: dict(Counter(f"{f.action} {f.kind}" for f in part.found)) for name, part in parts.items()}
        lost = sum((part.answers for part in parts.values()), Counter[str]())
        facts |= {"screened": {name: counts for name, counts in found.items() if counts}}
        return {k: v for k, v in (facts | {"answers_dropped": dict(lost), "leaks": len(self.leaks)}).items() if v}

    def write_screened(self, run: RunDir) -> None:
        """List all findings with their ids, in RUN/screened.jsonl."""
        parts = {"train": self.screened, "replay": self.screened_replay}
        rows = [{"source": name, **f._asdict()} for name, part in parts.items() for f in part.found]
        publish_jsonl(run.path / "screened.jsonl", rows)

    @cached_property
    def leaks(self) -> list[Leak]:
        """Dialogues, near copies or situations that stand in two splits. Raises InputError unless data.leaks allows them."""
        splits = {"train": self.read_train.dialogues, "valid": self.valid, "test": self.test}
        if self.read_replay is not None:
            splits["replay"] = self.read_replay.dialogues
        if self.read_eval_replay is not None:
            splits["eval.replay"] = self.read_eval_replay.dialogues
        trained = {"train", "replay"}  # what stands in both is trained on twice, which leaks nothing
        found = [
            leak
            for leak in find_leaks(splits, cache_root() / "leaks")
            if {leak.first.split()[0], leak.second.split()[0]} != trained
        ]
        if not found:
            return found
        d = self.config.data
        listed = "; ".join(map(str, found[:3]))
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        names = ", ".join(name if "." in name else f"data.{name}" for name in splits)
        what = f"{len(found)} leaks between {names}: {listed}{more}"
        if d.leaks == "error":
            raise InputError(
                f"{what}; take one of each out (`esjax data check {d.train} {d.valid} {d.test}` lists them), or set "
                "data.leaks=allow"
            )
        say(f"{what} (data.leaks=allow)")
        return found

    # --- rows and contexts -------------------------------------------------------------------------------------------

    @cached_property
    def sft_rows(self) -> tuple[list[Rows], dict[str, Any]]:
        """Phase 1's examples: all training dialogues, and enough replay conversations to make up their share; and counts.

        Raises InputError when none fits data.window.
        """
        d, encoder = self.config.data, self.encoder
        encoder.counts.clear()
        own = self._examples(self.train, "dialogue", self.read_train.origin)
        times = self.read_train.times or [1] * len(self.read_train.dialogues)
        examples = [row for rows, n in zip(own, self.screened.numbers, strict=True) for row in rows * times[n]]
        facts: dict[str, Any] = {"dialogues": len(self.train), "dialogue_rows": len(examples)} | self.screen_facts()
        tokens = sum(map(_targets, examples))
        if self.read_replay is not None:
            replay = self.replay_rows
            order = np.random.default_rng((self.config.seed, 1)).permutation(len(replay))
            have, share = (len(examples) if d.replay_by == "examples" else tokens), d.replay_share
            want, taken = round(have * share / (1 - share)), list[Rows]()
            while want > 0:
                taken.append(replay[order[len(taken) % len(replay)]])
                want -= 1 if d.replay_by == "examples" else _targets(taken[-1])
            examples += taken
            drawn = sum(map(_targets, taken))
            facts |= {"replay_rows": len(taken), "replay_tokens": drawn}
            shares = len(taken) / len(examples), drawn / (tokens + drawn)
            say(
                f"replay: {len(taken)} of {len(examples)} examples ({shares[0]:.1%}), {shares[1]:.1%} of the target tokens"
            )
            tokens += drawn
        if encoder.tokenizer.told_date:
            facts["date_told"] = encoder.tokenizer.told_date
        return examples, facts | {"history": dict(encoder.counts), "target_tokens": tokens}

    @cached_property
    def replay_rows(self) -> list[Rows]:
        """All replay conversations that fit data.window. Raises InputError when none does."""
        if self.read_replay is None:
            return []
        made = self._examples(self.screened_replay.kept, "conversation", self.read_replay.origin, system=False)
        return [row for rows in made for row in rows]

    @cached_property
    def valid_rows(self) -> list[Rows]:
        return [row for rows in self._examples(self.valid, "dialogue", str(self.config.data.valid)) for row in rows]

    @cached_property
    def test_rows(self) -> list[tuple[str, Rows]]:
        """The held-out dialogues' rows, each with its dialogue's id."""
        made = self._examples(self.test, "dialogue", str(self.config.data.test))
        return [(d.id, row) for d, rows in zip(self.test, made, strict=True) for row in rows]

    @cached_property
    def eval_replay_rows(self) -> list[tuple[str, Rows]]:
        """The same of held-out replay data; none where there is none."""
        corpus = self.read_eval_replay
        if corpus is None:
            return []
        made = self._examples(corpus.dialogues, "conversation", corpus.origin, system=False)
        return [(d.id, row) for d, rows in zip(corpus.dialogues, made, strict=True) for row in rows]

    def _examples(self, dialogues: list[Dialogue], what: str, origin: str, system: bool = True) -> list[list[Rows]]:
        rows = self.encoder.examples([self.encoder.chat(d, system) for d in dialogues])
        if not any(rows):
            raise InputError(f"{origin}: no {what} fits data.window={self.config.data.window} tokens; raise it")
        return rows

    @cached_property
    def pool(self) -> tuple[list[Context], Counter[str]]:
        """All contexts of phase 2, and what became of their histories. Raises InputError when none fits."""
        self.encoder.counts.clear()
        setting = "data.window" if self.config.evolve.context_tokens is None else "evolve.context_tokens"
        origin = self.read_train.origin
        pool = contexts(self.train, self.encoder, self.config.context_room, origin, f"raise {setting}")
        return pool, Counter(self.encoder.counts)

    @cached_property
    def asked(self) -> list[Context]:
        """The contexts that are answered for the closing table. Raises InputError when none fits."""
        c = self.config
        remedy = "raise data.window or lower reply.max_tokens"
        pool = contexts(self.test, self.encoder, c.data.window - c.reply.max_tokens, str(c.data.test), remedy)
        return [pool[i] for i in evenly_spread(c.reply.max_contexts, len(pool))]


def evenly_spread(count: int | None, total: int) -> list[int]:
    """``count`` of the places 0 to ``total`` - 1, or all of them where it is None or more than there are."""
    count = min(total if count is None else count, total)
    return [i * total // count for i in range(count)]


def _targets(row: Rows) -> int:
    return int((row.weight != 0).sum())
