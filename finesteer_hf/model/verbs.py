"""The steering methods of a model, and the `generate` and `forward` that take steering arguments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from finesteer_hf.adapters.adapter import LoadReport, SteeringAdapter, warn_about
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.model.generate import OF_GENERATE, SteeredGeneration
from finesteer_hf.model.status import SteeringStatus, steering_status
from finesteer_hf.processors import SteeringProcessor, SteeringProcessorList
from finesteer_hf.runtime.arguments import as_number
from finesteer_hf.runtime.call import SteeringRuntime
from finesteer_hf.runtime.current import end_interrupted_forward
from finesteer_hf.runtime.decoding.logits import steer_forward
from finesteer_hf.runtime.forwards.prompt_ends import PROMPT_ENDS, noting, told, without_noting
from finesteer_hf.runtime.plan import SelectionLike, as_selection


# A valid folder name on every system.
_FOLDER_NAME = re.compile(r"[\w.+@ -]+")


class SteeringMixin(SteeredGeneration):
    """Steering for a `PreTrainedModel`; use `SteeredModelForCausalLM` to get one.

    The class of a steered model is a subclass of its original class with this mixin in front, so `isinstance`,
    pipelines, trainers and evaluation harnesses work as before.
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
        strict: bool | None = None,
        **hub_kwargs: Any,
    ) -> LoadReport:
        """Load a steering adapter; it becomes active if none is.

        Loading under a name in use replaces that adapter for calls that start later. Another base of the same shape,
        or a LoRA that differs from the one at fit, gives a warning; if warnings are errors, nothing is loaded.

        Args:
            steering: `org/name`, `org/name@revision`, a folder, or a `SteeringAdapter`.
            adapter_name: its name on this model.
            revision: branch, tag or commit of the adapter's repo.
            strict: None: tensors that the method does not use are an error, another base of the same shape a warning.
                True: both are errors, and so is an adapter that does not name its base. False: such tensors are
                ignored and named in the report. Missing tensors are always an error.
            **hub_kwargs: `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            What was found.

        Raises:
            AdapterMismatchError: if it was fitted for a model of another shape; if strict, for another base.
            AdapterFileError: if its files are damaged or its tensors do not match its method.
        """
        tower = self._steering.tower
        if not isinstance(steering, SteeringAdapter):
            steering = SteeringAdapter.from_pretrained(
                steering,
                revision=revision,
                strict=strict is not False,
                accept=lambda config: SteeringAdapter(config, {}).check_base(self, tower, strict is True),  # type: ignore[arg-type]
                **hub_kwargs,
            )
        elif revision is not None or hub_kwargs:
            raise ValueError(
                f"{sorted({'revision', *hub_kwargs})} apply to a repo or folder, not to a SteeringAdapter object."
            )
        if left_out := steering.check_tensors(strict is not False):
            kept = {name: tensor for name, tensor in steering.tensors.items() if name not in left_out}
            steering = dataclasses.replace(steering, tensors=kept, unexpected_keys=left_out)
        notes = steering.check_base(self, tower, strict is True)  # type: ignore[arg-type]
        warn_about(notes, adapter_name)
        self._steering.add(adapter_name, steering)
        if not self._steering.selection:
            self._steering.selection = ((adapter_name, 1.0),)
        return LoadReport(adapter_name, steering.unexpected_keys, notes, steering.revision)

    def set_steering(self, steering: SelectionLike) -> None:
        """Set what is active for calls without a `steering` argument.

        Args:
            steering: a name, a list of names in the order in which they act, a dict of name to scale, or None.

        Raises:
            AdapterNotFoundError: for a name that is not loaded; nothing changes then.
        """
        selection = as_selection(steering)
        for name, _ in selection:
            self._steering.get(name)
        self._steering.selection = selection

    @contextlib.contextmanager
    def steering(self, steering: SelectionLike, *, scale: float = 1.0) -> Iterator[None]:
        """Steer with a given selection inside a block, in this thread; nests, and restores exactly.

        A thread started inside does not inherit it, and gets a `BlockElsewhereWarning` if it steers with something
        else; pass `steering=` to its call.

        Args:
            steering: as for `set_steering`.
            scale: multiplies the scales of the block, a finite number.
        """
        factor = as_number(scale, "scale")
        selection = tuple((name, own * factor) for name, own in as_selection(steering))
        block = self._steering.enter_block(selection)
        try:
            yield
        finally:
            self._steering.leave_block(block)

    @contextlib.contextmanager
    def steering_with(self, processors: Sequence[SteeringProcessor]) -> Iterator[None]:
        """Steer only with your own processors inside a block, in both `forward` and `generate`."""
        chain = tuple(SteeringProcessorList(processors))
        for processor in chain:
            for site in processor.sites:
                self._steering.tower.check(site)
        block = self._steering.enter_block((), chain)
        try:
            yield
        finally:
            self._steering.leave_block(block)

    def disable_steering(self) -> contextlib.AbstractContextManager[None]:
        """Run unsteered inside a block, in this thread."""
        return self.steering(None)

    def delete_steering(self, adapter_name: str) -> None:
        """Remove an adapter; other active adapters stay active."""
        self._steering.remove(adapter_name)

    def unload_steering(self) -> PreTrainedModel:
        """Remove all steering and return the base model: the same object in its original class.

        Raises:
            UnsupportedModelError: if sharding (FSDP2) changed the model's class after it was steered.
        """
        if type(self) is not steered_class(self._steering_base_class):
            raise UnsupportedModelError(
                f"The model became a {type(self).__name__} after it was steered, so its original class cannot be restored. "
                "Switch steering off with `model.set_steering(None)`, or steer after sharding."
            )
        self._steering.remove_hooks()
        if "forward" in self.__dict__:
            self.__dict__["forward"] = without_noting(self.__dict__["forward"])
        del self.__dict__["_steering"]
        self.__class__ = self._steering_base_class  # type: ignore[assignment]
        return self

    @property
    def active_steering(self) -> dict[str, float]:
        """Names and scales of the adapters active in this thread now, in order."""
        return dict(self._steering.active()[0])

    @property
    def steering_adapters(self) -> dict[str, SteeringAdapter]:
        """The loaded adapters by name."""
        return {name: loaded.adapter for name, loaded in self._steering.adapters.items()}

    def steering_status(self) -> SteeringStatus:
        """What is loaded, what is active, and where it reads and writes."""
        return steering_status(self._steering)

    def save_steering(self, save_directory: str | Path, adapter_name: str | None = None) -> None:
        """Save loaded adapters as PEFT does: `default` into the folder itself, each other one into a subfolder of its
        name.

        Args:
            save_directory: the folder.
            adapter_name: the adapter to save, into the folder itself; None for all.

        Raises:
            ValueError: if an adapter's name is not a valid folder name; nothing is written then.
        """
        if adapter_name is not None:
            self._steering.get(adapter_name).adapter.save_pretrained(save_directory)
            return
        adapters = self.steering_adapters
        for name in adapters:
            if not _FOLDER_NAME.fullmatch(name) or not name.strip(". "):
                raise ValueError(
                    f"{name!r} cannot be the name of a folder in {save_directory}. Save it by itself: "
                    f"save_steering(folder, {name!r})."
                )
        for name, adapter in adapters.items():
            adapter.save_pretrained(save_directory if name == "default" else Path(save_directory) / name)

    def push_steering_to_hub(self, repo_id: str, adapter_name: str | None = None, **kwargs: Any) -> Any:
        """Upload an adapter; arguments as for `SteeringAdapter.push_to_hub`.

        Args:
            repo_id: `org/name`.
            adapter_name: the adapter; may be left out if only one is loaded.
            **kwargs: `tag`, `revision`, `private`, `create_pr`, `commit_message`, `token`.
        """
        if adapter_name is None:
            if len(self._steering.adapters) != 1:
                raise ValueError(f"Name the adapter to push; loaded: {sorted(self._steering.adapters)}.")
            adapter_name = next(iter(self._steering.adapters))
        return self._steering.get(adapter_name).adapter.push_to_hub(repo_id, **kwargs)

    # -- a replaced forward
    # --------------------------------------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and isinstance(value, types.MethodType) and value.__self__ is self:
            value = noting(value)
        super().__setattr__(name, value)

    # -- copies -------------------------------------------------------------------------------------------------------

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The steered class has the name of its base, so pickle must find it through the base.
        return _restore, (self._steering_base_class,), self.__dict__


