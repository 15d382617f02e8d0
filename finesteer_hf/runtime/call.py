"""The steering state of a model beside its modules: loaded adapters, the active ones, and installed hooks.

It is outside the module tree, so that `state_dict`, `save_pretrained` and module names are the base model's.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.base_checks import check_widths
from finesteer_hf.errors import AdapterNotFoundError
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.arguments import Scale
from finesteer_hf.runtime.blocks import BlockSteering, OpenBlocks
from finesteer_hf.runtime.current import current_session
from finesteer_hf.runtime.decoding.compiled import CompiledSteering, forget_compiled_graphs
from finesteer_hf.runtime.forwards.plain_forwards import PlainForwards
from finesteer_hf.runtime.gradient_checkpointing import restore_checkpoints
from finesteer_hf.runtime.hooks import DecoderHook, SiteHook
from finesteer_hf.runtime.plan import Plan, PlanEntry, Selection
from finesteer_hf.sites import Site, TextTower


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter and its processor."""

    adapter: SteeringAdapter
    processor: SteeringMethod


# Runtimes to renew after a fork, which may leave locks held.
_RUNTIMES: weakref.WeakSet[SteeringRuntime] = weakref.WeakSet()


class SteeringRuntime:
    """The steering of one model.

    The collections are replaced, never changed in place: other threads may be reading them.

    Args:
        model: the causal LM.

    Attributes:
        adapters: loaded adapters by name.
        site_hooks: the hooked sites, each with its hook and the handle that removes it.
        blocks: the `with model.steering(...)` blocks of all threads.
        plain_forwards: the forwards outside `generate`.

    Raises:
        UnsupportedModelError: if its decoder blocks are not found.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tower = TextTower(model)
        self.adapters: dict[str, LoadedAdapter] = {}
        self._selection: Selection = ()
        self.compiled = CompiledSteering()
        self.site_hooks: dict[Site, tuple[SiteHook, Any]] = {}
        self.decoder_handles: list[Any] = DecoderHook(self).register(self.tower.decoder)
        forget_compiled_graphs(model)
        self.blocks = OpenBlocks()
        self.plain_forwards = PlainForwards(self)
        self.lock = threading.RLock()
        _RUNTIMES.add(self)
        # The plan of the last call, with its entries: other adapters, another processor under their name or another
        # scale are other entries and get a new plan.
        self._last_plan: tuple[tuple[PlanEntry, ...], Plan] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model gets its own hooks; locks, open blocks and running caches stay with the original.
        own = ("lock", "blocks", "plain_forwards", "_last_plan")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.blocks = OpenBlocks()
        self.plain_forwards = PlainForwards(self)
        self.lock = threading.RLock()
        _RUNTIMES.add(self)
        self._last_plan = None

    @property
    def selection(self) -> Selection:
        """The selection set on the model."""
        return self._selection

    @selection.setter
    def selection(self, value: Selection) -> None:
        self._selection = value
        self.sync_compiled()

    def sync_compiled(self) -> None:
        """Update compiled plain forwards to the currently active steering."""
        processors: dict[str, SteeringProcessor] = {name: loaded.processor for name, loaded in self.adapters.items()}
        selection, own = self.active()
        for number, processor in enumerate(own):
            processors[f"processor_{number}"] = processor
        self.compiled.sync(processors, dict(selection) | {f"processor_{i}": 1.0 for i in range(len(own))})

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: SteeringAdapter) -> None:
        """Load an adapter under a name; one of that name is replaced for calls that start later."""
        processor = adapter.build()
        for site in processor.sites:
            self.tower.check(site)
        check_widths(adapter, processor, self.tower)
        with self.lock:
            old = self.adapters.get(name)
            self.hook(processor.sites)
            self.adapters = {**self.adapters, name: LoadedAdapter(adapter, processor)}
            if old is not None:
                self.unhook(old.processor.sites)
            self.sync_compiled()

    def remove(self, name: str) -> None:
        """Remove an adapter, also from the active ones."""
        with self.lock:
            loaded = self.get(name)
            self._selection = tuple(pair for pair in self.selection if pair[0] != name)
            self.adapters = {other: value for other, value in self.adapters.items() if other != name}
            # So that its tensors can be freed.
            self._last_plan = None
            self.sync_compiled()
            self.unhook(loaded.processor.sites)

    def get(self, name: str) -> LoadedAdapter:
        """Look up an adapter, or raise `AdapterNotFoundError`."""
        if name not in self.adapters:
            raise AdapterNotFoundError(name, self.adapters)
        return self.adapters[name]

    # -- hooks --------------------------------------------------------------------------------------------------------

    def hook(self, sites: Iterable[Site]) -> None:
        """Put one hook on each site; hooks are reference-counted."""
        with self.lock:
            for site in sites:
                if site not in self.site_hooks:
                    forget_compiled_graphs(self.model)
                    module = self.tower.module(site)
                    hook = SiteHook(self, site, module)
                    self.site_hooks = {**self.site_hooks, site: (hook, hook.register(module))}
                self.site_hooks[site][0].references += 1

    def follow_modules(self) -> None:
        """Move hooks whose module was replaced, such as by a LoRA that is loaded or merged; called at the start of a
        call.

        A hook left on the layer inside a LoRA wrapper would steer only the base path.
        """
        with self.lock:
            for site, (hook, handle) in self.site_hooks.items():
                module = self.tower.module(site)
                if module is not hook.module:
                    handle.remove()
                    hook.module = module
                    self.site_hooks = {**self.site_hooks, site: (hook, hook.register(module))}

    def unhook(self, sites: Iterable[Site]) -> None:
        """Remove hooks of sites that are no longer needed."""
        with self.lock:
            for site in sites:
                hook, handle = self.site_hooks[site]
                hook.references -= 1
                if not hook.references:
                    handle.remove()
                    self.site_hooks = {other: value for other, value in self.site_hooks.items() if other != site}

    def hooked_widths(self) -> dict[Site, int]:
        """The hooked sites and the widths of their streams."""
        return {site: hook.width for site, (hook, _) in self.site_hooks.items()}

    def remove_hooks(self) -> None:
        """Remove all hooks and steer with nothing."""
        with self.lock:
            self._selection = ()
            for _, handle in self.site_hooks.values():
                handle.remove()
            for handle in self.decoder_handles:
                handle.remove()
            self.site_hooks = {}
            self.decoder_handles.clear()
            restore_checkpoints((self.tower.decoder, *self.tower.layers))

    # -- what a call steers with --------------------------------------------------------------------------------------

    def active(self) -> tuple[Selection, tuple[SteeringProcessor, ...]]:
        """The steering of a call without arguments: the innermost block's, else the selection set on the model."""
        block = self.blocks.innermost()
        return (self.selection, ()) if block is None else (block.selection, block.processors)

    def enter_block(self, selection: Selection, processors: tuple[SteeringProcessor, ...] = ()) -> BlockSteering:
        """Activate a selection in this thread until `leave_block`."""
        for name, _ in selection:
            self.get(name)
        self.hook(site for processor in processors for site in processor.sites)
        session = current_session(self)
        block = self.blocks.enter(selection, processors, None if session is None or session.of_forward else session)
        self.sync_compiled()
        return block

    def leave_block(self, block: BlockSteering) -> None:
        """Restore the state before `enter_block`; in any order, and from any thread."""
        self.blocks.leave(block)
        self.sync_compiled()
        self.unhook(site for processor in block.processors for site in processor.sites)

    def plan(self, selection: Selection, processors: Sequence[SteeringProcessor], scale: Scale) -> Plan:
        """Build the plan of a call in which all rows have the same adapters.

        Args:
            selection: the adapters.
            processors: processors that act after the adapters.
            scale: multiplies everything: a number, or one per row.
        """
        entries = tuple(PlanEntry(name, self.get(name).processor, times(scale, own)) for name, own in selection)
        if processors:
            # Not cached: a user's processor may have other sites by the next call.
            own_entries = (PlanEntry(f"processor_{i}", processor, scale) for i, processor in enumerate(processors))
            return Plan.of((*entries, *own_entries))
        laid_out = self._last_plan
        if laid_out is None or laid_out[0] != entries:
            self._last_plan = laid_out = (entries, Plan.of(entries))
        return laid_out[1]

    def mixed_plan(
        self, selections: Sequence[Selection], processors: Sequence[SteeringProcessor], scale: Scale
    ) -> Plan:
        """Build the plan of a call in which each row has its own adapters; arguments as for `plan`, row by row."""
        factors = scale if isinstance(scale, tuple) else (scale,) * len(selections)
        if len(factors) != len(selections):
            raise ValueError(
                f"`steering` has {len(selections)} rows and `steering_scale` {len(factors)}; give both one entry per row."
            )
        entries = []
        for name in dict.fromkeys(name for selection in selections for name, _ in selection):
            scales = [dict(row).get(name, 0.0) * factor for row, factor in zip(selections, factors, strict=True)]
            entries.append(PlanEntry(name, self.get(name).processor, tuple(scales)))
        entries += [PlanEntry(f"processor_{i}", processor, scale) for i, processor in enumerate(processors)]
        return Plan.of(entries)

    def renew_after_fork(self) -> None:
        """Drop the state of threads that a child process does not have."""
        self.lock = threading.RLock()
        self.compiled.lock = threading.RLock()
        self.compiled.bound = False
        self.blocks.renew_after_fork()


def times(scale: Scale, factor: float) -> Scale:
    """Multiply a scale, or each row's."""
    return tuple(value * factor for value in scale) if isinstance(scale, tuple) else scale * factor


def _renew_after_fork() -> None:
    for runtime in list(_RUNTIMES):
        runtime.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
