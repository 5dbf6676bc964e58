"""What the first process tells the person who watches: lines and progress bars, on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from esjax.runtime.context import current

console = Console(stderr=True)


def say(message: str) -> None:
    """One line for the person who watches, from the first process; on stderr, so that stdout holds results only."""
    if current().processes.writer:
        console.print(message, highlight=False, markup=False, soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens = task.fields["tokens"]
        more = f", {tokens / task.elapsed:.0f} tokens/s" if tokens and task.elapsed else ""
        return Text((f"{task.speed:.2f}/s" if task.speed else "-/s") + more)


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress bar with count, rate and time left, on stderr or in a notebook, else lines; yields ``advance(n, tokens=0)``.

    Where tokens are told, their rate is shown as well.
    """
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    # In a notebook rich draws a bar with ipywidgets, where they are installed.
    live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
    start = time.monotonic()
    count = drawn = 0
    last = start

    def rates(seconds: float) -> str:
        per_second = f"{count / max(seconds, 1e-9):.2f}/s"
        return per_second + (f", {drawn / max(seconds, 1e-9):.0f} tokens/s" if drawn else "")

    def advance(n: int, tokens: int = 0) -> None:
        nonlocal count, drawn, last
        count += n
        drawn += tokens
        bar.update(task, advance=n, tokens=drawn)
        now = time.monotonic()
        # A log file gets a line every 15 s instead of a bar.
        if current().processes.writer and not live and now - last > 15 and count:
            left = (total - done - count) * (now - start) / count
            say(f"  {label}: {done + count}/{total}, {rates(now - start)}, {left:.0f} s left")
            last = now

    shown = live and current().processes.writer
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(label, total=total, completed=done, tokens=0)
        yield advance
    seconds = time.monotonic() - start
    if count:
        say(f"  {label}: {count} in {seconds:.1f} s ({rates(seconds)})")
