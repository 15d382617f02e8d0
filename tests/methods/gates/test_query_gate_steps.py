"""The dose that a stepped gate looks up is that of its formula, at every score."""

from __future__ import annotations

import pytest
import torch

from finesteer_hf import FineSteerConfig
from finesteer_hf.estimators import GATE_FUNCTIONS
from finesteer_hf.methods.query_gate import QueryGate, from_file
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS


LOWEST = torch.finfo(torch.float32).min


def gate_and_tensors(kind: str, seed: int) -> tuple[QueryGate, dict[str, torch.Tensor]]:
    """A gate on the score `h[:, 0]`; calibration scores with ties, floors and thresholds within and outside of them."""
    generator = torch.Generator().manual_seed(seed)
    calibration = torch.randn(1 + seed, generator=generator)
    if seed % 2:
        calibration = calibration.round()
    tensors = {
        "gate.weight": torch.tensor([1.0, 0.0]),
        "gate.bias": torch.tensor(0.0),
        "gate.calibration": calibration.sort().values,
        "gate.threshold": calibration.median() if seed % 3 else torch.tensor(LOWEST),
        "gate.level": torch.tensor(0.3),
        "gate.gamma": torch.tensor(2.0),
    }
    if kind == "conformal":
        tensors["gate.floor"] = torch.tensor(LOWEST if seed % 5 else -0.5)
    gate = QueryGate(FineSteerConfig(gate=kind, gate_score="state"))
    return gate, tensors | gate.lay_out(tensors)


@pytest.mark.parametrize("kind", ["conformal", "quantile"])
@pytest.mark.parametrize("seed", range(12))
def test_the_looked_up_dose_is_that_of_the_formula(kind: str, seed: int) -> None:
    gate, tensors = gate_and_tensors(kind, seed)
    edges = torch.cat([tensors["gate.steps"], -tensors["gate.steps"], torch.linspace(-4, 4, 101)])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    scores = torch.cat([edges, edges.nextafter(up), edges.nextafter(down)]).clamp(LOWEST, -LOWEST)
    dose, score = gate(torch.stack([scores, torch.zeros_like(scores)], dim=1), tensors)
    assert torch.equal(score, scores)
    expected = GATE_FUNCTIONS[kind](scores, **from_file(GATE_TENSORS[kind], tensors))
    # Powers of vectors and of single numbers may differ in the last bit; nothing and everything are exact.
    torch.testing.assert_close(dose, expected, rtol=3e-7, atol=0.0)
    for exact in (0.0, 1.0):
        assert torch.equal(dose == exact, expected == exact)


@pytest.mark.parametrize("kind", ["conformal", "quantile"])
def test_a_nan_score_gets_the_lowest_dose(kind: str) -> None:
    gate, tensors = gate_and_tensors(kind, 10)
    dose, _ = gate(torch.tensor([[torch.nan, 0.0]]), tensors)
    assert dose.item() == 0.0
