"""A steered model that answers many requests at once: submit, follow, cancel, drain.

The manager packs and schedules in a thread of its own; this is its face to an event loop. Everything here but loading
adapters happens on that loop, so nothing is locked.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.decoder_layout import context_length
from finesteer_hf.errors import SteeringError
from finesteer_hf.runtime.plan import Plan, PlanEntry
from finesteer_hf.serving.admission import capacity, check_plan
from finesteer_hf.serving.catalogue import Catalogue
from finesteer_hf.serving.generation import Choice, EngineDownError, Generation, RequestRefusedError
from finesteer_hf.serving.sampling import Sampling


# How often the manager's thread is looked at, seconds; a request that it died with ends at most this much later.
WATCH = 0.25


@dataclass(frozen=True)
class Ask:
    """What a request asks of the engine.

    Attributes:
        prompt: token ids.
        max_new_tokens: most tokens of an answer.
        steering: adapters, by `name` or `name@version`, with their scales, in the order in which they act.
        sampling: how tokens are chosen.
        n: number of answers.
        stop: strings that end an answer.
        streaming: whether tokens are handed over as they come, or all at the end.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    steering: Mapping[str, float] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    stop: tuple[str, ...] = ()
    streaming: bool = False


class Engine:
    """Serves a steered model through transformers' continuous batching.

    Args:
        model: a steered model, in its place.
        tokenizer: its tokenizer.
        batching: how requests are packed; None lets transformers choose.
        max_length: most tokens of prompt and answer together; None: what the model and the cache can hold.

    Attributes:
        catalogue: the adapters that requests can name.
        max_length: the limit that holds, once started.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batching: ContinuousBatchingConfig | None = None,
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.catalogue = Catalogue(model, self._check_servable)
        self.max_length = max_length or 0
        self.eos = end_tokens(model)
        # Requests say themselves how they are sampled, so of the model's own configuration only its end is taken.
        generation = GenerationConfig(eos_token_id=sorted(self.eos) or [-1], pad_token_id=tokenizer.pad_token_id)
        self.manager = model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=batching or ContinuousBatchingConfig()
        )
        self._generations: dict[str, Generation] = {}
        self._draining = False
        self._begun = False
        self._watcher: asyncio.Task[None] | None = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the manager's thread, and wait until its cache is there.

        Raises:
            EngineDownError: if it ended meanwhile; the log says why.
            ValueError: if `max_length` is more than the model and the cache can hold.
        """
        self._begun = True
        self.manager.start()
        while self.manager.batch_processor is None:
            if not self.manager.is_running():
                raise EngineDownError("The engine's thread ended while it started; its error is in the log.")
            await asyncio.sleep(0.02)
        limits = (capacity(self.manager.batch_processor.cache), context_length(self.model))
        most = min((limit for limit in limits if limit is not None), default=2**31 - 1)
        if self.max_length > most:
            raise ValueError(
                f"max_length is {self.max_length}, and the model and the cache hold {most} tokens; give less."
            )
        self.max_length = self.max_length or most
        self._watcher = asyncio.create_task(self._watch())

    @property
    def alive(self) -> bool:
        """Whether the manager's thread runs."""
        return self._watcher is not None and self.manager.is_running()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive and not self._draining

    @property
    def in_flight(self) -> int:
        """Number of answers that are waited for."""
        return sum(len(generation.choices) for generation in self._generations.values())

    async def drain(self, timeout: float) -> int:
        """Take no more requests, and let those that run finish.

        Args:
            timeout: seconds after which the rest is cancelled.

        Returns:
            How many were cancelled.
        """
        self._draining = True
        end = time.monotonic() + timeout
        while self._generations and self.alive and time.monotonic() < end:
            await asyncio.sleep(0.02)
        left = list(self._generations.values())
        for generation in left:
            generation.fail(EngineDownError("The server is shutting down, and this took longer than it waits."))
        return len(left)

    async def stop(self) -> None:
        """End the manager's thread; what still runs fails."""
        self._draining = True
        if self._watcher is not None:
            self._watcher.cancel()
        for generation in list(self._generations.values()):
            generation.fail(EngineDownError("The server is shutting down."))
        if self._begun:
            self._begun = False
            await asyncio.to_thread(self.manager.stop, block=True, hard_stop=True)

    async def _watch(self) -> None:
        leftovers = self.manager.output_router.output_queue
        while self.manager.is_running():
            await asyncio.sleep(WATCH)
            # What was made of a cancelled request before the manager heard of it; nobody else takes it.
            with contextlib.suppress(queue.Empty):
                while True:
                    leftovers.get_nowait()
        # What the thread handed over before it ended comes first.
        await asyncio.sleep(0)
        for generation in list(self._generations.values()):
            generation.fail(EngineDownError("The engine's thread ended; its error is in the log."))

    # -- requests -----------------------------------------------------------------------------------------------------

    def submit(self, ask: Ask) -> Generation:
        """Queue a request; on the event loop.

        Raises:
            EngineDownError: if none is taken: the engine has not started, drains, or died.
            AdapterNotFoundError: for an adapter that is not offered.
            RequestRefusedError: for an empty prompt, too many tokens, an adapter named twice.
        """
        if not self.ready:
            raise EngineDownError("The server is shutting down." if self._draining else "The engine is not running.")
        identity = uuid.uuid4().hex
        # The adapters' lock: what is looked up is still there when the manager takes it.
        with self.catalogue.lock:
            asked = [(name, self.catalogue.resolve(name), scale) for name, scale in ask.steering.items()]
            keys = {offered.key: scale for _, offered, scale in asked}
            if len(keys) != len(asked):
                raise RequestRefusedError(f"{sorted(ask.steering)} name one adapter twice: {sorted(keys)}.")
            names = {offered.key: (name, offered.version) for name, offered, _ in asked}
            generation = Generation(
                identity, len(ask.prompt), ask.n, self.tokenizer, self.eos, ask.stop, names, self._release
            )
            for choice in generation.choices:
                self.manager.register_result_handler(choice.request_id, choice.receive)
            try:
                self.manager.add_request(
                    list(ask.prompt),
                    request_id=identity,
                    max_new_tokens=ask.max_new_tokens,
                    streaming=ask.streaming or bool(ask.stop),
                    record_timestamps=True,
                    steering=keys or None,
                    sampling=ask.sampling,
                    num_return_sequences=ask.n,
                )
            except BaseException as error:
                for choice in generation.choices:
                    self._unregister(choice)
                if type(error) is RuntimeError:
                    raise EngineDownError(str(error)) from error
                if isinstance(error, ValueError) and not isinstance(error, SteeringError):
                    raise RequestRefusedError(str(error)) from error
                raise
        self._generations[identity] = generation
        return generation

    def _release(self, choice: Choice) -> None:
        """What a generation calls for each answer that is not waited for any more."""
        if not choice.ended_by_engine:
            self.manager.cancel_request(choice.request_id)
        self._unregister(choice)
        if choice.generation.over:
            self._generations.pop(choice.generation.id, None)

    def _unregister(self, choice: Choice) -> None:
        router = self.manager.output_router
        with router._lock:
            router.result_handlers.pop(choice.request_id, None)

    def queue_length(self) -> tuple[int, int]:
        """Numbers of requests that wait and that run."""
        return self.manager.queue_length() if self.alive else (0, 0)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def _check_servable(self, name: str, adapter: SteeringAdapter) -> None:
        plan = Plan.of([PlanEntry(name, adapter.build(), 1.0)])
        check_plan(plan, self.model._steering.tower)


@contextlib.asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[None]:
    """Start an engine for a block, and stop it afterwards."""
    try:
        await engine.start()
        yield
    finally:
        await engine.stop()


def end_tokens(model: Any) -> frozenset[int]:
    """The tokens at which the model's own `generate` ends."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset(end for end in ([ends] if isinstance(ends, int) else ends) if end >= 0)
