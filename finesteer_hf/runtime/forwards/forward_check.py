"""Checks a forward: it passes each site of a plan once, with one stream of the input's shape."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.sites import Site


class ForwardCheck:
    """The sites that one forward has passed; raises if the plan cannot be fully applied.

    Args:
        rows: rows of the forward's input.
        tokens: columns of the forward's input.
    """

    def __init__(self, rows: int, tokens: int) -> None:
        self.shape = (rows, tokens)
        self.passed: set[Site] | None = set()

    def check(self, site: Site, hidden: torch.Tensor) -> None:
        """Check a state `[rows, tokens, width]` that is about to be read or written.

        Raises:
            UnsupportedModelError: if its first axes differ from the input's, or the site was passed before.
        """
        if hidden.shape[:2] != self.shape:
            raise UnsupportedModelError(
                f"Unsupported layout at {site}: expected [{self.shape[0]} rows, {self.shape[1]} tokens, width], got "
                f"{tuple(hidden.shape)}. The model pads, packs or transposes its stream; it cannot be steered."
            )
        # After the forward has ended, gradient checkpointing may run blocks again.
        if self.passed is None:
            return
        if site in self.passed:
            raise UnsupportedModelError(
                f"One forward passes {site} more than once, so the site has no single state. Models that run their blocks "
                "in a loop cannot be steered."
            )
        self.passed.add(site)

    def end(self, sites: Iterable[Site], depth: int) -> None:
        """Check the whole forward.

        Args:
            sites: the sites of the plan.
            depth: number of blocks that the forward should run.

        Raises:
            UnsupportedModelError: if a site was not passed and so would silently stay unsteered.
        """
        passed, self.passed = self.passed, None
        if passed is None:
            return
        missed = [str(site) for site in sites if site not in passed and site.layer < depth]
        if missed:
            raise UnsupportedModelError(
                f"The forward did not pass {missed}: the model skips these blocks for such inputs, like blocks that attend "
                "to images in a text without any. Steer other blocks, or give the inputs that they need."
            )
