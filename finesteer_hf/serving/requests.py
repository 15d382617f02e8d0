"""What one request of a packed batch asks for, and what is known of it while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from transformers import LogitsProcessorList

from finesteer_hf.processors import Decision, Positions
from finesteer_hf.runtime.plan import Plan, Selection
from finesteer_hf.serving.sampling import Sampling, TokenLogprob, logits_processors_of
from finesteer_hf.sites import Site


# The three parts of a text that positions tell apart, and the positions that steer each.
Region = Literal["before", "query", "after"]
REGIONS: Mapping[Region, tuple[Positions, ...]] = {
    "before": ("all", "prompt"),
    "query": ("all", "prompt", "generated"),
    "after": ("all", "generated"),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for, as it rides on the engine's own request state.

    The engine broadcasts that state to each tensor-parallel rank, copies it for returned sequences and keeps it when a
    request is queued again. So it holds plain values only.

    Attributes:
        ticket: id that the request was submitted under; its returned sequences share it.
        selection: adapters with their scales.
        sampling: how its tokens are chosen; None leaves that to the engine.
        sequences: number of returned sequences.
    """

    ticket: str
    selection: Selection
    sampling: Sampling | None = None
    sequences: int = 1


def child_id(ticket: str, number: int) -> str:
    """Id that the engine gives to a returned sequence after the first."""
    return f"{ticket}__child#{number}"


def ticket_of(request_id: str) -> str:
    """The ticket of a returned sequence."""
    return request_id.rpartition("__child#")[0] or request_id


def sequence_number(request_id: str, ticket: str) -> int:
    """0 for the sequence that carries the ticket itself, 1 and up for the others."""
    return 0 if request_id == ticket else 1 + int(request_id.rpartition("#")[2])


@dataclass(eq=False)
class SteeredRequest:
    """One request, with all its returned sequences: they share prompt, decision and rows.

    Attributes:
        asked: what it asks for.
        plan: what steers it; empty for an unsteered request.
        prompt: its token ids; empty until the engine shows it.
        states: unsteered states of the query, `[width]` float32, until the decision is made.
        means: means over the prompt, likewise.
        decisions: of each entry of the plan, one row each; complete once `decided`.
        rows: row of the table that each part of the text adds; 0 adds nothing.
        salts: fingerprint of what is added there; 0 for nothing.
        error: why the request fails; the engine goes on with the others.
        logprobs: what was recorded of each sequence's tokens, by request id.
        over: ids of its sequences that ended.
    """

    asked: Asked
    plan: Plan
    prompt: tuple[int, ...] = ()
    states: dict[Site, torch.Tensor] = field(default_factory=dict)
    means: dict[Site, torch.Tensor] = field(default_factory=dict)
    decisions: dict[int, Decision] = field(default_factory=dict)
    rows: dict[Region, int] = field(default_factory=dict)
    salts: dict[Region, int] = field(default_factory=dict)
    decided: bool = False
    error: Exception | None = None
    logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    _processors: dict[str, LogitsProcessorList] = field(default_factory=dict)
    _report: dict[str, dict[str, Any]] | None = None

    @property
    def sequence_ids(self) -> list[str]:
        """Ids of its returned sequences in the engine, the one that carries the ticket first."""
        ticket = self.asked.ticket
        return [ticket, *(child_id(ticket, number) for number in range(self.asked.sequences - 1))]

    @property
    def query(self) -> int:
        """Position of the query: the prompt's last token."""
        return len(self.prompt) - 1

    @cached_property
    def positions(self) -> frozenset[Positions]:
        """Positions of the entries that add something."""
        return frozenset(entry.processor.positions for entry in self.plan.entries if entry.processor.writes)

    @property
    def clean(self) -> int:
        """How many tokens stand before the first one that may be steered."""
        return self.query if self.positions <= {"generated"} else 0

    @property
    def adds(self) -> bool:
        """Whether anything may be added to its states."""
        return bool(self.positions) and self.error is None

    @property
    def fired(self) -> bool:
        """Whether anything is added to its states, once decided."""
        return any(self.rows.values())

    @cached_property
    def reads(self) -> tuple[Site, ...]:
        """Sites at which the query is read, in the order of a forward."""
        return tuple(sorted(self.plan.readers))

    def regions(self, first: int, end: int) -> dict[Region, int]:
        """How many of the tokens `first` to `end - 1` of the text lie in each part of it, in order."""
        query = self.query
        return {
            "before": max(min(end, query) - first, 0),
            "query": int(first <= query < end),
            "after": max(end - max(first, query + 1), 0),
        }

    def processors(self, request_id: str) -> LogitsProcessorList:
        """The logits processors of one of its sequences: those of its adapters, then its own sampling."""
        if request_id not in self._processors:
            number = sequence_number(request_id, self.asked.ticket)
            self._processors[request_id] = logits_processors_of(
                self.plan, self.asked.sampling, len(self.prompt), number
            )
        return self._processors[request_id]

    @property
    def chooses(self) -> bool:
        """Whether its logits go through processors of its own."""
        if self.asked.sampling is not None:
            return True
        return any(entry.processor.acts_on_logits for entry in self.plan.entries)

    def report(self) -> dict[str, dict[str, Any]] | None:
        """What each adapter decided: `gate`, `score` and what else it records, `fired` and `scale`; None until then."""
        if self._report is None and (self.decided or not self.plan):
            self._report = self._make_report()
        return self._report

    def _make_report(self) -> dict[str, dict[str, Any]]:
        result: dict[str, dict[str, Any]] = {}
        for index, entry in enumerate(self.plan.entries):
            decision = self.decisions.get(index)
            values: dict[str, Any] = {} if decision is None else {k: _plain(v) for k, v in decision.record.items()}
            gate = None if decision is None or decision.gate is None else float(decision.gate)
            result[entry.name] = values | {"gate": gate, "fired": gate is None or gate != 0.0, "scale": entry.scale}
        return result


def _plain(value: torch.Tensor) -> Any:
    """The one row of a record as a number or a list."""
    return value.detach().float().reshape(value.shape[1:]).tolist()
