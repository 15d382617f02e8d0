"""Reads a forward: hooks at the sites keep only the needed positions, and the forward ends at the deepest site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.method_api import Pool
from finesteer_hf.sites import Site, TextTower, stream_of


class StopReading(Exception):
    """Ends a forward after its deepest site."""


@dataclass
class Wanted:
    """Positions of one forward whose states are kept.

    Attributes:
        query_rows, query_columns: positions of the queries' last tokens.
        query_starts: where their prompts begin, which may be before the forward.
        answer_rows, answer_starts, answer_ends: spans of answers; an end is the column after the last token.
        answer_lasts: columns of the answers' last content tokens.
    """

    query_rows: list[int] = field(default_factory=list)
    query_columns: list[int] = field(default_factory=list)
    query_starts: list[int] = field(default_factory=list)
    answer_rows: list[int] = field(default_factory=list)
    answer_starts: list[int] = field(default_factory=list)
    answer_ends: list[int] = field(default_factory=list)
    answer_lasts: list[int] = field(default_factory=list)

    def take(self, hidden: torch.Tensor, pools: Sequence[Pool]) -> dict[Pool, torch.Tensor]:
        """Pool a stream.

        Args:
            hidden: `[rows, tokens, width]`, any float dtype.
            pools: the pools.

        Returns:
            `query` and `query_mean`: `[queries, width]`, `answer_mean` and `answer_last`: `[answers, width]`; float32, on
            the stream's device.
        """
        states: dict[Pool, torch.Tensor] = {}

        def index(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=hidden.device)

        def mean(rows: list[int], starts: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
            inside = (columns >= starts[:, None]) & (columns < ends[:, None])
            # Values outside the span may be NaN, so they are replaced, not multiplied by zero.
            spans = torch.where(inside[..., None], hidden[index(rows)].float(), 0.0)
            return spans.sum(1) / inside.sum(1, keepdim=True)

        if "query" in pools:
            states["query"] = hidden[index(self.query_rows), index(self.query_columns)].float()
        if "query_mean" in pools:
            states["query_mean"] = mean(self.query_rows, index(self.query_starts), index(self.query_columns) + 1)
        if "answer_last" in pools:
            states["answer_last"] = hidden[index(self.answer_rows), index(self.answer_lasts)].float()
        if "answer_mean" in pools:
            states["answer_mean"] = mean(self.answer_rows, index(self.answer_starts), index(self.answer_ends))
        return states


class ForwardReader:
    """Runs forwards of a decoder that end at the deepest given site.

    Args:
        tower: the model's decoder stack.
        sites: where states are read.
        pools: what is kept of the states.

    Raises:
        SiteError: if the model has no such site.
    """

    def __init__(self, tower: TextTower, sites: Sequence[Site], pools: Sequence[Pool]) -> None:
        self.tower = tower
        for site in sites:
            tower.check(site)
        self.sites = tuple(sorted(set(sites)))
        self.pools = tuple(pools)
        self.widths = {site: tower.width(site) for site in self.sites}
        self._wanted = Wanted()
        self._states: dict[Site, dict[Pool, torch.Tensor]] = {}

    def run(self, inputs: dict[str, Any], wanted: Wanted) -> dict[Site, dict[Pool, torch.Tensor]]:
        """Run the decoder on inputs; call it inside `installed`.

        Raises:
            UnsupportedModelError: if the forward skips a site.
        """
        self._wanted, self._states = wanted, {}
        with contextlib.suppress(StopReading):
            self.tower.decoder(**inputs)
        missed = [str(site) for site in self.sites if site not in self._states]
        if missed:
            raise UnsupportedModelError(f"A forward of {type(self.tower.decoder).__name__} does not pass {missed}.")
        return self._states

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Install hooks, evaluation mode and no gradients during a block; the earlier state is restored."""
        decoder = self.tower.decoder
        modes = {module: module.training for module in decoder.modules()}
        handles = [self._register(site) for site in self.sites]
        handles.append(self._register_stop())
        try:
            decoder.eval()
            # A compiled forward would not see the hooks.
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes.items():
                module.training = mode
            self._states = {}

    def _register(self, site: Site) -> Any:
        def keep(value: Any) -> None:
            self._states[site] = self._wanted.take(stream_of(value, site, self.widths[site]), self.pools)

        module = self.tower.module(site)
        if site.kind == "attention":
            raise ValueError(f"{site} cannot be captured: attention weights are per token, see `FitData.answers`.")
        if site.kind == "resid_post":
            return module.register_forward_hook(lambda module, args, output: keep(output))
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: keep(args or kwargs["hidden_states"]), with_kwargs=True
        )

    def _register_stop(self) -> Any:
        """Stop between two blocks, never inside one: offloading frees a block's weights at its end."""

        def stop(module: nn.Module, *anything: Any) -> None:
            raise StopReading

        deepest = self.sites[-1]
        block = self.tower.layers[deepest.layer]
        if deepest.kind == "resid_pre":
            return block.register_forward_pre_hook(stop)
        return block.register_forward_hook(stop)
