"""What the work itself costs, by formula: FLOPs, and bytes that must be read and written. No program does with less.

Nothing is recomputed, padded, copied or read twice; `esjax plan` and `esjax bench` hold compiled programs against it.
"""

from __future__ import annotations

import numpy as np

from esjax.model.families import Architecture
from esjax.model.linear import Lora, linear_sizes
from esjax.rows import Rows


def weights_read(arch: Architecture) -> int:
    """Numbers of the base that a token is multiplied with: those of all linear layers, and the head's."""
    return arch.layers * sum(i * o for i, o in linear_sizes(arch).values()) + arch.vocab * arch.width


def training_flops(arch: Architecture, lora: Lora | None, batch: Rows) -> float:
    """FLOPs of one step on a batch [B, T]; see ``passes_flops``."""
    pairs = float((batch.until - np.arange(batch.tokens.shape[1]))[batch.segment > 0].sum())
    return passes_flops(arch, lora, int((batch.segment > 0).sum()), int((batch.weight != 0).sum()), pairs)


def passes_flops(arch: Architecture, lora: Lora | None, tokens: int, targets: int, pairs: float) -> float:
    """FLOPs of a forward and a backward pass: the PaLM paper's count (Chowdhery et al. 2022, appendix B), by pass.

    Forward: 2 per weight of a linear layer and token, 2 V D per target, 4 N H per pair of tokens that see each other.
    Backward: the same again for the derivatives of the inputs, and once more for those of weights that are trained.

    Args:
        lora: the adapter that is trained; None trains all parameters.
        pairs: (query, key) that see each other, in one layer.
    """
    sizes = linear_sizes(arch)
    linear = 2.0 * arch.layers * sum(i * o for i, o in sizes.values()) * tokens
    head = 2.0 * arch.vocab * arch.width * targets
    attention = attention_flops(arch, pairs)
    if lora is None:
        return 3 * (linear + head + attention)
    adapter = 2.0 * arch.layers * lora.rank * sum(sum(sizes[n]) for n in lora.targets) * tokens
    return 2 * (linear + head) + 3 * (attention + adapter)


def attention_flops(arch: Architecture, pairs: float) -> float:
    """FLOPs of all layers' attention, forward, for so many (query, key) that see each other in one layer."""
    return 4.0 * arch.layers * arch.heads * arch.head_size * pairs


def prefill_flops(arch: Architecture, tokens: int, seen: float) -> float:
    """FLOPs of the keys and values of so many prompt tokens, which see so many tokens together.

    No head is needed, and of the last layer its keys and values alone.
    """
    whole, before = sum(i * o for i, o in linear_sizes(arch).values()), arch.layers - 1
    last = 2 * arch.width * arch.kv_heads * arch.head_size
    return 2.0 * (before * whole + last) * tokens + attention_flops(arch, seen) * before / arch.layers


def scoring_flops(arch: Architecture, tokens: int, targets: int, pairs: float) -> float:
    """FLOPs of one forward pass without an adapter, the head on targets alone."""
    linear = 2.0 * arch.layers * sum(i * o for i, o in linear_sizes(arch).values()) * tokens
    return linear + attention_flops(arch, pairs) + 2.0 * arch.vocab * arch.width * targets


def step_bytes(arch: Architecture, itemsize: int, slots: int) -> int:
    """Bytes that a decoding step must read: all weights once, and so many slots of the cache, each of one row or ring."""
    return (weights_read(arch) + 2 * arch.layers * arch.kv_heads * arch.head_size * slots) * itemsize
