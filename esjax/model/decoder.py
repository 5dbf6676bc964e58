"""The decoder: embedding, scanned layers, final norm. cached.py is its other form, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from esjax.model.attention import Attention, Decoding, Path, attention
from esjax.model.dropout import Dropout
from esjax.model.families import Architecture
from esjax.model.head import target_logprobs
from esjax.model.layers import KEPT, TRAINING, Block, Rope, Scores, rms_norm, rope_at, softcap
from esjax.model.linear import Lora
from esjax.rows import Layout, Rows
from esjax.runtime.mesh import batch_groups, constrain, mesh_sizes

Remat = Literal["auto", "none", "dots", "offload", "full"]
# What auto may be, the fastest first; each needs less memory than the one before.
AUTO: dict[str, tuple[Remat, ...]] = {
    "cpu": ("none", "full"),
    "gpu": ("dots", "full", "offload"),
    "tpu": ("dots", "full", "offload"),
}
ROOM = {"cpu": 0.5, "gpu": 0.95, "tpu": 0.95}  # the share of a device's memory up to which a faster one is taken


class Execution(NamedTuple):
    """How to compute, never what: all values give the same numbers to rounding. Static."""

    attention: Path = "dense"
    layout: Layout = "branched"  # what the rows hold at most; simpler rows take a shorter way
    remat: Remat = "none"  # auto only until it is settled, see ``forms``
    weights: Literal["shared", "apart"] = "apart"  # what decoding reads: training's arrays, or layers of its own
    decoding: Decoding = "plain"  # how a decoding step attends; auto only until it is settled, see ``sample/faster.py``
    logits: int = 1 << 26  # entries of the head's logits that exist at once on a device: 256 MiB in float32
    unroll: bool = False  # layers are not looped over
    interpret: bool = False  # kernels run on the host, for tests


class Decoder(nnx.Module):
    """A decoder-only transformer. Parameters: embed [V, D], layers (stacked), norm [D], head [V, D] unless tied."""

    def __init__(self, arch: Architecture, lora: Lora | None, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.arch = arch
        draw = jax.random.normal(rngs.params(), (arch.vocab, arch.width), jnp.float32) * 0.02
        self.embed = nnx.Param(draw.astype(dtype), axes=("vocab", "embed"))
        self.layers = Block(arch, lora, dtype, rngs)
        self.norm = nnx.Param(jnp.ones((arch.width,), dtype), axes=("embed",))
        if not arch.tied_head:
            draw = jax.random.normal(rngs.params(), (arch.vocab, arch.width), jnp.float32) * 0.02
            self.head = nnx.Param(draw.astype(dtype), axes=("vocab", "embed"))

    def __call__(
        self,
        rows: Rows,
        execution: Execution,
        dropout: Dropout | None = None,
        only: Take | None = None,
        early: bool = False,
    ) -> Array:
        """Final hidden states [B, T, D] of rows [B, T]; with ``dropout``, of what the adapters read.

        Args:
            only: gives the tokens whose hidden states are wanted, of any [B, T, D]; they alone are returned.
            early: where layers are not looped over, take them within the last layer already, as soon as it has attended.
        """
        choose = self._by_kind(rows, execution)
        definition, stacked = nnx.split(self.layers)
        # Joined along an axis that is split over tensor, matrices would have to move.
        on_gpu = execution.attention in ("cudnn", "pallas")
        place = TRAINING._replace(one_product=on_gpu and mesh_sizes()["tensor"] == 1)

        def layer(
            x: Array, scanned: tuple[nnx.State, Array, Array | None], only: Take | None = None
        ) -> tuple[Array, None]:
            state, kind, number = scanned
            x = checkpoint_name(constrain(x, "batch", None, None), LAYER_INPUT)
            own = place if dropout is None else place._replace(dropout=dropout._replace(layer=cast(Array, number)))
            return nnx.merge(definition, state)(x, *choose(kind), own, only), None

        x = embedded(self.embed[...], rows.tokens, self.arch, "vocab", None)
        each = (stacked, jnp.asarray(self.arch.kind_of), None if dropout is None else jnp.arange(self.arch.layers))
        early &= execution.unroll and only is not None and dropout is None  # which has a key for each row
        if execution.unroll:
            *before, last = unstacked(each)
            for one in before:
                x, _ = rematerialised(layer, execution)(x, one)
            x, _ = rematerialised(partial(layer, only=only if early else None), execution)(x, last)
        else:
            x, _ = jax.lax.scan(rematerialised(layer, execution), x, each)
        x = x if early or only is None else only(x)
        return rms_norm(x, self.norm[...], self.arch)

    def _by_kind(self, rows: Rows, execution: Execution) -> Callable[[Array], tuple[Rope | None, Attention]]:
        """For the number of a layer's kind, its rotary tables and its attention. Where all are alike, nothing is chosen."""
        kinds, windows = self.arch.kinds, self.arch.windows
        ways = [attention(execution, rows, Scores(window, self.arch.attention_cap)) for window in windows]
        ropes = [rope_at(kind, rows.position) for kind in kinds]
        if len(kinds) == 1:
            return lambda kind: (ropes[0], ways[0])
        turned = next(r for r in ropes if r is not None)
        still = Rope(jnp.ones_like(turned.cos), jnp.zeros_like(turned.sin))
        tables = jax.tree.map(lambda *x: jnp.stack(x), *(still if r is None else r for r in ropes))
        way_of = jnp.asarray([windows.index(kind.window) for kind in kinds])

        def choose(kind: Array) -> tuple[Rope | None, Attention]:
            def attend(q: Array, k: Array, v: Array) -> Array:
                return ways[0](q, k, v) if len(ways) == 1 else jax.lax.switch(way_of[kind], ways, q, k, v)

            return jax.tree.map(lambda x: x[kind], tables), attend

        return choose

    @property
    def head_weight(self) -> Array:
        """The vocabulary head [V, D]."""
        return (self.embed if self.arch.tied_head else self.head)[...]

    def logits(self, x: Array) -> Array:
        """Vocabulary head: [..., D] -> float32 [..., V]."""
        logits = jnp.einsum("...d,vd->...v", x, self.head_weight, preferred_element_type=jnp.float32)
        return softcap(logits, self.arch.logits_cap)


