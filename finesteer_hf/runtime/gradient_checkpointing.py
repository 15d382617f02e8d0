"""Gradient checkpointing: a block that runs again in the backward pass steers as in the forward pass.

The backward pass runs a checkpointed block after the call's session has ended, and on a GPU in another thread. A hook
inside the block (on an attention output projection) would find no session, and the gradients would be those of an
unsteered block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from finesteer_hf.runtime.current import in_session


_ATTRIBUTE = "_gradient_checkpointing_func"


class SteeredCheckpoint:
    """A checkpoint function that restores the forward's session for the recomputation.

    Args:
        checkpoint: the block's checkpoint function from transformers: `torch.utils.checkpoint.checkpoint` with its
            arguments.
    """

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(in_session(function), *args, **kwargs)


def steer_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Make checkpointing modules keep the session; skips modules that already do, and all others."""
    for module in modules:
        checkpoint = module.__dict__.get(_ATTRIBUTE)
        if checkpoint is not None and not isinstance(checkpoint, SteeredCheckpoint):
            setattr(module, _ATTRIBUTE, SteeredCheckpoint(checkpoint))


def restore_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Restore the modules' original checkpoint functions."""
    for module in modules:
        checkpoint = module.__dict__.get(_ATTRIBUTE)
        if isinstance(checkpoint, SteeredCheckpoint):
            setattr(module, _ATTRIBUTE, checkpoint.checkpoint)
