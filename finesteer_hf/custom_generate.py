"""Steering for plain transformers: `model.generate(..., custom_generate="org/adapter", trust_remote_code=True)`.

An adapter's repo may carry a `custom_generate/generate.py` (see `hub/generate_code.py`), which transformers loads and
calls in place of its own `generate`. It calls `generate_steered`, which leaves the given model a plain model. Repos
name this module, so do not move it.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from finesteer_hf.adapters.adapter import SteeringAdapter, warn_about
from finesteer_hf.model.verbs import SteeringMixin, steer


_TWINS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _renew_after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def generate_steered(model: Any, adapter: str | None, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Run transformers' `generate` on a plain model, steered with one adapter for this call only.

    Args:
        model: a causal LM of transformers.
        adapter: `org/name`, `org/name@revision` or a folder; loaded once a process.
        revision: branch, tag or commit of the adapter's repo.
        **kwargs: as for `generate` of a steered model, including `steering_scale`.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: if no adapter is named, or the model is already steered.
    """
    if adapter is None:
        raise ValueError('Name the adapter: generate(..., steering_adapter="org/name").')
    if isinstance(model, SteeringMixin):
        raise ValueError(
            f"The model is already steered. Load the adapter with model.load_steering({adapter!r}), then call generate "
            "without custom_generate."
        )
    loaded = _load(adapter, revision)
    name = f"{adapter}@{loaded.revision or revision or ''}"
    with _LOCK:
        twin = _twin(model)
        if name not in twin.steering_adapters:
            notes = loaded.check_base(twin, twin._steering.tower)
            twin._steering.add(name, loaded)
            warn_about(notes, name)
    return twin.generate(steering=name, **kwargs)


@functools.lru_cache(maxsize=16)
def _load(adapter: str, revision: str | None) -> SteeringAdapter:
    return SteeringAdapter.from_pretrained(adapter, revision=revision)


def _twin(model: PreTrainedModel) -> Any:
    """A steered model that shares the plain one's modules and settings; other threads can keep using the plain one."""
    twin = _TWINS.get(model)
    if twin is None:
        twin = copy.copy(model)
        twin.__dict__.pop("_compiled_call", None)
        steer(twin)
        _TWINS[model] = twin
    else:
        own = {"_steering", "_compiled_call"}
        twin.__dict__.update({key: value for key, value in model.__dict__.items() if key not in own})
    return twin