Take = Callable[[Array], Array]
EARLY = 0.75  # the share of a batch's tokens up to which those wanted are taken within the last layer


def unstacked(tree: Any) -> list[Any]:
    """A tree of arrays [L, ...] as L trees. Its gradient joins theirs once, where slices would add L arrays of all layers."""
    leaves, form = jax.tree.flatten(tree)
    apart = [[x[0] for x in jax.lax.split(leaf, (1,) * len(leaf))] for leaf in leaves]
    return [jax.tree.unflatten(form, one) for one in zip(*apart, strict=True)]


@jax.named_scope("embed")
def embedded(embed: Array, tokens: Array, arch: Architecture, *axes: str | None) -> Array:
    """Rows [..., D] of the embedding [V, D], which lies by ``axes``, scaled where the family scales them."""
    x = constrain(embed, *axes)[tokens]
    return x if arch.embedding_scale == 1 else x * jnp.asarray(arch.embedding_scale, x.dtype)


LAYER_INPUT = "layer_input"


def forms(execution: Execution, platform: str) -> list[Execution]:
    """What rematerialisation leaves open on a platform (cpu, gpu or tpu): one form, or of auto all that it may be."""
    return [
        # On a GPU what is kept need not be copied into arrays of all layers, and back; where little is to be kept, only a loop
        # sees to it.
        execution._replace(remat=remat, unroll=platform == "gpu" and remat in ("none", "dots"))
        for remat in (AUTO[platform] if execution.remat == "auto" else (execution.remat,))
    ]


def rematerialised(layer: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    """A scanned layer under a rematerialisation policy: what the forward pass keeps for the backward pass.

    none keeps everything; dots keeps what products and attention make and recomputes the rest; full keeps a layer's input
    alone; offload does so too, in the host's memory.
    """
    if execution.remat in ("none", "auto"):  # without a backward pass nothing is recomputed, and nothing to be settled
        return layer
    policies = jax.checkpoint_policies
    policy = {
        "dots": policies.save_from_both_policies(policies.save_only_these_names(KEPT), _made_by_a_kernel),
        "full": policies.nothing_saveable,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[execution.remat]
    # A loop over layers keeps the passes apart, so nothing else has to (prevent_cse would only hinder fusion).
    return jax.checkpoint(layer, policy=policy, prevent_cse=execution.unroll)


def _made_by_a_kernel(primitive: Any, *_: Any, **__: Any) -> bool:
    """Whether attention's kernel gives this: its output, and what its backward pass needs beside that."""
    return str(primitive).startswith(("dot_product_attention_fwd", "pallas_call"))


def token_logprobs(
    model: Decoder, rows: Rows, targets: int | None, execution: Execution, dropout: Dropout | None = None
) -> Array:
    """Log-probability of each target token, float32 [B, T]: entry i is for token i + 1; 0 where weight is 0.

    The one primitive of SFT, DPO and scoring. The head runs only where weight != 0, in chunks, so that [B, T, V] logits
    never exist.

    Args:
        rows: [B, T].
        targets: at least the number of nonzero weights in each device's share of the batch; static, so that shapes are.
            None takes any number, skips what is not there as it goes, and has no gradient: for scoring.
        dropout: of what the adapters read, in training.
    """
    b, t = rows.tokens.shape
    groups = batch_groups()
    wanted = (rows.weight != 0).reshape(groups, -1)
    last = wanted.shape[1] - 1  # the last token of a row is never a target
    size = last + 1 if targets is None else min(targets, last + 1)
    index = jax.vmap(lambda w: jnp.nonzero(w, size=size, fill_value=last)[0])(wanted)
    following = jnp.roll(rows.tokens, -1, axis=1).reshape(groups, -1)

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x.reshape(groups, b // groups * t, -1), index[..., None], axis=1)

    x = model(rows, execution, dropout, take, early=size <= EARLY * (last + 1))
    head = model.head_weight
    live = jnp.take_along_axis(wanted, index, axis=1)
    token = jnp.take_along_axis(following, index, axis=1)
    logprobs = jnp.where(
        live,
        target_logprobs(x, head, token, execution.logits, live if targets is None else None, model.arch.logits_cap),
        0.0,
    )
    flat = jax.vmap(lambda i, values: jnp.zeros(last + 1, jnp.float32).at[i].add(values))(index, logprobs)
    return flat.reshape(b, t)
