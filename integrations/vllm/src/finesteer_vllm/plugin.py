"""The front end: requests are checked as they come in, and get a salt for what is cached of them.

`register` is the entry point that vLLM calls in each of its processes. An engine that no adapter was given to is left as it
is, but for this: a request that asks it for steering is refused, not ignored.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from finesteer_vllm.adapters import ServedAdapter, read_config
from finesteer_vllm.requests import ADMITTED, Asked, SteeringRequestError, asked_of, cache_salt
from finesteer_vllm.seams import SeamError, adapters_of, check_config, check_front_end


_MARK = "_finesteer"
_logger = logging.getLogger("vllm.finesteer")


def register() -> None:
    """Wrap vLLM's input processor, once a process.

    Where the installed vLLM has another one, nothing is done but to say so: servers that do not steer go on, and the worker
    extension refuses to start one that is to.
    """
    try:
        processor = check_front_end()
    except SeamError as error:
        _logger.warning("finesteer-vllm does nothing in this process: %s", error)
        return
    if not hasattr(processor.process_inputs, _MARK):  # type: ignore[attr-defined]
        processor.__init__ = _with_adapters(processor.__init__)  # type: ignore[misc]
        processor.process_inputs = _admitting(processor.process_inputs)  # type: ignore[attr-defined]


class FrontEnd:
    """What a front end knows of its engine's adapters: their configs, not their tensors.

    Args:
        adapters: by the names that requests use; empty for an engine that is not to steer.
    """

    def __init__(self, adapters: dict[str, ServedAdapter]) -> None:
        self.adapters = adapters

    @classmethod
    def of(cls, vllm_config: Any) -> FrontEnd:
        """Read the adapters of an engine.

        Raises:
            SeamError: if it is to steer and is configured in a way that cannot be steered.
            AdapterError: if a folder holds no adapter.
        """
        folders = adapters_of(vllm_config)
        if folders:
            check_config(vllm_config)
        return cls({name: read_config(folder) for name, folder in folders.items()})

    def admit(self, request: Any, asked: Asked) -> None:
        """Put the salt on a request, and the mark by which workers know that it was checked.

        Args:
            request: vLLM's `EngineCoreRequest`, before it goes to the engine.
            asked: what it asks for.

        Raises:
            SteeringRequestError: for requests that cannot be steered.
        """
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            raise SteeringRequestError("Steering needs a prompt of token ids; this one brings embeddings.")
        if request.resumable:
            raise SteeringRequestError("A prompt that is still being written cannot be steered: it has no last token.")
        adapter = self.adapters[asked.adapter]
        if request.lora_request is not None:
            raise SteeringRequestError(
                f"Steering adapter {asked.adapter!r} and a LoRA cannot go together: it was fitted on the base as it is "
                "served. Merge the LoRA into the base, and fit the adapter on that."
            )
        request.cache_salt = cache_salt(asked, adapter.salt, request.prompt_token_ids, request.cache_salt)
        # The caller may use its parameters for other requests too.
        request.sampling_params = copy.copy(request.sampling_params)
        request.sampling_params.extra_args = {**request.sampling_params.extra_args, ADMITTED: adapter.salt}


def _with_adapters(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        setattr(self, _MARK, FrontEnd.of(vllm_config))

    return __init__


def _admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        front_end: FrontEnd = getattr(self, _MARK)
        asked = asked_of(getattr(params, "extra_args", None), tuple(front_end.adapters))
        request = original(self, request_id, prompt, params, *args, **kwargs)
        if asked is not None:
            front_end.admit(request, asked)
        return request

    setattr(process_inputs, _MARK, True)
    return process_inputs
