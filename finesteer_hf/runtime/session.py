"""The state of one call: the rows' queries, the decisions and the addends.

A call's state is not kept on the model. A session is in a `ContextVar` of the calling thread during one `generate` (or
one plain forward), so threads that share a model never see each other's steering, and an exception ends the session
with the call.

A session owns a `QueryPass`, which reads the queries and calls each entry's `decide` once, and an `Update`, which
applies the decisions. It has one *stream* per cache: the generated sequence is one; the unconditional sequence of
classifier-free guidance is another, and uses the decisions of the first. Tokens are identified by their absolute
position, from the cache's length before the forward, so chunked prefill, candidates of assisted decoding and caches of
earlier turns need no special case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from finesteer_hf.runtime.arguments import check_rows
from finesteer_hf.runtime.current import CURRENT
from finesteer_hf.runtime.decoding.logits import UnsteeredLogits
from finesteer_hf.runtime.forwards.forward_check import ForwardCheck
from finesteer_hf.runtime.forwards.streams import (
    Forward,
    Prompt,
    Stream,
    cache_length,
    forward_cache,
    forward_inputs,
    holds_states,
)
from finesteer_hf.runtime.forwards.window import Window
from finesteer_hf.runtime.plan import Plan, PlanEntry, row_scales
from finesteer_hf.runtime.query_pass import QueryPass
from finesteer_hf.runtime.update import Update
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


class CallSession:
    """The steering of one call.

    Args:
        runtime: the model's run time.
        plan: the call's plan.
        prompt: the prompt, known before the first forward inside `generate`; None for a plain forward.
        rows: number of rows with their own steering; None if it is the same for all.
        record: whether to keep relative norms for `output_steering`.

    Attributes:
        of_forward: whether the session ends with the forward that created it.
        query_pass: reads and decides.
        update: applies the decisions.
        memory: each entry's memory of the call, for the first sequence.
        streams: the sequences of the call; the generated one comes first.
        forward: the running or last forward.
        takes_back: whether the decoding loop can take tokens back.
        blocks: number of open `with model.steering(...)` blocks entered inside the call; calls inside them are not
            part of it.
    """

    def __init__(
        self,
        runtime: SteeringRuntime,
        plan: Plan,
        prompt: Prompt | None = None,
        *,
        rows: int | None = None,
        record: bool = False,
    ) -> None:
        self.runtime = runtime
        self.plan = plan
        self.prompt = prompt
        self.rows = rows
        self.query_pass = QueryPass(plan, runtime.tower)
        self.update = Update(plan, record)
        self.of_forward = False
        self.takes_back = False
        self.blocks = 0
        self.outer: CallSession | None = None
        self.memory: list[dict[str, Any]] = [{} for _ in plan.entries]
        self.streams: list[Stream] = []
        self.forward: Forward | None = None

    # -- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> CallSession:
        self.outer = CURRENT.get()
        self._token = CURRENT.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        CURRENT.reset(self._token)

    def forget_forward(self) -> None:
        """Release the last forward's cache and arguments."""
        self.streams[0].cache = None
        assert self.forward is not None
        self.forward.args, self.forward.kwargs = (), {}

    # -- a forward begins ---------------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        """Whether the running forward belongs to the query pass."""
        return self.query_pass.running is not None

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Place a forward of the decoder on its stream; called by the decoder's pre-hook."""
        if self.runs_ahead:
            return
        inputs = forward_inputs(args, kwargs)
        rows, tokens = int(inputs.shape[0]), int(inputs.shape[1])
        cache = forward_cache(kwargs)
        stream = self._stream_of(cache, rows, tokens)
        if stream is None:
            stream = self._new_stream(cache, rows, tokens, kwargs)
        if self.plan.remembers and cache is not None and not getattr(cache, "is_compileable", False):
            # Rejected drafts were cut off. A static cache is never used for drafts, and its length is on the device.
            stream.seen = min(stream.seen, cache_length(cache) or stream.seen)
        # Without a cache every forward passes the whole sequence again.
        past = stream.seen if cache is not None else 0
        stream.seen = past + tokens
        decoding = cache is not None and past >= stream.window.prompt_end
        if decoding and self.plan.lookback and not self.takes_back:
            raise ValueError(
                "The active steering takes generated tokens back, which only `generate` can do, with its own greedy search "
                "or sampling. To score a text, give the model prompt and answer in one forward, with `prompt_lengths`."
            )
        carried = not decoding and cache is not None and (past > 0 or holds_states(cache))
        self.forward = Forward(stream, past, tokens, decoding, carried, args, kwargs, ForwardCheck(rows, tokens))
        if not decoding:
            self.query_pass.before(self.forward)
        if self.plan.lookback and self.prompt is not None and self.prompt.lengths is not None:
            self.query_pass.review(self.forward)

    def end_forward(self, output: Any, training: bool) -> None:
        """Check a finished forward of the decoder; called by the decoder's hook, with None after an error.

        Raises:
            UnsupportedModelError: if a site was not passed.
            ValueError: if an addend is not finite.
        """
        if self.forward is None:
            return
        if output is not None:
            self.update.check_finite()
        # Layer drop skips blocks in training.
        if output is None or self.forward.decoding or training:
            self.forward.passage.end((), 0)
            return
        # An early-exit draft temporarily shortens the config.
        self.forward.passage.end(self.plan.sites, int(self.runtime.tower.config.num_hidden_layers))

    def _stream_of(self, cache: Any, rows: int, tokens: int) -> Stream | None:
        for stream in self.streams:
            same_sequence = cache is not None or tokens >= stream.window.prompt_end
            if stream.cache is cache and stream.rows == rows and same_sequence:
                return stream
        for stream in self.streams:
            unmet = cache is not None and stream.cache is None and stream.makes_cache
            if unmet and stream.rows == rows and cache_length(cache) in (0, stream.seen):
                stream.cache = cache
                return stream
        return None

    def _new_stream(self, cache: Any, rows: int, tokens: int, kwargs: dict[str, Any]) -> Stream:
        past = 0 if cache is None else cache_length(cache)
        prompt = self.prompt if self.prompt is not None and not self.streams else None
        if prompt is not None:
            window = self._window(prompt.length, prompt.mask, prompt.lengths)
            # A cache of states does not count its columns; the carried ones are those that the inputs lack.
            past = past or prompt.length - prompt.columns
        else:
            mask = kwargs.get("attention_mask")
            end = past + tokens
            usable = isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == (rows, end)
            window = self._window(end, mask if usable else None, None)
        makes_cache = cache is None and bool(kwargs.get("use_cache"))
        memory = self.memory if not self.streams else [{} for _ in self.plan.entries]
        stream = Stream(window, cache, past, rows, memory, prompt, self._expand, makes_cache)
        if self.streams:
            # Guidance runs a second sequence beside the first; the query, and so the decision, is the first one's.
            stream.decisions = self.streams[0].decisions
        self.streams.append(stream)
        return stream

    @property
    def _expand(self) -> int:
        return self.prompt.expand if self.prompt is not None else 1

    def _window(self, end: int, mask: torch.Tensor | None, lengths: torch.Tensor | None) -> Window:
        if not self.plan:
            # Nothing is steered, so nothing is checked, in particular no mask without a query.
            return Window.of(end, None, None)
        return Window.of(end, None if mask is None else mask.bool(), lengths)

    # -- a site is passed ---------------------------------------------------------------------------------------------

    def visit(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        """The new stream for a site's hook, or None to leave it as it is."""
        forward = self.forward
        if forward is None or not self.plan:
            return None
        stream = forward.stream
        if forward.decoding and site in stream.decode:
            delta = stream.decode[site]
            return None if delta is None else hidden + delta
        if self.runs_ahead:
            self.query_pass.note(site, hidden, forward)
            return None
        forward.passage.check(site, hidden)
        if site in self.plan.readers:
            self.query_pass.read(site, hidden, forward)
        steered = hidden
        for step in self.plan.steps.get(site, ()):
            if step.map is not None:
                steered = self.update.transform(step.map, site, steered, forward)
            else:
                self.query_pass.decide_unread(step.adds, stream, hidden.device)
                steered = self.update.add(site, step.adds, steered, forward)
        return None if steered is hidden else steered

    # -- called by generate
    # --------------------------------------------------------------------------------------------

    def check_rows(self, prompt: Prompt) -> None:
        """Raise `ValueError` if a per-row list does not match the batch."""
        if self.rows is not None:
            check_rows("Steering", self.rows, int(next(iter(prompt.inputs.values())).shape[0]) // prompt.expand)

    def rows_moved(self, shift: torch.Tensor, mask: torch.Tensor, seen: int) -> None:
        """Record that tokens were taken back between two forwards.

        Args:
            shift: int64 `[rows]`: columns by which each row has moved right since the start of the call.
            mask: `[rows, columns]` of all remaining columns, 0 at pads.
            seen: columns that are in the cache now.
        """
        assert self.prompt is not None
        main = self.streams[0]
        start = Window.of(self.prompt.length, self.prompt.mask, self.prompt.lengths)
        main.window = start.moved(shift, mask)
        main.seen = seen

    def logits_processors(self) -> list[Any]:
        """The logits processors of the plan's entries, in order."""
        assert self.prompt is not None
        inputs = next(iter(self.prompt.inputs.values()))
        processors: list[Any] = []
        for entry in self.plan.entries:
            if not entry.processor.acts_on_logits:
                continue
            scale = row_scales(entry.scale, int(inputs.shape[0]), self.prompt.expand, inputs.device)
            processors += entry.processor.logits_processors(scale)
            processors += entry.processor.contrast_processors(scale, UnsteeredLogits(self))
        return processors

    def row_scale(self, entry: PlanEntry, device: torch.device) -> torch.Tensor | float:
        """The scale of an entry for the rows of the last forward: a number, or `[rows]` float32."""
        assert self.forward is not None
        return row_scales(entry.scale, self.forward.stream.rows, self._expand, device)

    def unsteered(self) -> CallSession:
        """A session for unsteered forwards of the same model during this call."""
        return CallSession(self.runtime, Plan.of(()))

    # -- what a compiled decode step needs ----------------------------------------------------------------------------

    @property
    def can_decode_compiled(self) -> bool:
        """Whether the prompt is done and every later step adds the same vectors."""
        for entry in self.plan.entries:
            # In `generate` the logits processors act on logits; a plain forward does it itself.
            if entry.processor.maps or (self.of_forward and entry.processor.acts_on_logits):
                return False
        return bool(self.streams) and self.streams[0].seen >= self.streams[0].window.prompt_end

    def compiled_deltas(self, sites: Mapping[Site, int]) -> dict[Site, torch.Tensor]:
        """The addend of a decode step at each hooked site, `[rows, 1, width]`; -0.0 where the call does not steer."""
        decoder = self.runtime.tower.decoder
        return self.update.for_decoding(self.streams[0], sites, decoder.dtype, decoder.device)  # type: ignore[arg-type]

    # -- what the user sees -------------------------------------------------------------------------------------------

    def records_of_sequences(self, sequences: int) -> dict[str, dict[str, torch.Tensor]]:
        """For each entry, the tensors of its record, one value per returned sequence."""
        if not self.streams:
            return {}
        main = self.streams[0]
        expand = self._expand
        # All rows of a query agree: take its first row, once for each of its returned sequences.
        rows = torch.arange(0, main.rows, expand).repeat_interleave(sequences * expand // main.rows)
        result: dict[str, dict[str, torch.Tensor]] = {}
        for index, entry in enumerate(self.plan.entries):
            decision = main.decisions.get(index)
            values = {} if decision is None else dict(decision.record)
            if decision is not None and decision.gate is not None:
                values["gate"] = decision.gate
            if entry.name in self.update.relative_norms:
                values["relative_norm"] = self.update.relative_norms[entry.name]
            own = entry.processor.records(self.memory[index])
            if decision is not None or own:
                result[entry.name] = {name: value[rows.to(value.device)] for name, value in values.items()} | own
        return result
