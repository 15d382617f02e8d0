"""What several requests ask for at once: one for all, or a list with one for each."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any


def each(count: int, steering: Any, scale: Any) -> list[tuple[Any, Any]]:
    """Steering and scale of each of several requests, from one for all or a list of one for each.

    A list of names is a list of one for each: a stack for all is given as a dict.
    """
    steerings = list(steering) if isinstance(steering, (list, tuple)) else [steering] * count
    scale = scale.tolist() if hasattr(scale, "tolist") else scale
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    for name, values in (("steering", steerings), ("steering_scale", scales)):
        if len(values) != count:
            raise ValueError(
                f"`{name}` has {len(values)} entries for {count} prompts. Give one for each, or one for all."
            )
    return list(zip(steerings, scales, strict=True))


class AskedOfBatch:
    """What a `generate_batch` asks for, for the `add_requests` that transformers calls in it.

    Args:
        steering, scale: one for all, or a list with one for each prompt.

    Attributes:
        error: why the requests were not taken; transformers logs it and goes on.
    """

    def __init__(self, steering: Any, scale: Any) -> None:
        self.steering, self.scale = steering, scale
        self.error: Exception | None = None

    def __enter__(self) -> AskedOfBatch:
        self._token = OF_BATCH.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        OF_BATCH.reset(self._token)


OF_BATCH: ContextVar[AskedOfBatch | None] = ContextVar("finesteer_hf_batch", default=None)
