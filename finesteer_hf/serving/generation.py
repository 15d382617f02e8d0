"""A request that runs: its answers as they grow, what the gate said, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from finesteer_hf.errors import SteeringError
from finesteer_hf.serving.sampling import TokenLogprob
from finesteer_hf.serving.text import IncrementalText, StopStrings


FinishReason = Literal["stop", "length"]


class EngineDownError(SteeringError, RuntimeError):
    """The engine takes no requests, or ended with this one."""


class RequestRefusedError(SteeringError, ValueError):
    """A request that the engine does not take; nothing was queued."""


class RequestFailedError(SteeringError, RuntimeError):
    """One request failed inside the engine, as where a method raises; others go on."""


@dataclass(frozen=True)
class Increment:
    """What an answer grew by.

    Attributes:
        index: which answer of the request.
        text: new text; whole characters.
        logprobs: records of the tokens that the new text begins in, each with the place of its text in the answer.
        finish_reason: why it ended; None while it goes on.
    """

    index: int
    text: str
    logprobs: tuple[tuple[int, TokenLogprob], ...] = ()
    finish_reason: FinishReason | None = None


class Choice:
    """One answer of a request: takes what the manager hands over, and gives it on as text.

    Args:
        generation: the request.
        index: which answer.
        request_id: the manager's id of it.
        tokenizer: for the text.
        stop: strings that end it.

    Attributes:
        tokens: what was generated, up to the one that ended it.
        finish_reason: why it ended.
        ended_by_engine: whether the manager is through with it; what ended by a stop string is cancelled there.
    """

    def __init__(
        self, generation: Generation, index: int, request_id: str, tokenizer: Any, stop: Sequence[str]
    ) -> None:
        self.generation = generation
        self.index, self.request_id = index, request_id
        self._decoder, self._stops = IncrementalText(tokenizer), StopStrings(stop)
        self._decoded = 0
        self._given = 0
        # Records of tokens whose text is not given on yet: where it begins, and the record.
        self._records: list[tuple[int, TokenLogprob]] = []
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.ended_by_engine = False

    def receive(self, output: Any) -> None:
        """Take an output of the manager: all tokens so far; on the event loop."""
        self.ended_by_engine = self.ended_by_engine or output.is_finished()
        if self.generation.over or self.finish_reason is not None:
            return
        try:
            self._take(output)
        except Exception as error:
            # The loop would only print it, and the client wait for ever.
            self.generation.fail(error)

    def _take(self, output: Any) -> None:
        self.generation.note(output)
        if output.error is not None:
            self.generation.fail(RequestFailedError(output.error))
            return
        text, stopped = "", False
        for place in range(len(self.tokens), len(output.generated_tokens)):
            token = output.generated_tokens[place]
            self.tokens.append(token)
            if output.token_logprobs:
                self._records.append((self._decoded, output.token_logprobs[place]))
            piece = self._decoder.push(token)
            self._decoded += len(piece)
            released, stopped = self._stops.push(piece)
            text += released
            if stopped:
                break
        if output.is_finished() and not stopped:
            released, stopped = self._stops.push(self._decoder.end())
            text += released if stopped else released + self._stops.end()
        if stopped:
            self.finish_reason = "stop"
        elif output.is_finished():
            ended = bool(self.tokens) and self.tokens[-1] in self.generation.eos
            self.finish_reason = "stop" if ended else "length"
        if text or self.finish_reason is not None:
            self._given += len(text)
            ready = tuple(record for record in self._records if record[0] < self._given)
            del self._records[: len(ready)]
            self.generation.give(Increment(self.index, text, ready, self.finish_reason))


class Generation:
    """A submitted request; iterate over it for the increments of all of its answers, in the order in which they come.

    Args:
        identity: the manager's id of it.
        prompt_tokens: length of its prompt.
        n: number of answers.
        tokenizer: for the text.
        eos: tokens that end an answer.
        stop: strings that do.
        adapters: for each adapter's key on the model, what the request called it and its version.
        release: called once for each answer, when it is not waited for any more.

    Attributes:
        steering: what each adapter decided, by the name that the request called it; None until it is known.
        over: whether nothing is waited for any more.
        seconds_to_first: from submission to the first token; None until it is known.
    """

    def __init__(
        self,
        identity: str,
        prompt_tokens: int,
        n: int,
        tokenizer: Any,
        eos: frozenset[int],
        stop: Sequence[str],
        adapters: Mapping[str, tuple[str, str]],
        release: Callable[[Choice], None],
    ) -> None:
        self.id, self.prompt_tokens, self.eos = identity, prompt_tokens, eos
        ids = [identity, *(f"{identity}__child#{number}" for number in range(n - 1))]
        self.choices = [Choice(self, index, each, tokenizer, stop) for index, each in enumerate(ids)]
        self.steering: dict[str, dict[str, Any]] | None = None
        self.seconds_to_first: float | None = None
        self.over = False
        self._adapters = adapters
        self._release = release
        self._queue: asyncio.Queue[Increment | Exception] = asyncio.Queue()

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers so far, the end of turn included."""
        return sum(len(choice.tokens) for choice in self.choices)

    async def __aiter__(self) -> AsyncIterator[Increment]:
        """Give increments until each answer has ended.

        Raises:
            RequestFailedError: if the request failed inside the engine.
            EngineDownError: if the engine ended first.
        """
        left = len(self.choices)
        while left:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield item

    def note(self, output: Any) -> None:
        """Keep what an output says beside its tokens."""
        if self.seconds_to_first is None and output.timestamps:
            self.seconds_to_first = output.timestamps[0] - output.created_time
        if self.steering is None and output.steering is not None:
            self.steering = {}
            for key, report in output.steering.items():
                name, version = self._adapters[key]
                self.steering[name] = {"version": version, **report}

    def give(self, increment: Increment) -> None:
        """Hand an increment to who iterates."""
        self._queue.put_nowait(increment)
        if increment.finish_reason is not None:
            self.over = all(choice.finish_reason is not None for choice in self.choices)
            self._release(self.choices[increment.index])

    def fail(self, error: Exception) -> None:
        """End the request with an error, for all of its answers; nothing happens if it is over."""
        if not self.over:
            self._queue.put_nowait(error)
            self.cancel()

    def cancel(self) -> None:
        """End the request because nobody waits for it; nothing happens if it is over."""
        if not self.over:
            self.over = True
            for choice in self.choices:
                if choice.finish_reason is None:
                    self._release(choice)
