"""Writing at a site: what a call adds there, merged to one op, and the maps of the activation.

What is added is computed once for a stream, in fp32, and cast to the stream's dtype; from then on a decode step adds it in
one op. Rows that are not steered add -0.0, the additive identity of IEEE arithmetic: x + -0.0 is x to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from finesteer_hf.plan import Plan, PlanEntry, row_scales
from finesteer_hf.positions import Window
from finesteer_hf.processors import Positions, TokenView
from finesteer_hf.sites import Site
from finesteer_hf.streams import Prompt, Stream


class StreamWriter:
    """The writing half of a `CallSession`, which says where in the sequence the forward is and makes the decisions.

    Attributes:
        plan: what the call steers with.
        prompt: what `generate` knows of the prompts; None in a plain forward.
        record: whether relative norms are kept.
        past, tokens: columns before the forward, and in it.
        decoding: whether the prompt is done.
        memory: each entry's own state of the call, of the first sequence.
        streams: the call's sequences.
        relative_norms: norm of what each entry adds, as a share of the state's, `[rows]`.
        unchecked: sites that something new is added at, each with the largest magnitude of it.
    """

    plan: Plan
    prompt: Prompt | None
    record: bool
    past: int
    tokens: int
    decoding: bool
    memory: list[dict[str, Any]]
    streams: list[Stream]
    relative_norms: dict[str, torch.Tensor]
    unchecked: list[tuple[Site, torch.Tensor]]

    def _decide(self, index: int, entry: PlanEntry, stream: Stream, device: torch.device) -> None:
        raise NotImplementedError

    def _add(self, site: Site, number: int, adds: list[int], hidden: torch.Tensor, stream: Stream) -> torch.Tensor:
        undecided = [i for i in adds if i not in stream.decisions]
        for index in undecided:
            if self.plan.entries[index].processor.reads:
                # Positions of this chunk come before the query; nothing of it is steered.
                continue
            self._decide(index, self.plan.entries[index], stream, hidden.device)
        ready = [i for i in adds if i in stream.decisions]
        if not ready:
            return hidden
        key = (site, number)
        if key not in stream.adds or undecided:
            stream.adds[key] = self._deltas(site, ready, hidden, stream)
            if len(self.plan.steps[site]) == 1 and len(ready) == len(adds):
                late = [d for p, d in stream.adds[key].items() if p != "prompt"]
                stream.decode[site] = sum(late[1:], late[0]) if late else None
        for positions, delta in stream.adds[key].items():
            if self.decoding:
                hidden = hidden if positions == "prompt" else hidden + delta
                continue
            hidden = self._add_to_prompt(positions, delta, hidden, stream.window)
        return hidden

    def _add_to_prompt(
        self, positions: Positions, delta: torch.Tensor, hidden: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """Add to the named tokens of a forward; of tensors of the stream's size only the result is made."""
        columns = window.shared_columns(positions, self.past, self.tokens)
        if columns == slice(0, self.tokens):
            return hidden + delta
        if columns is not None:
            if columns.start == columns.stop:
                return hidden
            steered = hidden.clone()
            steered[:, columns] += delta
            return steered
        mask = window.token_mask(positions, self.past, self.tokens, hidden.device)
        if mask is None:
            return hidden + delta
        # -0.0 is the additive identity of IEEE arithmetic: x + -0.0 is x to the bit, which x + 0.0 is not.
        laid_out = torch.where(mask[..., None], delta, -0.0)
        return laid_out.add_(hidden) if laid_out.shape == hidden.shape else hidden + laid_out

    @torch.no_grad()
    def _deltas(
        self, site: Site, adds: list[int], hidden: torch.Tensor, stream: Stream
    ) -> dict[Positions, torch.Tensor]:
        total: dict[Positions, torch.Tensor] = {}
        expand = self.prompt.expand if self.prompt is not None else 1
        for index in adds:
            entry, decision = self.plan.entries[index], stream.decisions[index]
            if site not in decision.vectors:
                continue
            vector = decision.vectors[site].to(device=hidden.device, dtype=torch.float32)
            scale = row_scales(entry.scale, stream.rows, expand, hidden.device)
            coefficient = scale * entry.processor.strength
            if decision.gate is not None:
                coefficient = coefficient * decision.gate.to(hidden.device, torch.float32)
            if isinstance(coefficient, torch.Tensor):
                coefficient = coefficient[:, None]
                delta = (coefficient * vector).masked_fill_(coefficient == 0, -0.0)
            else:
                delta = coefficient * vector
            if self.record:
                self._record_norm(entry.name, site, delta, hidden, stream)
            delta = delta.to(hidden.dtype)[:, None]
            positions = entry.processor.positions
            total[positions] = total[positions] + delta if positions in total else delta
        self.unchecked += [(site, torch.linalg.vector_norm(delta, ord=math.inf)) for delta in total.values()]
        return total

    def _check_finite(self) -> None:
        """Look once at all that was decided: a strength that half precision cannot hold makes every logit NaN."""
        unchecked, self.unchecked = self.unchecked, []
        largest = unchecked[0][1]
        if len(unchecked) > 1:
            largest = torch.stack([magnitude.to(largest) for _, magnitude in unchecked]).max()
        if math.isfinite(float(largest)):
            return
        site, magnitude = next((s, m) for s, m in unchecked if not math.isfinite(float(m)))
        adds = [self.plan.entries[index] for step in self.plan.steps[site] for index in step.adds]
        names = ", ".join(f"{e.name!r} (strength {e.processor.strength:g}, scale {e.scale})" for e in adds)
        raise ValueError(
            f"What steering adds at {site} is not finite in {magnitude.dtype}: {names}. The largest number there is "
            f"{torch.finfo(magnitude.dtype).max:g}. Lower `steering_scale` or the strength, load the model in bfloat16, or "
            "look for NaN in the adapter's tensors."
        )

    def _record_norm(self, name: str, site: Site, delta: torch.Tensor, hidden: torch.Tensor, stream: Stream) -> None:
        if site in stream.states:
            state = stream.states[site].to(hidden.device)
        elif stream.window.query_within(self.past, self.tokens):
            state = stream.window.query_state(hidden, self.past)
        else:
            return
        self.relative_norms[name] = delta.norm(dim=-1).expand(stream.rows) / state.norm(dim=-1)

    def _transform(self, index: int, site: Site, hidden: torch.Tensor, stream: Stream) -> torch.Tensor:
        entry = self.plan.entries[index]
        positions = entry.processor.positions
        if self.decoding and positions == "prompt":
            return hidden
        return entry.processor.transform(site, hidden, self._view(index, stream, hidden.device))

    def _view(self, index: int, stream: Stream, device: torch.device) -> TokenView:
        entry, window = self.plan.entries[index], stream.window
        positions = entry.processor.positions
        expand = self.prompt.expand if self.prompt is not None else 1
        scale = row_scales(entry.scale, stream.rows, expand, device)
        if not isinstance(scale, torch.Tensor):
            scale = torch.full((stream.rows,), float(scale), device=device)
        return TokenView(
            mask=None if self.decoding else window.token_mask(positions, self.past, self.tokens, device),
            last_index=None if self.decoding else window.newest(self.past, self.tokens, device),
            in_prompt=not self.decoding,
            scale=scale[:, None, None],
            state=self.memory[index] if stream is self.streams[0] else stream.memory.setdefault(index, {}),
            first_column=self.past,
            query_column=window.query,
            decision=stream.decisions.get(index),
        )
