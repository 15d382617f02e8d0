"""Steering inside a compiled graph.

`torch.compile` does not see hooks that are added later, cannot trace a `ContextVar`, and recompiles on every Python number
that changes. So hooks are installed once, and inside a graph they read this object instead of the call's session: tensors
whose values change and whose shapes stay. A scale, a swap of adapters of one shape, or switching steering off then
recompiles nothing; rows that are not steered add -0.0, which changes no bit.

`generate` prefills eagerly (the session reads, decides and steers as always) and binds what each site adds before it runs
the compiled decode step. A compiled plain forward decides inside the graph.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.processors import QueryStates, SteeringProcessor
from finesteer_hf.prompt_ends import leading_ignored
from finesteer_hf.session import CallSession
from finesteer_hf.sites import Site


class CompiledSteering:
    """What the hooks of one model read inside a graph.

    Attributes:
        processors: of all loaded adapters, active or not, so that activating one changes a number only.
        scales: `[processors]` float32: scale times strength, 0 for an adapter that is not active.
        deltas: what each written site adds in a bound decode step, `[rows, 1, width]` in the stream's dtype.
        on_logits: whether an active one acts on logits.
        bound: whether a decode step is running, rather than a plain forward that decides for itself.
        mask: the plain forward's 2-D attention mask, or None.
        lengths: its `prompt_lengths`, or None.
        labels: its `labels`, or None.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.processors: list[SteeringProcessor] = []
        self.scales = torch.zeros(0)
        self.on_logits = False
        self.deltas: dict[Site, torch.Tensor] = {}
        self.bound = False
        self.mask: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        self.states: dict[str, dict[Site, torch.Tensor]] = {"last": {}, "mean": {}}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    # -- outside the graph --------------------------------------------------------------------------------------------

    def sync(self, processors: dict[str, SteeringProcessor], scales: dict[str, float]) -> None:
        """Take over what is loaded and what is active, for plain forwards."""
        self.processors = list(processors.values())
        self.on_logits = any(p.acts_on_logits and scales.get(name, 0.0) != 0 for name, p in processors.items())
        self.scales = torch.tensor([scales.get(name, 0.0) * p.strength for name, p in processors.items()])

    def run_bound(
        self, session: CallSession, sites: dict[Site, int], call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a compiled decode step with what the session's eager prefill decided.

        Args:
            session: the call.
            sites: the hooked sites and their widths.
            call: the compiled forward.
            *args: its arguments.
            **kwargs: its arguments.
        """
        with self.lock:
            self.deltas = session.compiled_deltas(sites)
            self.bound = True
            try:
                return call(*args, **kwargs)
            finally:
                self.bound = False

    def note(self, lengths: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        """Take note of what says where the prompts of a plain forward end."""
        self.lengths, self.labels = lengths, labels

    # -- inside the graph ---------------------------------------------------------------------------------------------

    def begin_forward(self, kwargs: dict[str, Any]) -> None:
        """Note the mask of a plain forward."""
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        self.states = {"last": {}, "mean": {}}

    def visit(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a site's hook puts back, as tensor arithmetic without branches on values."""
        if self.bound:
            return hidden + self.deltas[site] if site in self.deltas else None
        for processor in self.processors:
            if site in processor.reads:
                pooled = self._prompt_mean if processor.query_pool == "mean" else self._query_state
                self.states[processor.query_pool][site] = pooled(hidden)
        steered = hidden
        for index, processor in enumerate(self.processors):
            if site in processor.maps:
                raise UnsupportedModelError(
                    f"{type(processor).__name__} maps activations and cannot be part of a compiled plain forward; use "
                    "`generate`, which runs such steps uncompiled, or an uncompiled forward."
                )
            if site in processor.writes:
                steered = steered + self._delta(index, processor, site, hidden)
        return None if steered is hidden else steered

    def _query_state(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, self._query_index(hidden)].float()

    def _prompt_mean(self, hidden: torch.Tensor) -> torch.Tensor:
        named = self._up_to_query(hidden)
        return torch.where(named[..., None], hidden.float(), 0.0).sum(dim=1) / named.sum(dim=1, keepdim=True)

    def _up_to_query(self, hidden: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(hidden.shape[1], device=hidden.device)[None]
        named = columns <= self._query_index(hidden)[:, None]
        return named if self.mask is None else named & self.mask[:, -hidden.shape[1] :].bool()

    def _query_index(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.shape[1]
        if self.mask is None:
            first = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
            last = torch.full_like(first, tokens - 1)
        else:
            real = self.mask[:, -tokens:].int()
            first = real.argmax(dim=1)
            last = tokens - 1 - real.flip(1).argmax(dim=1)
        if self.lengths is not None:
            return first + self.lengths.to(hidden.device) - 1
        if self.labels is None or self.labels.shape != hidden.shape[:2]:
            return last
        real = torch.ones_like(self.labels) if self.mask is None else self.mask[:, -tokens:]
        lengths = leading_ignored(self.labels, real.bool())
        return torch.where(lengths == 0, last, first + lengths - 1)

    def _delta(self, index: int, processor: SteeringProcessor, site: Site, hidden: torch.Tensor) -> torch.Tensor:
        states = self.states[processor.query_pool]
        missing = [read for read in processor.reads if read not in states]
        earlier = [
            p for p in self.processors if p is not processor and any(w < r for w in p.writes for r in processor.reads)
        ]
        if missing or earlier:
            raise UnsupportedModelError(
                "This stack of adapters needs a second pass over the prompt (one writes before another has read), which a "
                "compiled plain forward cannot make. Use `generate`, or an uncompiled forward."
            )
        decision = processor.decide(QueryStates(states, hidden.shape[0], hidden.device))
        coefficient = self.scales[index].to(hidden.device)
        if decision.gate is not None:
            coefficient = coefficient * decision.gate
        coefficient = coefficient.reshape(-1, 1)
        delta = torch.where(coefficient == 0, -0.0, coefficient * decision.vectors[site]).to(hidden.dtype)[:, None]
        tokens = hidden.shape[1]
        columns = torch.arange(tokens, device=hidden.device)[None]
        query = self._query_index(hidden)[:, None]
        named = torch.ones_like(columns, dtype=torch.bool)
        if processor.positions == "prompt":
            named = columns <= query
        elif processor.positions == "generated":
            named = columns >= query
        if self.mask is not None:
            named = named & self.mask[:, -tokens:].bool()
        return torch.where(named[..., None], delta, -0.0)


def forward_is_compiled(model: torch.nn.Module) -> bool:
    """Whether the user compiled a model in place: `model.compile()` or `model.forward = torch.compile(model.forward)`."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        return True
    return hasattr(model.__dict__.get("forward"), "_torchdynamo_orig_callable")


def forget_compiled_graphs(model: torch.nn.Module) -> None:
    """Drop graphs that were traced without a hook: dynamo would go on running them, and steer in part.

    Dynamo keeps its graphs by code object, not by model, so all of the process's are dropped and traced anew when they
    are next called.
    """
    model.__dict__.pop("_compiled_call", None)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
