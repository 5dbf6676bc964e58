"""Rotary frequencies of all rope types, as transformers computes them (its modeling_rope_utils)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from esjax.errors import InputError
from esjax.model.families.architecture import Rotary

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def positive(value: Any, key: str, where: str) -> float:
    """A number above 0. Raises InputError naming the key."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise InputError(f"{where}: {key}={value!r} is not supported; allowed: numbers above 0")
    return float(value)


def rotary(rope: dict[str, Any], head_size: int, positions: int, partial: bool, where: str) -> tuple[Rotary, int]:
    """The frequencies that rope parameters mean, and for how many of the model's ``positions`` they hold.

    ``partial``: the family turns only a share of a head where ``partial_rotary_factor`` says so. Raises InputError for what
    is not supported.
    """
    kind = rope.get("rope_type")
    if kind not in TYPES:
        raise InputError(f"{where}: rope type {kind!r} is not supported; allowed: {', '.join(TYPES)}")
    share = rope.get("partial_rotary_factor", 1) or 1
    if not partial and kind != "default" and share != 1:
        raise InputError(f"{where}: partial_rotary_factor={share!r} is not supported; allowed: 1")
    size = int(head_size * positive(share, "partial_rotary_factor", where)) if partial else head_size
    if size % 2 or not 0 < size <= head_size:
        raise InputError(f"{where}: partial_rotary_factor={share!r} turns {size} numbers of a head; that must be even")
    theta = positive(rope.get("rope_theta"), "rope_theta", where)
    inverse = 1.0 / theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))

    def number(key: str) -> float:
        return positive(rope.get(key), key, where)

    factor = 1.0
    if kind == "linear":
        inverse = inverse / np.float32(number("factor"))
    elif kind == "llama3":
        inverse = _llama3(inverse, number, where)
    elif kind == "yarn":
        inverse, factor = _yarn(inverse, rope, theta, number, where)
    elif kind == "longrope":  # of more positions all would be turned otherwise, also the first ones
        original = int(number(ORIGINAL))
        short = np.asarray([positive(x, "short_factor", where) for x in rope.get("short_factor") or ()], np.float32)
        if len(short) != len(inverse):
            raise InputError(f"{where}: short_factor has {len(short)} numbers; allowed: {len(inverse)}")
        inverse = 1.0 / (short * theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size)))
        longer = number("factor") if rope.get("factor") else positions / original
        factor = 1.0 if longer <= 1 else math.sqrt(1 + math.log(longer) / math.log(original))
        positions = min(positions, original)
    if kind in ("yarn", "longrope") and rope.get("attention_factor") is not None:
        factor = number("attention_factor")
    # A dynamic one begins to change beyond max_position_embeddings, which is as far as we go.
    return Rotary(tuple(map(float, inverse.astype(np.float32))), factor), positions


ORIGINAL = "original_max_position_embeddings"


def _llama3(inverse: np.ndarray, number: Callable[[str], float], where: str) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by a factor, short ones kept, between: blended."""
    factor, low, high, original = map(number, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL))
    if low >= high:
        raise InputError(f"{where}: low_freq_factor={low} must be below high_freq_factor={high}")
    turns = original * inverse / (2 * math.pi)  # rotations within the original window
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(inverse * (blend + (1 - blend) / factor))


def _yarn(
    inverse: np.ndarray, rope: dict[str, Any], theta: float, number: Callable[[str], float], where: str
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2024): few rotations within the original window are stretched, many kept; and cos's factor."""
    factor, original, half = number("factor"), number(ORIGINAL), len(inverse)

    def dimension(rotations: float) -> float:
        return half * math.log(original / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = (dimension(positive(rope.get(k) or d, k, where)) for k, d in (("beta_fast", 32), ("beta_slow", 1)))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    ramp = np.clip((np.arange(half, dtype=np.float32) - low) / ((high - low) or 0.001), 0, 1)

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    own, all_ = rope.get("mscale"), rope.get("mscale_all_dim")
    attention = scale(own) / scale(all_) if own and all_ else scale(1)
    return inverse / factor * ramp + inverse * (1 - ramp), attention
