"""``model.remat: auto``: of the forms of a training step the fastest that the devices have room for, found by compiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from esjax.model.decoder import ROOM, Execution, forms
from esjax.runtime.context import current
from esjax.train.step import Step


class Fitted(NamedTuple):
    """A compiled step."""

    step: Any  # jax.stages.Compiled
    form: Execution
    seconds: float  # that the last compilation took


def compile_fitting(
    make: Callable[[Execution], Step], execution: Execution, arguments: Any, compile: Callable[[Any], Any]
) -> Fitted:
    """The first form of the execution whose step fits, compiled; the last, where none of them does.

    Every process must ask: all take the same form.

    Args:
        make: the jitted step of a form.
        arguments: of the step.
        compile: compiles what is lowered.
    """
    *faster, last = forms(execution, jax.default_backend())
    for form in faster:
        made = _compiled(make(form), arguments, compile)
        if current().processes.all(made is not None) and made is not None:
            return Fitted(made[0], form, made[1])
    began = time.perf_counter()
    step: Any = make(last)
    compiled = compile(step.lower(*arguments))
    return Fitted(compiled, last, time.perf_counter() - began)


def _compiled(step: Any, arguments: Any, compile: Callable[[Any], Any]) -> tuple[Any, float] | None:
    """The compiled step and how long that took; None where a device has not the room."""
    began = time.perf_counter()
    try:
        compiled = compile(step.lower(*arguments))
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e) and "out of memory" not in str(e).lower():
            raise
        return None
    m = compiled.memory_analysis()
    more = m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes + m.generated_code_size_in_bytes
    held, limit = _memory(m.argument_size_in_bytes)
    return (compiled, time.perf_counter() - began) if held + more <= ROOM[jax.default_backend()] * limit else None


def _memory(arguments: int) -> tuple[int, float]:
    """Bytes that a device holds now, and those that it has. All devices of a CPU share the machine's."""
    devices = jax.local_devices()
    if jax.default_backend() == "cpu":
        return arguments, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    stats = [device.memory_stats() for device in devices]
    return max(s["bytes_in_use"] for s in stats), min(s["bytes_limit"] for s in stats)
