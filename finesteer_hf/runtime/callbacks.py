"""The user's code that `generate` calls back: logits processors, stopping criteria, streamers.

It runs outside the call's session. If it generates or runs a plain forward, for example as a judge, that is a separate
call, which reads its own query and uses the steering active at that point. Guidance is the exception: its second
sequence is part of the call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.generation.streamers import BaseStreamer

from finesteer_hf.runtime.current import in_session, outside_sessions


class OutsideProcessors(LogitsProcessorList):
    """Logits processors that run outside the session; created inside it, to which their guidance belongs.

    Args:
        processors: transformers' list.
    """

    def __init__(self, processors: Iterable[Any]) -> None:
        super().__init__(
            _guiding(p) if isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) else p for p in processors
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return outside_sessions(super().__call__, *args, **kwargs)


class OutsideCriteria(StoppingCriteriaList):
    """Stopping criteria that run outside the session."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return outside_sessions(super().__call__, *args, **kwargs)


class OutsideStreamer(BaseStreamer):
    """A streamer that runs outside the session."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer

    def put(self, value: Any) -> None:
        outside_sessions(self.streamer.put, value)

    def end(self) -> None:
        outside_sessions(self.streamer.end)


class _Guided:
    """The model of a guidance processor; its forwards belong to the session in which this wrapper was created."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.call = in_session(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def _guiding(processor: Any) -> Any:
    # A copy: the user may use the processor in other calls. A drafting call gets its outer call's processors.
    guiding = copy.copy(processor)
    guiding.model = _Guided(processor.model.model if isinstance(processor.model, _Guided) else processor.model)
    return guiding
