"""What is measured: a workload file's exact sizes, a random model of its shape, and this machine's ceilings."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field, ValidationError

from esjax.errors import InputError
from esjax.model.decoder import Decoder
from esjax.model.families import Architecture, architecture
from esjax.model.linear import Lora
from esjax.model.lora import lora_from
from esjax.plan.measure import LARGEST
from esjax.plan.moved import moved
from esjax.runtime.programs import work_bytes
from esjax.settings.files import read_text
from esjax.settings.schema import LoraSettings, Settings

GIB = 2**30


class SampleWork(Settings):
    """Continuations of unrelated prompts at temperature 0.7 and top-p 0.9; none stops early, and prefill counts."""

    batch: int = Field(ge=1)
    """Prompts."""
    prompt: int = Field(ge=1)
    """Tokens of a prompt."""
    new_tokens: int = Field(ge=1)
    """Tokens drawn from each."""


class RoundWork(Settings):
    """The three replies to each context, drawn as above; everything counts."""

    contexts: int = Field(ge=1)
    """Contexts."""
    context: int = Field(ge=1)
    """Tokens of a context."""
    instruction: int = Field(ge=1)
    """Tokens of an instruction, which follows the context (reflection), or context, draft and reflection (refinement)."""
    draft: int = Field(ge=1)
    """Tokens drawn for a draft, from the context alone."""
    reflection: int = Field(ge=1)
    """Tokens drawn for a reflection."""
    refinement: int = Field(ge=1)
    """Tokens drawn for a refinement."""


class DpoWork(Settings):
    """A step of preference training."""

    pairs: int = Field(ge=1)
    """Pairs a step."""
    prompt: int = Field(ge=1)
    """Tokens of a prompt."""
    response: int = Field(ge=1)
    """Tokens of the chosen and of the rejected response."""
    lora_rank: int = Field(ge=1)
    """Rank of the adapter on every linear layer."""
    steps: int = Field(ge=1)
    """Steps that are timed."""
    warmup: int = Field(ge=0)
    """Steps before those."""


class SftWork(Settings):
    """A step of fine-tuning with a loss on every token."""

    batch: int = Field(ge=1)
    """Sequences a step."""
    length: int = Field(ge=1)
    """Tokens of a sequence."""
    lora_rank: int = Field(ge=1)
    """Rank of the adapter on every linear layer."""
    steps: int = Field(ge=1)
    """Steps that are timed."""
    warmup: int = Field(ge=0)
    """Steps before those."""


class Workload(Settings):
    """One profile of a workload file."""

    dtype: Literal["float32", "bfloat16"]
    """Dtype of the base and of the arithmetic."""
    model: dict[str, Any]
    """A Llama's config.json."""
    runs: int = Field(default=10, ge=1)
    """Times that sampling and the generations of a round are done over; the middle one counts."""
    sample: SampleWork
    """Sampling."""
    round: RoundWork
    """The generations of a round."""
    dpo: DpoWork
    """The preference step."""
    sft: SftWork
    """The fine-tuning step."""

    @property
    def architecture(self) -> Architecture:
        """The model's shape. Raises InputError naming a key that is not supported."""
        return architecture({"model_type": "llama", **self.model}, "the workload's model")


def read_workload(path: str, profile: str) -> Workload:
    """A profile of a workload file (JSON). Raises InputError naming what is wrong."""
    try:
        profiles = json.loads(read_text(path))
        return Workload.model_validate(profiles[profile])
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise InputError(f"{path}, profile {profile}: {where}: {first['msg']}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f"{path}: no profile {profile!r} can be read from it; expected a JSON object of profiles"
        ) from e


def lora_of(rank: int) -> Lora:
    """An adapter of this rank on every linear layer."""
    return lora_from(LoraSettings(rank=rank, alpha=2 * rank))


