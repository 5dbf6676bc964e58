"""What the decoder needs to know of a backbone, whatever family it is of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
NORMS = ("attn_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")  # before and after attention and the MLP


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding: the first 2 x len(frequencies) numbers of a head are turned, the others stay."""

    frequencies: tuple[float, ...]  # radians a position
    factor: float = 1.0  # cos and sin are multiplied by it


@dataclass(frozen=True)
class Kind:
    """What may differ from layer to layer."""

    window: int | None  # a token sees those of fewer positions' distance; None: all before it
    rotary: Rotary | None  # None: no rotary positions


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer; letters as in esjax.rows."""

    family: str  # model_type of config.json
    vocab: int  # V
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_size: int  # H
    hidden: int  # F
    norm_eps: float
    tied_head: bool
    max_positions: int
    kinds: tuple[Kind, ...]  # the different ones
    kind_of: tuple[int, ...]  # of each layer, among these
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")  # which of NORMS there are
    norm_plus_one: bool = False  # a norm's weight is one more than what is stored, and applied in float32
    qk_norm: Literal["", "head", "whole"] = ""  # queries and keys are normed: each head, or all heads together
    biased: tuple[str, ...] = ()  # the linear layers that have a bias
    fused: bool = False  # queries, keys and values are one linear layer; so are gate and up
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float = 1.0
    query_scale: float | None = None  # of the scores; None is H^-1/2
    attention_cap: float | None = None  # c: scores s become c tanh(s / c)
    logits_cap: float | None = None
    kernels: Literal["plain", "int8", "nf4"] = "plain"  # how the frozen linear layers are kept, see ``model.quantised``

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers of a block, by their Hugging Face names."""
        return FUSED if self.fused else LINEARS

    @property
    def qkv(self) -> tuple[str, ...]:
        """Those that make queries, keys and values."""
        return self.linears[:1] if self.fused else self.linears[:3]

    @property
    def gate_up(self) -> tuple[str, ...]:
        """Those that make gate and up."""
        return self.linears[2:3] if self.fused else self.linears[4:6]

    @cached_property
    def windows(self) -> tuple[int | None, ...]:
        """The different windows."""
        return tuple(dict.fromkeys(kind.window for kind in self.kinds))
