"""What a judge is asked and answers, and how every answer is kept, so that none is paid for twice."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from esjax.corpus.dialogue import Message
from esjax.hub.fetch import cache_root
from esjax.run.progress import progress, say
from esjax.runtime.context import current


class Question(NamedTuple):
    """One question with few answers."""

    messages: list[Message]
    choices: tuple[str, ...]  # what may be answered: letters or digits
    texts: tuple[str, ...]  # what the question is about, for judges that are rules: the seeker's words, then replies

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps([self.messages, self.choices]).encode()).hexdigest()


class Answer(NamedTuple):
    """``shares``: of each choice, summing to 1, or None where the judge's words held no answer; tokens that were paid for."""

    shares: tuple[float, ...] | None
    read: int = 0
    written: int = 0

    @property
    def choice(self) -> int | None:
        """The number of the choice that was made; the first of equal ones."""
        return None if self.shares is None else self.shares.index(max(self.shares))


Done = Callable[[int, Answer], None]


class Judge(Protocol):
    """Answers questions one by one, in any order. ``name`` tells its answers from other judges'."""

    name: str
    alone: bool  # whether one process asks it for all

    def ask(self, questions: Sequence[Question], done: Done) -> None:
        """Tell ``done`` each question's number and answer. What was told before an error stays told.

        Raises InputError, TransientError, Stopped.
        """
        ...


class Kept:
    """A judge whose answers are kept in a file of the cache; the same question is asked once."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        digest = hashlib.sha256(judge.name.encode()).hexdigest()[:16]
        self.file = cache_root() / "judges" / f"{digest}.jsonl"
        self.known: dict[str, Answer] = {}
        self._torn = False
        # Processes on several machines have caches of their own, and a judge that all of them compute must be asked the same.
        if self.file.exists() and (judge.alone or current().processes.count == 1):
            text = self.file.read_text(encoding="utf-8")
            self._torn = bool(text) and not text.endswith("\n")  # a killed process was writing
            for line in text.splitlines():
                self._remember(line)
        self.asked = self.read = self.written = 0

    def _remember(self, line: str) -> None:
        try:
            row: dict[str, Any] = json.loads(line)
            shares = row["shares"]
            self.known[row["key"]] = Answer(None if shares is None else tuple(shares), row["read"], row["written"])
        except (ValueError, KeyError, TypeError):  # the end of a line that a killed process began
            pass

    def answers(self, questions: Sequence[Question], label: str) -> list[Answer]:
        """An answer to each question. Errors as of ``Judge.ask``; what was answered before one is kept."""
        keys = [q.key for q in questions]
        missing = list({k: q for k, q in zip(keys, questions, strict=True) if k not in self.known}.values())
        if missing:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as file, progress(label, len(missing)) as advance:

                def done(i: int, answer: Answer) -> None:
                    key = missing[i].key
                    self.known[key] = answer
                    self.asked += 1
                    self.read += answer.read
                    self.written += answer.written
                    if current().processes.writer:
                        fcntl.flock(file, fcntl.LOCK_EX)  # other runs may ask the same judge
                        file.write(json.dumps({"key": key, **answer._asdict()}) + "\n")
                        file.flush()
                        fcntl.flock(file, fcntl.LOCK_UN)
                    advance(1)

                if self._torn:
                    file.write("\n")  # the unfinished line ends here
                self.judge.ask(missing, done)
        return [self.known[k] for k in keys]

    def say_cost(self) -> None:
        """What was asked anew, and what it took."""
        tokens = f", {self.read} tokens read and {self.written} written" if self.read else ""
        say(f"  {self.judge.name}: {self.asked} questions asked{tokens}; {len(self.known)} answers in {self.file}")


def rendered(folder: Path, name: str, **values: str) -> list[Message]:
    """A question from a prompt file."""
    import jinja2

    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False).from_string(text)
    return [{"role": "user", "content": template.render(**values).strip()}]


def conversation(messages: Sequence[Message]) -> str:
    """A context as a judge reads it."""
    names = {"user": "Seeker", "assistant": "Supporter"}
    return "\n".join(f"{names[m['role']]}: {m['content']}" for m in messages if m["role"] in names)
