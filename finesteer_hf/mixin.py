"""The verbs of a steered model, and the `generate` and `forward` that take steering arguments."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedModel
from transformers.utils import ModelOutput

from finesteer_hf.adapter import LoadReport, SteeringAdapter, warn_about
from finesteer_hf.backtracking import refuse_what_cannot_go_back, sample_with_backtracking
from finesteer_hf.compiled import forward_is_compiled
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.logits import steer_forward
from finesteer_hf.plan import Plan, Scale, Selection, SelectionLike, as_selection
from finesteer_hf.processors import SteeringProcessor, SteeringProcessorList
from finesteer_hf.runtime import PROMPT_LENGTHS, SteeringRuntime
from finesteer_hf.session import CallSession, Prompt, cache_length, current_session
from finesteer_hf.status import SteeringStatus, steering_status


class _Unset:
    """Marks an argument that was not given, where None has a meaning."""

    def __repr__(self) -> str:
        return "<what is set on the model>"


UNSET = _Unset()


class SteeringMixin:
    """Steering for a `PreTrainedModel`; use `SteeredModelForCausalLM` to get one.

    The class of a steered model is a subclass of its own class with this mixin in front, so it stays what it was for
    `isinstance`, pipelines, trainers and evaluation harnesses.
    """

    _steering: SteeringRuntime
    _steering_base_class: type[PreTrainedModel]

    # -- manage -------------------------------------------------------------------------------------------------------

    def load_steering(
        self,
        steering: str | SteeringAdapter,
        adapter_name: str = "default",
        *,
        revision: str | None = None,
        strict: bool = True,
        **hub_kwargs: Any,
    ) -> LoadReport:
        """Load a steering adapter; it becomes active if none is.

        Loading under a name that is taken replaces that adapter for calls that begin from now on.

        Args:
            steering: `org/name`, `org/name@revision`, a folder, or a `SteeringAdapter`.
            adapter_name: name that the other verbs know it by.
            revision: branch, tag or commit of the adapter's repo.
            strict: whether tensors that the method does not use, and another base of the same shape, are errors.
            **hub_kwargs: `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            What was found.

        Raises:
            AdapterMismatchError: if it was fitted for a model of another shape.
            AdapterFileError: if its files are damaged.
        """
        if not isinstance(steering, SteeringAdapter):
            steering = SteeringAdapter.from_pretrained(steering, revision=revision, strict=strict, **hub_kwargs)
        elif revision is not None or hub_kwargs:
            raise ValueError(
                f"{sorted({'revision', *hub_kwargs})} apply to a repo or folder, not to a SteeringAdapter object."
            )
        missing, unexpected = steering.check_tensors(strict)
        notes = steering.check_base(self, self._steering.tower)  # type: ignore[arg-type]
        self._steering.add(adapter_name, steering)
        if not self._steering.selection:
            self._steering.selection = ((adapter_name, 1.0),)
        warn_about(notes, adapter_name)
        return LoadReport(adapter_name, missing, unexpected, notes, steering.revision)

    def set_steering(self, steering: SelectionLike) -> None:
        """Say what is active for calls that name nothing themselves.

        Args:
            steering: a name, a list of names in the order in which they act, a dict of name to scale, or None.

        Raises:
            AdapterNotFoundError: for a name that is not loaded; nothing is changed then.
        """
        selection = as_selection(steering)
        for name, _ in selection:
            self._steering.get(name)
        self._steering.selection = selection

    @contextlib.contextmanager
    def steering(self, steering: SelectionLike, *, scale: float = 1.0) -> Iterator[None]:
        """Steer with something else inside a block, in this thread; nests, and restores exactly.

        Args:
            steering: as for `set_steering`.
            scale: multiplies the scales of the block.
        """
        selection = tuple((name, own * scale) for name, own in as_selection(steering))
        token = self._steering.enter_block(selection)
        try:
            yield
        finally:
            self._steering.leave_block(token)

    @contextlib.contextmanager
    def steering_with(self, processors: Sequence[SteeringProcessor]) -> Iterator[None]:
        """Steer with processors of your own, and nothing else, inside a block; for `forward` and `generate` alike."""
        chain = tuple(SteeringProcessorList(processors))
        for processor in chain:
            for site in processor.sites:
                self._steering.tower.check(site)
        token = self._steering.enter_block((), chain)
        try:
            yield
        finally:
            self._steering.leave_block(token, chain)

    def disable_steering(self) -> contextlib.AbstractContextManager[None]:
        """Steer with nothing inside a block, in this thread."""
        return self.steering(None)

    def delete_steering(self, adapter_name: str) -> None:
        """Forget an adapter; if it was active, the others stay so."""
        self._steering.remove(adapter_name)

    def unload_steering(self) -> PreTrainedModel:
        """Take everything off and give back the base model, the same object in its own class.

        Raises:
            UnsupportedModelError: if sharding (FSDP2) gave the model a class of its own after it was steered.
        """
        if type(self) is not steered_class(self._steering_base_class):
            raise UnsupportedModelError(
                f"The model became a {type(self).__name__} after it was steered, so its own class cannot be given back. "
                "Switch steering off with `model.set_steering(None)`, or steer after sharding."
            )
        self._steering.remove_hooks()
        del self.__dict__["_steering"]
        self.__class__ = self._steering_base_class  # type: ignore[assignment]
        return self

    @property
    def active_steering(self) -> dict[str, float]:
        """Names and scales of what is active here and now, in order."""
        return dict(self._steering.active()[0])

    @property
    def steering_adapters(self) -> dict[str, SteeringAdapter]:
        """The loaded adapters by name."""
        return {name: loaded.adapter for name, loaded in self._steering.adapters.items()}

    def steering_status(self) -> SteeringStatus:
        """What is loaded, what is active, and where it reads and writes."""
        return steering_status(self._steering)

    def save_steering(self, save_directory: str, adapter_name: str | None = None) -> None:
        """Save loaded adapters as PEFT does: `default` into the folder itself, any other into a folder of its name.

        Args:
            save_directory: the folder.
            adapter_name: the adapter to save, into the folder itself; None for all.
        """
        if adapter_name is not None:
            self._steering.get(adapter_name).adapter.save_pretrained(save_directory)
            return
        for name, loaded in self._steering.adapters.items():
            folder = save_directory if name == "default" else f"{save_directory}/{name}"
            loaded.adapter.save_pretrained(folder)

    def push_steering_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """Upload an adapter; arguments as for `SteeringAdapter.push_to_hub`.

        Args:
            repo_id: `org/name`.
            adapter_name: which; may be left out if one is loaded.
            **kwargs: `tag`, `revision`, `private`, `create_pr`, `commit_message`, `token`.
        """
        if adapter_name is None:
            if len(self._steering.adapters) != 1:
                raise ValueError(f"Name the adapter to push; loaded: {sorted(self._steering.adapters)}.")
            adapter_name = next(iter(self._steering.adapters))
        return self._steering.get(adapter_name).adapter.push_to_hub(repo_id, **kwargs)

    # -- steer --------------------------------------------------------------------------------------------------------

    def generate(
        self,
        *args: Any,
        steering: SelectionLike | Sequence[SelectionLike] | _Unset = UNSET,
        steering_scale: float | Sequence[float] | torch.Tensor = 1.0,
        steering_processor: Sequence[SteeringProcessor] | None = None,
        output_steering: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, steered; takes everything that one takes.

        Args:
            *args: as for `GenerationMixin.generate`.
            steering: for this call only: a name, a dict of name to scale, None for unsteered, or a list with one of
                these for each row of the batch. Not given: what is set on the model.
            steering_scale: multiplies the scales: a number, or one for each row.
            steering_processor: processors of your own, beside the active adapters and after them.
            output_steering: whether the output gets `.steering`: for each adapter its scores, gates and more, tensors
                with one entry for each returned sequence. Needs `return_dict_in_generate=True`.
            **kwargs: as for `GenerationMixin.generate`.

        Raises:
            AdapterNotFoundError: for a name that is not loaded, before any computation.
            ValueError: if rows and lists do not fit, or `output_steering` has no output object to go to.
        """
        plan = self._call_plan(steering, steering_scale, steering_processor)
        if output_steering and not self._returns_dict(kwargs):
            raise ValueError(
                "output_steering=True needs return_dict_in_generate=True: a bare tensor has no `.steering`."
            )
        processors = tuple(SteeringProcessorList(steering_processor or ()))
        self._steering.follow_modules()
        self._steering.hook(site for processor in processors for site in processor.sites)
        try:
            with CallSession(self._steering, plan, record=output_steering) as session:
                output = super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._steering.unhook(site for processor in processors for site in processor.sites)
        if output_steering and isinstance(output, ModelOutput):
            output.steering = session.records_of_sequences(output.sequences.shape[0])  # type: ignore[attr-defined]
        return output

    def _call_plan(self, steering: Any, scale: Any, processors: Sequence[SteeringProcessor] | None) -> Plan:
        chain = tuple(SteeringProcessorList(processors or ()))
        for processor in chain:
            for site in processor.sites:
                self._steering.tower.check(site)
        factor = as_scale(scale)
        if isinstance(steering, _Unset):
            outer = current_session(self._steering)
            if outer is not None and not outer.of_forward:
                # A model that drafts for itself generates inside its own call: it drafts with the same steering.
                return outer.plan
            selection, own = self._steering.active()
            return self._steering.plan(selection, (*own, *chain), factor)
        if steering is None or isinstance(steering, (str, Mapping)):
            return self._steering.plan(as_selection(steering), chain, factor)
        rows: list[Selection] = [as_selection(row) for row in steering]
        return self._steering.mixed_plan(rows, chain, factor)

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
        # Here the prepared configuration, the final mask and the rows of the forwards are known, before any forward.
        ids, kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        session = current_session(self._steering)
        if session is not None and session.prompt is None:
            session.prompt = prompt_of(ids, kwargs, expand_size)
            session.check_rows(session.prompt)
        return ids, kwargs

    def _validate_generation_mode(self, mode: Any, generation_config: Any, loop: dict[str, Any]) -> None:
        super()._validate_generation_mode(mode, generation_config, loop)  # type: ignore[misc]
        session = current_session(self._steering)
        if session is not None and session.plan.lookback:
            refuse_what_cannot_go_back(mode, generation_config, loop)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        # transformers takes the decoding method from the class, so this stands in for its greedy search and sampling.
        session = current_session(self._steering)
        if session is None or not session.plan.lookback:
            return super()._sample(*args, **kwargs)  # type: ignore[misc]
        return sample_with_backtracking(self, super()._sample, session, *args, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        session = current_session(self._steering)
        if session is not None and session.plan:
            logits_processor = LogitsProcessorList([*(logits_processor or ()), *session.logits_processors()])
        return super()._get_logits_processor(*args, logits_processor=logits_processor, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' continuous batching; refused while steering is active.

        Raises:
            UnsupportedModelError: if anything is active: requests are packed into one row there, in another thread.
        """
        session = current_session(self._steering)
        selection, processors = self._steering.active()
        if (session is not None and session.plan) or (session is None and (selection or processors)):
            raise UnsupportedModelError(
                "Continuous batching packs requests into one row and shares cached blocks between them, so it cannot be "
                "steered by row. Use `generate`, or `with model.disable_steering()` for an unsteered batch."
            )
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def __call__(self, *args: Any, prompt_lengths: Any = None, **kwargs: Any) -> Any:
        """A plain forward, steered with what is active.

        Args:
            *args: as for the model's `forward`.
            prompt_lengths: `[rows]` numbers of real prompt tokens, if the rows hold prompt and answer: the query is
                then token `prompt_lengths - 1` of the row's real tokens instead of the last one.
            **kwargs: as for the model's `forward`.
        """
        if torch.compiler.is_compiling():
            self._steering.compiled.lengths = prompt_lengths
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        if prompt_lengths is not None:
            prompt_lengths = torch.as_tensor(prompt_lengths, dtype=torch.long)
        token = PROMPT_LENGTHS.set(prompt_lengths)
        try:
            if not forward_is_compiled(self):  # type: ignore[arg-type]
                return super().__call__(*args, **kwargs)  # type: ignore[misc]
            return self._call_compiled(super().__call__, prompt_lengths, *args, **kwargs)  # type: ignore[misc]
        finally:
            PROMPT_LENGTHS.reset(token)

    def _call_compiled(self, call: Any, prompt_lengths: Any, *args: Any, **kwargs: Any) -> Any:
        runtime, session = self._steering, current_session(self._steering)
        if session is None:
            with runtime.compiled.lock:
                runtime.sync_compiled()
                runtime.compiled.lengths = prompt_lengths
                return call(*args, **kwargs)
        if session.can_decode_compiled:
            return runtime.compiled.run_bound(session, runtime.hooked_widths(), call, *args, **kwargs)
        # The prompt is read and decided on eagerly, as it is when `generate` compiles by itself.
        with torch.compiler.set_stance("force_eager"):
            return call(*args, **kwargs)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """transformers' compiled forward for decode steps, bound to what the calling thread's session adds."""
        compiled = super().get_compiled_call(compile_config)  # type: ignore[misc]
        runtime = self._steering

        def call(*args: Any, **kwargs: Any) -> Any:
            session = current_session(runtime)
            if session is None or not session.can_decode_compiled:
                return self(*args, **kwargs)
            return runtime.compiled.run_bound(session, runtime.hooked_widths(), compiled, *args, **kwargs)

        return call

    # -- copies -------------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The steered class has the name of its base, so it is found again through the base, not by its own name.
        return _restore, (self._steering_base_class,), self.__dict__


def _restore(base_class: type[PreTrainedModel]) -> PreTrainedModel:
    model = base_class.__new__(base_class)
    model.__class__ = steered_class(base_class)
    return model


_STEERED_CLASSES: dict[type, type] = {}


def steered_class(base_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model class that has the verbs of `SteeringMixin`.

    It keeps the name and module of its base: they go into `config.architectures` and into transformers' own checks.
    """
    if base_class in _STEERED_CLASSES:
        return _STEERED_CLASSES[base_class]
    namespace = {
        "forward": _forward_of(base_class),
        "__module__": base_class.__module__,
        "__qualname__": base_class.__qualname__,
        "__doc__": base_class.__doc__,
        "_steering_base_class": base_class,
    }
    return _STEERED_CLASSES.setdefault(base_class, type(base_class.__name__, (SteeringMixin, base_class), namespace))


def _forward_of(base_class: type[PreTrainedModel]) -> Any:
    # PEFT calls `forward`, not the model. Trainers and `generate` read its signature, so it stays the base's.
    @functools.wraps(base_class.forward)
    def forward(self: Any, *args: Any, prompt_lengths: Any = None, **kwargs: Any) -> Any:
        if prompt_lengths is None:
            return steer_forward(base_class.forward, self, args, kwargs)
        token = PROMPT_LENGTHS.set(torch.as_tensor(prompt_lengths, dtype=torch.long))
        try:
            return steer_forward(base_class.forward, self, args, kwargs)
        finally:
            PROMPT_LENGTHS.reset(token)

    return forward


def steer(model: PreTrainedModel) -> None:
    """Turn a model into a steered one, in place; nothing happens if it is one.

    Raises:
        UnsupportedModelError: if the model cannot be steered.
    """
    if isinstance(model, SteeringMixin):
        return
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal language model of transformers; load one with AutoModelForCausalLM."
        )
    runtime = SteeringRuntime(model)
    model.__class__ = steered_class(type(model))
    model.__dict__["_steering"] = runtime


def prompt_of(ids: Any, kwargs: dict[str, Any], expand: int) -> Prompt:
    """What `generate` knows of the prompts once its inputs are prepared."""
    embeds = kwargs.get("inputs_embeds")
    inputs = {"inputs_embeds": embeds} if embeds is not None else {"input_ids": ids}
    mask = kwargs.get("attention_mask")
    length = int(next(iter(inputs.values())).shape[1])
    cache = kwargs.get("past_key_values")
    if mask is not None and mask.ndim == 2 and mask.shape[1] >= length:
        length = int(mask.shape[1])
    elif cache is not None and cache_length(cache) >= length:
        # Only the new turn's tokens were given, beside the cache of the earlier ones.
        length += cache_length(cache)
    usable = isinstance(mask, torch.Tensor) and mask.ndim == 2
    return Prompt(length, mask.bool() if usable else None, None, inputs, expand)  # type: ignore[union-attr]


def as_scale(value: float | Sequence[float] | torch.Tensor) -> Scale:
    """Normalise `steering_scale`: a number, or a tuple with one number a row."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, (int, float)):
        return float(value)
    return tuple(float(v) for v in value)


__all__ = ["UNSET", "SteeringMixin", "steer", "steered_class"]
