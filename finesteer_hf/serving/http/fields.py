"""What a request may hold; what cannot be honoured is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from finesteer_hf.serving.http.errors import FieldError


MOST_STOPS = 4
MOST_ANSWERS = 128
# What OpenAI's API has and this server has not, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}


class Strict(BaseModel):
    """Takes what it knows, of the right kind."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampled(Strict):
    """What chat and completions share.

    `user` and `metadata` ask for nothing and are ignored.
    """

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    steering: Any = None
    steering_scale: float | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_what_is_not_done(cls, values: Any) -> Any:
        """Leave out what asks for nothing, and refuse what asks for something that is not done."""
        if not isinstance(values, Mapping):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields or name not in NOT_DONE:
                kept[name] = value
            elif not any(type(value) is type(each) and value == each for each in NOT_DONE[name]):
                raise FieldError(name, f"{name} is not supported by this server; leave it out.")
        return kept

    @model_validator(mode="after")
    def check_stream_options(self) -> Sampled:
        """`stream_options` belong to a stream."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options needs stream: true.", None)
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def check_stop(cls, value: Any) -> Any:
        """One string or a few, none of them empty."""
        stops = [value] if isinstance(value, str) else value
        if stops is None or stops == []:
            return None
        if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
            raise FieldError("stop", "stop must be a string or a list of strings, none of them empty.", None)
        if len(stops) > MOST_STOPS:
            raise FieldError("stop", f"stop takes at most {MOST_STOPS} strings, got {len(stops)}.", None)
        return stops

    @field_validator("logit_bias")
    @classmethod
    def check_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        """Token ids as strings, and numbers from -100 to 100."""
        for token, bias in (value or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) < 10) or not -100 <= bias <= 100:
                raise FieldError("logit_bias", "logit_bias maps token ids to numbers from -100 to 100.", None)
        return value

    @field_validator("steering", mode="before")
    @classmethod
    def check_steering(cls, value: Any) -> Any:
        """A name, a list of names, a dict of name to scale, or null."""
        named = isinstance(value, dict) and all(type(scale) in (int, float) for scale in value.values())
        listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (value is None or isinstance(value, str) or named or listed):
            raise FieldError(
                "steering", "steering must be a name, a list of names, an object of name to scale, or null.", None
            )
        if listed and len(set(value)) != len(value):
            raise FieldError(
                "steering", "steering names an adapter twice; use an object to give it another scale.", None
            )
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())


class Message(Strict):
    """A chat message of text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Any]

    @model_validator(mode="before")
    @classmethod
    def text_alone(cls, values: Any) -> Any:
        """Leave out what a client sends back empty, as in an answer of this server's, and refuse the rest."""
        if not isinstance(values, Mapping):
            return values
        kept = {name: value for name, value in values.items() if name in cls.model_fields or value not in (None, [])}
        for name in kept:
            if name not in cls.model_fields:
                raise FieldError(f"messages.{name}", f"Messages hold role and text; {name!r} is not supported.")
        return kept

    @field_validator("content", mode="after")
    @classmethod
    def join_parts(cls, value: Any) -> str:
        """Text, or parts of text, as one."""
        if isinstance(value, str):
            return value
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
                raise FieldError("messages.content", f"Only parts of type text are supported, got {kind!r}.")
        return "".join(part["text"] for part in value)


class ChatRequest(Sampled):
    """`/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def check_pairs(self) -> ChatRequest:
        """Fields that say the same, or need one another."""
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true.", None)
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "max_tokens and max_completion_tokens disagree; give one.", None)
        return self

    @property
    def answer_limit(self) -> int | None:
        """Most tokens of the answer, if the request says."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def recorded(self) -> int | None:
        """Number of likeliest tokens to record, None for no record."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    """`/v1/completions`."""

    prompt: Any
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def check_prompt(cls, value: Any) -> Any:
        """A string, token ids, or a list of either."""
        many = value if isinstance(value, list) and value and not is_tokens(value) else [value]
        if not all(isinstance(each, str) or is_tokens(each) for each in many):
            raise FieldError("prompt", "prompt must be a string, a list of token ids, or a list of either.", None)
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        return self.prompt if isinstance(self.prompt, list) and not is_tokens(self.prompt) else [self.prompt]

    @property
    def answer_limit(self) -> int | None:
        """Most tokens of an answer, as OpenAI's default has it."""
        return self.max_tokens or 16

    @property
    def recorded(self) -> int | None:
        """Number of likeliest tokens to record, None for no record."""
        return self.logprobs


def is_tokens(value: Any) -> bool:
    """Whether a value is a list of token ids."""
    return isinstance(value, list) and bool(value) and all(type(each) is int and each >= 0 for each in value)
