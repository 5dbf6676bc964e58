"""One key table for import and export: what Hugging Face calls each of our parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from esjax.model.families.architecture import Architecture
from esjax.model.families.reading import FAMILIES


@dataclass(frozen=True)
class Weight:
    """One tensor: where it lies in our module tree and what Hugging Face calls it.

    ``path`` leads to a parameter; below ``layers`` parameters are stacked [L, ...] and ``{}`` in ``key`` is the layer.
    ``transpose``: Hugging Face stores linear layers as [out, in], we store [in, out].
    """

    path: tuple[str, ...]
    key: str
    transpose: bool = False


def key_table(arch: Architecture) -> Iterator[Weight]:
    """Every tensor of a checkpoint of this architecture; nothing else may be in it."""
    yield Weight(("embed",), "model.embed_tokens.weight")
    for name in arch.linears:
        prefix = f"model.layers.{{}}.{module_name(name)}"
        yield Weight(("layers", name, "kernel"), f"{prefix}.weight", transpose=True)
        if name in arch.biased:
            yield Weight(("layers", name, "bias"), f"{prefix}.bias")
    for norm in arch.norms:
        yield Weight(("layers", norm), f"model.layers.{{}}.{FAMILIES[arch.family].norm_keys[norm]}.weight")
    if arch.qk_norm:
        for which in ("q_norm", "k_norm"):
            yield Weight(("layers", which), f"model.layers.{{}}.self_attn.{which}.weight")
    yield Weight(("norm",), "model.norm.weight")
    if not arch.tied_head:
        yield Weight(("head",), "lm_head.weight")


def module_name(linear: str) -> str:
    """A linear layer's name inside a Hugging Face decoder layer."""
    return f"{'self_attn' if linear in ('qkv_proj', 'q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{linear}"


def ignorable(key: str, arch: Architecture) -> bool:
    """Tensors some checkpoints carry although they repeat others: rotary tables, and the head where it is tied."""
    return key.endswith("rotary_emb.inv_freq") or (key == "lm_head.weight" and arch.tied_head)
