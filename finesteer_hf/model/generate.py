"""`generate` and the plain forward of a steered model: a call's arguments become a plan, run in a session."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils import ModelOutput

from finesteer_hf.processors import SteeringProcessor, SteeringProcessorList
from finesteer_hf.runtime.arguments import UNSET, Unset, as_scale
from finesteer_hf.runtime.call import SteeringRuntime
from finesteer_hf.runtime.callbacks import OutsideCriteria, OutsideProcessors, OutsideStreamer
from finesteer_hf.runtime.current import current_session, outside_sessions
from finesteer_hf.runtime.decoding.backtracking import refuse_what_cannot_go_back, sample_with_backtracking
from finesteer_hf.runtime.decoding.compiled import forward_is_compiled
from finesteer_hf.runtime.forwards.prompt_ends import PROMPT_ENDS, told
from finesteer_hf.runtime.forwards.streams import Prompt, cache_length, forward_cache
from finesteer_hf.runtime.plan import Plan, Selection, SelectionLike, as_selection
from finesteer_hf.runtime.session import CallSession
from finesteer_hf.serving.asking import AskedOfBatch, each, plan_of
from finesteer_hf.serving.contract import check_contract


if TYPE_CHECKING:
    from finesteer_hf.serving.manager import SteeredManager


# Arguments of `generate`; functions that would silently ignore them refuse them.
OF_GENERATE = frozenset(("steering", "steering_scale", "steering_processor", "output_steering"))

# Position of `generate`'s streamer argument, after `self`.
_STREAMER_PLACE = list(inspect.signature(GenerationMixin.generate).parameters).index("streamer") - 1


class SteeredGeneration:
    """The steering half of `SteeringMixin`: it comes before the model's class and passes everything on to it."""

    _steering: SteeringRuntime

    def generate(
        self,
        *args: Any,
        steering: SelectionLike | Sequence[SelectionLike] | Unset = UNSET,
        steering_scale: float | Sequence[float] | torch.Tensor = 1.0,
        steering_processor: Sequence[SteeringProcessor] | None = None,
        output_steering: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run transformers' `generate`, steered; takes all of its arguments.

        Args:
            *args: as for `GenerationMixin.generate`.
            steering: for this call only: a name, a dict of name to scale, None for unsteered, or a list with one of
                these for each row of the batch. By default, what is set on the model.
            steering_scale: multiplies the scales: a number, or one for each row.
            steering_processor: your own processors, which act after the active adapters.
            output_steering: whether the output gets `.steering`: each adapter's scores, gates and more, as tensors
                with one entry per returned sequence. Needs `return_dict_in_generate=True`.
            **kwargs: as for `GenerationMixin.generate`.

        Raises:
            AdapterNotFoundError: for a name that is not loaded, before any computation.
            ValueError: if rows and lists do not match, a scale is not finite, an addend is not finite in the model's
                dtype, or `output_steering` has no output object.
            TypeError: if `steering` or `steering_scale` has another type.
        """
        processors = tuple(SteeringProcessorList(steering_processor or ()))
        plan, rows = self._call_plan(steering, steering_scale, processors)
        if output_steering and not self._returns_dict(kwargs):
            raise ValueError(
                "output_steering=True needs return_dict_in_generate=True: a bare tensor has no `.steering`."
            )
        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = OutsideStreamer(kwargs["streamer"])
        elif len(args) > _STREAMER_PLACE and args[_STREAMER_PLACE] is not None:
            args = (*args[:_STREAMER_PLACE], OutsideStreamer(args[_STREAMER_PLACE]), *args[_STREAMER_PLACE + 1 :])
        self._steering.follow_modules()
        # Fixed for the call: an adapter may be deleted or replaced while it steers.
        self._steering.hook(plan.sites)
        try:
            with CallSession(self._steering, plan, rows=rows, record=output_steering) as session:
                output = super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._steering.unhook(plan.sites)
        if output_steering and isinstance(output, ModelOutput):
            output.steering = session.records_of_sequences(output.sequences.shape[0])  # type: ignore[attr-defined]
        return output

    def _call_plan(self, steering: Any, scale: Any, chain: tuple[SteeringProcessor, ...]) -> tuple[Plan, int | None]:
        """The plan of a call, and the number of rows if steering was given per row."""
        for processor in chain:
            for site in processor.sites:
                self._steering.tower.check(site)
        factor = as_scale(scale)
        rows = len(factor) if isinstance(factor, tuple) else None
        if isinstance(steering, Unset):
            outer = current_session(self._steering)
            if outer is not None and not outer.of_forward and factor == 1.0 and not chain:
                # A self-drafting model generates inside its own call and drafts with the same steering. User
                # callbacks, and code in its own block, are outside of it.
                return outer.plan, outer.rows
            self._steering.blocks.warn_of_others(self._steering.selection)
            with self._steering.lock:
                selection, own = self._steering.active()
                return self._steering.plan(selection, (*own, *chain), factor), rows
        if not isinstance(steering, Sequence) or isinstance(steering, str):
            return self._steering.plan(as_selection(steering), chain, factor), rows
        if not steering:
            raise ValueError("steering=[] has no entries. Give one entry for each row of the batch, or None.")
        selections: list[Selection] = [as_selection(row) for row in steering]
        return self._steering.mixed_plan(selections, chain, factor), len(selections)

    def _returns_dict(self, kwargs: dict[str, Any]) -> bool:
        configs = (kwargs.get("generation_config"), self.generation_config)  # type: ignore[attr-defined]
        for value in (
            kwargs.get("return_dict_in_generate"),
            *(getattr(c, "return_dict_in_generate", None) for c in configs),
        ):
            if value is not None:
                return bool(value)
        return False

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        # Here, before any forward, the prepared configuration, the final mask and the rows of the forwards are known.
        ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        session = current_session(self._steering)
        if session is not None and session.prompt is None:
            session.prompt = prompt_of(ids, kwargs, expand_size, masked=bool(session.plan))
            session.check_rows(session.prompt)
        return ids, kwargs

    def _validate_generation_mode(self, mode: Any, generation_config: Any, loop: dict[str, Any]) -> None:
        super()._validate_generation_mode(mode, generation_config, loop)  # type: ignore[misc]
        session = current_session(self._steering)
        if session is None:
            return
        if session.plan.remembers and (generation_config.num_beams > 1 or session.plan.lookback):
            raise ValueError(
                "The active steering remembers the tokens of each row, but beams reorder rows, and so does taking tokens "
                "back; use greedy search or sampling, without an adapter that takes tokens back."
            )
        if session.plan.lookback:
            refuse_what_cannot_go_back(mode, generation_config, loop)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        # transformers takes the decoding method from the class, so this replaces its greedy search and sampling.
        session = current_session(self._steering)
        if session is None or not session.plan.lookback:
            return super()._sample(*args, **kwargs)  # type: ignore[misc]
        return sample_with_backtracking(self, super()._sample, session, *args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        session = current_session(self._steering)
        own = session.logits_processors() if session is not None and session.plan else []
        if own:
            logits_processor = LogitsProcessorList([*(logits_processor or ()), *own])
        processors = super()._get_logits_processor(*args, logits_processor=logits_processor, **kwargs)  # type: ignore[misc]
        return processors if session is None else OutsideProcessors(processors)

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        return criteria if current_session(self._steering) is None else OutsideCriteria(criteria)

    def generate_batch(
        self,
        inputs: list[list[int]],
        *args: Any,
        steering: SelectionLike | Sequence[SelectionLike] | Unset = UNSET,
        steering_scale: float | Sequence[float] = 1.0,
        **kwargs: Any,
    ) -> Any:
        """transformers' continuous batching, steered: each request in the packed batch with its own adapters and scale.

        Args:
            inputs: token ids of the prompts.
            *args: as for `ContinuousMixin.generate_batch`.
            steering: a name, a dict of name to scale, None for unsteered, or a list with one of these for each prompt.
                Not given: what is active.
            steering_scale: multiplies the scales: a number, or one for each prompt.
            **kwargs: as for `ContinuousMixin.generate_batch`; `max_new_tokens`.

        Returns:
            `GenerationOutput`s by request id, each with `.steering`: what the gates said.

        Raises:
            AdapterNotFoundError: for a name that is not loaded.
            UnsupportedModelError: for an adapter that a packed batch cannot serve, by name.
            ValueError: if lists and prompts do not fit, or a prompt does not fit the engine.
            TypeError: for an unknown keyword.
            RuntimeError: if all requests failed, as they do when the engine dies. A single one has `.error` set.
        """
        session = current_session(self._steering)
        # `generate(cache_implementation="paged")` calls this with all that it was given.
        of_generate = session is not None and not session.of_forward
        known = {*inspect.signature(super().generate_batch).parameters, "max_new_tokens"} - {"kwargs"}  # type: ignore[misc]
        unknown = sorted(kwargs.keys() - known)
        if unknown and not of_generate:
            raise TypeError(
                f"generate_batch takes no {unknown}. It takes steering, steering_scale and {sorted(known)}."
            )
        if of_generate and isinstance(steering, Unset):
            assert session is not None
            # Each row of that call is a request of its own.
            steering = [session.plan.of_row(row) for row in range(len(inputs))]  # type: ignore[misc]
        # Before an engine is begun: it would be begun for nothing.
        asked = each(len(inputs), steering, steering_scale)
        with AskedOfBatch([plan_of(self._steering, *own) for own in asked]) as batch:
            results = outside_sessions(super().generate_batch, inputs, *args, **kwargs)  # type: ignore[misc]
        if batch.error is not None:
            raise batch.error
        errors = [output.error for output in results.values() if output.error is not None]
        if inputs and len(errors) == len(results):
            raise RuntimeError(f"All requests failed, the first with: {errors[0] if errors else 'the engine died'}")
        return results

    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, **kwargs: Any
    ) -> SteeredManager:
        """transformers' manager of continuous batching, whose requests are steered: see `SteeredManager.add_request`.

        CUDA graphs and asynchronous batching are off unless they are asked for; an engine with them serves unsteered
        requests only.

        Raises:
            UnsupportedModelError: if the engine of the installed transformers cannot be steered.
        """
        check_contract()
        # An older transformers lacks what this builds on, and everything but serving works with it.
        from finesteer_hf.serving.manager import SteeredManager

        if continuous_batching_config is None:
            # Where older code puts it.
            own = generation_config or self.generation_config  # type: ignore[attr-defined]
            continuous_batching_config = getattr(own, "continuous_batching_config", None)
        config = copy.copy(continuous_batching_config) or ContinuousBatchingConfig()
        config.use_cuda_graph = config.use_cuda_graph or False
        config.use_async_batching = config.use_async_batching or False
        manager = outside_sessions(super().init_continuous_batching, generation_config, config, **kwargs)  # type: ignore[misc]
        return SteeredManager.take_over(manager, self._steering)

    def __call__(self, *args: Any, prompt_lengths: Any = None, **kwargs: Any) -> Any:
        """Run a plain forward with the active steering.

        Args:
            *args: as for the model's `forward`.
            prompt_lengths: `[rows]` numbers of real prompt tokens, if the rows hold prompt and answer: the query is
                then token `prompt_lengths - 1` of the row's real tokens instead of the last one. Without it, `labels`
                that begin with -100, as trainers' do, give the same.
            **kwargs: as for the model's `forward`.

        Warns:
            UserWarning: once, if the steering depends on the prompt's end and neither gives it.
        """
        labels = kwargs.get("labels")
        if torch.compiler.is_compiling():
            self._steering.compiled.note(prompt_lengths, labels)
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        with told(prompt_lengths, labels):
            if not forward_is_compiled(self):  # type: ignore[arg-type]
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            return self._call_compiled(super().__call__, *args, **kwargs)  # type: ignore[misc]

    def _call_compiled(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        runtime, session = self._steering, current_session(self._steering)
        if session is None:
            runtime.blocks.warn_of_others(runtime.selection)
            cache, plan = forward_cache(kwargs), runtime.plan(*runtime.active(), 1.0)
            if cache is None or not plan.depends_on_query:
                runtime.plain_forwards.check_prompt_ends(args, kwargs)
                with runtime.compiled.lock:
                    runtime.sync_compiled()
                    runtime.compiled.note(PROMPT_ENDS.get().lengths, kwargs.get("labels"))
                    return call(*args, **kwargs)
            # A hand-written decoding loop: its steps use the decision of the forward over the prompt.
            session = runtime.plain_forwards.session_of(cache, plan)
            decided = session is not None and session.can_decode_compiled
        else:
            decided = session.can_decode_compiled and not session.of_forward
        if session is not None and decided:
            return runtime.compiled.run_bound(session, runtime.hooked_widths(), call, *args, **kwargs)
        # The prompt is read and decided eagerly, as when `generate` compiles by itself.
        with torch.compiler.set_stance("force_eager"):
            return call(*args, **kwargs)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """transformers' compiled forward for decode steps, bound to the addends of the calling thread's session."""
        compiled = super().get_compiled_call(compile_config)  # type: ignore[misc]
        runtime = self._steering

        def call(*args: Any, **kwargs: Any) -> Any:
            session = current_session(runtime)
            if session is None or session.of_forward or not session.can_decode_compiled:
                return self(*args, **kwargs)
            return runtime.compiled.run_bound(session, runtime.hooked_widths(), compiled, *args, **kwargs)

        return call


def prompt_of(ids: Any, kwargs: dict[str, Any], expand: int, masked: bool = True) -> Prompt:
    """The prompts, from the prepared inputs of `generate`; without their mask if it is not needed."""
    embeds = kwargs.get("inputs_embeds")
    inputs = {"inputs_embeds": embeds} if embeds is not None else {"input_ids": ids}
    mask = kwargs.get("attention_mask")
    length = int(next(iter(inputs.values())).shape[1])
    cache = kwargs.get("past_key_values")
    if mask is not None and mask.ndim == 2 and mask.shape[1] >= length:
        length = int(mask.shape[1])
    elif cache is not None and cache_length(cache) >= length:
        # Only the new turn's tokens were given, with the cache of the earlier ones.
        length += cache_length(cache)
    usable = masked and isinstance(mask, torch.Tensor) and mask.ndim == 2
    return Prompt(length, mask.bool() if usable else None, None, inputs, expand)  # type: ignore[union-attr]
