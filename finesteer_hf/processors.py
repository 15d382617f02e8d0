"""The activation twin of transformers' `LogitsProcessor`.

A steering method at run time is a `SteeringProcessor`: it names the sites it reads and writes, and implements any of
three functions. `decide` is called once per query, with the unsteered states of the prompt; `transform` at each
forward, for maps of the activation and token-level methods; `logits_processors` once per call, for methods that act on
logits. The run time handles hooks, positions, padding, caches, rows and scales; the processor never does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from finesteer_hf.sites import Site


Positions = Literal["all", "prompt", "generated"]
POSITIONS: tuple[Positions, ...] = ("all", "prompt", "generated")
QueryPool = Literal["last", "mean"]


class QueryStates(Mapping[Site, torch.Tensor]):
    """The unsteered states of the queries, one row each.

    Maps each read site to `[rows, width]`, float32, on the device of that site's stream.

    Attributes:
        rows: number of rows in the batch, beams and returned sequences included.
        device: device of the rows.
    """

    def __init__(self, states: Mapping[Site, torch.Tensor], rows: int, device: torch.device) -> None:
        self._states = dict(states)
        self.rows = rows
        self.device = device

    def __getitem__(self, site: Site) -> torch.Tensor:
        return self._states[site]

    def __iter__(self) -> Any:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)


@dataclass
class Decision:
    """A processor's decision for the rows of a call.

    Attributes:
        vectors: for each write site `[rows, width]` or `[1, width]`, float32: added to the stream.
        gate: `[rows]` in [0, 1], or None for an ungated method. At exactly 0 the row's stream stays bit-identical.
        record: what `output_steering=True` returns, tensors with one entry a row (`score`, `experts`, ...).
    """

    vectors: Mapping[Site, torch.Tensor]
    gate: torch.Tensor | None = None
    record: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class DecisionFormula:
    """What `decide` computes, by the names of formulas and by tensors: for programs that have these and not the class.

    With h the state of the query at `read`: `vector(h)` for all write sites side by side, times `gate(score(h))`.

    Attributes:
        read: where h is taken.
        vector: name in `finesteer_hf.estimators.VECTOR_FUNCTIONS`.
        score: name in `finesteer_hf.estimators.SCORE_FUNCTIONS`; None where the gate is always open.
        gate: `stepped` (the dose of a score is looked up between the scores at which it steps), `logistic` or `ser` (the
            score is the dose); None where it is always open.
        tensors: what the formulas take, by the names of the adapter's file, float32.
    """

    read: Site
    vector: str
    score: str | None
    gate: str | None
    tensors: Mapping[str, torch.Tensor]


@dataclass
class TokenView:
    """What `transform` knows about the current forward.

    Attributes:
        mask: bool `[rows, tokens]`: real tokens that the processor's `positions` select; None if it selects all.
        last_index: int64 `[rows]`: index in this forward of each row's newest real token.
        in_prompt: whether the forward still contains prompt tokens.
        scale: `[rows, 1, 1]` float32: the run-time scale of each row, without the strength.
        state: the processor's memory of this call; empty at the start of each call.
        first_column: absolute position of this forward's first column.
        query_column: absolute position of the query tokens: a number if all rows agree, else int64 `[rows]`.
        decision: the result of `decide` for the rows; None if it was not called, or the processor reads nothing.
    """

    mask: torch.Tensor | None
    last_index: torch.Tensor | None
    in_prompt: bool
    scale: torch.Tensor
    state: dict[str, Any]
    first_column: int = 0
    query_column: int | torch.Tensor = 0
    decision: Decision | None = None

    def since_query(self, hidden: torch.Tensor) -> torch.Tensor:
        """Each column's distance from the query, in tokens: 0 the query itself, 1 the first generated token, ...

        Returns:
            int64 `[rows or 1, tokens]`.
        """
        columns = torch.arange(self.first_column, self.first_column + hidden.shape[1], device=hidden.device)[None]
        if isinstance(self.query_column, int):
            return columns - self.query_column
        return columns - self.query_column.to(hidden.device)[:, None]

    def newest(self, hidden: torch.Tensor) -> torch.Tensor:
        """State of each row's newest real token, `[rows, width]`."""
        if self.last_index is None:
            return hidden[:, -1]
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), self.last_index.to(hidden.device)]


@dataclass(frozen=True)
class StepView:
    """What `watch` knows about a decoding step, after its tokens are chosen.

    The newest token has not been through the model yet: `transform` last saw the state that it was chosen from.

    Attributes:
        new_tokens: int64 `[rows]`: number of generated tokens of each row, the newest included.
        newest: int64 `[rows]`: the newest token.
        active: bool `[rows]`: rows that may backtrack: not finished before this step, and of a scale other than 0.
        ended: bool `[rows]`: rows that this token ends (end of sequence, length, any stopping criterion).
        state: the processor's memory of this call, shared with `transform`.
    """

    new_tokens: torch.Tensor
    newest: torch.Tensor
    active: torch.Tensor
    ended: torch.Tensor
    state: dict[str, Any]


