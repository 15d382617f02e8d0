"""The engine's own objects, steered: each gets a subclass in place of its class.

The list of logits processors sees each batch, the batch processor fails single requests, the router attaches what the
gates said, the scheduler says who was cancelled, the cache knows blocks by what was added to them (`prefix.py`).
`contract.py` checks that the installed transformers has what these subclasses build on.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchProcessor, OutputRouter
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from finesteer_hf.serving.paged import KEY, PagedSession
from finesteer_hf.serving.prefix import SteeredCache
from finesteer_hf.serving.requests import Asked, SteeredRequest


logger = logging.getLogger(__name__)


class SteeredLogits(ContinuousBatchingLogitsProcessorList):
    """The one place where the engine shows which requests a batch holds, in the order in which it packs them."""

    session: PagedSession

    @classmethod
    def take_over(cls, processors: Any, session: PagedSession) -> None:
        """Put this class in place of a list's own, and let the engine accept what a request asks for."""
        processors.__class__, processors.session = cls, session
        processors.supported_keys = {**processors.supported_keys, KEY: Asked}

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        self.session.lay_out(requests_in_batch)
        self.do_processing = bool(self.logits_processor) or bool(self.session.sampled)
        return super().prepare_tensor_args(requests_in_batch, arg_storage)

    def __call__(self, input_ids: Any, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:
        processed = super().__call__(input_ids, scores, logits_processor_args)
        return self.session.choose(scores, processed) if self.session.sampled else processed


class SteeredBatchProcessor(ContinuousBatchProcessor):
    """Ends requests whose own steering or sampling failed, and no others."""

    session: PagedSession

    @classmethod
    def take_over(cls, processor: Any, session: PagedSession) -> None:
        """Put this class in place of a batch processor's own, and steered ones in place of its scheduler's and cache's."""
        if isinstance(processor, cls):
            return
        scheduler: Any = processor.scheduler
        cache: Any = processor.cache
        processor.__class__, processor.session = cls, session
        scheduler.__class__, scheduler.session = _releasing(scheduler.__class__), session
        cache.__class__, cache.session, cache.scheduler = SteeredCache, session, scheduler
        session.is_live = processor.is_live

    def _generation_step(self, model: Any) -> None:
        # A request with several sequences leaves its last prompt token for after the split. If that is all that a step
        # holds, the step has no token, and a forward without tokens would end the engine.
        if getattr(self.inputs_and_outputs, "num_q_tokens", 1):
            super()._generation_step(model)

    def update_batch(self) -> None:
        batch: list[Any] = getattr(self.inputs_and_outputs, "requests_in_batch", [])
        # Looked up before: requests that end in this step are let go of in it.
        states = [(self.session.of(future.state), future.state) for future in batch]
        super().update_batch()
        failed = dict.fromkeys(request for request, _ in states if request is not None and request.error is not None)
        for request in failed:
            self._fail(request, {state.request_id: state for owner, state in states if owner is request})

    def is_live(self, request: SteeredRequest) -> bool:
        """Whether one of a request's sequences is in work or waits."""
        return any(self._state(request_id) is not None for request_id in request.sequence_ids)

    def _fail(self, request: SteeredRequest, in_batch: dict[str, Any]) -> None:
        """End all sequences of a request with its error.

        Args:
            request: with an error.
            in_batch: states of those of its sequences that the last forward held, by id.
        """
        assert request.error is not None
        logger.warning("Request %s failed: %r", request.asked.ticket, request.error)
        self.session.stats.failed += 1
        first = next(iter(in_batch.values()))
        for request_id in request.sequence_ids:
            if request_id in request.over:
                continue
            # A sequence that was not split off yet is waited for all the same.
            state = self._state(request_id) or in_batch.get(request_id) or first.fork(request_id)
            if self.scheduler.waiting_requests.pop(request_id, None) is not None:
                self.scheduler.waiting_requests_order.remove(request_id)
            self._handle_request_error(request.error, state)
            self.scheduler.finish_request(request_id)
        self.session.release(request.asked.ticket)

    def _state(self, request_id: str) -> Any:
        scheduler = self.scheduler
        return scheduler.active_requests.get(request_id) or scheduler.waiting_requests.get(request_id)


class SteeredRouter(OutputRouter):
    """Hands outputs on with what the request's gates said, and lets go of requests that are over."""

    session: PagedSession

    @classmethod
    def take_over(cls, router: Any, session: PagedSession) -> None:
        """Put this class in place of a router's own."""
        router.__class__, router.session = cls, session

    def deliver(self, output: GenerationOutput) -> None:
        if self._look_at([output]):
            super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        super().deliver_batch(self._look_at(outputs))

    def _look_at(self, outputs: list[GenerationOutput]) -> list[GenerationOutput]:
        """Annotate outputs, let go of the requests that are over, and return what may be delivered.

        All are looked at before any is let go of, for sequences of one request may end in one step; and all of that before
        they are delivered, so that whoever has an answer may use its id again.
        """
        delivered = [output for output in outputs if self.session.annotate(output)]
        for output in delivered:
            if output.is_finished():
                self.session.left(output.request_id)
        return delivered


class _ReleasesCancelled(Scheduler):
    """A scheduler that says which requests were cancelled: the engine delivers nothing for them."""

    session: PagedSession

    def clear_cancelled_requests(self) -> list[RequestState]:
        states = super().clear_cancelled_requests()
        for state in states:
            self.session.left(state.request_id)
        return states


@functools.cache
def _releasing(scheduler_class: type[Scheduler]) -> type[Scheduler]:
    return type(f"Steered{scheduler_class.__name__}", (_ReleasesCancelled, scheduler_class), {})
