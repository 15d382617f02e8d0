"""What is done inside the model: reading at one block, adding at others, on buffers that never move.

All of it is plain tensor operations on buffers of fixed size and address, without a branch on a value: a batch is laid out
by filling the buffers (`batch.py`), so the same operations can be traced, compiled and replayed as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from finesteer_vllm.adapters import CONSTANT, ServedAdapter


# Row 0 of a table is for tokens that are not steered; the last is written by slots in which nothing is decided.
UNSTEERED = 0
# Name under which a steered block holds what is done at its output.
CHILD = "finesteer"


class SteeringReader(nn.Module):
    """Decides, for the queries of a batch that ask for one adapter, and writes the decisions into the tables.

    Args:
        adapter: one that reads.
        tables: by layer `[rows, hidden_size]` in the model's dtype; those of its write layers are written.
        slots: most queries a batch.
        device: of the buffers.
    """

    query_token: torch.Tensor
    query_row: torch.Tensor
    query_scale: torch.Tensor

    def __init__(
        self, adapter: ServedAdapter, tables: Mapping[int, torch.Tensor], slots: int, device: torch.device
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self._names = list(adapter.tensors)
        for number, name in enumerate(self._names):
            self.register_buffer(f"tensor_{number}", adapter.tensors[name].to(device), persistent=False)
        for number, layer in enumerate(adapter.write_layers):
            self.register_buffer(f"table_{number}", tables[layer], persistent=False)
        unused = len(tables[adapter.write_layers[0]]) - 1
        self.register_buffer("query_token", torch.zeros(slots, dtype=torch.int64, device=device), persistent=False)
        rows = torch.full((slots,), unused, dtype=torch.int64, device=device)
        self.register_buffer("query_row", rows, persistent=False)
        self.register_buffer("query_scale", torch.zeros(slots, dtype=torch.float32, device=device), persistent=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> None:
        """Read the stream at the queries, decide, and put what is added into the queries' rows.

        Args:
            hidden, residual: `[tokens, hidden_size]`; the stream is their sum.
        """
        states = hidden.index_select(0, self.query_token) + residual.index_select(0, self.query_token)
        tensors = {name: getattr(self, f"tensor_{number}") for number, name in enumerate(self._names)}
        vector, gate = self.adapter.decide(states.float(), tensors)
        added = addend(vector, self.query_scale if gate is None else self.query_scale * gate)
        for number, part in enumerate(added.chunk(len(self.adapter.write_layers), dim=-1)):
            table = getattr(self, f"table_{number}")
            table.index_copy_(0, self.query_row, part.to(table.dtype))


def addend(vector: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """scale * vector, and -0.0 where the scale is 0: x + -0.0 is x to the bit, which x + 0.0 is not.

    Args:
        vector: `[rows, width]` float32.
        scale: `[rows]` float32, gate, strength and run-time scale together.
    """
    scale = scale[:, None]
    return torch.where(scale == 0, -0.0, scale * vector)


class SteeringSite(nn.Module):
    """What is done at the output of one block: first the readers, then one gather and one add.

    Args:
        readers: of the adapters that read here.
        table: `[rows, hidden_size]` in the model's dtype; None if nothing is written here.
        row_of_token: `[most tokens]` int64, the same for all sites.
    """

    table: torch.Tensor | None
    row_of_token: torch.Tensor

    def __init__(
        self, readers: Sequence[SteeringReader], table: torch.Tensor | None, row_of_token: torch.Tensor
    ) -> None:
        super().__init__()
        self.readers = nn.ModuleList(readers)
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("row_of_token", row_of_token, persistent=False)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The block's `hidden` with what its tokens' rows add; arguments `[tokens, hidden_size]`."""
        for reader in self.readers:
            reader(hidden, residual)
        if self.table is None:
            return hidden
        return hidden + self.table.index_select(0, self.row_of_token[: hidden.shape[0]])


def steer_output(block: nn.Module, args: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward hook of a steered block: reads `hidden + residual`, writes to `hidden` only.

    Raises:
        TypeError: if the block does not return `(hidden, residual)`.
    """
    if not (isinstance(output, tuple) and len(output) == 2 and all(isinstance(part, torch.Tensor) for part in output)):
        raise TypeError(
            f"{type(block).__name__} does not return (hidden, residual), so this engine cannot be steered: "
            f"got {type(output).__name__}."
        )
    hidden, residual = output
    if hidden.shape != residual.shape:
        raise TypeError(f"{type(block).__name__} returns hidden {hidden.shape} and residual {residual.shape}.")
    return getattr(block, CHILD)(hidden, residual), residual


class SteeringTables:
    """The buffers of one engine, and where they are attached.

    Args:
        adapters: by the names that requests use.
        rows: most requests a batch.
        tokens: most tokens a batch, padding included.
        dtype, device: of the model.

    Attributes:
        tables: by write layer `[rows + 2, hidden_size]`: row 0 for tokens that are not steered, 1 to `rows` for requests,
            the last for slots without a decision; -0.0 to begin with.
        row_of_token: `[tokens]` int64.
        readers: by name, of the adapters that read.
    """

    def __init__(
        self,
        adapters: Mapping[str, ServedAdapter],
        rows: int,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.adapters, self.rows = dict(adapters), rows
        layers = sorted({layer for adapter in adapters.values() for layer in adapter.write_layers})
        width = next(iter(adapters.values())).hidden_size
        self.tables = {layer: torch.full((rows + 2, width), -0.0, dtype=dtype, device=device) for layer in layers}
        self.row_of_token = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.readers = {
            name: SteeringReader(adapter, self.tables, rows, device)
            for name, adapter in adapters.items()
            if adapter.vector != CONSTANT
        }
        self._constants = {
            name: adapter.tensors["vectors"].to(device)
            for name, adapter in adapters.items()
            if adapter.vector == CONSTANT
        }

    def attach(self, blocks: Sequence[nn.Module]) -> None:
        """Hook the blocks that are read or written, once, before anything is compiled or captured.

        Args:
            blocks: all of the model, in order; each returns `(hidden, residual)`.
        """
        reading: dict[int, list[SteeringReader]] = {}
        for reader in self.readers.values():
            reading.setdefault(int(reader.adapter.read_layer or 0), []).append(reader)
        for layer in sorted({*self.tables, *reading}):
            site = SteeringSite(reading.get(layer, []), self.tables.get(layer), self.row_of_token)
            blocks[layer].add_module(CHILD, site)
            blocks[layer].register_forward_hook(steer_output)

    def put_constant(self, name: str, scale: float, row: int) -> None:
        """Put what an adapter adds that reads nothing into a row of its layers' tables."""
        adapter, vectors = self.adapters[name], self._constants[name]
        added = addend(vectors, vectors.new_full((len(vectors),), scale * adapter.strength))
        for layer, vector in zip(adapter.write_layers, added, strict=True):
            self.tables[layer][row] = vector.to(self.tables[layer].dtype)
