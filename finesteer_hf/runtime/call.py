"""What a steered model keeps beside its modules: loaded adapters, what is active, and the installed hooks.

All of it lives outside the module tree, so that `state_dict`, `save_pretrained` and module names show the base model.
"""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.adapters.base_checks import check_widths
from finesteer_hf.errors import (
    AdapterNotFoundError,
    BlockElsewhereWarning,
    PromptEndWarning,
    UnsupportedModelError,
)
from finesteer_hf.method_api import SteeringMethod
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.arguments import Scale, check_rows
from finesteer_hf.runtime.decoding.compiled import CompiledSteering, forget_compiled_graphs
from finesteer_hf.runtime.decoding.logits import leave_decoder
from finesteer_hf.runtime.gradient_checkpointing import restore_checkpoints
from finesteer_hf.runtime.hooks import DecoderHook, SiteHook
from finesteer_hf.runtime.plan import Plan, PlanEntry, Selection
from finesteer_hf.runtime.prompt_ends import PROMPT_ENDS, PromptEnds, prompt_lengths_of
from finesteer_hf.runtime.session import CallSession, current_session
from finesteer_hf.runtime.streams import Prompt, cache_length, forward_cache, forward_inputs, packs_texts, shares_a_row
from finesteer_hf.sites import Site, TextTower


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter and the processor made of it."""

    adapter: SteeringAdapter
    processor: SteeringMethod


@dataclass(eq=False)
class BlockSteering:
    """What a `with model.steering(...)` block puts in place of what is set on the model.

    Attributes:
        runtime_id: `id` of the run time that it is for.
        selection, processors: what it steers with.
        outer: the block around it.
        thread: identity of the thread that entered it.
        session: the call of this model in which it was entered, if any.
        closed: whether it was left where it could not be taken away: out of turn, or from another context, as a
            generator that is closed by another thread does. It is passed over then.
        warned: whether a call of another thread was told about it.
        token: takes it away again.
    """

    runtime_id: int
    selection: Selection
    processors: tuple[SteeringProcessor, ...]
    outer: BlockSteering | None
    thread: int
    session: CallSession | None = None
    closed: bool = False
    warned: bool = False
    token: Token[BlockSteering | None] | None = None


_BLOCK: ContextVar[BlockSteering | None] = ContextVar("finesteer_hf_block", default=None)


# For what a fork leaves locked.
_RUNTIMES: weakref.WeakSet[SteeringRuntime] = weakref.WeakSet()


class SteeringRuntime:
    """The steering of one model.

    What is loaded and hooked is replaced, never changed: other threads may be looking at it.

    Args:
        model: the causal LM.

    Attributes:
        adapters: what is loaded, by name.
        site_hooks: the hooked sites, each with its hook and the handle that takes it away.
        open_blocks: the `with model.steering(...)` blocks of all threads.

    Raises:
        UnsupportedModelError: if its decoder blocks cannot be told.
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
        self.open_blocks: list[BlockSteering] = []
        self.lock = threading.RLock()
        _RUNTIMES.add(self)
        self.told_of_prompt_ends = False
        # The plan of the last call, with the entries that it was asked for: other adapters, another processor under
        # their name or another scale are other entries, and lay out a new one.
        self._last_plan: tuple[tuple[PlanEntry, ...], Plan] | None = None
        self._plain: weakref.WeakKeyDictionary[Any, CallSession] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model gets hooks of its own; locks, open blocks and running caches stay with the original.
        own = ("lock", "open_blocks", "_plain", "_last_plan")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.open_blocks = []
        self.lock = threading.RLock()
        _RUNTIMES.add(self)
        self._last_plan = None
        self._plain = weakref.WeakKeyDictionary()

    @property
    def selection(self) -> Selection:
        """What is set on the model."""
        return self._selection

    @selection.setter
    def selection(self, value: Selection) -> None:
        self._selection = value
        self.sync_compiled()

    def sync_compiled(self) -> None:
        """Let compiled plain forwards steer with what is active here and now."""
        processors: dict[str, SteeringProcessor] = {name: loaded.processor for name, loaded in self.adapters.items()}
        selection, own = self.active()
        for number, processor in enumerate(own):
            processors[f"processor_{number}"] = processor
        self.compiled.sync(processors, dict(selection) | {f"processor_{i}": 1.0 for i in range(len(own))})

    # -- adapters -----------------------------------------------------------------------------------------------------

    def add(self, name: str, adapter: SteeringAdapter) -> None:
        """Load an adapter under a name; one of that name is replaced for calls that begin from now on."""
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
        """Forget an adapter and drop it from what is active."""
        with self.lock:
            loaded = self.get(name)
            self._selection = tuple(pair for pair in self.selection if pair[0] != name)
            self.adapters = {other: value for other, value in self.adapters.items() if other != name}
            # So that its tensors can go.
            self._last_plan = None
            self.sync_compiled()
            self.unhook(loaded.processor.sites)

    def get(self, name: str) -> LoadedAdapter:
        """Look an adapter up, or raise `AdapterNotFoundError`."""
        if name not in self.adapters:
            raise AdapterNotFoundError(name, self.adapters)
        return self.adapters[name]

    # -- hooks --------------------------------------------------------------------------------------------------------

    def hook(self, sites: Iterable[Site]) -> None:
        """Put a hook on each site, once; hooks are counted."""
        with self.lock:
            for site in sites:
                if site not in self.site_hooks:
                    forget_compiled_graphs(self.model)
                    module = self.tower.module(site)
                    hook = SiteHook(self, site, module)
                    self.site_hooks = {**self.site_hooks, site: (hook, hook.register(module))}
                self.site_hooks[site][0].references += 1

    def follow_modules(self) -> None:
        """Move hooks whose module was replaced since, as a LoRA that is loaded or merged does; called as a call begins.

        A hook left on the layer inside a LoRA wrapper would steer the base path and not the LoRA's.
        """
        with self.lock:
            for site, (hook, handle) in self.site_hooks.items():
                module = self.tower.module(site)
                if module is not hook.module:
                    handle.remove()
                    hook.module = module
                    self.site_hooks = {**self.site_hooks, site: (hook, hook.register(module))}

    def unhook(self, sites: Iterable[Site]) -> None:
        """Take the hooks of sites away that nobody needs any more."""
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
        """Take all hooks away, and steer with nothing."""
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
        """What a call that names nothing steers with: the innermost block's choice, else what is set."""
        block = self.innermost_block()
        return (self.selection, ()) if block is None else (block.selection, block.processors)

    def innermost_block(self) -> BlockSteering | None:
        """The block of this model that this thread stands in."""
        block = _BLOCK.get()
        while block is not None and (block.closed or block.runtime_id != id(self)):
            block = block.outer
        return block

    def enter_block(self, selection: Selection, processors: tuple[SteeringProcessor, ...] = ()) -> BlockSteering:
        """Put a choice in place for this thread until `leave_block`."""
        for name, _ in selection:
            self.get(name)
        self.hook(site for processor in processors for site in processor.sites)
        session = current_session(self)
        if session is not None and session.of_forward:
            session = None
        block = BlockSteering(id(self), selection, processors, _BLOCK.get(), threading.get_ident(), session)
        if session is not None:
            session.blocks += 1
        block.token = _BLOCK.set(block)
        with self.lock:
            self.open_blocks.append(block)
        self.sync_compiled()
        return block

    def leave_block(self, block: BlockSteering) -> None:
        """Restore what was in place before `enter_block`; in any order, and from any thread."""
        if block.session is not None:
            block.session.blocks -= 1
        with self.lock:
            self.open_blocks.remove(block)
        block.closed = not _taken_away(block)
        while (innermost := _BLOCK.get()) is not None and innermost.closed:
            _BLOCK.set(innermost.outer)
        self.sync_compiled()
        self.unhook(site for processor in block.processors for site in processor.sites)

    def warn_of_blocks_elsewhere(self) -> None:
        """Warn, once a block, if this thread stands in none and one of another thread steers with something else.

        A new thread does not inherit the blocks of the thread that starts it, nor can it be told which thread that was.
        """
        if not self.open_blocks or self.innermost_block() is not None:
            return
        with self.lock:
            others = [
                block
                for block in self.open_blocks
                if block.thread != threading.get_ident()
                and not block.warned
                and (block.selection, block.processors) != (self.selection, ())
            ]
            for block in others:
                block.warned = True
        if others:
            says = [
                dict(block.selection) or [type(p).__name__ for p in block.processors] or "nothing" for block in others
            ]
            warnings.warn(
                f"This thread stands in no `with model.steering(...)` block and steers with what is set on the model "
                f"({dict(self.selection) or 'nothing'}), while a block of another thread steers with "
                f"{', '.join(map(str, says))}. A thread does not inherit the block that it was started in: give "
                "`steering=` to the call, use `model.set_steering(...)`, or start the thread with "
                "`contextvars.copy_context().run`.",
                BlockElsewhereWarning,
                stacklevel=4,
            )

    def plan(self, selection: Selection, processors: Sequence[SteeringProcessor], scale: Scale) -> Plan:
        """Lay out a call in which all rows have the same adapters.

        Args:
            selection: the adapters.
            processors: processors beside the adapters, after them.
            scale: multiplies everything: a number, or one a row.
        """
        entries = tuple(PlanEntry(name, self.get(name).processor, times(scale, own)) for name, own in selection)
        if processors:
            # Not kept: a processor of the user's may name other sites by the next call.
            own_entries = (PlanEntry(f"processor_{i}", processor, scale) for i, processor in enumerate(processors))
            return Plan.of((*entries, *own_entries))
        laid_out = self._last_plan
        if laid_out is None or laid_out[0] != entries:
            self._last_plan = laid_out = (entries, Plan.of(entries))
        return laid_out[1]

    def mixed_plan(
        self, selections: Sequence[Selection], processors: Sequence[SteeringProcessor], scale: Scale
    ) -> Plan:
        """Lay out a call in which each row has its own adapters; arguments as for `plan`, one selection a row."""
        factors = scale if isinstance(scale, tuple) else (scale,) * len(selections)
        if len(factors) != len(selections):
            raise ValueError(
                f"`steering` has {len(selections)} rows and `steering_scale` {len(factors)}; give both one entry a row."
            )
        entries = []
        for name in dict.fromkeys(name for selection in selections for name, _ in selection):
            scales = [dict(row).get(name, 0.0) * factor for row, factor in zip(selections, factors, strict=True)]
            entries.append(PlanEntry(name, self.get(name).processor, tuple(scales)))
        entries += [PlanEntry(f"processor_{i}", processor, scale) for i, processor in enumerate(processors)]
        return Plan.of(entries)

    def renew_after_fork(self) -> None:
        """Forget what threads that a child process does not have were about."""
        self.lock = threading.RLock()
        self.compiled.lock = threading.RLock()
        self.compiled.bound = False
        self.open_blocks = [block for block in self.open_blocks if block.thread == threading.get_ident()]

    # -- plain forwards -----------------------------------------------------------------------------------------------

    def plain_session(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallSession | None:
        """The session of a forward outside `generate`; None if nothing is active.

        A forward that continues the cache of an earlier plain forward keeps that one's decisions, so that a hand-written
        decoding loop steers as `generate` does; with `prompt_lengths` it decides anew.
        """
        ends = PROMPT_ENDS.get()
        self.warn_of_blocks_elsewhere()
        selection, processors = self.active()
        if not selection and not processors:
            return None
        self.follow_modules()
        plan = self.plan(selection, processors, 1.0)
        if shares_a_row(kwargs) or (plan.depends_on_query and packs_texts(kwargs)):
            raise UnsupportedModelError(
                "Steering is active, but a row of this forward holds several texts (continuous batching, packing, "
                "padding-free training), whose queries cannot be told apart. Use `generate`, or pad instead of packing, or "
                "switch steering off with `model.set_steering(None)`."
            )
        cache = forward_cache(kwargs)
        earlier = None if cache is None else self.plain_session_of(cache, plan)
        if earlier is not None:
            earlier.streams[0].cache = cache
            return earlier
        if not plan:
            return None
        return CallSession(self, plan, self._plain_prompt(plan, ends, args, kwargs))

    def plain_session_of(self, cache: Any, plan: Plan) -> CallSession | None:
        """The session of the plain forward that filled a cache, if a forward from there on is to go on with it.

        It is not where the plan is another one, or `prompt_lengths` ask for a new decision.
        """
        if PROMPT_ENDS.get().lengths is not None:
            return None
        earlier = self._plain.get(cache)
        return earlier if earlier is not None and earlier.plan == plan else None

    def _plain_prompt(
        self, plan: Plan, ends: PromptEnds, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Prompt | None:
        """The prompts of a plain forward; None where nothing says that they end before its last token."""
        lengths = ends.lengths
        if lengths is None and not plan.depends_on_query:
            return None
        inputs, cache, mask = forward_inputs(args, kwargs), forward_cache(kwargs), kwargs.get("attention_mask")
        past = 0 if cache is None else cache_length(cache)
        rows, tokens = int(inputs.shape[0]), int(inputs.shape[1])
        mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        if lengths is not None:
            check_rows("prompt_lengths", len(lengths), rows)
        else:
            lengths, all_known = prompt_lengths_of(ends.labels, (rows, tokens), mask, past)
            if not all_known and tokens > 1:
                self._tell_of_prompt_ends()
        return None if lengths is None else Prompt(past + tokens, mask, lengths)

    def check_prompt_ends(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn of a compiled plain forward, which finds its queries inside the graph, as of any other."""
        plan = self.plan(*self.active(), 1.0)
        if plan:
            self._plain_prompt(plan, PROMPT_ENDS.get(), args, kwargs)

    def _tell_of_prompt_ends(self) -> None:
        if self.told_of_prompt_ends:
            return
        self.told_of_prompt_ends = True
        warnings.warn(
            "Steering depends on where the prompt ends, and this forward does not say: the last token of each row is taken "
            "for the query. If a row holds prompt and answer, give `prompt_lengths` (numbers of real prompt tokens) or "
            "`labels` that begin with -100; if it holds a prompt alone, `prompt_lengths=attention_mask.sum(1)`. lm-eval "
            "steers rightly through its model `finesteer`. This is said once a model.",
            PromptEndWarning,
            stacklevel=2,
        )

    def end_plain_session(self, session: CallSession, output: Any) -> None:
        """Remember a plain forward's decisions with the cache that it filled."""
        if output is not None:
            leave_decoder(session)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            cache = getattr(output, "cache_params", None)
        if cache is not None and session.streams:
            # The dictionary's value must not keep its key alive.
            session.forget_forward()
            self._plain[cache] = session


def _taken_away(block: BlockSteering) -> bool:
    """Take a block away if it is this context's innermost; contexts that were copied inside it keep it."""
    if _BLOCK.get() is not block or block.token is None:
        return False
    try:
        _BLOCK.reset(block.token)
    except ValueError:
        # A copy of the context that it was entered in: there it stays.
        return False
    return True


def times(scale: Scale, factor: float) -> Scale:
    """Multiply a scale, or each row's."""
    return tuple(value * factor for value in scale) if isinstance(scale, tuple) else scale * factor


def _renew_after_fork() -> None:
    for runtime in list(_RUNTIMES):
        runtime.renew_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)
