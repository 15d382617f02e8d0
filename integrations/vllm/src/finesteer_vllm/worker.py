"""The worker: the model's blocks are hooked as it is loaded, and each batch is laid out as its inputs are prepared.

vLLM resolves `--worker-extension-cls` by importing this module in each worker, before the worker is made; an extension may
add methods to the worker and may not replace any. So importing the module is what takes hold of the model runner. It
raises where the installed vLLM is not as expected, and the worker does not start.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from finesteer_vllm.adapters import AdapterError, ServedAdapter, read_adapter
from finesteer_vllm.batch import BatchLayout, Scheduled
from finesteer_vllm.requests import ADMITTED, asked_of
from finesteer_vllm.seams import (
    EXTENSION,
    KNOWN_BLOCKS,
    SECOND_RUNNER,
    SETTINGS,
    SeamError,
    adapters_of,
    check_config,
    check_front_end,
    check_runner,
    check_runner_object,
)
from finesteer_vllm.sites import SteeringTables


_MARK = "_finesteer"
_logger = logging.getLogger("vllm.finesteer")


class SteeringWorkerExtension:
    """What `collective_rpc` can ask a worker that steers."""

    model_runner: Any

    def steering_status(self) -> dict[str, Any]:
        """The adapters that this worker serves, with their salts and layers, and how many queries it has decided."""
        layout: BatchLayout = getattr(self.model_runner, _MARK)
        return {
            "adapters": {
                name: {
                    "steering_type": adapter.steering_type,
                    "salt": adapter.salt,
                    "read_layer": adapter.read_layer,
                    "write_layers": list(adapter.write_layers),
                    "chat_template_sha256": adapter.chat_template_sha256,
                }
                for name, adapter in layout.tables.adapters.items()
            },
            "decisions": layout.decisions,
        }


def install() -> None:
    """Take hold of the model runners, once a process.

    Raises:
        SeamError: if the installed vLLM is not as expected.
    """
    check_front_end()
    runner: Any = check_runner()
    if not hasattr(runner.load_model, _MARK):
        runner.load_model = _marked(_attaching(runner.load_model))
        runner._prepare_inputs = _marked(_laying_out(runner._prepare_inputs))
        runner._dummy_run = _marked(_clearing(runner._dummy_run))
    try:
        second: Any = importlib.import_module(SECOND_RUNNER).GPUModelRunner
    except (ImportError, AttributeError):
        return
    if not hasattr(second.load_model, _MARK):
        second.load_model = _marked(_refusing(second.load_model))


def attach(runner: Any) -> BatchLayout:
    """Hook the blocks of a runner's model.

    Args:
        runner: vLLM's `GPUModelRunner`, its model loaded, nothing compiled or captured yet.

    Raises:
        SeamError: if the engine cannot be steered.
        AdapterError: if a folder holds no adapter, or one for another model.
    """
    folders = adapters_of(runner.vllm_config)
    if not folders:
        raise SeamError(
            f"--worker-extension-cls {EXTENSION} without adapters: give --additional-config "
            f'\'{{"{SETTINGS}": {{"adapters": {{"name": "folder"}}}}}}\'.'
        )
    check_config(runner.vllm_config)
    check_runner_object(runner)
    for name in ("_prepare_inputs", "_dummy_run"):
        if not hasattr(getattr(type(runner), name), _MARK):
            raise SeamError(f"{type(runner).__name__} has a {name} of its own; this platform cannot be steered.")
    blocks = decoder_blocks(runner.get_model(), runner.vllm_config.model_config.hf_text_config)
    adapters = {name: read_adapter(folder) for name, folder in folders.items()}
    for name, adapter in adapters.items():
        _check_base(name, adapter, runner.vllm_config.model_config)
    tables = SteeringTables(adapters, runner.max_num_reqs, runner.max_num_tokens, runner.dtype, runner.device)
    tables.attach(list(blocks))
    # vLLM hashes the additional config into the key of its cache of compiled models: one that was compiled without these
    # hooks, or with others, must not be found.
    salts = json.dumps(sorted((name, adapter.salt) for name, adapter in adapters.items()))
    runner.vllm_config.additional_config[SETTINGS]["hooked"] = hashlib.sha256(salts.encode()).hexdigest()
    _logger.info("Steering %s at the outputs of blocks %s.", sorted(adapters), sorted(tables.tables))
    return BatchLayout(tables)


def decoder_blocks(model: nn.Module, text_config: Any) -> nn.ModuleList:
    """The decoder's blocks, in order.

    Raises:
        SeamError: if there is not exactly one list of them, or they are of a kind whose stream is not known.
    """
    count = text_config.num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and {type(block).__name__ for block in module} <= set(KNOWN_BLOCKS)
    ]
    if len(found) != 1:
        raise SeamError(
            f"{type(model).__name__} has {len(found)} lists of {count} decoder blocks of a known kind "
            f"({', '.join(KNOWN_BLOCKS)}), whose residual stream is hidden + residual; this model cannot be steered."
        )
    return found[0]


def scheduled(runner: Any) -> list[Scheduled]:
    """The batch whose inputs a runner has just prepared.

    Raises:
        RuntimeError: if a request asks for steering and no front end has checked it.
    """
    layout: BatchLayout = getattr(runner, _MARK)
    adapters, batch = layout.tables.adapters, runner.input_batch
    starts, parts = runner.query_start_loc.np, []
    for index, request in enumerate(batch.req_ids[: batch.num_reqs]):
        state = runner.requests[request]
        extra = dict(getattr(state.sampling_params, "extra_args", None) or {})
        admitted = extra.pop(ADMITTED, None)
        asked = asked_of(extra, tuple(adapters))
        if asked is not None and admitted != adapters[asked.adapter].salt:
            raise RuntimeError(
                f"Request {request} asks for steering adapter {asked.adapter!r} and was not checked by a front end with "
                "this plugin and these files. Restart all processes of the server with the same adapters."
            )
        start, end = int(starts[index]), int(starts[index + 1])
        computed = int(batch.num_computed_tokens_cpu[index])
        parts.append(Scheduled(request, start, end - start, computed, int(batch.num_prompt_tokens[index]), asked))
    return parts


def _check_base(name: str, adapter: ServedAdapter, model_config: Any) -> None:
    """Compare an adapter with the served model; what only may be wrong is logged."""
    config = model_config.hf_text_config
    served = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "base_model_type": config.model_type,
    }
    fitted = {key: getattr(adapter, key) for key in served}
    if (
        any(fitted[key] not in (None, served[key]) for key in served)
        or max(adapter.write_layers) >= config.num_hidden_layers
    ):
        raise AdapterError(f"Steering adapter {name!r} was fitted on a model of {fitted}; served is one of {served}.")
    if adapter.base_model_name_or_path not in (None, model_config.model):
        _logger.warning(
            "Steering adapter %r was fitted on %s; served is %s.",
            name,
            adapter.base_model_name_or_path,
            model_config.model,
        )
    if adapter.lora:
        _logger.warning("Steering adapter %r was fitted with LoRA %s active.", name, list(adapter.lora))


def _layout_of(runner: Any) -> BatchLayout | None:
    """A runner's layout; None for an engine that is not to steer, which another engine of this process may be."""
    layout: BatchLayout | None = getattr(runner, _MARK, None)
    if layout is None and adapters_of(runner.vllm_config):
        raise SeamError(f"{type(runner).__name__} has loaded its model past the plugin; it is not run unsteered.")
    return layout


def _attaching(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if self.vllm_config.parallel_config.worker_extension_cls == EXTENSION:
            setattr(self, _MARK, attach(self))
        return result

    return load_model


def _laying_out(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        layout = _layout_of(self)
        if layout is not None:
            layout.lay_out(scheduled(self), self.requests)
        return result

    return _prepare_inputs


def _clearing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        layout = _layout_of(self)
        if layout is not None:
            layout.clear()
        return original(self, *args, **kwargs)

    return _dummy_run


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if adapters_of(self.vllm_config):
            raise SeamError("vLLM's second model runner is not steered: set VLLM_USE_V2_MODEL_RUNNER=0.")
        return original(self, *args, **kwargs)

    return load_model


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, _MARK, True)
    return function


install()
