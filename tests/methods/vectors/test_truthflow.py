"""TRUTHFLOW: the flow against equations with known ends, and the processor against the network itself."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from finesteer_hf import QueryStates
from finesteer_hf.methods.truthflow import TruthFlowConfig
from finesteer_hf.methods.truthflow.network import FlowNetwork, integrate, train_flow
from finesteer_hf.testing.conformance import fit_on_toy


SMALL = {"width": 32, "levels": 3, "rank": 4, "epochs": 60, "learning_rate": 3e-3, "batch_size": 16}


@pytest.fixture(scope="module")
def adapter():
    return fit_on_toy(TruthFlowConfig(layer=1, strength=2.0, **SMALL))[2]


def test_the_midpoint_rule_follows_a_known_equation():
    matrix = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    start = torch.tensor([[1.0, 0.0], [0.3, -2.0]])
    calls = []

    def velocity(x, time):
        calls.append(float(time[0]))
        return time[:, None] * (x @ matrix)

    end = integrate(velocity, start, 15)
    for row, got in zip(start, end, strict=True):
        exact = solve_ivp(lambda t, x: t * (x @ matrix.numpy()), (0, 1), row.numpy(), rtol=1e-9).y[:, -1]
        np.testing.assert_allclose(got, exact, atol=2e-3)
    # 16 points in time, 30 calls.
    assert len(calls) == 30
    np.testing.assert_allclose(calls, np.arange(30) / 30, atol=1e-6)


def test_flow_matching_maps_each_state_to_its_shift():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(300, 6, generator=generator)
    end = start @ torch.randn(6, 6, generator=generator) * 0.3 + 1
    torch.manual_seed(0)
    network = FlowNetwork(6, 64, 3)
    losses = train_flow(
        network, start[:250], end[:250], epochs=80, batch_size=64, learning_rate=3e-3, generator=generator
    )
    assert losses[-1] < losses[0] / 3
    with torch.no_grad():
        got = integrate(network, start[250:], 15)
    constant = (end[250:] - end[:250].mean(0)).square().mean()
    assert (got - end[250:]).square().mean() < constant / 2


def test_the_network_is_a_u_net_of_halving_levels():
    network = FlowNetwork(10, 16, 3)
    assert [(level.linear.in_features, level.linear.out_features) for level in network.down] == [
        (10, 16),
        (16, 8),
        (8, 4),
    ]
    assert [(level.linear.in_features, level.linear.out_features) for level in network.up] == [(12, 8), (24, 16)]
    assert network(torch.randn(3, 10), torch.rand(3)).shape == (3, 10)
    assert FlowNetwork(10, 16, 1).eval()(torch.randn(1, 10), torch.rand(1)).shape == (1, 10)


def test_the_vector_is_the_projected_end_of_the_flow(adapter):
    network = adapter.config.network()
    weights = {n.removeprefix("flow."): t for n, t in adapter.tensors.items() if n.startswith("flow.")}
    network.load_state_dict(weights, strict=False)
    network.eval()
    basis, scale = adapter.tensors["basis"], adapter.tensors["scale"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-5, rtol=0)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x = states / scale
    with torch.no_grad():
        for step in range(15):
            time = torch.full((5,), step / 15)
            x = x + network(x + network(x, time) / 30, time + 1 / 30) / 15
    processor = adapter.build()
    decision = processor.decide(QueryStates({processor.site: states}, 5, states.device))
    torch.testing.assert_close(decision.vectors[processor.site], scale * x @ basis.T @ basis, atol=1e-5, rtol=1e-4)


def test_fits_repeat_and_leave_the_random_state_alone(adapter):
    before = torch.random.get_rng_state()
    again = fit_on_toy(TruthFlowConfig(layer=1, strength=2.0, **SMALL))[2]
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())


def test_auto_takes_the_layer_that_ridge_predicts_best():
    _, _, adapter = fit_on_toy(TruthFlowConfig(strength=1.0, **SMALL))
    table = {row["layer"]: row["ridge_r2"] for row in adapter.config.fit["report"]["layers"]}
    assert adapter.config.layer == max(table, key=table.get)


def test_the_paper_s_settings():
    config = TruthFlowConfig.paper(4096, layer=12, rank=10)
    assert (config.width, config.levels, config.epochs, config.batch_size, config.steps) == (2048, 4, 40, 136, 15)


@pytest.mark.parametrize("field", [{"rank": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"batch_size": 1}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TruthFlowConfig(**field)
