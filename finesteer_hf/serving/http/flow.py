"""A request on its way through the server: its generations, its place in the limits, and what is said of it in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from finesteer_hf.errors import SteeringError
from finesteer_hf.serving.engine import Ask, Engine
from finesteer_hf.serving.generation import Generation, Increment
from finesteer_hf.serving.http.errors import ApiError, error_word
from finesteer_hf.serving.http.logs import LOGGER


class Limits:
    """How much is taken at once.

    Args:
        max_requests: most answers in flight, those that wait included.
        max_per_client: most of one address; None: no limit of its own.

    Attributes:
        most: most answers to one request.
    """

    def __init__(self, max_requests: int, max_per_client: int | None) -> None:
        self.most = min(max_requests, max_per_client or max_requests)
        self._max_requests, self._max_per_client = max_requests, max_per_client
        self._of: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self, client: str, answers: int) -> Iterator[None]:
        """Hold places for a client's answers.

        Raises:
            ApiError: 429 if there are none now; 400 if there can never be so many.
        """
        if answers > self.most:
            raise ApiError(400, f"{answers} answers in one request; this server gives at most {self.most}.", param="n")
        if self._of.total() + answers > self._max_requests:
            raise ApiError(429, "The server has as many requests as it takes; try again.", code="queue_full")
        taken = self._of[client]
        if self._max_per_client is not None and taken + answers > self._max_per_client:
            raise ApiError(
                429,
                f"This client has {taken} answers in flight; it may have {self._max_per_client}.",
                code="client_queue_full",
            )
        self._of[client] += answers
        try:
            yield
        finally:
            self._of[client] -= answers
            if not self._of[client]:
                del self._of[client]


class Flow:
    """Submits the prompts of one request, follows them, and leaves nothing behind when it is closed.

    Args:
        engine: the engine.
        limits: the server's.
        client: its address.
        log: what is logged of the request.
    """

    def __init__(self, engine: Engine, limits: Limits, client: str, log: dict[str, Any]) -> None:
        self._engine, self._limits, self._client = engine, limits, client
        self._places = contextlib.ExitStack()
        self.log = log
        self.generations: list[Generation] = []

    def submit(self, asks: Sequence[Ask]) -> list[Generation]:
        """Queue all prompts, or none.

        Raises:
            ApiError: if a limit is reached.
            SteeringError, ValueError: what the engine refuses.
        """
        self._places.enter_context(self._limits.place(self._client, sum(ask.n for ask in asks)))
        try:
            for ask in asks:
                self.generations.append(self._engine.submit(ask))
        except BaseException:
            self.close()
            raise
        return self.generations

    async def increments(self, generations: Sequence[Generation]) -> AsyncIterator[tuple[int, Increment]]:
        """Increments of all prompts as they come, each with the number of its prompt."""
        if len(generations) == 1:
            async for increment in generations[0]:
                yield 0, increment
            return
        merged: asyncio.Queue[tuple[int, Increment] | Exception | None] = asyncio.Queue()

        async def follow(number: int, generation: Generation) -> None:
            try:
                async for increment in generation:
                    merged.put_nowait((number, increment))
                merged.put_nowait(None)
            except Exception as error:
                merged.put_nowait(error)

        tasks = [asyncio.create_task(follow(number, each)) for number, each in enumerate(generations)]
        try:
            left = len(tasks)
            while left:
                item = await merged.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    def failed(self, error: Exception) -> None:
        """Note an error that came after the status was sent."""
        self.log["error"] = error_word(error)
        if not isinstance(error, SteeringError):
            LOGGER.error("request failed", exc_info=error, extra={"fields": self.log})

    def close(self) -> None:
        """Cancel what still runs, give the places back, and note the counts."""
        for generation in self.generations:
            generation.cancel()
        self._places.close()
        firsts = [each.seconds_to_first for each in self.generations if each.seconds_to_first is not None]
        self.log |= {
            "prompt_tokens": sum(each.prompt_tokens for each in self.generations),
            "completion_tokens": sum(each.completion_tokens for each in self.generations),
            "first_token_seconds": min(firsts, default=None),
            "steering": [
                {
                    f"{name.partition('@')[0]}@{report['version']}": {
                        "fired": report["fired"],
                        "scale": report["scale"],
                    }
                    for name, report in each.steering.items()
                }
                for each in self.generations
                if each.steering
            ],
        }
