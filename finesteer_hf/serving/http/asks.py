"""From a request's fields to what the engine is asked."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from finesteer_hf.serving.engine import Ask, Engine
from finesteer_hf.serving.http.errors import ApiError, FieldError
from finesteer_hf.serving.http.fields import ChatRequest, CompletionRequest, Message, Sampled
from finesteer_hf.serving.sampling import Sampling


# A text of more characters is tokenised outside of the event loop.
SHORT_TEXT = 8_192


class Served:
    """What a server offers: an engine under a name, and what a request that names no adapter is steered with.

    Args:
        engine: the engine.
        name: of the base model; `name:adapter` and `name:adapter@version` are steered.
        default: adapters with their scales for requests to the base's name that say nothing of steering.
    """

    def __init__(self, engine: Engine, name: str, default: Mapping[str, float] | None = None) -> None:
        self.engine, self.name, self.default = engine, name, dict(default or {})

    def model_names(self) -> list[str]:
        """All model names that requests can give."""
        offered = self.engine.catalogue.offered()
        steered = dict.fromkeys(f"{self.name}:{each.name}" for each in offered)
        return [self.name, *steered, *(f"{self.name}:{each.key}" for each in offered)]

    def steering_of(self, body: Sampled) -> dict[str, float]:
        """What a request is steered with, as its model name and its fields say.

        Raises:
            ApiError: for an unknown model, or a name and a field that disagree.
            AdapterNotFoundError: for an adapter that is not offered.
        """
        base, colon, named = split_name(body.model, self.name)
        resolve = self.engine.catalogue.resolve
        if base != self.name or (colon and body.model not in self.model_names()):
            raise ApiError(
                404,
                f"The model {body.model!r} does not exist. There are: {', '.join(self.model_names())}.",
                param="model",
                code="model_not_found",
            )
        given = "steering" in body.model_fields_set
        asked = as_scales(body.steering) if given else ({named: 1.0} if colon else self.default)
        if colon and given and {resolve(name).key for name in asked} != {resolve(named).key}:
            raise FieldError(
                "steering", f"model names the adapter {named!r} and steering says {body.steering!r}; give one.", None
            )
        scale = 1.0 if body.steering_scale is None else body.steering_scale
        for name in asked:
            resolve(name)
        return {name: own * scale for name, own in asked.items()}

    def ask(self, body: ChatRequest | CompletionRequest, prompt: list[int], steering: Mapping[str, float]) -> Ask:
        """What the engine is asked for one prompt.

        Raises:
            ApiError: if prompt and answer are too long, or a token is none.
        """
        limit = self.engine.max_length
        room = limit - len(prompt)
        length = room if body.answer_limit is None else body.answer_limit
        if not prompt:
            raise ApiError(400, "The prompt has no tokens.", param=prompt_field(body))
        if room < 1 or length > room:
            raise ApiError(
                400,
                f"This model holds {limit} tokens; the prompt has {len(prompt)} and the answer may have "
                f"{max(length, 1)}. Shorten the prompt or ask for fewer tokens.",
                param=prompt_field(body) if room < 1 else "max_tokens",
                code="context_length_exceeded",
            )
        temperature = 1.0 if body.temperature is None else body.temperature
        sampling = Sampling(
            temperature=temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
            seed=secrets.randbits(62) if body.seed is None else body.seed,
            logprobs=body.recorded,
            logit_bias=self._bias(body.logit_bias),
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
        )
        return Ask(prompt, length, steering, sampling, body.n or 1, body.stops, bool(body.stream))

    def _bias(self, given: Mapping[str, float] | None) -> dict[int, float]:
        bias = {int(token): value for token, value in (given or {}).items()}
        self._check_tokens(bias, "logit_bias")
        return bias

    def _check_tokens(self, tokens: Any, field: str) -> None:
        size = self.engine.model.config.get_text_config().vocab_size
        if any(token >= size for token in tokens):
            raise ApiError(400, f"{field} holds {max(tokens)}; token ids are below {size}.", param=field)

    async def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of a chat, up to where the answer begins.

        Raises:
            ApiError: if the model has no chat template, or its template refuses the messages.
        """
        tokenizer = self.engine.tokenizer
        if not tokenizer.chat_template:
            raise ApiError(400, f"{self.name} has no chat template; use /v1/completions.", param="messages")
        # `developer` is OpenAI's newer name of the system role; templates know the old one.
        chat = [{"role": "system" if m.role == "developer" else m.role, "content": m.content} for m in messages]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            # A template is a program of the model's author, which may raise anything.
            raise ApiError(
                400, f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return await self._tokens(text, "messages", special=False)

    async def completion_prompt(self, prompt: str | list[int]) -> list[int]:
        """Tokens of a prompt.

        Raises:
            ApiError: for tokens that are none.
        """
        if isinstance(prompt, str):
            return await self._tokens(prompt, "prompt", special=True)
        self._check_tokens(prompt, "prompt")
        return prompt

    async def _tokens(self, text: str, field: str, special: bool) -> list[int]:
        def encode() -> list[int]:
            return self.engine.tokenizer(text, add_special_tokens=special)["input_ids"]

        try:
            text.encode()
            return encode() if len(text) <= SHORT_TEXT else await asyncio.to_thread(encode)
        except UnicodeEncodeError as error:
            raise ApiError(400, f"{field} holds half of a surrogate pair, which is no text.", param=field) from error


def split_name(model: str, base: str) -> tuple[str, str, str]:
    """A model name as base, colon and adapter; the base's own name may have a colon."""
    if model == base:
        return base, "", ""
    return (base, ":", model[len(base) + 1 :]) if model.startswith(f"{base}:") else (model, "", "")


def as_scales(steering: Any) -> dict[str, float]:
    """The field `steering` as adapters with their scales."""
    if steering is None:
        return {}
    if isinstance(steering, Mapping):
        return {name: float(scale) for name, scale in steering.items()}
    return dict.fromkeys([steering] if isinstance(steering, str) else steering, 1.0)


def prompt_field(body: Sampled) -> str:
    """Where a request's prompt stands."""
    return "messages" if isinstance(body, ChatRequest) else "prompt"
