"""Where the plugin takes hold of vLLM, and whether the installed vLLM is as expected there.

Read in vLLM's sources as they stood in mid 2026 (`main`), where two model runners exist; the first one,
`vllm.v1.worker.gpu_model_runner`, is the one that is steered. Anything that is missing, or set to something that was not
thought through, is a reason not to start: an engine that was to steer never runs unsteered.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
from collections.abc import Mapping
from typing import Any


RUNNER = "vllm.v1.worker.gpu_model_runner"
SECOND_RUNNER = "vllm.v1.worker.gpu.model_runner"
FRONT_END = "vllm.v1.engine.input_processor"
EXTENSION = "finesteer_vllm.worker.SteeringWorkerExtension"
# Key of vLLM's `additional_config`, and the plugin's name in its entry point group.
SETTINGS = PLUGIN = "finesteer"
# Blocks whose forward was read: they return (hidden, residual), and their stream is the sum.
KNOWN_BLOCKS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class SeamError(RuntimeError):
    """The installed vLLM, or how it is configured, is not one that can be steered."""


def adapters_of(vllm_config: Any) -> dict[str, str]:
    """The adapters that an engine is to serve, folders by name; empty if it is not to steer.

    Args:
        vllm_config: its `additional_config` is `{"finesteer": {"adapters": {"name": "folder"}}}`.

    Raises:
        SeamError: if the setting has another form.
    """
    additional = vllm_config.additional_config
    settings = additional.get(SETTINGS) if isinstance(additional, Mapping) else None
    if settings is None:
        return {}
    adapters = settings.get("adapters") if isinstance(settings, Mapping) else None
    if not isinstance(adapters, Mapping) or not adapters or not all(isinstance(v, str) for v in adapters.values()):
        raise SeamError(
            f'additional_config[{SETTINGS!r}] must be {{"adapters": {{"name": "folder"}}}} with at least one adapter, got '
            f"{settings!r}."
        )
    return dict(adapters)


def check_config(vllm_config: Any) -> None:
    """Refuse engines that were not thought through.

    Raises:
        SeamError: naming every setting that stands in the way.
    """
    problems = []
    refused = (
        ("use_v2_model_runner", False, "the second model runner is not steered: set VLLM_USE_V2_MODEL_RUNNER=0"),
        ("parallel_config.pipeline_parallel_size", 1, "a request's row would be on other ranks than its query"),
        ("parallel_config.use_ubatching", False, "a batch cut in two has other token positions"),
        ("parallel_config.prefill_context_parallel_size", 1, "tokens of a prompt are split over ranks"),
        ("compilation_config.pass_config.enable_sp", False, "residual streams are split over ranks"),
        ("speculative_config", None, "drafts were not tried"),
        ("kv_transfer_config", None, "states from elsewhere come without their decision"),
        ("model_config.runner_type", "generate", "only what generates is steered"),
        ("parallel_config.worker_extension_cls", EXTENSION, f"start with --worker-extension-cls {EXTENSION}"),
    )
    for path, wanted, why in refused:
        found: Any = vllm_config
        try:
            for name in path.split("."):
                found = getattr(found, name)
        except AttributeError:
            problems.append(f"this vLLM has no {path}")
            continue
        if found != wanted:
            problems.append(f"{path} is {found!r} and must be {wanted!r} ({why})")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        problems.append(f"VLLM_PLUGINS leaves {PLUGIN!r} out, which checks requests as they come in")
    if problems:
        raise SeamError(f"This engine cannot be steered: {'; '.join(problems)}.")


def check_front_end() -> type:
    """The class that turns what users send into requests.

    Raises:
        SeamError: if the installed vLLM has none, or another one.
    """
    processor = _class(FRONT_END, "InputProcessor")
    _check_arguments(processor, "process_inputs", ("request_id", "prompt", "params"))
    request = _class("vllm.v1.engine", "EngineCoreRequest")
    _check_fields(request, ("prompt_token_ids", "sampling_params", "cache_salt", "lora_request", "resumable"))
    _check_fields(_class("vllm.sampling_params", "SamplingParams"), ("extra_args",))
    return processor


def check_runner() -> type:
    """The class that runs batches.

    Raises:
        SeamError: if the installed vLLM has none, or another one.
    """
    runner = _class(RUNNER, "GPUModelRunner")
    _check_arguments(runner, "_prepare_inputs", ("scheduler_output", "num_scheduled_tokens"))
    _check_arguments(runner, "_dummy_run", ("num_tokens",))
    _check_arguments(runner, "load_model", ())
    _check_arguments(runner, "get_model", ())
    _check_fields(_class("vllm.v1.worker.gpu_input_batch", "CachedRequestState"), ("sampling_params",))
    return runner


def check_runner_object(runner: Any) -> None:
    """Look at a runner whose model has just been loaded.

    Raises:
        SeamError: naming every attribute that is missing.
    """
    needed = (
        *("vllm_config", "device", "dtype", "max_num_tokens", "max_num_reqs", "requests", "query_start_loc.np"),
        *("input_batch.req_ids", "input_batch.num_reqs", "input_batch.num_computed_tokens_cpu"),
        "input_batch.num_prompt_tokens",
    )
    missing = []
    for path in needed:
        found = runner
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None:
            missing.append(path)
    if missing:
        raise SeamError(f"{type(runner).__name__} of this vLLM has no {', '.join(missing)}; it cannot be steered.")


def _class(module: str, name: str) -> type:
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"This vLLM has no {module}.{name} ({error}); it cannot be steered.") from error
    assert isinstance(found, type)
    return found


def _check_arguments(owner: type, method: str, names: tuple[str, ...]) -> None:
    function = getattr(owner, method, None)
    parameters = None if function is None else list(inspect.signature(function).parameters)
    if parameters is None or tuple(parameters[1 : 1 + len(names)]) != names:
        raise SeamError(
            f"{owner.__name__}.{method} of this vLLM takes {parameters}, and {['self', *names]} are expected; it cannot be "
            "steered."
        )


def _check_fields(owner: type, names: tuple[str, ...]) -> None:
    fields = getattr(owner, "__struct_fields__", None)
    if fields is None and dataclasses.is_dataclass(owner):
        fields = tuple(field.name for field in dataclasses.fields(owner))
    missing = sorted(set(names) - set(fields or ()))
    if missing:
        raise SeamError(f"{owner.__name__} of this vLLM has no {', '.join(missing)}; it cannot be steered.")
