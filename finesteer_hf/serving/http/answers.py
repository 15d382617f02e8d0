"""Answers in OpenAI's shapes: whole, and as the chunks of a stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from finesteer_hf.serving.generation import Generation, Increment
from finesteer_hf.serving.http.errors import as_api_error, error_body, finite
from finesteer_hf.serving.http.flow import Flow
from finesteer_hf.serving.http.records import Record, TokenTexts


Endpoint = Literal["chat", "completions"]


@dataclass
class Grown:
    """An answer, put together."""

    texts: list[str] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    finish_reason: str | None = None


class Answer:
    """What one request is answered with.

    Args:
        endpoint: whose shapes.
        identity: the answer's id.
        model: the model's name, as the request gave it.
        generations: one for each prompt; answers are numbered through them.
        recorded: whether log-probabilities were asked for.
        include_usage: whether a stream ends with counts of tokens.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        identity: str,
        model: str,
        generations: Sequence[Generation],
        texts: TokenTexts,
        *,
        recorded: bool,
        include_usage: bool,
    ) -> None:
        self._chat = endpoint == "chat"
        self._generations, self._texts = generations, texts
        self._recorded, self._include_usage = recorded, include_usage
        self._n = len(generations[0].choices)
        self._head = {"id": identity, "created": int(time.time()), "model": model}

    async def whole(self, flow: Flow) -> dict[str, Any]:
        """The body of an answer that is not streamed; ends early, with its error, if a prompt fails."""
        grown = [Grown() for _ in range(self._n * len(self._generations))]
        async for number, increment in flow.increments(self._generations):
            answer = grown[number * self._n + increment.index]
            answer.texts.append(increment.text)
            answer.records += increment.logprobs
            answer.finish_reason = increment.finish_reason or answer.finish_reason
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": [self._choice(index, answer) for index, answer in enumerate(grown)],
            "usage": self.usage(),
            "steering": self.steering(),
        }

    async def chunks(self, flow: Flow) -> AsyncIterator[str]:
        """The events of a stream; an error that comes on the way is its last one."""
        try:
            if self._chat:
                for index in range(self._n):
                    yield self._chunk([self._delta(index, {"role": "assistant", "content": ""})])
            left = self._n * len(self._generations)
            async for number, increment in flow.increments(self._generations):
                left -= increment.finish_reason is not None
                index = number * self._n + increment.index
                # With the last choice: an event without choices comes only to who asked for usage.
                more = {} if left else {"steering": self.steering()}
                for choice in self._grown(index, increment):
                    yield self._chunk([choice], **(more if choice["finish_reason"] else {}))
            if self._include_usage:
                yield self._chunk([], usage=self.usage())
            yield "data: [DONE]\n\n"
        except Exception as error:
            flow.failed(error)
            told = as_api_error(error)
            yield event(error_body(told.status_code, told.detail, told.param, told.code))

    def usage(self) -> dict[str, int]:
        """Counts of tokens; a prompt counts once, however many answers it has."""
        prompt = sum(generation.prompt_tokens for generation in self._generations)
        completion = sum(generation.completion_tokens for generation in self._generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def steering(self) -> Any:
        """What the gates said: an object by adapter, or for several prompts a list of them."""
        reports = [finite(generation.steering or {}) for generation in self._generations]
        return reports[0] if len(reports) == 1 else reports

    def _choice(self, index: int, answer: Grown) -> dict[str, Any]:
        text = "".join(answer.texts)
        body = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {
            "index": index,
            **body,
            "logprobs": self._logprobs(answer.records),
            "finish_reason": answer.finish_reason,
        }

    def _grown(self, index: int, increment: Increment) -> list[dict[str, Any]]:
        """What an answer grew by as choices of chunks: in a chat, the end is a chunk of its own."""
        logprobs = self._logprobs(increment.logprobs)
        if not self._chat:
            end = {"finish_reason": increment.finish_reason}
            return [{"index": index, "text": increment.text, "logprobs": logprobs, **end}]
        choices = []
        if increment.text or increment.logprobs:
            choices.append(self._delta(index, {"content": increment.text}, logprobs))
        if increment.finish_reason is not None:
            choices.append({**self._delta(index, {}), "finish_reason": increment.finish_reason})
        return choices

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, records: Sequence[Record]) -> dict[str, Any] | None:
        if not self._recorded:
            return None
        return self._texts.chat(records) if self._chat else self._texts.completion(records)

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._head, "object": kind, "choices": choices, **usage, **more})


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, allow_nan=False)}\n\n"