def _restore(base_class: type[PreTrainedModel]) -> PreTrainedModel:
    model = base_class.__new__(base_class)
    model.__class__ = steered_class(base_class)
    return model


_STEERED_CLASSES: dict[type, type] = {}


def steered_class(base_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model class that has the verbs of `SteeringMixin`.

    It keeps the name and module of its base: `config.architectures` and transformers' checks use them.
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
    parameters = list(inspect.signature(base_class.forward).parameters)[1:]
    labels_place = parameters.index("labels") if "labels" in parameters else len(parameters)

    # PEFT calls `forward`, not the model. Trainers and `generate` read its signature, so it is the base's.
    @functools.wraps(base_class.forward)
    def forward(self: Any, *args: Any, prompt_lengths: Any = None, **kwargs: Any) -> Any:
        # Written as a loop: torch before 2.13 cannot trace a set intersected with the keys of a dict.
        misplaced = sorted(name for name in kwargs if name in OF_GENERATE)
        if misplaced:
            raise TypeError(
                f"{misplaced} are arguments of generate(). For a plain forward use `with model.steering(name, scale=...)`, "
                "`model.steering_with(processors)` or `model.set_steering(...)`."
            )
        labels = kwargs.get("labels", args[labels_place] if labels_place < len(args) else None)
        said = prompt_lengths is not None or labels is not None
        if torch.compiler.is_compiling():
            if said:
                # Keep what the call has recorded.
                compiled = self._steering.compiled
                compiled.note(compiled.lengths if prompt_lengths is None else prompt_lengths, labels)
            return steer_forward(base_class.forward, self, args, kwargs)
        lengths = PROMPT_ENDS.get().lengths if prompt_lengths is None else prompt_lengths
        try:
            with told(lengths, labels) if said else contextlib.nullcontext():
                return steer_forward(base_class.forward, self, args, kwargs)
        except BaseException:
            end_interrupted_forward(self._steering)
            raise

    # `generate` reads it several times a call; set here, it is not rebuilt each time.
    forward.__signature__ = inspect.signature(base_class.forward)  # type: ignore[attr-defined]
    return forward


def steer(model: PreTrainedModel) -> None:
    """Turn a model into a steered one, in place; does nothing if it already is.

    Raises:
        UnsupportedModelError: if the model cannot be steered.
    """
    if isinstance(model, SteeringMixin):
        return
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a causal language model of transformers; load one with AutoModelForCausalLM."
        )
    runtime = SteeringRuntime(model)
    model.__class__ = steered_class(type(model))
    model.__dict__["_steering"] = runtime
    if "forward" in model.__dict__:
        model.forward = model.__dict__["forward"]


__all__ = ["SteeringMixin", "steer", "steered_class"]
