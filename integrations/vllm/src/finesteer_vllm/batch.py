"""Laying a batch out: which rows its tokens get, which of its tokens are queries, and whose rows are kept.

Plain Python and small copies to the device, once a step and outside of anything compiled. Nothing here knows of vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from finesteer_vllm.adapters import CONSTANT
from finesteer_vllm.requests import Asked
from finesteer_vllm.sites import UNSTEERED, SteeringTables


@dataclass(frozen=True)
class Scheduled:
    """A request's part of a packed batch.

    Attributes:
        request: its id.
        start, tokens: where its tokens are in the batch, and how many.
        computed: tokens of it that were computed before, or found in the cache.
        prompt: number of its prompt's tokens; the query is the last of them.
        asked: how it is steered; None if it is not.
    """

    request: str
    start: int
    tokens: int
    computed: int
    prompt: int
    asked: Asked | None


@dataclass
class _Held:
    """A decision: `row` of the tables, or, while another request needs the row, what stood in it."""

    asked: Asked
    row: int | None
    decided: bool = False
    kept: dict[int, torch.Tensor] | None = None


class BatchLayout:
    """Fills the buffers of `SteeringTables` for one batch after the other.

    A request's row is made when its query is computed and lives as long as the request. A request that was put back may
    outlive the batch: its row is kept, and if others need it, set aside, since what was cached of it need not be computed
    again and so its query may never pass again.

    Args:
        tables: the buffers.

    Attributes:
        decisions: how many queries were given a row so far.
    """

    def __init__(self, tables: SteeringTables) -> None:
        self.tables = tables
        self.decisions = 0
        self._held: dict[str, _Held] = {}
        self._free = list(range(tables.rows, 0, -1))
        pinned = tables.row_of_token.device.type == "cuda"
        self._unused = tables.rows + 1
        # Read by asynchronous copies: who calls `lay_out` again waits for them first, as vLLM does for its own.
        self._row_of_token = torch.zeros(len(tables.row_of_token), dtype=torch.int64, pin_memory=pinned)
        slots = tables.rows
        self._queries = {
            name: (
                torch.zeros(slots, dtype=torch.int64, pin_memory=pinned),
                torch.full((slots,), self._unused, dtype=torch.int64, pin_memory=pinned),
                torch.zeros(slots, dtype=torch.float32, pin_memory=pinned),
            )
            for name in tables.readers
        }

    def lay_out(self, batch: Sequence[Scheduled], alive: Collection[str]) -> None:
        """Fill the buffers for a batch.

        Args:
            batch: its requests, in the order of their tokens.
            alive: ids of all requests that are not finished; rows of others are given back.

        Raises:
            RuntimeError: if a request is past its query and nothing was decided for it, so that it would go unsteered.
        """
        for request in [name for name in self._held if name not in alive]:
            self._give_back(request)
        self._reset()
        slots = dict.fromkeys(self._queries, 0)
        present = {part.request for part in batch}
        for part in batch:
            if part.asked is None or part.computed + part.tokens < part.prompt:
                continue
            held = self._held.get(part.request)
            if held is not None and held.asked != part.asked:
                # Another request under the id of one that was given up.
                self._give_back(part.request)
                held = None
            if held is None or held.row is None:
                held = self._with_row(part, held, present)
            query = part.prompt - 1 - part.computed
            if query >= 0:
                self._ask(part, held, query, slots)
            elif not held.decided:
                raise RuntimeError(
                    f"Request {part.request} continues after its prompt and nothing was decided for it. Its states come "
                    "from a cache that this plugin does not know; it is not run unsteered."
                )
            assert held.row is not None
            self._row_of_token[part.start + max(query, 0) : part.start + part.tokens] = held.row
        self._upload()

    def clear(self) -> None:
        """Let the next forward steer nothing and decide nothing: for forwards that are no batch (warm-up, capture)."""
        # On the device alone: copies of the batch before may still read the host's side.
        self.tables.row_of_token.fill_(UNSTEERED)
        for reader in self.tables.readers.values():
            reader.query_token.zero_()
            reader.query_row.fill_(self._unused)
            reader.query_scale.zero_()

    def _ask(self, part: Scheduled, held: _Held, query: int, slots: dict[str, int]) -> None:
        """Have the query decided in this forward, or put the constant into its row."""
        assert part.asked is not None and held.row is not None
        adapter = self.tables.adapters[part.asked.adapter]
        self.decisions += not held.decided
        held.decided = True
        if adapter.vector == CONSTANT:
            self.tables.put_constant(part.asked.adapter, part.asked.scale, held.row)
            return
        tokens, rows, scales = self._queries[part.asked.adapter]
        slot = slots[part.asked.adapter]
        slots[part.asked.adapter] += 1
        tokens[slot], rows[slot] = part.start + query, held.row
        scales[slot] = part.asked.scale * adapter.strength

    def _with_row(self, part: Scheduled, held: _Held | None, present: Collection[str]) -> _Held:
        """Give a request a row, with what stood in its own if that was set aside."""
        assert part.asked is not None
        if not self._free:
            # There are as many rows as a batch has requests, so one of the rows belongs to a request that waits.
            waiting = next(name for name, other in self._held.items() if other.row is not None and name not in present)
            self._set_aside(self._held[waiting])
        held = held or _Held(part.asked, None)
        held.row = self._free.pop()
        for layer, table in self.tables.tables.items():
            # The one before may have written layers that this one does not.
            table[held.row] = held.kept[layer] if held.kept is not None else -0.0
        held.kept = None
        self._held[part.request] = held
        return held

    def _set_aside(self, held: _Held) -> None:
        assert held.row is not None
        held.kept = {layer: table[held.row].clone() for layer, table in self.tables.tables.items()}
        self._free.append(held.row)
        held.row = None

    def _give_back(self, request: str) -> None:
        row = self._held.pop(request).row
        if row is not None:
            self._free.append(row)

    def _reset(self) -> None:
        self._row_of_token.fill_(UNSTEERED)
        for tokens, rows, scales in self._queries.values():
            tokens.zero_()
            rows.fill_(self._unused)
            scales.zero_()

    def _upload(self) -> None:
        self.tables.row_of_token.copy_(self._row_of_token, non_blocking=True)
        for name, (tokens, rows, scales) in self._queries.items():
            reader = self.tables.readers[name]
            reader.query_token.copy_(tokens, non_blocking=True)
            reader.query_row.copy_(rows, non_blocking=True)
            reader.query_scale.copy_(scales, non_blocking=True)
