"""The programs that a run compiles, by name: few, and known; and what a program's products cost."""

from __future__ import annotations

import math
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


def compile_named(lowered: Any) -> Any:
    """A lowered program, compiled so that its text has the names that today's code gives its parts.

    JAX's cache on disk otherwise gives what was compiled from equal instructions under other names.
    """
    option = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    try:
        return lowered.compile()
    finally:
        jax.config.update(option, before)


def work_bytes(compiled: Any) -> int:
    """Bytes of a device that a compiled program takes beside its arguments: what it works in, and results of their own."""
    m = compiled.memory_analysis()
    return int(m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes + m.generated_code_size_in_bytes)


def too_large(error: Exception) -> bool:
    """Whether an error is the compiler's word that a program is larger than its device."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


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


def products(jaxpr: Any) -> float:
    """FLOPs of a program's matrix products on all devices, 2 per multiply-add, without those in kernels.

    Scans count as often as they run, a loop of unknown length as one iteration (decoding's is one step), and of branches the
    dearest. The compiler's own analysis counts the body of any loop once.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [
            products(getattr(part, "jaxpr", part))
            for value in eqn.params.values()
            for part in (value if isinstance(value, tuple | list) else [value])
            if hasattr(getattr(part, "jaxpr", part), "eqns")
        ]
        kind = eqn.primitive.name
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
            total += 2.0 * eqn.outvars[0].aval.size * summed
        elif kind == "cond":
            total += max(inner)
        elif kind == "shard_map":  # of one device's part
            mesh = eqn.params["mesh"]
            total += sum(inner) * math.prod(mesh.shape[axis] for axis in eqn.params.get("manual_axes", mesh.axis_names))
        elif kind != "pallas_call":
            total += sum(inner) * (eqn.params["length"] if kind == "scan" else 1)
    return total


def _count(event: str, duration_secs: float, **facts: Any) -> None:
    name = str(facts.get("fun_name", ""))
    if event == "/jax/core/compile/backend_compile_duration" and name.startswith("jit(esjax_"):
        current().compiled[name[len("jit(esjax_") : -1]] += 1
        current().compile_seconds += duration_secs


jax.monitoring.register_event_duration_secs_listener(_count)
