"""Steering for plain transformers: `model.generate(..., custom_generate="org/adapter", trust_remote_code=True)`.

An adapter's repo may carry a `custom_generate/generate.py`, which transformers loads and calls in place of its own
`generate`. Ours is a few lines that call `generate_steered`; the model that it is given stays the plain model it was.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
from pathlib import Path
from string import Template
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedModel

from finesteer_hf.adapter import SteeringAdapter, warn_about
from finesteer_hf.mixin import SteeringMixin, steer


FILE_NAME = "custom_generate/generate.py"
_TEMPLATE = Template('''\
"""Steer with this repo's adapter: model.generate(**inputs, custom_generate=$repo, trust_remote_code=True).

steering_scale, output_steering and everything that generate takes may be added; revision= is the adapter's.
"""

ADAPTER = $repo


def generate(model, steering_adapter=ADAPTER, revision=None, **kwargs):
    try:
        from finesteer_hf.custom_generate import generate_steered
    except ImportError as error:
        raise ImportError("This adapter steers with finesteer_hf. Install it: pip install finesteer-hf") from error
    return generate_steered(model, steering_adapter, revision=revision, **kwargs)
''')

_TWINS: WeakKeyDictionary[PreTrainedModel, Any] = WeakKeyDictionary()
_LOCK = threading.Lock()


def _renew_after_fork() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


def write_custom_generate(directory: str | Path, repo: str | None) -> Path:
    """Write `custom_generate/generate.py` into a folder.

    Args:
        directory: what becomes the root of the repo.
        repo: what the code loads, `org/name`; None where it is not known yet: callers then have to say
            `steering_adapter="org/name"`.

    Returns:
        Path of the file.
    """
    path = Path(directory) / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(generate_code(repo))
    return path


def generate_code(repo: str | None) -> bytes:
    """Content of `custom_generate/generate.py`; argument as for `write_custom_generate`."""
    return _TEMPLATE.substitute(repo=repr(repo)).encode()


def generate_steered(model: Any, adapter: str | None, *, revision: str | None = None, **kwargs: Any) -> Any:
    """transformers' `generate` on a plain model, steered with one adapter for this call alone.

    Args:
        model: a causal LM of transformers.
        adapter: `org/name`, `org/name@revision` or a folder; read once a process.
        revision: branch, tag or commit of the adapter's repo.
        **kwargs: as for `generate` of a steered model, `steering_scale` among them.

    Returns:
        What `generate` returns.

    Raises:
        ValueError: if no adapter is named, or the model is steered already.
    """
    if adapter is None:
        raise ValueError('Say which adapter steers: generate(..., steering_adapter="org/name").')
    if isinstance(model, SteeringMixin):
        raise ValueError(
            f"The model is steered already. Load the adapter with model.load_steering({adapter!r}), then call generate "
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
    """A steered model that shares the plain one's modules and settings; other threads keep using the plain one."""
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
