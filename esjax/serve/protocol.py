"""What OpenAI's protocol says, as far as it is served: requests, checked, and the form of answers. Nothing is ignored."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from esjax.corpus.dialogue import Message
from esjax.run.jsonl import finite

MOST_N = 128  # replies to one request
MOST_PROMPTS = 128  # of one request for completions
ROLES = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0)]


class Refused(Exception):
    """A request that cannot be served, as an HTTP status with one line."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Request(BaseModel):
    """What both kinds of requests have. Settings of other servers are taken where they change nothing, and else refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    n: int = Field(1, ge=1, le=MOST_N)
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Bookkeeping of clients, which changes no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["developer", "system", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1)]
    name: str | None = None
    refusal: None = None

    @field_validator("name")
    @classmethod
    def _no_name(cls, name: str | None) -> None:
        if name is not None:
            raise ValueError("chat templates have no place for names; put it into the content")


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and it needs one")
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.top_logprobs and self.stream:
            raise ValueError("top_logprobs is not served while streaming; leave out one of them")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens: give one of them")
        if self.messages[-1].role != "user":
            raise ValueError("messages: the last one must be the user's")
        return self

    @property
    def chat(self) -> list[Message]:
        def text(content: str | list[_Part]) -> str:
            return content if isinstance(content, str) else "".join(part.text for part in content)

        return [Message(role=ROLES[m.role], content=text(m.content)) for m in self.messages]

    @property
    def most(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[Token], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Annotated[list[Token], Field(min_length=1)]], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.stream and (self.echo or self.logprobs):
            raise ValueError("echo and logprobs above 0 are not served while streaming; leave out one of them")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 draws nothing, which only echo makes use of")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else list(self.prompt)


R = TypeVar("R", bound=BaseModel)


def parsed(kind: type[R], body: bytes) -> R:
    """A request's body. Raises Refused, in one line that names the field."""
    try:
        tree = json.loads(body, parse_constant=_no_number, parse_float=finite)
    except (ValueError, RecursionError) as e:
        raise Refused(400, f"the body is not JSON: {str(e).splitlines()[0][:200]}") from e
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        first = max(e.errors(include_url=False), key=lambda x: (len(x["loc"]), x["type"] != "extra_forbidden"))
        name = ".".join(str(p) for p in first["loc"] if not any(c in str(p) for c in "[("))
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "not served here; leave it out"
        raise Refused(400, f"{name}: {message}" if name else message, name or None) from e


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def head(kind: str, model: str) -> dict[str, Any]:
    """What every answer and chunk begins with."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompts: int, drawn: int) -> dict[str, int]:
    """Tokens of an answer."""
    return {"prompt_tokens": prompts, "completion_tokens": drawn, "total_tokens": prompts + drawn}


def chat_logprobs(
    texts: Sequence[str], logprobs: Sequence[float], tops: Sequence[Sequence[tuple[str, float]]]
) -> dict[str, Any]:
    """The log-probs of a chat's reply, a token each."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        entry(text, logprob) | {"top_logprobs": [entry(*t) for t in top]}
        for text, logprob, top in zip(texts, logprobs, tops, strict=True)
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    texts: Sequence[str], logprobs: Sequence[float | None], tops: Sequence[dict[str, float] | None]
) -> dict[str, Any]:
    """The log-probs of a completion."""
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {"tokens": list(texts), "token_logprobs": list(logprobs), "top_logprobs": list(tops), "text_offset": offsets}


def event(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
