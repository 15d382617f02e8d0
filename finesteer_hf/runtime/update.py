"""Writes at sites: a call's addends, merged into one op, and maps of the activation.

The addend is computed once for a stream, in fp32, and cast to the stream's dtype; from then on a decode step adds it
in one op. Unsteered rows add -0.0, the additive identity of IEEE arithmetic: x + -0.0 is x to the bit.

`addend`, `merged` and `written` are the update itself. A compiled forward calls them inside its graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from finesteer_hf.processors import Decision, Positions, TokenView
from finesteer_hf.runtime.forwards.streams import Forward, Stream
from finesteer_hf.runtime.forwards.window import Window
from finesteer_hf.runtime.plan import Plan, row_scales
from finesteer_hf.sites import Site


@torch.no_grad()
def addend(decision: Decision, site: Site, scale: torch.Tensor | float, device: torch.device) -> torch.Tensor:
    """One entry's addend at a site, `[rows or 1, width]` float32; -0.0 in rows of gate or scale 0.

    Args:
        decision: a decision with a vector for the site.
        site: the site.
        scale: run-time scale times strength: a number, or a tensor with one number, or one a row.
        device: device of the stream.
    """
    vector = decision.vectors[site].to(device=device, dtype=torch.float32)
    if decision.gate is not None:
        scale = scale * decision.gate.to(device, torch.float32)
    if not isinstance(scale, torch.Tensor):
        return scale * vector
    scale = scale.reshape(-1, 1)
    return (scale * vector).masked_fill_(scale == 0, -0.0)


def merged(addends: Iterable[tuple[Positions, torch.Tensor]], dtype: torch.dtype) -> dict[Positions, torch.Tensor]:
    """One addend for all entries of the same positions, `[rows or 1, 1, width]` in the stream's dtype."""
    total: dict[Positions, torch.Tensor] = {}
    for positions, delta in addends:
        delta = delta.to(dtype)[:, None]
        total[positions] = total[positions] + delta if positions in total else delta
    return total


def written(hidden: torch.Tensor, adds: Mapping[Positions, torch.Tensor], window: Window, past: int) -> torch.Tensor:
    """The stream with addends on the selected tokens; allocates only the result at the stream's size.

    Args:
        hidden: `[rows, tokens, width]`.
        adds: the addends, see `merged`.
        window: the columns of the sequence.
        past: absolute position of the first token.
    """
    for positions, delta in adds.items():
        hidden = _written(hidden, delta, positions, window, past)
    return hidden


def _written(
    hidden: torch.Tensor, delta: torch.Tensor, positions: Positions, window: Window, past: int
) -> torch.Tensor:
    tokens = hidden.shape[1]
    columns = window.shared_columns(positions, past, tokens)
    if columns == slice(0, tokens):
        return hidden + delta
    if columns is not None:
        if columns.start == columns.stop:
            return hidden
        steered = hidden.clone()
        steered[:, columns] += delta
        return steered
    mask = window.token_mask(positions, past, tokens, hidden.device)
    if mask is None:
        return hidden + delta
    # -0.0 is the additive identity of IEEE arithmetic: x + -0.0 is x to the bit; x + 0.0 is not.
    laid_out = torch.where(mask[..., None], delta, -0.0)
    return laid_out.add_(hidden) if laid_out.shape == hidden.shape else hidden + laid_out