def parts(
    arch: Architecture, lora: Lora | None, dtype: jnp.dtype, bare: bool = False
) -> tuple[nnx.GraphDef[Decoder], Callable[[], tuple[nnx.State, nnx.State]]]:
    """A random model's definition, and what makes its two parts: what is trained (float32) and what is frozen (``dtype``).

    Without ``lora`` all parameters are trained, or, if the model is ``bare``, none.
    """
    kept = dtype if lora is not None or bare else jnp.dtype("float32")
    what = nnx.LoRAParam if lora is not None or bare else nnx.Param

    def make() -> Decoder:
        return Decoder(arch, lora, kept, nnx.Rngs(params=0, lora=0))

    definition, _, _ = nnx.split(nnx.eval_shape(make), what, ...)  # type: ignore[misc]
    return definition, jax.jit(lambda: nnx.split(make(), what, ...)[1:])


def tracing(root: Path, task: str, variant: str) -> AbstractContextManager[None]:
    """Write a profiler trace of what is done meanwhile into a folder of this task and variant."""
    return jax.profiler.trace(str(root / f"{task}-{variant}".replace(", ", "-")))


def memory(compiled: Any) -> dict[str, float]:
    """Memory in GiB: the step's by the compiler's layout, and the process' peak so far, earlier jobs and set-up included.

    The latter is the device's where it can tell (``device_peak_gib``), else the resident memory (``process_peak_gib``).
    """
    return planned(compiled) | peak_memory()


def peak_memory() -> dict[str, float]:
    """The device's or the process' peak so far in GiB, see ``memory``."""
    stats = jax.local_devices()[0].memory_stats()
    if stats is not None and "peak_bytes_in_use" in stats:
        return {"device_peak_gib": round(stats["peak_bytes_in_use"] / GIB, 2)}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"process_peak_gib": round(resident / GIB, 2)}


def planned(compiled: Any) -> dict[str, float]:
    """What a program needs on one device by the compiler's layout, in GiB: all of it, and that beside its arguments."""
    work = work_bytes(compiled)
    held = compiled.memory_analysis().argument_size_in_bytes
    return {"mem_gib": round((held + work) / GIB, 2), "work_gib": round(work / GIB, 2)}


def spread(units: float, seconds: Sequence[float]) -> list[float]:
    """The figures of the slowest and the fastest time."""
    return [round(units / max(seconds), 2), round(units / min(seconds), 2)]


def traffic(compiled: Any, needed: float, steps: bool = False) -> dict[str, Any]:
    """What a program moves in main memory by its compiled text, beside the bytes that its work needs; see ``plan.moved``."""
    found = moved(compiled.as_text(), steps=steps)
    most = {part: round(size / GIB, 3) for part, size in found.largest(LARGEST)}
    return {"moved_gib": round(found.bytes / GIB, 3), "needed_gib": round(needed / GIB, 3), "moved_most_gib": most}


def best_seconds(function: Callable[..., jax.Array], *arguments: Any) -> float:
    """The shortest of twelve calls of a jitted function; the first of them compiles."""
    best = float("inf")
    for _ in range(12):
        began = time.perf_counter()
        function(*arguments).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return best


class Ceilings(NamedTuple):
    """What this machine reaches at most."""

    flops: float  # FLOP/s of one large square product
    bandwidth: float  # bytes/s that it reads in the product of a large matrix and a vector


def measured_ceilings(dtype: jnp.dtype) -> Ceilings:
    """This machine's ceilings, products of ``dtype``."""
    on_cpu = jax.default_backend() == "cpu"
    n, long = (2048, 1 << 13) if on_cpu else (8192, 1 << 15)
    # Random numbers: a GPU draws less power on constants, and then runs faster than on real ones.
    square = jax.random.normal(jax.random.key(0), (n, n), dtype)
    matrix, vector = jnp.ones((long, long), jnp.float32), jnp.ones(long, jnp.float32)
    multiply = jax.jit(jnp.matmul)
    return Ceilings(
        2.0 * n**3 / best_seconds(multiply, square, square), matrix.nbytes / best_seconds(multiply, matrix, vector)
    )
