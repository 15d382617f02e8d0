"""Where the prompts of a plain forward end, from the caller or else from the labels.

The inputs of a forward over prompt and answer do not show where the prompt ends. Scorers pass `prompt_lengths`;
trainers pass `labels` in which the prompt is -100. Both are stored for the thread when the model is called, and read
when its decoder is called.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from finesteer_hf.runtime.arguments import as_lengths


IGNORED = -100


@dataclass(frozen=True)
class PromptEnds:
    """A forward's arguments that tell where prompts end.

    Attributes:
        lengths: int64 `[rows]` numbers of real prompt tokens, or None.
        labels: int64 `[rows, tokens]`, -100 at tokens without loss, or None.
    """

    lengths: torch.Tensor | None = None
    labels: torch.Tensor | None = None


NOT_TOLD = PromptEnds()
# For the next plain forward of this thread.
PROMPT_ENDS: ContextVar[PromptEnds] = ContextVar("finesteer_hf_prompt_ends", default=NOT_TOLD)


@contextlib.contextmanager
def told(lengths: Any, labels: Any) -> Iterator[None]:
    """Store these arguments while a forward runs.

    Raises:
        TypeError: if lengths are not integers `[rows]`.
    """
    if lengths is not None:
        lengths = as_lengths(lengths)
    token = PROMPT_ENDS.set(PromptEnds(lengths, labels if isinstance(labels, torch.Tensor) else None))
    try:
        yield
    finally:
        PROMPT_ENDS.reset(token)


def leading_ignored(labels: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Number of real tokens before each row's first trained one; all of the row's if none is trained.

    Args:
        labels: int64 `[rows, tokens]`.
        real: bool `[rows, past + tokens]`, False at pads; columns of a cache come first.

    Returns:
        int64 `[rows]`; 0 if the row begins with a trained token, so that no prompt end is known.
    """
    past = real.shape[1] - labels.shape[1]
    trained = (labels.to(real.device) != IGNORED) & real[:, past:]
    before = trained.long().cumsum(dim=1) == 0
    return real[:, :past].sum(dim=1) + (before & real[:, past:]).sum(dim=1)


def prompt_lengths_of(
    labels: torch.Tensor | None, shape: tuple[int, ...], mask: torch.Tensor | None, past: int
) -> tuple[torch.Tensor | None, bool]:
    """The prompt lengths, from labels.

    Args:
        labels: the model's `labels`, or None.
        shape: rows and tokens of the decoder's inputs; labels of another shape are ignored.
        mask: bool `[rows, past + tokens]`, False at pads; None or of another shape if there are none.
        past: columns in the cache.

    Returns:
        int64 `[rows]`, or None if no row's labels show a prompt end; a row whose labels show none counts all its real
        tokens. And whether every row's labels show one.
    """
    if labels is None or labels.shape != shape:
        return None, False
    rows, tokens = shape
    if mask is None or mask.shape != (rows, past + tokens):
        mask = torch.ones(rows, past + tokens, dtype=torch.bool, device=labels.device)
    lengths = leading_ignored(labels, mask)
    unknown = lengths == 0
    if bool(unknown.all()):
        return None, False
    return torch.where(unknown, mask.sum(dim=1), lengths), not bool(unknown.any())


def noting(forward: types.MethodType) -> types.MethodType:
    """Wrap a forward that replaced a model's own, so that it stores the labels that it is called with.

    PEFT calls `model.forward`, and TRL replaces it by one that does not pass the labels on.
    """
    function = forward.__func__

    @functools.wraps(function)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs.get("labels") is None:
            return function(self, *args, **kwargs)
        with told(PROMPT_ENDS.get().lengths, kwargs["labels"]):
            return function(self, *args, **kwargs)

    noted.notes_labels_for = function  # type: ignore[attr-defined]
    return types.MethodType(noted, forward.__self__)


def without_noting(forward: Any) -> Any:
    """Undo `noting`; anything else is returned as it is."""
    function = getattr(forward, "notes_labels_for", None)
    return forward if function is None else types.MethodType(function, forward.__self__)
