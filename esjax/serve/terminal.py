"""``esjax chat`` in a terminal: lines in, a streamed reply out, and commands that begin with a slash."""

from __future__ import annotations

import contextlib
import secrets
import sys
from collections.abc import Callable
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from esjax.corpus.dialogue import Message
from esjax.errors import InputError
from esjax.run.files import check_new, write_text
from esjax.run.jsonl import json_text
from esjax.safety.guard import Guard, Watch
from esjax.serve.engine import Engine
from esjax.serve.talk import NOTICE, SIGN, check_asked, fitted, infer, open_also, reply_job, said, speak, why
from esjax.settings.files import Overrides

HELP = """/profile        what the model would infer of you
/compare NAME   another model's reply to the same message beside this one's: m0, backbone folder, hf:ORG/NAME, ...
/why            what stands behind the last reply: reflection, draft, refinement
/save FILE      write the conversation as JSON; nothing is stored otherwise
/new            forget the conversation and begin another
/quit           end (or Ctrl-D)"""


class Terminal:
    """One conversation in a terminal."""

    def __init__(self, engine: Engine, name: str, guard: Guard | None, given: Overrides) -> None:
        self.engine, self.name, self.guard, self.given = engine, name, guard, given
        self.chat: list[Message] = []
        self.seed = secrets.randbits(32)
        self.console = Console(highlight=False, soft_wrap=True)
        self.commands: dict[str, Callable[[str], None]] = {
            "/profile": lambda _: self._profile(),
            "/compare": self._compare,
            "/why": lambda _: self._why(),
            "/save": self._save,
            "/new": lambda _: self._new(),
            "/help": lambda _: print(HELP),
        }

    def run(self) -> None:
        """Until the input ends, or somebody says /quit."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and earlier ones come back with the arrow keys; no file is written
        self.console.print(Panel(NOTICE, title=SIGN))
        print(f"{self.name} listens. /help lists what else you can do.")
        while True:
            try:
                line = input(f"\n[{SIGN}]\nyou> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D ends the conversation")
                continue
            if line in ("/quit", "/exit"):
                return
            if line:
                self._line(line)

    def _line(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        try:
            if not line.startswith("/"):
                self._answer(line)
            elif word in self.commands:
                self.commands[word](rest.strip())
            else:
                print(f"{word}: no such command; /help lists them")
        except InputError as e:
            print(e)
        except KeyboardInterrupt:
            print(" (stopped)")

    def _answer(self, line: str) -> None:
        before = self.chat
        self.chat = [*self.chat, Message(role="user", content=line)]
        held = self.guard.before([line]) if self.guard else None
        if held is not None:
            print(f"\n{held.text}")
            self.chat.append(Message(role="assistant", content=held.text))
            return
        try:
            given = fitted(self.engine.models[self.name], self.chat)
            if given.cut:
                print(f"(the {given.cut} oldest messages no longer fit and are not read)")
            text = self._stream(self.name, given.prompt)
        except BaseException:
            self.chat = before
            raise
        self.chat.append(Message(role="assistant", content=text))

    def _stream(self, name: str, prompt: list[int]) -> str:
        """Show the reply to the conversation as it comes. Returns it, or what the guard says in its place."""
        watch, text = Watch(self.guard, said(self.chat)), ""
        sys.stdout.write(f"{name}> ")
        for reply in speak(self.engine, reply_job(self.engine, name, prompt, self._seed())):
            sys.stdout.write(watch.take(reply.text, reply.finish is not None))
            sys.stdout.flush()
            text = reply.text.strip()
            if watch.held is not None:
                text = watch.held.text
                sys.stdout.write(f"\n\n{text}")
                break
        print()
        return text

    def _seed(self) -> int:
        return (self.seed + len(self.chat)) % 2**32

    def _asked(self) -> list[Message]:
        """The conversation up to the last message of the user's that was answered. Raises InputError."""
        if not self.chat:
            raise InputError("there is no reply yet; say something first")
        check_asked(self.guard, self.chat[:-1])
        return self.chat[:-1]

    def _profile(self) -> None:
        for field, text in infer(self.engine, self.name, self._asked(), self._seed()).items():
            print(f"{field.replace('_', ' ')}: {text}")

    def _why(self) -> None:
        made = why(self.engine, self.name, self._asked(), self.chat[-1]["content"], self._seed())
        for field, text in made.reflection.items():
            print(f"{field.replace('_', ' ')}: {text}")
        held = self.guard.after(made.refinement, said(self._asked())) if self.guard else None
        print(f"draft: {made.draft}\nrefined: {held.text if held else made.refinement}")

    def _compare(self, name: str) -> None:
        asked = self._asked()
        if not name:
            raise InputError("/compare NAME: give m0, m1, ... of this model's run, or another model")
        open_also(self.engine, name, self.given)
        text = ""
        for reply in speak(
            self.engine, reply_job(self.engine, name, fitted(self.engine.models[name], asked).prompt, self._seed())
        ):
            text = reply.text.strip()
        if self.guard and (held := self.guard.after(text, said(asked))):
            text = held.text
        sides = ((self.name, self.chat[-1]["content"]), (name, text))
        self.console.print(Columns([Panel(Text(words), title=who) for who, words in sides], equal=True, expand=True))

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save FILE: give a new file")
        place = Path(file).expanduser()
        check_new(place, "file")
        write_text(place, json_text({"model": self.name, "messages": self.chat}, indent=1, ensure_ascii=False) + "\n")
        print(f"{len(self.chat)} messages written to {place}")

    def _new(self) -> None:
        self.chat, self.seed = [], secrets.randbits(32)
        print("a new conversation; the model knows nothing of the last one")
