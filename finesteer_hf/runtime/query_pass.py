"""Reads the unsteered query states at sites, and makes the decisions from them.

If the steering forward reaches the query before its first write, the query is read on the way. Otherwise the prompt is
run ahead, up to the deepest read site.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from finesteer_hf.processors import Decision, QueryStates, SteeringProcessor
from finesteer_hf.runtime.forwards.streams import Forward, Stream, forward_inputs, in_lockstep, mask_fits
from finesteer_hf.runtime.plan import Plan
from finesteer_hf.runtime.update import token_view
from finesteer_hf.sites import Site, TextTower


@torch.no_grad()
def decision_of(
    processor: SteeringProcessor, states: Mapping[Site, torch.Tensor], rows: int, device: torch.device
) -> Decision:
    """Call a processor's `decide`; a compiled forward does this inside its graph.

    Args:
        processor: the processor.
        states: query states or prompt means, at least at its `reads`: `[rows, width]` float32.
        rows: rows of the batch.
        device: device of the states.
    """
    queries = QueryStates({site: states[site].to(device) for site in processor.reads}, rows, device)
    if not torch.is_autocast_enabled(device.type):
        return processor.decide(queries)
    # Under autocast the method's products would be in half precision.
    with torch.autocast(device.type, enabled=False):
        return processor.decide(queries)


class StopForward(Exception):
    """Ends a forward once its deepest needed site is read."""


class QueryPass:
    """Reads the queries of a call and calls each entry's `decide` once.

    States and decisions are kept on the stream, so that a second sequence can use the first one's decisions.

    Args:
        plan: the call's plan.
        tower: the model's decoder.

    Attributes:
        running: the sites that the current run-ahead forward reads; None outside of one.
    """

    def __init__(self, plan: Plan, tower: TextTower) -> None:
        self.plan = plan
        self.tower = tower
        self.running: set[Site] | None = None
        # Where a run-ahead forward keeps whole streams, `[rows, tokens, width]`, instead of the query's states.
        self._texts: dict[Site, torch.Tensor] | None = None

    # -- before a forward ---------------------------------------------------------------------------------------------

    def before(self, forward: Forward) -> None:
        """Run the prompt ahead if the forward over it cannot read what it needs on the way.

        Raises:
            ValueError: if a prompt mean is needed and the call does not pass the tokens that are already in the cache.
        """
        self._read_means(forward)
        if self._must_read_first(forward):
            self._read_whole_prompt(forward)

    def _must_read_first(self, forward: Forward) -> bool:
        window = forward.stream.window
        readers = {i: entry.processor for i, entry in enumerate(self.plan.entries) if entry.processor.reads}
        if all(index in forward.stream.decisions for index in readers):
            return False
        if self.plan.writes_before_reading:
            return True
        if forward.carried and self.plan.writes_before_a_read:
            # In the middle of a forward the cache cannot be restored: states of linear attention cannot be cropped.
            return True
        if forward.has_query:
            return False
        # A chunk that ends before the query: the decision must be known before the prompt is steered.
        late = all(processor.positions == "generated" for processor in readers.values())
        return not (late and window.uniform)

    def _read_means(self, forward: Forward) -> None:
        """Decide the entries that read a prompt mean, when no forward passes the prompt in one piece.

        The whole prompt is run ahead without the cache, whose content may be steered and gives no states.
        """
        stream = forward.stream
        waiting = {i: e for i, e in enumerate(self.plan.entries) if e.averages and i not in stream.decisions}
        if not waiting or forward.has_whole_prompt:
            return
        known = stream.prompt.columns if stream.prompt is not None and stream.prompt.inputs else 0
        if known < stream.window.prompt_end:
            raise ValueError(
                f"{', '.join(repr(entry.name) for entry in waiting.values())} decides from the mean over the whole prompt, "
                "but part of the prompt is in a cache that was filled before this call, and its states are gone. Give "
                "`generate` the whole text as `input_ids` beside the cache, or leave the cache out."
            )
        kwargs = _prompt_from(0, forward)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache_params")}
        for site, hidden in self._texts_at(set(self.plan.averaged), forward, (), kwargs).items():
            stream.means[site] = stream.window.prompt_mean(hidden)
        for index, entry in waiting.items():
            self._decide(index, stream, stream.means[max(entry.processor.reads)].device)

    def _read_whole_prompt(self, forward: Forward) -> None:
        """Run the unsteered prompt up to the deepest read site."""
        args, kwargs, stream = forward.args, forward.kwargs, forward.stream
        complete = stream.prompt is not None and bool(stream.prompt.inputs)
        if complete and forward.past + forward.tokens < stream.window.prompt_end:
            args, kwargs = (), _prompt_from(forward.past, forward)
        self._run(forward, args, kwargs, {site for entry in self.plan.entries for site in entry.processor.reads})
        for site in sorted(stream.states):
            self._decide_after(site, stream)

    def review(self, forward: Forward) -> None:
        """Show the whole unsteered text to processors that backtrack during generation."""
        entries = [(i, entry.processor) for i, entry in enumerate(self.plan.entries) if entry.processor.lookback]
        sites = {site for _, processor in entries for site in processor.maps}
        if not sites:
            return
        texts = self._texts_at(sites, forward, forward.args, forward.kwargs)
        device = next(iter(texts.values())).device
        for index, processor in entries:
            states = {site: texts[site] for site in processor.maps}
            processor.review(states, token_view(self.plan, index, forward, device))

    # -- running ahead ------------------------------------------------------------------------------------------------

    def _texts_at(
        self, sites: set[Site], forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[Site, torch.Tensor]:
        texts: dict[Site, torch.Tensor] = {}
        self._texts = texts
        try:
            self._run(forward, args, kwargs, sites)
        finally:
            self._texts = None
        return texts

    def _run(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], sites: set[Site]) -> None:
        kwargs = dict(kwargs)
        for name in ("past_key_values", "cache_params"):
            cache = kwargs.get(name)
            if cache is not None:
                # The cache holds nothing of this forward yet, see `_must_read_first`.
                kwargs[name] = copy.deepcopy(cache) if forward.carried else None
        end = forward.past + forward.tokens
        if not mask_fits(kwargs.get("attention_mask"), end):
            real = forward.stream.window.real(0, end, forward_inputs(args, kwargs).device)
            kwargs["attention_mask"] = None if real is None else real.long()
        # Mamba-like models use a cache of states only with `use_cache`; this one is a copy.
        kwargs["use_cache"] = kwargs.get("cache_params") is not None
        self.running = sites
        try:
            with torch.no_grad():
                self.tower.decoder(*args, **kwargs)
        except StopForward:
            pass
        finally:
            self.running = None

    def note(self, site: Site, hidden: torch.Tensor, forward: Forward) -> None:
        """Keep the stream of a run-ahead forward at a site, and end it at the deepest needed one."""
        assert self.running is not None
        if site not in self.running:
            return
        if self._texts is not None:
            self._texts[site] = hidden.detach()
        else:
            _keep(self.plan, site, hidden, forward)
        if site == max(self.running):
            raise StopForward

    # -- within a forward ---------------------------------------------------------------------------------------------

    def read(self, site: Site, hidden: torch.Tensor, forward: Forward) -> None:
        """Take the query states from a forward at a read site, and decide the entries that wait for them."""
        stream = forward.stream
        if not forward.has_query:
            return
        if site in self.plan.averaged and all(index in stream.decisions for index in self.plan.readers[site]):
            return
        if site not in stream.states:
            if self._fired_before(site, stream):
                later = {reader for reader in self.plan.readers if reader >= site}
                self._run(forward, forward.args, forward.kwargs, later)
            else:
                _keep(self.plan, site, hidden, forward)
        self._decide_after(site, stream)

    def decide_unread(self, entries: Iterable[int], stream: Stream, device: torch.device) -> None:
        """Decide the given entries that read nothing, before they first write."""
        for index in entries:
            if index not in stream.decisions and not self.plan.entries[index].processor.reads:
                self._decide(index, stream, device)

    def _fired_before(self, site: Site, stream: Stream) -> bool:
        """Whether an earlier write of this forward changed the stream that is about to be read."""
        for written, steps in self.plan.steps.items():
            if written >= site:
                continue
            for step in steps:
                if step.map is not None:
                    return True
                # Ranks that shard one model must run the same passes, whatever the gates of their prompts.
                if in_lockstep():
                    return True
                for index in step.adds:
                    gate = stream.decisions[index].gate
                    if gate is None or bool((gate != 0).any()):
                        return True
        return False

    def _decide_after(self, site: Site, stream: Stream) -> None:
        for index, entry in enumerate(self.plan.entries):
            if index not in stream.decisions and entry.deepest_read == site:
                self._decide(index, stream, stream.states[site].device)

    def _decide(self, index: int, stream: Stream, device: torch.device) -> None:
        entry = self.plan.entries[index]
        states = stream.means if entry.averages else stream.states
        stream.decisions[index] = decision_of(entry.processor, states, stream.rows, device)


def _keep(plan: Plan, site: Site, hidden: torch.Tensor, forward: Forward) -> None:
    stream = forward.stream
    stream.states[site] = stream.window.query_state(hidden, forward.past)
    # In other forwards entries that read a mean have decided, see `_read_means`.
    if site in plan.averaged and forward.has_whole_prompt:
        stream.means[site] = stream.window.prompt_mean(hidden)


def _prompt_from(column: int, forward: Forward) -> dict[str, Any]:
    """A forward's arguments by name, with its tokens replaced by the prompt from a column on."""
    stream, window = forward.stream, forward.stream.window
    assert stream.prompt is not None
    # The forward's cache positions do not apply to these columns.
    own = ("input_ids", "inputs_embeds", "cache_position")
    kwargs = {name: value for name, value in forward.kwargs.items() if name not in own}
    width = window.prompt_end - column
    kwargs |= {name: value[:, -width:] for name, value in stream.prompt.inputs.items()}
    if "position_ids" in kwargs:
        positions = window.position_ids(stream.rows, next(iter(stream.prompt.inputs.values())).device)
        kwargs["position_ids"] = positions[:, column:]
    kwargs["attention_mask"] = None if window.mask is None else window.mask.long()
    return kwargs
