"""The buffers inside a model: one graph for every batch, and rows that come and go."""

from __future__ import annotations

import pytest
import torch
from finesteer_vllm.adapters import read_adapter
from finesteer_vllm.batch import BatchLayout, Scheduled
from finesteer_vllm.requests import Asked
from finesteer_vllm.sites import SteeringTables, addend
from torch import nn


class Block(nn.Module):
    """A block of vLLM's shape without attention: what is told of tokens here is told of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        residual = hidden if residual is None else hidden + residual
        return torch.tanh(self.mix(residual)), residual


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        residual = None
        for block in self.layers:
            hidden, residual = block(hidden, residual)
        return hidden + residual


@pytest.fixture
def adapters(exported):
    return {name: read_adapter(folder) for name, folder in exported.items()}


@pytest.fixture
def tables(adapters) -> SteeringTables:
    return SteeringTables(adapters, rows=3, tokens=24, dtype=torch.float32, device=torch.device("cpu"))


def part(request: str, start: int, tokens: int, computed: int, prompt: int, name: str | None, scale: float = 1.0):
    return Scheduled(request, start, tokens, computed, prompt, None if name is None else Asked(name, scale))


def batches() -> list[list[Scheduled]]:
    """Steps of three requests: whole prompts, a prompt in pieces, decoding, one that ends and one that takes its place."""
    return [
        [part("a", 0, 5, 0, 5, "several"), part("b", 5, 4, 0, 9, "official"), part("c", 9, 3, 0, 3, None)],
        [part("a", 0, 1, 5, 5, "several"), part("b", 1, 5, 4, 9, "official"), part("c", 6, 1, 3, 3, None)],
        [part("b", 0, 1, 9, 9, "official"), part("d", 1, 6, 0, 6, "caa", -2.0), part("e", 7, 2, 0, 2, "mixture")],
        [part("d", 0, 1, 6, 6, "caa", -2.0), part("b", 1, 1, 10, 9, "official"), part("e", 2, 1, 2, 2, "mixture")],
    ]


def test_one_graph_serves_every_batch(tables: SteeringTables, adapters) -> None:
    """What a CUDA graph needs: the same operations on the same buffers, whoever is in the batch."""
    plain, compiled, layout = Stack(), Stack(), BatchLayout(tables)
    others = SteeringTables(adapters, rows=3, tokens=24, dtype=torch.float32, device=torch.device("cpu"))
    other_layout = BatchLayout(others)
    tables.attach(list(plain.layers))
    others.attach(list(compiled.layers))
    whole = torch.compile(compiled, backend="aot_eager", fullgraph=True, dynamic=True)
    addresses = [buffer.data_ptr() for buffer in compiled.buffers()]
    with torch.inference_mode(), torch._dynamo.config.patch(error_on_recompile=True):
        for number, batch in enumerate(batches()):
            alive = {entry.request for entry in batch}
            hidden = torch.randn(max(entry.start + entry.tokens for entry in batch) + 5, 32)
            layout.lay_out(batch, alive)
            other_layout.lay_out(batch, alive)
            torch.testing.assert_close(whole(hidden), plain(hidden), msg=f"batch {number}")
            for layer, table in tables.tables.items():
                torch.testing.assert_close(others.tables[layer][:-1], table[:-1])
    assert addresses == [buffer.data_ptr() for buffer in compiled.buffers()]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_serves_every_batch(adapters) -> None:
    device = torch.device("cuda")
    plain, captured = Stack().to(device), Stack().to(device)
    layouts = []
    for stack in (plain, captured):
        tables = SteeringTables(adapters, rows=3, tokens=24, dtype=torch.float32, device=device)
        tables.attach(list(stack.layers))
        layouts.append(BatchLayout(tables))
    static, graph = torch.zeros(24, 32, device=device), torch.cuda.CUDAGraph()
    with torch.inference_mode():
        captured(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = captured(static)
        for number, batch in enumerate(batches()):
            torch.cuda.synchronize()
            for layout in layouts:
                layout.lay_out(batch, {entry.request for entry in batch})
            static.copy_(torch.randn(24, 32))
            graph.replay()
            torch.testing.assert_close(out, plain(static), msg=f"batch {number}")


def test_only_tokens_from_the_query_on_are_steered(tables: SteeringTables) -> None:
    bare, steered, layout = Stack(), Stack(), BatchLayout(tables)
    tables.attach(list(steered.layers))
    hidden = torch.randn(24, 32)
    layout.lay_out(
        [part("a", 0, 6, 2, 5, "caa"), part("b", 6, 4, 0, 9, "constant"), part("c", 10, 3, 7, 4, None)],
        {"a", "b", "c"},
    )
    same = (bare(hidden) == steered(hidden)).all(dim=-1)
    # Request a's query is its fifth token, the third of this batch; b's comes later; from 13 on there is padding.
    assert [index for index, equal in enumerate(same.tolist()) if not equal] == [2, 3, 4, 5]


def test_a_row_holds_what_its_adapter_adds(tables: SteeringTables, adapters) -> None:
    layout = BatchLayout(tables)
    layout.lay_out([part("a", 0, 4, 0, 4, "constant", 0.5)], {"a"})
    row = int(tables.row_of_token[3])
    assert row > 0 and tables.row_of_token[:3].tolist() == [0, 0, 0]
    for layer, table in tables.tables.items():
        where = adapters["constant"].write_layers
        added = (
            0.5 * adapters["constant"].tensors["vectors"][where.index(layer)] if layer in where else torch.zeros(32)
        )
        torch.testing.assert_close(table[row], added)
        assert table[0].eq(0).all() and table[0].signbit().all()
    # The next one in the row writes other layers.
    layout.lay_out([part("b", 0, 2, 0, 2, "caa")], {"b"})
    assert int(tables.row_of_token[1]) == row
    assert all(
        table[row].eq(0).all() == (layer not in adapters["caa"].write_layers) for layer, table in tables.tables.items()
    )


def test_more_requests_wait_than_there_are_rows(tables: SteeringTables) -> None:
    layout, names = BatchLayout(tables), "abcdefgh"
    for name in names:
        layout.lay_out([part(name, 0, 3, 0, 3, "constant", float(names.index(name) + 1))], set(names))
    for name in reversed(names):
        layout.lay_out([part(name, 0, 1, 3, 3, "constant", float(names.index(name) + 1))], set(names))
        row = tables.tables[0][int(tables.row_of_token[0])]
        torch.testing.assert_close(row, (names.index(name) + 1) * tables.adapters["constant"].tensors["vectors"][0])
    assert layout.decisions == len(names)


def test_a_request_past_its_query_without_a_decision_is_not_run(tables: SteeringTables) -> None:
    with pytest.raises(RuntimeError, match="Request late continues after its prompt and nothing was decided"):
        BatchLayout(tables).lay_out([part("late", 0, 1, 7, 5, "caa")], {"late"})


def test_a_block_that_returns_something_else_is_refused(tables: SteeringTables) -> None:
    class Tensor(Block):
        def forward(self, hidden, residual):
            return super().forward(hidden, residual)[0]

    blocks = [Tensor() for _ in range(3)]
    tables.attach(blocks)
    with pytest.raises(TypeError, match=r"Tensor does not return \(hidden, residual\)"):
        blocks[1](torch.zeros(2, 32), None)


def test_a_closed_gate_adds_the_identity() -> None:
    added = addend(torch.tensor([[1.0, -torch.inf], [torch.nan, 2.0], [1.0, 2.0]]), torch.tensor([0.0, 0.0, 3.0]))
    assert added[:2].eq(0).all() and added[:2].signbit().all()
    assert added[2].tolist() == [3.0, 6.0]
