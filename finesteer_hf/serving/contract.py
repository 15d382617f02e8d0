"""What steering builds on in transformers' continuous batching, checked when an engine is begun.

transformers calls these parts internal and changes them between releases. An engine whose parts differ is refused: it
would run, and leave requests unsteered.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from typing import Any

import transformers

from finesteer_hf.errors import UnsupportedModelError


#: The release that the seam was written against and is tested with.
TESTED = "5.23"

_PACKAGE = "transformers.generation.continuous_batching"
# Classes, by name: an older release need not have them. Their methods that are overridden or called, with the parameters
# that are relied on.
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "continuous_api.ContinuousBatchingManager": {
        "_run_generation_loop": (),
        "_create_batch_processor": (),
        "start": (),
        "warmup": (),
        "cancel_request": ("request_id",),
    },
    "continuous_api.ContinuousBatchProcessor": {
        "update_batch": (),
        "_generation_step": ("model",),
        "_handle_request_error": ("error", "state"),
    },
    "continuous_api.OutputRouter": {"deliver": ("output",), "deliver_batch": ("outputs",)},
    "continuous_api.BackgroundThreadStatus": {"can_accept_new_requests": ()},
    "cb_logits_processors.ContinuousBatchingLogitsProcessorList": {
        "check_kwargs": ("kwargs",),
        "prepare_tensor_args": ("requests_in_batch", "arg_storage"),
        "__call__": ("input_ids", "scores", "logits_processor_args"),
    },
    "cache.PagedAttentionCache": {
        "search_prefix_match": ("request_id", "prompt_ids"),
        "mark_complete_blocks": ("state", "complete_blocks"),
    },
    "scheduler.Scheduler": {"clear_cancelled_requests": (), "finish_request": ("request_id",)},
}
_STATE_FIELDS = {
    *("request_id", "initial_tokens", "generated_tokens", "position_offset", "num_children", "max_new_tokens"),
    *("eos_token_id", "streaming", "record_timestamps", "logit_processor_kwargs", "_true_initial_tokens"),
}
_FUTURE_SLOTS = {"state", "has_new_token", "query_length"}
_MANAGER_ATTRIBUTES = (
    *("input_queue", "output_router", "logit_processor", "distributed_helper", "background_thread_status"),
    *("is_tp_driver", "generation_config", "continuous_batching_config", "_request_lock", "_request_counter"),
    *("_wake_up_loop", "_use_prefix_sharing", "num_return_sequences"),
)


def problems(manager: Any = None) -> list[str]:
    """What the installed transformers lacks of the seam; empty where steering works.

    Args:
        manager: a manager to look at as well.
    """
    found = []
    for path, methods in _METHODS.items():
        owner = _part(path)
        if owner is None:
            found.append(path)
            continue
        for name, wanted in methods.items():
            method = getattr(owner, name, None)
            parameters = () if method is None else tuple(inspect.signature(method).parameters)[1:]
            if method is None or parameters[: len(wanted)] != wanted:
                found.append(f"{owner.__name__}.{name}({', '.join(wanted)})")
    state, future = _part("requests.RequestState"), _part("requests.FutureRequestState")
    fields = set() if state is None else {field.name for field in dataclasses.fields(state)}
    found += [f"RequestState.{name}" for name in sorted(_STATE_FIELDS - fields)]
    slots = set(getattr(future, "__slots__", ()))
    found += [f"FutureRequestState.{name}" for name in sorted(_FUTURE_SLOTS - slots)]
    if manager is not None:
        found += [f"ContinuousBatchingManager.{name}" for name in _MANAGER_ATTRIBUTES if not hasattr(manager, name)]
    return found


def _part(path: str) -> Any:
    """A class of transformers' continuous batching; None if the installed release has none of that name there."""
    module, _, name = path.partition(".")
    try:
        return getattr(importlib.import_module(f"{_PACKAGE}.{module}"), name, None)
    except ImportError:
        return None


def check_contract(manager: Any = None) -> None:
    """Raise `UnsupportedModelError` if an engine of the installed transformers cannot be steered.

    Args:
        manager: a manager to look at as well.
    """
    missing = problems(manager)
    if missing:
        raise UnsupportedModelError(
            f"Continuous batching of transformers {transformers.__version__} cannot be steered: it lacks "
            f"{', '.join(missing)}. Install transformers {TESTED}, which this version of finesteer_hf was tested with, or "
            "use `generate`."
        )
