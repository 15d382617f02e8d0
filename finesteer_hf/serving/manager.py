"""transformers' manager of continuous batching, steered: each request brings its adapters, scale and sampling."""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
)
from transformers.generation.continuous_batching.requests import RequestState

from finesteer_hf.decoder_layout import context_length
from finesteer_hf.runtime.arguments import UNSET, Unset
from finesteer_hf.runtime.plan import Plan, Selection, SelectionLike
from finesteer_hf.serving.admission import capacity, check_engine, room
from finesteer_hf.serving.asking import OF_BATCH, Active, each, plan_of
from finesteer_hf.serving.contract import check_contract
from finesteer_hf.serving.engine_parts import SteeredBatchProcessor, SteeredLogits, SteeredRouter
from finesteer_hf.serving.paged import KEY, PagedSession, Stats
from finesteer_hf.serving.requests import Asked, SteeredRequest, ticket_of
from finesteer_hf.serving.sampling import Sampling


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


class SteeredManager(ContinuousBatchingManager):
    """A manager whose requests are steered; `model.init_continuous_batching()` of a steered model gives one.

    A request that names nothing steers with what is active where it is added: a `with model.steering(...)` block, else the
    block that the manager was begun in, else what is set on the model.
    """

    runtime: SteeringRuntime
    session: PagedSession
    began_in: Active | None
    _admission: threading.Lock

    @classmethod
    def take_over(cls, manager: ContinuousBatchingManager, runtime: SteeringRuntime) -> SteeredManager:
        """Make a manager of transformers a steered one, in place; one that is steered already keeps its requests.

        Raises:
            UnsupportedModelError: if the installed transformers has not the seams that steering needs.
        """
        began_in = runtime.active() if runtime.blocks.innermost() is not None else None
        if not isinstance(manager, cls):
            check_contract(manager)
            manager.__class__ = cls
            assert isinstance(manager, cls)
            manager.runtime = runtime
            manager._admission = threading.Lock()
            manager.session = PagedSession(runtime, lambda asked: runtime.plan(asked.selection, (), 1.0))
            SteeredLogits.take_over(manager.logit_processor, manager.session)
            SteeredRouter.take_over(manager.output_router, manager.session)
        manager.began_in = began_in
        return manager

    # -- requests -----------------------------------------------------------------------------------------------------

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        *,
        steering: SelectionLike | Unset = UNSET,
        steering_scale: float = 1.0,
        sampling: Sampling | None = None,
        num_return_sequences: int | None = None,
        **logit_processor_kwargs: Any,
    ) -> str | None:
        """Queue a request. Everything is checked first: nothing is queued where it raises.

        Args:
            input_ids: the prompt.
            request_id: to find its results by; None: one is made up. Returned sequences after the first are called
                `{request_id}__child#0` and so on.
            max_new_tokens: most tokens of the answer; None: as the generation config says, or all that fits.
            streaming: whether each token is delivered as it comes.
            record_timestamps: whether the time of each token is kept.
            eos_token_id: ends the answer.
            steering: a name, a list of names, a dict of name to scale, or None for unsteered. Not given: what is active.
            steering_scale: multiplies the scales.
            sampling: how its tokens are chosen; None: as the engine's generation config says.
            num_return_sequences: how many answers; None: as the generation config says.
            **logit_processor_kwargs: `temperature`, `top_k`, `top_p`, where the engine was created with
                `per_request_processors=True`.

        Returns:
            The request's id; None on a tensor-parallel rank that is not the first.

        Raises:
            AdapterNotFoundError: for a name that is not loaded.
            UnsupportedModelError: for an adapter that a packed batch cannot serve.
            ValueError: for a prompt that does not fit, or an id that is in flight.
            TypeError: for an unknown keyword.
            RuntimeError: if the engine takes no more requests.
        """
        plan, selection = self._plan(steering, steering_scale)
        return self._queue(
            input_ids,
            plan,
            selection,
            request_id=request_id,
            max_new_tokens=max_new_tokens,
            streaming=streaming,
            record_timestamps=record_timestamps,
            eos_token_id=eos_token_id,
            sampling=sampling,
            sequences=num_return_sequences,
            logit_processor_kwargs=logit_processor_kwargs,
        )

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        *,
        steering: SelectionLike | Sequence[SelectionLike] | Unset = UNSET,
        steering_scale: float | Sequence[float] = 1.0,
        **logit_processor_kwargs: Any,
    ) -> list[str]:
        """`add_request` for several prompts; `steering` and `steering_scale` are one for all, or a list with one for each.

        All are checked before the first is queued.
        """
        batch = OF_BATCH.get()
        asked: tuple[Any, Any] = (steering, steering_scale) if batch is None else (batch.plans, 1.0)
        try:
            return self._add_requests(
                inputs, max_new_tokens, streaming, record_timestamps, *asked, logit_processor_kwargs
            )
        except Exception as error:
            if batch is not None:
                batch.error = error
            raise

    def _add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None,
        streaming: bool,
        record_timestamps: bool,
        steering: Any,
        steering_scale: Any,
        logit_processor_kwargs: dict[str, Any],
    ) -> list[str]:
        plans = [self._plan(*asked) for asked in each(len(inputs), steering, steering_scale)]
        eos_token_id = self.generation_config.eos_token_id
        eos_token_id = self.model.config.eos_token_id if eos_token_id is None else eos_token_id
        for input_ids in inputs:
            self._room(input_ids, max_new_tokens)
        with self._request_lock:
            ids = [f"req_{self._request_counter + i}" for i in range(len(inputs))]
            self._request_counter += len(inputs)
        order = range(len(inputs))
        if self._use_prefix_sharing:
            # Neighbours share their beginnings then.
            order = sorted(order, key=lambda i: inputs[i], reverse=True)  # type: ignore[assignment]
        for i in order:
            self._queue(
                inputs[i],
                *plans[i],
                request_id=ids[i],
                max_new_tokens=max_new_tokens,
                streaming=streaming,
                record_timestamps=record_timestamps,
                eos_token_id=-1 if eos_token_id is None else eos_token_id,
                logit_processor_kwargs=logit_processor_kwargs,
            )
        return ids

    def _plan(self, steering: Any, scale: Any) -> tuple[Plan, Selection]:
        """What a request steers with, checked, and the same as plain values."""
        plan = plan_of(self.runtime, steering, scale, self.began_in)
        if plan:
            check_engine(self.continuous_batching_config)
        own = [entry.name for entry in plan.entries if entry.name not in self.runtime.adapters]
        if own and self.distributed_helper.tp_size > 1:
            raise ValueError(
                f"{own} are processors of this rank alone. Under tensor parallelism, steer with loaded adapters."
            )
        return plan, tuple((entry.name, float(entry.scale)) for entry in plan.entries)  # type: ignore[arg-type]

    def _queue(
        self,
        input_ids: Sequence[int],
        plan: Plan,
        selection: Selection,
        *,
        request_id: str | None,
        max_new_tokens: int | None,
        streaming: bool,
        record_timestamps: bool,
        eos_token_id: int | list[int] | None,
        logit_processor_kwargs: dict[str, Any],
        sampling: Sampling | None = None,
        sequences: int | None = None,
    ) -> str | None:
        if not self.is_tp_driver:
            return None
        unknown = (
            logit_processor_kwargs.keys() - self.logit_processor.supported_keys - self.logit_processor.ignored_keys
        )
        if unknown:
            raise TypeError(
                f"Unknown arguments {sorted(unknown)}. A request takes steering, steering_scale, sampling and "
                f"num_return_sequences; this engine's own processors take {sorted(self.logit_processor.supported_keys)}."
            )
        input_ids = [int(token) for token in input_ids]
        max_new_tokens = self._room(input_ids, max_new_tokens)
        sequences = self.num_return_sequences if sequences is None else sequences
        if sequences < 1:
            raise ValueError(f"num_return_sequences must be at least 1, got {sequences}.")
        denial = self.background_thread_status.can_accept_new_requests()
        if denial is not None:
            raise RuntimeError(f"{denial} The request was not taken.") from self.background_thread_status.fatal_error
        if sampling is not None and sampling.temperature and sampling.seed is None:
            sampling = dataclasses.replace(sampling, seed=secrets.randbits(63))
        if request_id is None:
            with self._request_lock:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        elif ticket_of(request_id) != request_id:
            raise ValueError(f"{request_id!r} is an id that the engine gives to returned sequences. Give another one.")
        asked = Asked(request_id, selection, sampling, sequences)
        state = RequestState(
            request_id=request_id,
            initial_tokens=input_ids,
            num_children=sequences - 1,
            record_timestamps=record_timestamps,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.generation_config.eos_token_id if eos_token_id is None else eos_token_id,
            streaming=streaming,
            logit_processor_kwargs={**logit_processor_kwargs, KEY: asked},
        )
        self.session.admit(SteeredRequest(asked, plan))
        try:
            self.input_queue.put(state, block=True, timeout=10)
        except BaseException:
            self.session.release(request_id)
            raise
        self._wake_up_loop.set()
        return request_id

    def _room(self, input_ids: Sequence[int], max_new_tokens: int | None) -> int:
        """How many new tokens a request may have; raises as `admission.room`."""
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        limits = {
            "the model's context": context_length(self.model),
            "the engine's cache": capacity(self._engine().cache),
        }
        vocabulary = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        return room(input_ids, max_new_tokens, int(vocabulary), limits)

    def queue_length(self) -> tuple[int, int]:
        """Number of requests that wait, and that are in work."""
        if self.batch_processor is None:
            return self.input_queue.qsize(), 0
        scheduler = self.batch_processor.scheduler
        return self.input_queue.qsize() + len(scheduler.waiting_requests), len(scheduler.active_requests)

    @property
    def stats(self) -> Stats:
        """Counts of what the engine has done."""
        return self.session.stats

    # -- the engine's thread --------------------------------------------------------------------------------------------

    def _engine(self) -> ContinuousBatchProcessor:
        """The batch processor, made if there is none: what fits is known only then."""
        with self._admission:
            if self.batch_processor is None:
                self.batch_processor = self._create_batch_processor()
            return self.batch_processor

    def start(self) -> None:
        """Start the engine's thread."""
        self._engine()
        super().start()

    def warmup(self) -> None:
        """Prepare what the engine prepares; its dummy batches are not steered."""
        with self.session:
            super().warmup()

    def _run_generation_loop(self) -> None:
        with self.session:
            super()._run_generation_loop()

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        processor = super()._create_batch_processor()
        SteeredBatchProcessor.take_over(processor, self.session)
        return processor