class SteeringProcessor:
    """Base of everything that steers activations.

    Attributes:
        reads: sites whose states of the prompt `decide` needs.
        query_pool: which states those are: of the prompt's `last` real token, or the `mean` over its real tokens. A
            mean needs the whole prompt, so a call that continues an earlier cache is refused unless it passes all
            token ids, as for `generate`.
        writes: sites that `decide` returns vectors for.
        maps: sites at which `transform` is called in each forward.
        positions: tokens that are steered: `all` (prompt and generated), `prompt`, or `generated` (from the last prompt
            token on, the first state that produces a generated token).
        strength: multiplies the vectors of `decide`; `steering_scale` multiplies it again at run time.
        lookback: most tokens that `watch` ever drops; 0 if it is not called.
        remembers: whether `transform` depends on what `state` holds of earlier tokens. Beams and backtracking, which
            reorder or rewind rows, are then refused.
    """

    reads: tuple[Site, ...] = ()
    writes: tuple[Site, ...] = ()
    maps: tuple[Site, ...] = ()
    query_pool: QueryPool = "last"
    positions: Positions = "all"
    strength: float = 1.0
    lookback: int = 0
    remembers: bool = False

    def decide(self, queries: QueryStates) -> Decision:
        """Decide, once per query, what is added at the write sites."""
        return Decision(vectors={})

    def transform(self, site: Site, hidden: torch.Tensor, view: TokenView) -> torch.Tensor:
        """Map the stream `[rows, tokens, width]` at a site of `maps`; rows of scale 0 must be returned unchanged."""
        return hidden

    def watch(self, step: StepView) -> torch.Tensor:
        """After each step of `generate`: how many of its newest tokens each row drops, int64 `[rows]`.

        The row continues from the rest; its last kept token, or the prompt's, goes through the model again.
        """
        return torch.zeros_like(step.new_tokens)

    def review(self, states: Mapping[Site, torch.Tensor], view: TokenView) -> None:
        """See the unsteered states at `maps` before a plain forward over prompt and answer (`prompt_lengths`).

        Called for processors with a `lookback`, which may store in `view.state` what they would have done.

        Args:
            states: `[rows, tokens, width]` at each site.
            view: as for `transform`.
        """

    def records(self, state: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What `output_steering=True` returns beside the record of `decide`: tensors with one entry a row."""
        return {}

    def logits_processors(self, scale: torch.Tensor | float) -> list[Any]:
        """`LogitsProcessor`s for `generate`'s own list; `scale` is a number, or `[rows]` float32 for mixed batches."""
        return []

    def contrast_processors(
        self, scale: torch.Tensor | float, unsteered: Callable[[torch.Tensor], torch.Tensor]
    ) -> list[Any]:
        """Like `logits_processors`, and run after them, for methods that compare with the unsteered logits.

        Args:
            scale: as for `logits_processors`.
            unsteered: maps `input_ids` `[rows, tokens]` to the unsteered model's next-token logits `[rows,
                vocabulary]` float32.
        """
        return []

    @property
    def acts_on_logits(self) -> bool:
        """Whether the processor's class has logits processors."""
        own, base = type(self), SteeringProcessor
        return (
            own.logits_processors is not base.logits_processors
            or own.contrast_processors is not base.contrast_processors
        )

    @property
    def depends_on_query(self) -> bool:
        """Whether steering depends on where the prompt ends."""
        return bool(self.reads) or self.positions != "all" or self.lookback > 0 or self.acts_on_logits

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that need a hook, in forward order."""
        return tuple(sorted({*self.reads, *self.writes, *self.maps}))


class SteeringProcessorList(list[SteeringProcessor]):
    """Processors that act in order, for `generate(steering_processor=SteeringProcessorList([...]))`.

    Example:
        >>> processors = SteeringProcessorList([ConstantVector(Site("resid_post", 12), vector)])
        >>> model.generate(**inputs, steering_processor=processors)
    """

    def __init__(self, processors: Iterable[SteeringProcessor] = ()) -> None:
        super().__init__(processors)
        for processor in self:
            if not isinstance(processor, SteeringProcessor):
                raise TypeError(
                    f"A SteeringProcessorList holds SteeringProcessor objects, got {type(processor).__name__}."
                )


class ConstantVector(SteeringProcessor):
    """Add one vector at one site, whatever the query.

    Args:
        site: where it is added.
        vector: `[width]`, any float dtype.
        positions: tokens that are steered.
        strength: factor of the vector.
    """

    def __init__(
        self, site: Site | str, vector: torch.Tensor, *, positions: Positions = "all", strength: float = 1.0
    ) -> None:
        self.site = Site.parse(site)
        self.writes = (self.site,)
        self.positions = positions
        self.strength = strength
        self.vector = vector.detach().float()

    def decide(self, queries: QueryStates) -> Decision:
        return Decision(vectors={self.site: self.vector.to(queries.device)[None]})
