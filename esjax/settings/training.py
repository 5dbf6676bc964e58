"""Settings of training: the adapter, the optimiser and both phases."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esjax.errors import InputError
from esjax.settings.base import CONTENT, EXECUTION, Settings


class LoraSettings(Settings):
    """The one adapter that evolves through phase 1 and all rounds (PEFT's definition: scale alpha/rank)."""

    rank: int = Field(16, ge=1)
    """Rank R of every adapter matrix pair."""
    alpha: float = Field(32.0, gt=0)
    """Scale numerator: the update is (alpha / rank) * B A."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter: Hugging Face names, all-linear, or regular expressions of whole names, such as
    .*self_attn.*; one that matches nothing is an error."""
    rslora: bool = False
    """Rank-stabilised: the update is (alpha / sqrt(rank)) * B A (Kalajdzievski 2023)."""
    init: Literal["b_zero", "a_zero", "gaussian"] = "b_zero"
    """A new adapter changes nothing: b_zero draws A as PEFT does, gaussian draws A normal, a_zero draws B, and A is zero."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the adapter's inputs that SFT sets to zero, anew in every step. DPO drops none (as in TRL): what it compares with
    its stored reference must be the same model."""
    start: Annotated[str | None, CONTENT] = None
    """A PEFT folder to start from, instead of a new adapter; it must be of this rank, alpha and targets."""


class TrainSettings(Settings):
    """What both phases train."""

    what: Literal["lora", "all"] = "lora"
    """lora: an adapter on a frozen base; all: every parameter (in float32, computed with in model.dtype), so that M_t is a
    whole model."""
    wandb: Annotated[str | None, EXECUTION] = None
    """A project of Weights & Biases that gets the numbers of training beside metrics.jsonl and TensorBoard (esjax's wandb extra);
    null for none."""


class OptimSettings(Settings):
    """An optimiser with linear warm-up and cosine decay, shared by both training phases."""

    optimiser: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"
    """As optax has them; muon orthogonalises each layer's matrices and leaves the rest to AdamW."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    warmup_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the steps with linear warm-up from 0."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak (cosine decay)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(1.0, gt=0)
    """Global gradient norm is clipped to this."""
    epochs: int = Field(1, ge=1)
    """Passes over the training examples."""
    batch_rows: int = Field(8, ge=1)
    """Packed rows in one optimiser step."""
    micro_rows: Annotated[int, EXECUTION] = Field(8, ge=1)
    """Rows computed at once; batch_rows / micro_rows gradients are accumulated, weighted by their target counts."""
    row_length: int = Field(1024, ge=16)
    """Tokens T of a packed row; at least data.window (for DPO: the context and two replies)."""
    checkpoint_every: Annotated[int, EXECUTION] = Field(50, ge=1)
    """Optimiser steps between checkpoints; SIGTERM makes one at once."""
    checkpoints_kept: Annotated[int, EXECUTION] = Field(2, ge=1)
    """Newest checkpoints kept; with two or more, a damaged one is survived."""


class SftSettings(OptimSettings):
    """Phase 1: supervised fine-tuning on the supporter's turns."""

    validate_every: Annotated[int, EXECUTION] = Field(50, ge=1)
    """Optimiser steps between validation losses; the last step is always validated."""


class DpoSettings(OptimSettings):
    """Phase 2: direct preference optimisation against stored reference log-probs."""

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "nll"] = "sigmoid"
    """Of a pair's margin, where r is beta times how far a reply's log-prob rose above its reference's: sigmoid (DPO, Rafailov et
    al. 2023), robust (to label_smoothing, Chowdhury et al. 2024), hinge (SLiC, Zhao et al. 2023), ipo (Azar et al. 2024, of
    log-probs a token), apo_zero and apo_down (D'Oosterlinck et al. 2024, for chosen replies that are better, or worse, than the
    model's own), simpo (Meng et al. 2024: log-probs a token without a reference), nll (no preference at all: SFT on the chosen
    replies alone, in the same rows and steps, the baseline that DPO has to beat)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference; IPO's tau."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a preference label is wrong (conservative DPO); of sigmoid, robust, simpo."""
    target_margin: float = Field(0.0, ge=0)
    """By how much r of the chosen reply should exceed r of the rejected one (SimPO's gamma); of sigmoid, robust, hinge, simpo."""
    length_weight: float = Field(0.0, ge=0)
    """What a token of more counts in the margin beside r, so that length does not have to be learned (R-DPO's alpha, Park et al.
    2024); of sigmoid, robust, hinge."""
    tail_weight: float = Field(1.0, ge=0, le=1)
    """Weight of the tokens by which a reply is longer than the other one of its pair (LD-DPO's alpha, Liu et al. 2024); of all
    losses but ipo, simpo and nll."""
    length_normalised: bool = False
    """Divide each reply's log-prob by its token count before the loss; ipo and simpo do anyway."""
    pair_weights: Literal["none", "reflection", "judge"] = "none"
    """What a pair's loss is multiplied by, on average 1 (after WPO, Zhou et al. 2024): twice the logistic function of by how much
    who is asked prefers the chosen reply. reflection, M_t itself with principles and reflection before it, in nats a token;
    judge, eval.judge in marks from 0 to 5 for helpfulness and personalisation. `esjax dpo` takes each pair's `weight` from its
    file."""
    trunk: Literal["prompt", "dialogue"] = "dialogue"
    """What is computed once: each pair's prompt, or a whole dialogue with the pairs of all its turns as branches, which then
    fall into one step (dpo.row_length must leave room for them). The loss of a pair is the same."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood of the chosen replies, per token."""
    replay_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood of data.replay, per target token; of the rows of every step, the share
    data.replay_share is then replay."""

    valid_share: float = Field(0.0, ge=0, le=0.5)
    """Share of a round's pairs that is held out, whole dialogues: loss, margin and accuracy on them are measured while
    training goes on."""
    validate_every: int = Field(0, ge=0)
    """Optimiser steps between such measures, and those of KL(M_t || M_0) on data.valid, in nats a token; the last step is always
    measured. 0 measures nothing."""
    keep: Literal["last", "best"] = "last"
    """What becomes M_t: what was trained at the last step, or at the measured one with the lowest loss on held-out pairs."""

    def replay_rows(self, share: float) -> int:
        """How many of a step's rows hold replay, where ``share`` of them should: at least one, but not all."""
        return min(max(1, round(self.batch_rows * share)), self.batch_rows - 1) if self.replay_weight > 0 else 0

    def check(self) -> None:
        """Raise InputError for a setting that the loss makes no use of."""
        of_margin = ("sigmoid", "robust", "hinge")
        for name, off, losses in (
            ("label_smoothing", 0.0, ("sigmoid", "robust", "simpo")),
            ("target_margin", 0.0, (*of_margin, "simpo")),
            ("length_weight", 0.0, of_margin),
            ("length_normalised", False, (*of_margin, "apo_zero", "apo_down")),
            ("tail_weight", 1.0, (*of_margin, "apo_zero", "apo_down")),
        ):
            given = getattr(self, name)
            if given != off and self.loss not in losses:
                raise InputError(
                    f"dpo.{name}={given} means nothing with dpo.loss={self.loss}: it is for {', '.join(losses)}; set it to {off}"
                )
        if self.loss == "nll" and self.nll_weight > 0:
            raise InputError(
                f"dpo.nll_weight={self.nll_weight} adds to a loss what dpo.loss=nll is already; set it to 0"
            )
        corrections = {"length_weight": 0.0, "length_normalised": False, "tail_weight": 1.0}
        given = [name for name, off in corrections.items() if getattr(self, name) != off]
        if len(given) > 1:
            raise InputError(
                f"{' and '.join(f'dpo.{name}' for name in given)} each correct for length: use only one of them"
            )
