"""Settings of phase 2: what is drawn for each context, and which replies become a pair."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esjax.errors import InputError
from esjax.settings.base import CONTENT, EXECUTION, Settings


class SamplingSettings(Settings):
    """How tokens are drawn. Temperature 0 is greedy."""

    temperature: float = Field(0.7, ge=0, le=1e6)
    """Softmax temperature; 0, or less than 1e-6, takes the most likely token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus: the smallest set of tokens with at least this probability."""
    top_k: int = Field(0, ge=0, lt=1 << 31)
    """Only the k most likely tokens; 0 means all."""
    max_tokens: int = Field(128, ge=1, lt=1 << 31)
    """Longest reply in tokens, the end-of-turn token included."""


class ReflectionSettings(Settings):
    """The constrained reflection (u, s): one line for each field."""

    temperature: float = Field(0.7, ge=0, le=1e6)
    """Softmax temperature; 0, or less than 1e-6, takes the most likely token."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus."""
    top_k: int = Field(0, ge=0, lt=1 << 31)
    """Only the k most likely tokens; 0 means all."""
    field_tokens: int = Field(40, ge=4, le=32000)
    """Longest field in tokens; one that reaches it ends with its last whole word and a full stop, so that every reflection
    parses."""


class EvolveSettings(Settings):
    """Phase 2: which contexts, and the three generations for each."""

    rounds: Annotated[int, EXECUTION] = Field(2, ge=1)
    """Rounds of self-improvement; round t turns M_(t-1) into M_t. More may be asked for later."""
    contexts_per_round: int | None = Field(None, ge=1)
    """Contexts C_n drawn without replacement for a round, anew for every round; null means all."""
    context_tokens: int | None = Field(None, ge=16)
    """Longest context C_n in tokens (older turns are dropped and counted); null means what data.window leaves."""
    batch: Annotated[int, EXECUTION] = Field(16, ge=1, le=1 << 16)
    """Replies under way at once (also for the closing table)."""
    draft: SamplingSettings = SamplingSettings()
    """The pre-refined reply, later `rejected`."""
    reflection: ReflectionSettings = ReflectionSettings()
    """Profile, emotional state and situation."""
    refinement: SamplingSettings = SamplingSettings()
    """The post-refined reply, later `chosen`."""

    reflect: bool = True
    """Whether the model reflects on the person before it refines; without, it has the draft alone to refine (Self-Refine, Madaan
    et al. 2023)."""
    show_draft: bool = True
    """Whether refining sees the draft; without, a refinement is a second answer that knows principles and reflection (context
    distillation, Snell et al. 2022)."""
    drafts: int = Field(1, ge=1, le=64)
    """Drafts of each context; the first is the one that refining sees."""
    refinements: int = Field(1, ge=1, le=64)
    """Refinements of each context, of which the one that measures best is taken (best of n, Dong et al. 2023)."""
    measure: Literal["likelihood", "specificity", "judge"] = "specificity"
    """What tells several drafts or refinements of a context apart: their log-prob a token under M_t; specificity, how much higher
    that is than in eval.others other people's contexts; the mean mark of eval.judge for helpfulness and personalisation."""
    chosen: Literal["refinement", "gold"] = "refinement"
    """What DPO prefers: the refinement; gold, the reply of the corpus (as SPIN does, Chen et al. 2024), for which nothing is
    reflected on or refined."""
    rejected: Literal["draft", "first", "low"] = "draft"
    """What it is preferred to: M_t's draft; first, M_0's draft; low, of evolve.drafts the one that measures nearest to their mean
    less two standard deviations (Xiao et al. 2025)."""
    reference: Literal["before", "first"] = "before"
    """The reference of DPO: before, M_t, from which the round starts, so that its first loss is ln 2; first, M_0 in all rounds,
    so that later ones start elsewhere (their first loss is what the margin of M_t over M_0 makes it)."""
    pairs_of: int | None = Field(1, ge=1)
    """Rounds whose pairs a round trains on, counted back from itself, with references made anew; null means all so far."""
    warmup_contexts: int = Field(0, ge=0)
    """Contexts on which M_0, before round 1, is taught to refine its drafts towards the corpus' own replies (settings of sft);
    0 for none. The model that comes of it drafts and refines in round 1, and is trained on."""

    @property
    def compares(self) -> bool:
        """Whether several drafts or refinements of a context are told apart."""
        return self.drafts > 1 or self.refinements > 1

    @property
    def refines(self) -> bool:
        """Whether refinements are made."""
        return self.chosen == "refinement"

    @property
    def reflects(self) -> bool:
        """Whether reflections are made."""
        return self.reflect and self.refines

    def check(self) -> None:
        """Raise InputError for a setting that nothing makes use of, or that lacks what it needs."""
        if self.rejected == "low" and self.drafts < 4:
            raise InputError(
                f"evolve.rejected=low needs several drafts to choose from: set evolve.drafts to 4 or more, not {self.drafts}"
            )
        if self.rejected != "low" and self.drafts > 1:
            raise InputError(
                f"evolve.drafts={self.drafts} means nothing with evolve.rejected={self.rejected}: set it to 1, or rejected to low"
            )
        if self.measure != "specificity" and not self.compares:
            raise InputError(
                f"evolve.measure={self.measure} means nothing with one draft and one refinement of each context: set it to "
                "specificity, or evolve.refinements to 2 or more"
            )
        if self.refines:
            return
        without = "evolve.chosen=gold makes no refinements, so"
        if self.refinements > 1:
            raise InputError(f"{without} evolve.refinements={self.refinements} means nothing; set it to 1")
        if self.warmup_contexts:
            raise InputError(f"{without} evolve.warmup_contexts={self.warmup_contexts} means nothing; set it to 0")


class FilterSettings(Settings):
    """Which pairs are dropped. The limits are ours; the paper's public text leaves them open."""

    min_words: int = Field(4, ge=1)
    """A reply with fewer words counts as empty. In scripts without spaces every character is a word."""
    max_similarity: float = Field(0.9, gt=0, le=1)
    """Draft and refinement whose word overlap ratio (difflib) reaches this are near-identical."""
    min_length_ratio: float = Field(0.5, gt=0)
    """Fewest words of the refinement for each word of the draft."""
    max_length_ratio: float = Field(2.5, gt=0)
    """Most words of the refinement for each word of the draft."""
    max_repetition: float = Field(0.2, ge=0, le=1)
    """Highest share of a reply's 4-word sequences that repeat an earlier one."""
    more_specific: bool = False
    """Whether a pair is kept only where the chosen reply is more specific to its context than the rejected one, under M_t: how
    much likelier it is there than in eval.others other people's contexts."""
    scaffolding_patterns: Annotated[str, CONTENT] = "bundled:prompts/scaffolding.txt"
    """Regular expressions, one a line; a reply that matches one shows traces of the prompts."""