class Update:
    """Applies the decisions of a call at each site.

    Args:
        plan: the call's plan.
        record: whether to keep relative norms.

    Attributes:
        relative_norms: norm of each entry's addend relative to the state's norm, `[rows]`.
        unchecked: sites with a new addend, each with its largest magnitude.
    """

    def __init__(self, plan: Plan, record: bool) -> None:
        self.plan = plan
        self.record = record
        self.relative_norms: dict[str, torch.Tensor] = {}
        self.unchecked: list[tuple[Site, torch.Tensor]] = []

    def add(self, site: Site, entries: Iterable[int], hidden: torch.Tensor, forward: Forward) -> torch.Tensor:
        """Add the addends of a step's decided entries; an undecided entry steers no token before its query."""
        stream = forward.stream
        decided = tuple(index for index in entries if index in stream.decisions)
        if not decided:
            return hidden
        key = (site, decided)
        if key not in stream.adds:
            stream.adds[key] = self._adds(site, decided, hidden, forward)
            if len(self.plan.steps[site]) == 1 and decided == tuple(entries):
                late = [delta for positions, delta in stream.adds[key].items() if positions != "prompt"]
                stream.decode[site] = sum(late[1:], late[0]) if late else None
        return written(hidden, stream.adds[key], stream.window, forward.past)

    @torch.no_grad()
    def _adds(
        self, site: Site, decided: Iterable[int], hidden: torch.Tensor, forward: Forward
    ) -> dict[Positions, torch.Tensor]:
        stream = forward.stream
        addends: list[tuple[Positions, torch.Tensor]] = []
        for index in decided:
            entry, decision = self.plan.entries[index], stream.decisions[index]
            if site not in decision.vectors:
                continue
            scale = row_scales(entry.scale, stream.rows, stream.expand, hidden.device)
            delta = addend(decision, site, scale * entry.processor.strength, hidden.device)
            if self.record:
                self._record_norm(entry.name, site, delta, hidden, forward)
            addends.append((entry.processor.positions, delta))
        total = merged(addends, hidden.dtype)
        self.unchecked += [(site, torch.linalg.vector_norm(delta, ord=math.inf)) for delta in total.values()]
        return total

    def _record_norm(self, name: str, site: Site, delta: torch.Tensor, hidden: torch.Tensor, forward: Forward) -> None:
        stream = forward.stream
        if site in stream.states:
            state = stream.states[site].to(hidden.device)
        elif forward.has_query:
            state = stream.window.query_state(hidden, forward.past)
        else:
            return
        self.relative_norms[name] = delta.norm(dim=-1).expand(stream.rows) / state.norm(dim=-1)

    def check_finite(self) -> None:
        """Check new addends once: one that overflows half precision makes every logit NaN.

        Raises:
            ValueError: if an addend is not finite.
        """
        if not self.unchecked:
            return
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
            f"What steering adds at {site} is not finite in {magnitude.dtype}: {names}. The largest number is "
            f"{torch.finfo(magnitude.dtype).max:g}. Lower `steering_scale` or the strength, load the model in bfloat16, or "
            "look for NaN in the adapter's tensors."
        )

    def transform(self, index: int, site: Site, hidden: torch.Tensor, forward: Forward) -> torch.Tensor:
        """Apply the map of an entry."""
        processor = self.plan.entries[index].processor
        if forward.decoding and processor.positions == "prompt":
            return hidden
        return processor.transform(site, hidden, token_view(self.plan, index, forward, hidden.device))

    def for_decoding(
        self, stream: Stream, sites: Mapping[Site, int], dtype: torch.dtype, device: torch.device
    ) -> dict[Site, torch.Tensor]:
        """The addend of a decode step at each given site, `[rows, 1, width]`; -0.0 where the call does not steer.

        Args:
            stream: the sequence, past its prompt.
            sites: the sites and their widths.
            dtype, device: those of the stream at sites without an addend.
        """
        for site, width in sites.items():
            if site not in stream.compiled:
                delta = stream.decode.get(site)
                if delta is None:
                    delta = torch.full((1, 1, width), -0.0, dtype=dtype, device=device)
                stream.compiled[site] = delta.expand(stream.rows, 1, width).contiguous()
        return stream.compiled


def token_view(plan: Plan, index: int, forward: Forward, device: torch.device) -> TokenView:
    """What an entry's `transform` knows about a forward."""
    entry, stream, window = plan.entries[index], forward.stream, forward.stream.window
    past, tokens = forward.past, forward.tokens
    scale = row_scales(entry.scale, stream.rows, stream.expand, device)
    if not isinstance(scale, torch.Tensor):
        scale = torch.full((stream.rows,), float(scale), device=device)
    return TokenView(
        mask=None if forward.decoding else window.token_mask(entry.processor.positions, past, tokens, device),
        last_index=None if forward.decoding else window.newest(past, tokens, device),
        in_prompt=not forward.decoding,
        scale=scale[:, None, None],
        state=stream.memory[index],
        first_column=past,
        query_column=window.query,
        decision=stream.decisions.get(index),
    )
