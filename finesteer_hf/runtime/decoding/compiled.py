"""Steering inside a compiled graph.

`torch.compile` does not see hooks that are added later, cannot trace a `ContextVar`, and recompiles whenever a Python
number changes. So hooks are installed once, and inside a graph they read this object instead of the call's session.
Its tensors change values but not shapes. Changing a scale, swapping adapters of the same shape or switching steering
off then recompiles nothing. Unsteered rows add -0.0, which changes no bit.

`generate` prefills eagerly (the session reads, decides and steers as usual), then binds each site's addend and runs
the compiled decode step. A compiled plain forward reads and decides inside the graph, with the same functions as the
eager one.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.processors import Decision, SteeringProcessor
from finesteer_hf.runtime.forwards.prompt_ends import leading_ignored
from finesteer_hf.runtime.forwards.streams import forward_inputs
from finesteer_hf.runtime.forwards.window import Window
from finesteer_hf.runtime.query_pass import decision_of
from finesteer_hf.runtime.session import CallSession
from finesteer_hf.runtime.update import addend, merged, written
from finesteer_hf.sites import Site


class CompiledSteering:
    """What the hooks of a model read inside a graph.

    Attributes:
        processors: processors of all loaded adapters, active or not, so that activating one only changes a number.
        scales: `[processors]` float32: scale times strength, 0 for an adapter that is not active.
        deltas: addend of each written site in a bound decode step, `[rows, 1, width]` in the stream's dtype.
        on_logits: whether an active processor acts on logits.
        bound: whether a decode step is running, not a plain forward that makes its own decisions.
        lengths: the plain forward's `prompt_lengths`, or None.
        labels: its `labels`, or None.
        window: its columns, counted from its first one.
        states: states read in it, by `query_pool` and site.
        decisions: each processor's decision in it, by its index.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.processors: list[SteeringProcessor] = []
        self.scales = torch.zeros(0)
        self.on_logits = False
        self.deltas: dict[Site, torch.Tensor] = {}
        self.bound = False
        self.lengths: torch.Tensor | None = None
        self.labels: torch.Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self.window: Window | None = None
        self.states: dict[str, dict[Site, torch.Tensor]] = {"last": {}, "mean": {}}
        self.decisions: dict[int, Decision] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.RLock()

    # -- outside the graph --------------------------------------------------------------------------------------------

    def sync(self, processors: dict[str, SteeringProcessor], scales: dict[str, float]) -> None:
        """Copy what is loaded and what is active, for plain forwards."""
        self.processors = list(processors.values())
        self.on_logits = any(p.acts_on_logits and scales.get(name, 0.0) != 0 for name, p in processors.items())
        self.scales = torch.tensor([scales.get(name, 0.0) * p.strength for name, p in processors.items()])

    def run_bound(
        self, session: CallSession, sites: dict[Site, int], call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a compiled decode step with the decisions of the session's eager prefill.

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
        """Store what tells where the prompts of a plain forward end."""
        self.lengths, self.labels = lengths, labels

    # -- inside the graph ---------------------------------------------------------------------------------------------

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the queries of a plain forward."""
        self._forget()
        if not self.bound:
            self.window = traced_window(
                forward_inputs(args, kwargs), kwargs.get("attention_mask"), self.lengths, self.labels
            )

    def end_forward(self) -> None:
        """Drop what a plain forward read and decided, so that its graph does not return it."""
        self._forget()

    def visit(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        """The stream that a site's hook returns, without branches on values."""
        if self.bound:
            return hidden + self.deltas[site] if site in self.deltas else None
        window = self.window
        assert window is not None
        for processor in self.processors:
            if site in processor.reads:
                mean = processor.query_pool == "mean"
                state = window.prompt_mean(hidden) if mean else window.query_state(hidden, 0)
                self.states[processor.query_pool][site] = state
        addends = []
        for index, processor in enumerate(self.processors):
            if site in processor.maps:
                raise UnsupportedModelError(
                    f"{type(processor).__name__} maps activations and cannot be part of a compiled plain forward; use "
                    "`generate`, which runs such steps uncompiled, or an uncompiled forward."
                )
            if site in processor.writes:
                decision = self._decision(index, processor, hidden)
                scale = self.scales[index].to(hidden.device)
                addends.append((processor.positions, addend(decision, site, scale, hidden.device)))
        return written(hidden, merged(addends, hidden.dtype), window, 0) if addends else None

    def _decision(self, index: int, processor: SteeringProcessor, hidden: torch.Tensor) -> Decision:
        """A processor's decision; `decide` runs at the first site that it writes."""
        if index in self.decisions:
            return self.decisions[index]
        states = self.states[processor.query_pool]
        missing = [read for read in processor.reads if read not in states]
        earlier = [
            p for p in self.processors if p is not processor and any(w < r for w in p.writes for r in processor.reads)
        ]
        if missing or earlier:
            raise UnsupportedModelError(
                "This stack of adapters needs a second pass over the prompt (one writes before another reads), which a "
                "compiled plain forward cannot make. Use `generate`, or an uncompiled forward."
            )
        self.decisions[index] = decision_of(processor, states, hidden.shape[0], hidden.device)
        return self.decisions[index]


def traced_window(
    inputs: torch.Tensor, mask: Any, lengths: torch.Tensor | None, labels: torch.Tensor | None
) -> Window:
    """The columns of a plain forward, found without reading values.

    Args:
        inputs: ids `[rows, tokens]`, or embeddings.
        mask: the attention mask; anything but a tensor `[rows, past + tokens]` means that there are no pads.
        lengths: numbers of real prompt tokens, `[rows]`, or None.
        labels: int64 `[rows, tokens]`, or None; used if there are no lengths.
    """
    rows, tokens = inputs.shape[:2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        mask = mask[:, -tokens:].bool()
        first = mask.int().argmax(dim=1)
        query = tokens - 1 - mask.int().flip(1).argmax(dim=1)
    else:
        mask = None
        first = torch.zeros(rows, dtype=torch.long, device=inputs.device)
        query = torch.full_like(first, tokens - 1)
    if lengths is not None:
        query = first + lengths.to(first.device) - 1
    elif labels is not None and labels.shape == (rows, tokens):
        real = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        trained_from = leading_ignored(labels, real)
        query = torch.where(trained_from == 0, query, first + trained_from - 1)
    # The column numbers are known only on the device.
    return Window(tokens, mask, query, 0, tokens - 1)


def forward_is_compiled(model: torch.nn.Module) -> bool:
    """Whether the user compiled a model in place: `model.compile()` or `model.forward = torch.compile(model.forward)`."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        return True
    return hasattr(model.__dict__.get("forward"), "_torchdynamo_orig_callable")


def forget_compiled_graphs(model: torch.nn.Module) -> None:
    """Drop graphs that were traced without a hook: dynamo would still run them and steer in part.

    Dynamo keeps graphs by code object, not by model, so all graphs of the process are dropped and traced again at
    their next call.
    """
    model.__dict__.pop("_compiled_call", None)
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["frames"]:
        dynamo.reset()
