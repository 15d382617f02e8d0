"""What the requests of a packed batch add: a table for each write site, with a row for each that is steered.

Nothing here knows an engine. Each token names a row, so a site adds `table[row_of_token]`: one gather and one add,
however many requests, adapters and scales are in the batch. Row 0 is -0.0, the additive identity of IEEE arithmetic, so
tokens that are not steered stay bit-identical.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from finesteer_hf.processors import Decision, SteeringProcessor
from finesteer_hf.runtime.query_pass import decision_of
from finesteer_hf.runtime.update import addend, merged
from finesteer_hf.serving.requests import REGIONS, SteeredRequest
from finesteer_hf.sites import Site, TextTower


class SteeringTable:
    """Rows of what is added, for the requests of one engine.

    Args:
        tower: the model's decoder.
        dtype, device: of the stream.
        rows: rows to begin with; the table grows when more requests are steered at once.

    Attributes:
        decisions: how many requests were decided.
    """

    def __init__(self, tower: TextTower, dtype: torch.dtype, device: torch.device, rows: int = 64) -> None:
        self.tower, self.dtype, self.device = tower, dtype, device
        self.capacity = rows
        self.decisions = 0
        self._tables: dict[Site, torch.Tensor] = {}
        self._free = list(range(rows - 1, 0, -1))

    # -- rows ---------------------------------------------------------------------------------------------------------

    def give_rows(self, request: SteeredRequest) -> None:
        """Give an undecided request its rows: one for each set of entries that a part of its text is steered by."""
        for site in {site for entry in request.plan.entries for site in entry.processor.writes}:
            if site not in self._tables:
                self._tables[site] = self._empty(self.capacity, site)
        given: dict[frozenset[str], int] = {frozenset(): 0}
        for region, positions in REGIONS.items():
            acting = request.positions & frozenset(positions)
            if acting not in given:
                given[acting] = self._take_row()
            request.rows[region] = given[acting]

    def take_back(self, request: SteeredRequest) -> None:
        """Free the rows of a request that is over, or that nothing is added to."""
        self._free += {row for row in request.rows.values() if row}
        request.rows = dict.fromkeys(request.rows, 0)

    @property
    def in_use(self) -> int:
        """Number of rows that belong to requests."""
        return self.capacity - 1 - len(self._free)

    def _take_row(self) -> int:
        if not self._free:
            self._tables = {
                site: torch.cat((table, self._empty(self.capacity, site))) for site, table in self._tables.items()
            }
            self._free = list(range(2 * self.capacity - 1, self.capacity - 1, -1))
            self.capacity *= 2
        row = self._free.pop()
        for table in self._tables.values():
            table[row].fill_(-0.0)
        return row

    def _empty(self, rows: int, site: Site) -> torch.Tensor:
        return torch.full((rows, self.tower.width(site)), -0.0, dtype=self.dtype, device=self.device)

    # -- deciding -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decide(self, requests: Sequence[SteeredRequest]) -> None:
        """Ask the processors about requests whose states are read, one call a processor for all of them.

        A processor that raises, or adds what is not finite, fails its own requests only: see `SteeredRequest.error`.
        """
        asked: dict[int, tuple[SteeringProcessor, list[tuple[SteeredRequest, int]]]] = {}
        for request in requests:
            for index, entry in enumerate(request.plan.entries):
                asked.setdefault(id(entry.processor), (entry.processor, []))[1].append((request, index))
        for processor, places in asked.values():
            self._ask(processor, places)
        for request in requests:
            if request.error is None:
                self._write(request)
            if request.error is not None:
                self.take_back(request)
            request.states.clear()
            request.means.clear()
            request.decided = True
            self.decisions += 1

    def _ask(self, processor: SteeringProcessor, places: list[tuple[SteeredRequest, int]]) -> None:
        averages = bool(processor.reads) and processor.query_pool == "mean"
        try:
            states = {
                site: torch.stack([(r.means if averages else r.states)[site] for r, _ in places])
                for site in processor.reads
            }
            decision = decision_of(processor, states, len(places), self.device)
            for row, (request, index) in enumerate(places):
                request.decisions[index] = _row_of(decision, row)
        except Exception as error:
            if len(places) == 1:
                places[0][0].error = error
                return
            for place in places:
                self._ask(processor, [place])

    def _write(self, request: SteeredRequest) -> None:
        """Fill the rows of a decided request; where its gates are shut it gives them back."""
        for site, table in self._tables.items():
            addends = []
            for index, entry in enumerate(request.plan.entries):
                decision = request.decisions[index]
                if site in decision.vectors:
                    assert isinstance(entry.scale, float)
                    scale = torch.tensor(entry.scale * entry.processor.strength, device=self.device)
                    delta = addend(decision, site, scale, self.device)
                    addends.append((entry.processor.positions, delta))
            total = {positions: delta[0, 0] for positions, delta in merged(addends, self.dtype).items()}
            for positions, delta in total.items():
                if not bool(torch.isfinite(delta).all()):
                    names = ", ".join(f"{e.name!r} (scale {e.scale:g})" for e in request.plan.entries)
                    request.error = ValueError(
                        f"What steering adds at {site} ({positions}) is not finite in {self.dtype}: {names}. Lower the "
                        "scale, load the model in bfloat16, or look for NaN in the adapter's tensors."
                    )
                    return
            for region, acting in REGIONS.items():
                deltas = [delta for positions, delta in total.items() if positions in acting]
                if deltas and request.rows[region]:
                    table[request.rows[region]] = sum(deltas[1:], deltas[0])
        if all(d.gate is not None and float(d.gate) == 0 for d in request.decisions.values() if d.vectors):
            self.take_back(request)
        for region, row in request.rows.items():
            request.salts[region] = self._fingerprint(row) if row else 0

    def _fingerprint(self, row: int) -> int:
        """31 bits that tell rows of different content apart, alike on all ranks."""
        digest = hashlib.blake2b(digest_size=4)
        for site in sorted(self._tables):
            values = self._tables[site][row]
            if bool((values != 0).any()):
                digest.update(str(site).encode())
                digest.update(values.view(torch.uint8).cpu().numpy().tobytes())
        return (int.from_bytes(digest.digest(), "little") >> 1) or 1

    # -- adding -------------------------------------------------------------------------------------------------------

    def add(self, site: Site, hidden: torch.Tensor, row_of_token: torch.Tensor) -> torch.Tensor:
        """The stream `[1, tokens, width]` with each token's row added."""
        return hidden + self._tables[site][row_of_token]


def _row_of(decision: Decision, row: int) -> Decision:
    """One row of a decision, as a decision of one row."""

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values[row : row + 1] if values.shape[0] > 1 else values

    return Decision(
        vectors={site: pick(vector) for site, vector in decision.vectors.items()},
        gate=None if decision.gate is None else pick(decision.gate),
        record={name: pick(values) for name, values in decision.record.items()},
    )


def sites_of(requests: Iterable[SteeredRequest]) -> frozenset[Site]:
    """Sites that some requests write at."""
    return frozenset(site for request in requests for site in request.plan.steps)
