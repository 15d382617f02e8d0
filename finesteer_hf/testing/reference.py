"""Plain hooks on a module, without sessions, windows or sites: the reference that steering is compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn


def first_tensor(value: Any) -> torch.Tensor:
    """The stream in a block's input or output: the tensor itself, or the first part."""
    return value[0] if isinstance(value, (tuple, list)) else value


def with_first(value: Any, tensor: torch.Tensor) -> Any:
    """Replace the stream that `first_tensor` returns."""
    if isinstance(value, (tuple, list)):
        return type(value)([tensor, *value[1:]])
    return tensor


@contextlib.contextmanager
def reading(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the stream that a module returns in each of its calls, `[rows, tokens, width]`."""
    seen: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(first_tensor(output).detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def adding(
    module: nn.Module,
    delta: torch.Tensor | Callable[[], torch.Tensor],
    *,
    mask: torch.Tensor | None = None,
    at_input: bool = False,
) -> Iterator[None]:
    """Add a vector to all real tokens of a module's stream.

    Args:
        module: the block, or the projection whose input is steered.
        delta: `[width]`, or `[rows, 1, width]`; a function is called for it each time.
        mask: int or bool `[rows of the batch, prompt columns]`, 0 at pads; None if there are none.
        at_input: whether to change the module's input instead of its output.
    """

    def steered(hidden: torch.Tensor) -> torch.Tensor:
        added = (delta() if callable(delta) else delta).to(hidden.dtype)
        # A call with fewer columns than the prompt is a decode step: all its tokens are real.
        if mask is None or hidden.shape[1] < mask.shape[1]:
            return hidden + added
        real = mask.bool().repeat_interleave(hidden.shape[0] // mask.shape[0], dim=0)
        real = nn.functional.pad(real, (0, hidden.shape[1] - real.shape[1]), value=True)
        return torch.where(real[..., None], hidden + added, hidden)

    if at_input:
        handle = module.register_forward_pre_hook(lambda m, args: with_first(args, steered(args[0])))
    else:
        handle = module.register_forward_hook(
            lambda m, args, output: with_first(output, steered(first_tensor(output)))
        )
    try:
        yield
    finally:
        handle.remove()
