"""The programs that a run compiles, by name: few, and known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from esjax.runtime.context import current


def program(name: str, function: Callable[..., Any], **how: Any) -> Any:
    """``jax.jit(function, **how)`` under a name by which its compilations are counted."""

    def named(*arguments: Any, **options: Any) -> Any:
        return function(*arguments, **options)

    named.__name__ = named.__qualname__ = f"esjax_{name}"
    if "static_argnames" in how or "donate_argnames" in how:
        raise TypeError("a named program takes static and donated arguments by number: its wrapper hides their names")
    return jax.jit(named, **how)


def compiled() -> Counter[str]:
    """How often each named program was compiled under this runtime (or fetched, compiled, from JAX's cache on disk)."""
    return Counter(current().compiled)


def seconds() -> float:
    """How long that took."""
    return current().compile_seconds


def summary() -> str:
    """The same in words."""
    found = current().compiled
    return f"{found.total()} programs compiled: " + ", ".join(f"{n} {name}" for name, n in sorted(found.items()))


def _count(event: str, duration_secs: float, **facts: Any) -> None:
    name = str(facts.get("fun_name", ""))
    if event == "/jax/core/compile/backend_compile_duration" and name.startswith("jit(esjax_"):
        current().compiled[name[len("jit(esjax_") : -1]] += 1
        current().compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)
