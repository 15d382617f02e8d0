"""The plan of a call: processors in order, their sites, and the scale of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.runtime.arguments import Scale, as_number, check_rows
from finesteer_hf.sites import Site


# Active adapters: names in order, each with its scale.
Selection = tuple[tuple[str, float], ...]
SelectionLike = str | Sequence[str] | Mapping[str, float] | None


def as_selection(value: SelectionLike) -> Selection:
    """Normalise `"a"`, `["a", "b"]`, `{"a": 1.0, "b": -0.5}` or None.

    Raises:
        TypeError: for anything else.
        ValueError: if a name is repeated, or a scale is not finite.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return ((value, 1.0),)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        pairs = tuple((name, as_number(scale, f"The scale of {name!r}")) for name, scale in value.items())
    elif isinstance(value, Sequence) and all(isinstance(name, str) for name in value):
        pairs = tuple((name, 1.0) for name in value)
    else:
        raise TypeError(
            f"Give the active adapters as a name, a list of names, a dict of name to scale, or None; got {value!r}."
        )
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"An adapter can be active once; got {names}. Use a dict to give it a larger scale.")
    return pairs


@dataclass(frozen=True)
class PlanEntry:
    """A processor of a call.

    Attributes:
        name: the adapter's name, or `processor_<i>` for one passed to the call.
        processor: the processor.
        scale: a number, or one number a row of the user's batch (before beams).
    """

    name: str
    processor: SteeringProcessor
    scale: Scale

    @property
    def off(self) -> bool:
        """Whether the entry changes no row."""
        return not any(self.scale) if isinstance(self.scale, tuple) else self.scale == 0.0

    @property
    def averages(self) -> bool:
        """Whether the entry decides from prompt means."""
        return bool(self.processor.reads) and self.processor.query_pool == "mean"

    @property
    def deepest_read(self) -> Site | None:
        """The last read site; after it the entry can decide."""
        return max(self.processor.reads, default=None)


@dataclass
class SiteStep:
    """One step at a site: either additive entries that share one add, or the map of one entry."""

    adds: list[int] = field(default_factory=list)
    map: int | None = None


@dataclass(frozen=True)
class Plan:
    """The entries of a call, and what happens at each site.

    Attributes:
        entries: in the order in which they act.
        steps: for each written or mapped site, its steps in order; consecutive additive entries share one.
        readers: for each read site, the entries that read there.
    """

    entries: tuple[PlanEntry, ...]
    steps: Mapping[Site, tuple[SiteStep, ...]]
    readers: Mapping[Site, tuple[int, ...]]

    @classmethod
    def of(cls, entries: Sequence[PlanEntry]) -> Plan:
        """Build a plan; entries of scale zero are left out."""
        kept = tuple(entry for entry in entries if not entry.off)
        steps: dict[Site, list[SiteStep]] = {}
        readers: dict[Site, list[int]] = {}
        for index, entry in enumerate(kept):
            for site in entry.processor.reads:
                readers.setdefault(site, []).append(index)
            for site in entry.processor.writes:
                at_site = steps.setdefault(site, [])
                if not at_site or at_site[-1].map is not None:
                    at_site.append(SiteStep())
                at_site[-1].adds.append(index)
            for site in entry.processor.maps:
                steps.setdefault(site, []).append(SiteStep(map=index))
        return cls(
            kept,
            {site: tuple(value) for site, value in steps.items()},
            {site: tuple(value) for site, value in readers.items()},
        )

    def __bool__(self) -> bool:
        return bool(self.entries)

    def of_row(self, row: int) -> Plan:
        """The plan of one row of the batch alone, as the user counts rows."""
        entries = (
            PlanEntry(e.name, e.processor, e.scale[row] if isinstance(e.scale, tuple) else e.scale)
            for e in self.entries
        )
        return Plan.of(tuple(entries))

    @cached_property
    def lookback(self) -> int:
        """Most tokens that an entry may drop; 0 if none does."""
        return max((entry.processor.lookback for entry in self.entries), default=0)

    @cached_property
    def remembers(self) -> bool:
        """Whether an entry needs rows to keep their places from token to token."""
        return any(entry.processor.remembers for entry in self.entries)

    @cached_property
    def depends_on_query(self) -> bool:
        """Whether an entry's steering depends on where the prompt ends."""
        return any(entry.processor.depends_on_query for entry in self.entries)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """All sites of the plan, in forward order."""
        return tuple(sorted({site for entry in self.entries for site in entry.processor.sites}))

    @cached_property
    def averaged(self) -> frozenset[Site]:
        """Sites at which an entry reads the prompt mean."""
        entries = (entry.processor for entry in self.entries if entry.averages)
        return frozenset(site for processor in entries for site in processor.reads)

    @cached_property
    def writes_before_a_read(self) -> bool:
        """Whether a read site comes after a write site of any entry."""
        return bool(self.steps) and bool(self.readers) and min(self.steps) < max(self.readers)

    @cached_property
    def writes_before_reading(self) -> bool:
        """Whether an entry must write before it has read; the prompt is then read in a separate pass."""
        for entry in self.entries:
            deepest = entry.deepest_read
            if deepest is not None and any(
                site < deepest for site in (*entry.processor.writes, *entry.processor.maps)
            ):
                return True
        return False


def row_scales(scale: Scale, rows: int, expand: int, device: torch.device) -> torch.Tensor | float:
    """Scales of the rows of a forward: a number as it is, or `[rows]` float32.

    Args:
        scale: a number, or one number a row of the user's batch.
        rows: rows of the forward.
        expand: rows of the forward per row of the user's batch (beams, returned sequences).
        device: device of the result.

    Raises:
        ValueError: if the numbers of rows do not match.
    """
    if not isinstance(scale, tuple):
        return scale
    check_rows("Steering", len(scale), rows // expand)
    return torch.tensor(scale, dtype=torch.float32, device=device).repeat_interleave(expand)
