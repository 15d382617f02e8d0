"""Reading at a site: the states of the queries, unsteered, and the decisions that are made from them.

Where the forward that steers passes the query before its first write, it is read on the way. Otherwise the prompt is run
ahead, as far as the deepest read site and no further.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from finesteer_hf.plan import PlanEntry
from finesteer_hf.processors import QueryStates
from finesteer_hf.sites import Site
from finesteer_hf.streams import Stream, forward_inputs, in_lockstep, mask_fits
from finesteer_hf.writing import StreamWriter


if TYPE_CHECKING:
    from finesteer_hf.runtime import SteeringRuntime


class StopForward(Exception):
    """Ends a forward whose deepest needed site has been read."""


class StreamReader(StreamWriter):
    """The reading half of a `CallSession`, which says where in the sequence the forward is.

    Attributes:
        runtime: the model's run time.
        streams: the sequences of the call, the one that is generated first.
        carried: whether the forward's cache held something before the prompt.
        probing: the sites that a forward run ahead is to show; None outside of one.
        text_states: where such a forward keeps whole streams, `[rows, tokens, width]`, instead of the query's states.
    """

    runtime: SteeringRuntime
    streams: list[Stream]
    carried: bool
    probing: set[Site] | None
    text_states: dict[Site, torch.Tensor] | None
    _forward: tuple[tuple[Any, ...], dict[str, Any]]

    def _must_read_first(self, stream: Stream) -> bool:
        if all(i in stream.decisions for i, entry in enumerate(self.plan.entries) if entry.processor.reads):
            return False
        if self.plan.writes_before_reading:
            return True
        if self.carried and self.plan.writes_before_a_read:
            # In the middle of a forward the cache can no longer be put back: states of linear attention do not crop.
            return True
        if stream.window.query_within(self.past, self.tokens):
            return False
        # A chunk that ends before the query: what steers the prompt must be known before it is steered.
        late = all(e.processor.positions == "generated" for e in self.plan.entries if e.processor.reads)
        return not (late and stream.window.uniform)

    def _sees_whole_prompt(self, stream: Stream) -> bool:
        return self.past == 0 and not self.carried and self.tokens > stream.window.last_query

    def _read_means(self, stream: Stream) -> None:
        """Decide the entries that take a mean over the prompt, where no forward passes the prompt in one piece.

        The whole prompt is run ahead, without the cache: what that holds may have been steered, and shows no states.

        Raises:
            ValueError: if the call does not bring the tokens that are in the cache already.
        """
        waiting = {i: e for i, e in enumerate(self.plan.entries) if e.averages and i not in stream.decisions}
        if not waiting or self._sees_whole_prompt(stream):
            return
        known = self.prompt.columns if self.prompt is not None and self.prompt.inputs else 0
        if stream is not self.streams[0] or known < stream.window.prompt_end:
            raise ValueError(
                f"{', '.join(repr(entry.name) for entry in waiting.values())} decides from the mean over the whole prompt, "
                "but a part of the prompt is in a cache that was filled before this call, and its states are gone. Give "
                "`generate` the whole text as `input_ids` beside the cache, or leave the cache out."
            )
        args, kwargs = self._prompt_from(0, stream)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache_params")}
        self.text_states = {}
        try:
            self._probe(stream, args, kwargs, set(self.plan.averaged))
            stream.means = {site: stream.window.prompt_mean(hidden) for site, hidden in self.text_states.items()}
        finally:
            self.text_states = None
        for index, entry in waiting.items():
            self._decide(index, entry, stream, stream.means[max(entry.processor.reads)].device)

    def _prompt_from(self, column: int, stream: Stream) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The running forward's arguments, with the prompt from a column on in place of its own tokens."""
        assert self.prompt is not None
        # Where the forward's own columns stand in the cache says nothing of these.
        own = ("input_ids", "inputs_embeds", "cache_position")
        kwargs = {name: value for name, value in self._forward[1].items() if name not in own}
        width, mask = stream.window.prompt_end - column, stream.window.mask
        kwargs |= {name: value[:, -width:] for name, value in self.prompt.inputs.items()}
        if "position_ids" in kwargs:
            positions = stream.window.position_ids(stream.rows, next(iter(self.prompt.inputs.values())).device)
            kwargs["position_ids"] = positions[:, column:]
        kwargs["attention_mask"] = None if mask is None else mask.long()
        return (), kwargs

    def _read_whole_prompt(self, stream: Stream) -> None:
        """Run the unsteered prompt up to the deepest read site, and no further."""
        args, kwargs = self._forward
        complete = self.prompt is not None and stream is self.streams[0] and bool(self.prompt.inputs)
        if complete and self.past + self.tokens < stream.window.prompt_end:
            args, kwargs = self._prompt_from(self.past, stream)
        self._probe(stream, args, kwargs, {site for entry in self.plan.entries for site in entry.processor.reads})
        for site in sorted(stream.states):
            self._decide_after(site, stream)

    def _probe(self, stream: Stream, args: tuple[Any, ...], kwargs: dict[str, Any], sites: set[Site]) -> None:
        kwargs = dict(kwargs)
        for name in ("past_key_values", "cache_params"):
            cache = kwargs.get(name)
            if cache is not None:
                # Nothing of this forward is in the cache yet, see `_must_read_first`.
                kwargs[name] = copy.deepcopy(cache) if self.carried else None
        if not mask_fits(kwargs.get("attention_mask"), self.past + self.tokens):
            real = stream.window.real(0, self.past + self.tokens, forward_inputs(args, kwargs).device)
            kwargs["attention_mask"] = None if real is None else real.long()
        # Mamba-like models look at a cache of states only if they are told to use one; this one is a copy.
        kwargs["use_cache"] = kwargs.get("cache_params") is not None
        self.probing = sites
        try:
            with torch.no_grad():
                self.runtime.tower.decoder(*args, **kwargs)
        except StopForward:
            pass
        finally:
            self.probing = None

    def _note(self, wanted: set[Site], site: Site, hidden: torch.Tensor, stream: Stream) -> None:
        """Keep what a forward of `_probe` shows at a site, and end it at the deepest one that is wanted."""
        if site not in wanted:
            return
        if self.text_states is not None:
            self.text_states[site] = hidden.detach()
        else:
            self._keep(site, hidden, stream)
        if site == max(wanted):
            raise StopForward

    def _review(self, stream: Stream) -> None:
        """Show processors that would have gone back while it was generated the whole text, unsteered."""
        entries = [
            (index, entry.processor) for index, entry in enumerate(self.plan.entries) if entry.processor.lookback
        ]
        sites = {site for _, processor in entries for site in processor.maps}
        if not sites:
            return
        self.text_states = {}
        try:
            self._probe(stream, *self._forward, sites)
            device = next(iter(self.text_states.values())).device
            for index, processor in entries:
                states = {site: self.text_states[site] for site in processor.maps}
                processor.review(states, self._view(index, stream, device))
        finally:
            self.text_states = None

    def _read(self, site: Site, hidden: torch.Tensor, stream: Stream) -> None:
        if not stream.window.query_within(self.past, self.tokens):
            return
        if site in self.plan.averaged and all(index in stream.decisions for index in self.plan.readers[site]):
            return
        if site not in stream.states:
            if self._fired_before(site, stream):
                args, kwargs = self._forward
                self._probe(stream, args, kwargs, {later for later in self.plan.readers if later >= site})
            else:
                self._keep(site, hidden, stream)
        self._decide_after(site, stream)

    def _keep(self, site: Site, hidden: torch.Tensor, stream: Stream) -> None:
        stream.states[site] = stream.window.query_state(hidden, self.past)
        # In other forwards what takes a mean has decided, see `_read_means`.
        if site in self.plan.averaged and self._sees_whole_prompt(stream):
            stream.means[site] = stream.window.prompt_mean(hidden)

    def _fired_before(self, site: Site, stream: Stream) -> bool:
        """Whether a write of this forward has already changed the stream that is about to be read."""
        for written, steps in self.plan.steps.items():
            if written >= site:
                continue
            for step in steps:
                if step.map is not None:
                    return True
                # Ranks that shard one model run the same passes, whatever the gates of their own prompts are.
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
                self._decide(index, entry, stream, stream.states[site].device)

    @torch.no_grad()
    def _decide(self, index: int, entry: PlanEntry, stream: Stream, device: torch.device) -> None:
        kept = stream.means if entry.averages else stream.states
        states = {site: kept[site].to(device) for site in entry.processor.reads}
        queries = QueryStates(states, stream.rows, device)
        if not torch.is_autocast_enabled(device.type):
            stream.decisions[index] = entry.processor.decide(queries)
            return
        # Under autocast the method's products would be taken in half precision.
        with torch.autocast(device.type, enabled=False):
            stream.decisions[index] = entry.processor.decide(queries)
