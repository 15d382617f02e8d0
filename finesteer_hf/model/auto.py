"""`SteeredModelForCausalLM`: any causal LM with a steering adapter, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.base_models import LOCAL, PACKAGED, is_hub_id, last_part, located
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.model.verbs import SteeringMixin, steer


SteeringSource = str | Path | SteeringAdapter
SteeringArgument = SteeringSource | Mapping[str, SteeringSource] | None


class SteeredModelForCausalLM:
    """Factory of steered models; what it returns is the model itself, of its own class, with `SteeringMixin`.

    Example:
        >>> model = SteeredModelForCausalLM.from_pretrained(
        ...     "meta-llama/Meta-Llama-3-8B-Instruct", steering="org/llama3-finesteer-truthful@v1"
        ... )
        >>> model.generate(**inputs, max_new_tokens=64)
    """

    def __init__(self) -> None:
        raise TypeError("Use SteeredModelForCausalLM.from_pretrained(...) or .from_model(model).")

    @classmethod
    def from_pretrained(
        cls,
        model_id: str | Path | None,
        *,
        steering: SteeringArgument = None,
        steering_revision: str | None = None,
        steering_kwargs: dict[str, Any] | None = None,
        **automodel_kwargs: Any,
    ) -> Any:
        """Load a causal LM and its steering adapters.

        Args:
            model_id: the base model; a LoRA repo works too, and `playground` is the model that ships with the package.
                None: the base and commit named in the adapter's config.
            steering: `org/name`, `org/name@revision`, a folder, a `SteeringAdapter`, or a dict of adapter name to any
                of these; the first becomes active.
            steering_revision: branch, tag or commit of the adapter's repo. `revision` is the base model's.
            steering_kwargs: more arguments of `load_steering` (`strict`, `token`, `cache_dir`, `subfolder`,
                `local_files_only`); token, cache_dir and local_files_only default to the model's.
            **automodel_kwargs: as for `AutoModelForCausalLM.from_pretrained`.

        Returns:
            The model, steered.

        Raises:
            ValueError: if `model_id` is None and no adapter names a base that can be loaded, or
                `trust_remote_code=True` would run that base's code: an adapter must not choose whose code runs.
            AdapterFileError: if `model_id` is None and an adapter from the Hub names a base that is not on the Hub.
            AdapterMismatchError: if an adapter was fitted for a model of another shape; with `strict=True` in
                `steering_kwargs`, also for another base of the same shape.
        """
        shared: dict[str, Any] = {
            k: automodel_kwargs[k] for k in ("token", "cache_dir", "local_files_only") if k in automodel_kwargs
        }
        more = dict(steering_kwargs or {})
        strict = more.pop("strict", None)
        adapters = _load_adapters(steering, steering_revision, {**shared, **more, "strict": strict is not False})
        if model_id is None:
            model_id, base_revision = _named_base(adapters, automodel_kwargs.get("trust_remote_code", False))
            if base_revision is not None:
                automodel_kwargs.setdefault("revision", base_revision)
        model = AutoModelForCausalLM.from_pretrained(located(str(model_id)), **automodel_kwargs)
        steer(_inner_model(model))
        return _loaded_into(model, adapters, strict)

    @classmethod
    def from_model(cls, model: Any, steering: SteeringArgument = None) -> Any:
        """Steer a model that is already loaded: quantised, sharded, offloaded or a `PeftModel`; in place.

        Args:
            model: a causal LM of transformers, or a `PeftModel` or `PeftMixedModel` around one.
            steering: as for `from_pretrained`.

        Returns:
            The same object. A `PeftModel` passes the steering verbs and arguments on to the model inside.

        Raises:
            UnsupportedModelError: if its decoder blocks are not found.
        """
        steer(_inner_model(model))
        return _loaded_into(model, _load_adapters(steering, None, {}), None)


def _loaded_into(model: Any, adapters: Mapping[str, SteeringAdapter], strict: bool | None) -> Any:
    for name, adapter in adapters.items():
        _inner_model(model).load_steering(adapter, name, strict=strict)  # type: ignore[operator]
    return model


def _inner_model(model: Any) -> PreTrainedModel | Any:
    from peft import PeftMixedModel, PeftModel

    if isinstance(model, PeftMixedModel):
        return model.base_model.model
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _load_adapters(
    steering: SteeringArgument, revision: str | None, kwargs: dict[str, Any]
) -> dict[str, SteeringAdapter]:
    if steering is None:
        return {}
    sources: Mapping[str, SteeringSource] = steering if isinstance(steering, Mapping) else {"default": steering}
    return {
        name: source
        if isinstance(source, SteeringAdapter)
        else SteeringAdapter.from_pretrained(source, revision=revision, **kwargs)
        for name, source in sources.items()
    }


def _named_base(adapters: Mapping[str, SteeringAdapter], trust_remote_code: Any) -> tuple[str, str | None]:
    bases = {
        (adapter.config.base_model_name_or_path, adapter.config.base_model_revision) for adapter in adapters.values()
    }
    named = {base for base in bases if base[0]}
    if len(named) != 1:
        raise ValueError(
            "model_id=None takes the base that the adapter names, but "
            + (f"the adapters name {sorted(str(b[0]) for b in named)}." if named else "no adapter names one.")
            + " Give model_id."
        )
    name, commit = named.pop()
    assert name is not None
    if trust_remote_code:
        raise ValueError(
            f"trust_remote_code=True runs code of the base model, and {name!r} was named by the adapter, not by you. Give "
            f"model_id={name!r} if you trust it."
        )
    if name.startswith(LOCAL):
        raise ValueError(
            f"The adapter was fitted on a folder called {last_part(name.removeprefix(LOCAL))!r}, which is not a model "
            "that can be found. Give model_id."
        )
    if any(adapter.revision is not None for adapter in adapters.values()) and not is_hub_id(name):
        if name not in PACKAGED:
            raise AdapterFileError(
                f"An adapter from the Hub names {name!r} as its base: not a Hub id, or a local folder. Give model_id."
            )
    return name, commit


def steered(model: torch.nn.Module) -> bool:
    """Whether a model has the steering verbs."""
    return isinstance(_inner_model(model), SteeringMixin)
