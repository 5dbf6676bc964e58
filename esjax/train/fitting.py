"""``model.remat: auto``: of the forms of a training step the fastest that the devices have room for, found by compiling."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from esjax.errors import InputError
from esjax.model.decoder import ROOM, Execution, forms
from esjax.runtime.context import current
from esjax.runtime.programs import too_large, work_bytes
from esjax.train.step import Step


class Fitted(NamedTuple):
    """A compiled step."""

    step: Any  # jax.stages.Compiled
    form: Execution
    seconds: float  # that compiling took, with the forms that did not fit


def compile_fitting(
    make: Callable[[Execution], Step], execution: Execution, arguments: Any, compiler: Callable[[Any], Any]
) -> Fitted:
    """The first form of the execution whose step fits, compiled; the last, where none of them does.

    Every process must ask: all take the same form.

    Args:
        make: the jitted step of a form.
        arguments: of the step.
        compiler: compiles what is lowered.

    Raises InputError where there is a choice and a device does not tell its memory.
    """
    began = time.perf_counter()
    *faster, last = forms(execution, jax.default_backend())

    def compiled(form: Execution) -> Fitted:
        step: Any = make(form)
        made = compiler(step.lower(*arguments))
        return Fitted(made, form, time.perf_counter() - began)

    for form in faster:
        try:
            found = compiled(form)
            fits = _fits(found.step)
        except jax.errors.JaxRuntimeError as e:
            if not too_large(e):
                raise
            fits = False
        if current().processes.all(fits):
            return found
    return compiled(last)


def _fits(compiled: Any) -> bool:
    """Whether a device has the room for a program beside all that it holds."""
    held, limit = _memory(compiled.memory_analysis().argument_size_in_bytes)
    return held + work_bytes(compiled) <= ROOM[jax.default_backend()] * limit


def _memory(arguments: int) -> tuple[int, float]:
    """Bytes that a device holds now, and those that it has. All devices of a CPU share the machine's. Raises InputError."""
    devices = jax.local_devices()
    if jax.default_backend() == "cpu":
        return arguments, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_in_use" in s and "bytes_limit" in s for s in stats):
        raise InputError(
            f"model.remat=auto: {devices[0]} does not tell its memory (with XLA_PYTHON_CLIENT_ALLOCATOR=platform none does); "
            "choose none, dots, full or offload"
        )
    return max(s["bytes_in_use"] for s in stats), min(s["bytes_limit"] for s in stats)
