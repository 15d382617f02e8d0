"""What the plugin decides is what finesteer_hf decides, for every form of score, gate and vector."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from finesteer_vllm.adapters import ServedAdapter, read_adapter
from planted import PlantedData

from finesteer_hf import SteeringAdapter
from finesteer_hf.interop import export_vllm
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig
from finesteer_hf.processors import QueryStates
from finesteer_hf.sites import Site


HUB_CARDS = Path(__file__).resolve().parents[3] / "hub_cards"
SHIPPED = sorted(path.parent.name for path in HUB_CARDS.glob("*/steering_config.json"))
SITE = Site("resid_post", 2)
GATES = [
    *((gate, score) for gate in ("conformal", "quantile", "logistic") for score in ("state", "t2q", "ser")),
    ("ser", "ser"),
    ("always", "auto"),
]


@pytest.fixture(scope="module")
def data() -> PlantedData:
    return PlantedData()


def fitted(data: PlantedData, **settings) -> SteeringAdapter:
    settings = {"strength": 1.0, "positions": "generated", "refine": 0, "target": "difference", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = FineSteer.fit(data, FineSteerConfig(layer=2, **settings))
    return SteeringAdapter(result.config, result.tensors)


def compare(adapter: SteeringAdapter, served: ServedAdapter, h: torch.Tensor) -> torch.Tensor | None:
    """Hold one's decisions on states `[rows, width]` to the other's; gives the gate."""
    processor = adapter.build()
    wanted = processor.decide(QueryStates(dict.fromkeys(processor.reads, h), len(h), h.device))
    vector, gate = served.decide(h, served.tensors)
    torch.testing.assert_close(
        vector, torch.cat([wanted.vectors[site] for site in processor.writes], dim=-1), rtol=1e-6, atol=1e-6
    )
    if wanted.gate is None:
        assert gate is None
    else:
        torch.testing.assert_close(gate, wanted.gate, rtol=1e-6, atol=1e-6, equal_nan=True)
    return gate


@pytest.mark.parametrize(("gate", "score"), GATES)
def test_every_gate_of_every_score(tmp_path: Path, data: PlantedData, gate: str, score: str) -> None:
    adapter = fitted(data, gate=gate, gate_score=score, experts="reduced_rank", residual_rank=3)
    served = read_adapter(export_vllm(adapter, tmp_path))
    rows = [data.query(SITE, part) for part in ("fit", "calibration", "validation")]
    rows += [data.general(SITE, part) for part in ("fit", "validation")]
    states = torch.cat([torch.from_numpy(part) for part in rows])
    # Far states, the mean itself, and what no model should give.
    odd = torch.cat([states[:4] * 1e18, states[:4] * 1e-18, states.mean(0)[None], torch.zeros(1, states.shape[1])])
    found = compare(adapter, served, torch.cat([states, odd]))
    assert (found is None) == (gate == "always")
    if found is not None:
        assert float(found.min()) >= 0 and float(found.max()) <= 1 and len(found.unique()) > 1
    if gate == "conformal":
        assert 0 in found and 1 in found


@pytest.mark.parametrize("softness", [0.5, 6.0])
def test_soft_and_hard_conformal_gates(tmp_path: Path, data: PlantedData, softness: float) -> None:
    # Without general prompts nothing lifts the floor, so doses between 0 and 1 are left below the threshold.
    adapter = fitted(
        data,
        gate_score="t2q",
        gate_gamma=softness,
        gate_epsilon=0.2,
        gate_false_alarms=1.0,
        experts="reduced_rank",
        residual_rank=2,
    )
    served = read_adapter(export_vllm(adapter, tmp_path))
    states = torch.from_numpy(data.query(SITE, "calibration"))
    ways = torch.linspace(0.0, 3.0, 60)[:, None, None]
    found = compare(adapter, served, (states.mean(0) + ways * (states[:8] - states.mean(0))).flatten(0, 1))
    assert found is not None and ((found > 0) & (found < 1)).any()


def test_a_nan_gets_the_lowest_dose(tmp_path: Path, data: PlantedData) -> None:
    adapter = fitted(data, gate_score="state", experts="reduced_rank", residual_rank=2)
    served = read_adapter(export_vllm(adapter, tmp_path))
    _, gate = served.decide(torch.full((1, 24), torch.nan), served.tensors)
    assert gate is not None and float(gate) == float(served.tensors["gate.doses"].min()) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"experts": "mixture", "num_experts": 3, "residual_rank": 2},
        {"experts": "mixture", "num_experts": 2, "residual_rank": 0},
        {"experts": "paper", "num_experts": 4, "residual_rank": 3, "hidden_dim": 8, "key_dim": 8},
        {"experts": "reduced_rank", "residual_rank": 0},
        {"experts": "reduced_rank", "residual_rank": 4, "write_site": ["resid_post[2]", "resid_post[3]"]},
        {"experts": "paper", "compat": "official", "residual_rank": 3},
    ],
)
def test_every_vector(tmp_path: Path, data: PlantedData, settings: dict) -> None:
    adapter = fitted(data, **settings)
    compare(adapter, read_adapter(export_vllm(adapter, tmp_path)), torch.from_numpy(data.query(SITE, "validation")))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_adapters_that_ship(tmp_path: Path, name: str) -> None:
    adapter = SteeringAdapter.from_pretrained(HUB_CARDS / name)
    if adapter.config.positions != "generated":
        with pytest.raises(ValueError, match=f"positions={adapter.config.positions!r}"):
            export_vllm(adapter, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        adapter.config = dataclasses.replace(adapter.config, positions="generated")
    served = read_adapter(export_vllm(adapter, tmp_path))
    generator = torch.Generator().manual_seed(0)
    width = int(adapter.config.hidden_size or 0)
    scales = torch.tensor([0.1, 1.0, 5.0, 25.0]).repeat_interleave(32)[:, None]
    h = scales * torch.randn(128, width, generator=generator)
    if "gate.mean" in served.tensors:
        # Around the queries that it was fitted on, where a monitoring score is not all rejections.
        basis, spread = served.tensors["gate.basis"], served.tensors["gate.variances"].sqrt()
        near = torch.randn(128, len(spread), generator=generator) * spread
        away = torch.linspace(0, 0.3, 128)[:, None] * torch.randn(128, width, generator=generator)
        h = torch.cat([h, served.tensors["gate.mean"] + near @ basis.T + away])
    gate = compare(adapter, served, h)
    assert gate is not None and 0 < float((gate > 0).float().mean()) < 1
    assert served.salt != "" and served.chat_template_sha256 == adapter.config.fit["chat_template_sha256"]


@pytest.mark.parametrize("name", SHIPPED)
def test_deciding_is_one_graph_without_a_look_at_values(tmp_path: Path, name: str) -> None:
    adapter = SteeringAdapter.from_pretrained(HUB_CARDS / name)
    adapter.config = dataclasses.replace(adapter.config, positions="generated")
    served = read_adapter(export_vllm(adapter, tmp_path))
    h = torch.randn(6, served.hidden_size)
    whole = torch.compile(lambda states: served.decide(states, served.tensors), backend="eager", fullgraph=True)
    for traced, plain in zip(whole(h), served.decide(h, served.tensors), strict=True):
        torch.testing.assert_close(traced, plain)
    # On tensors without values anything that looked at one would raise.
    meta = {key: tensor.to("meta") for key, tensor in served.tensors.items()}
    vector, gate = served.decide(h.to("meta"), meta)
    assert vector.shape == (6, served.hidden_size * len(served.write_layers)) and gate is not None
