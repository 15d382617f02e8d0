"""The gate of a fitted FineSteer: from which queries it is calibrated, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import PlantedData, states
from quick_fit import SITE, fit

from finesteer_hf.errors import DatasetError
from finesteer_hf.methods.finesteer import FineSteer


def test_the_threshold_comes_from_queries_that_the_score_has_not_seen() -> None:
    data = PlantedData()
    result = fit(data, gate_score="ser", subspace_rank=4)
    mean = data.query(SITE, "fit").astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(result.tensors["gate.mean"].numpy(), mean, rtol=1e-5)
    method = FineSteer(result.config, result.tensors)
    scores = method.decide(states(SITE, data.query(SITE, "calibration"))).record["score"]
    torch.testing.assert_close(result.tensors["gate.calibration"], scores.sort().values)


def test_the_score_is_chosen_without_the_calibration_queries() -> None:
    data, other = PlantedData(), PlantedData()
    rows = other._parts["calibration"]
    for layer in other._query:
        other._query[layer][rows] += np.random.default_rng(1).standard_normal((len(rows), 24)).astype(np.float32)
    one, two = (fit(world, gate_score="auto") for world in (data, other))
    assert one.config.gate_score == two.config.gate_score
    assert one.report["gate"]["candidates"] == two.report["gate"]["candidates"]
    assert one.report["layers"] == two.report["layers"]


def test_the_promised_miss_rate_is_kept_on_the_mean_over_seeds() -> None:
    rates, bounds = [], []
    for seed in range(12):
        data = PlantedData(rows=300, seed=seed, clarity=(1.0,))
        result = fit(
            data, layer=0, gate_epsilon=0.1, gate_score="ser", subspace_rank=8, experts="reduced_rank", residual_rank=2
        )
        rates.append(result.report["gate"]["misses"]["value"])
        bounds.append(result.report["gate"]["miss_bound"])
    error = np.std(rates, ddof=1) / np.sqrt(len(rates))
    assert max(bounds) <= 0.1
    assert np.mean(rates) <= 0.1 + 2 * error


def test_the_paper_gate_misses_more_than_it_says() -> None:
    """The threshold of rows that the subspace was fitted on does not hold for new ones."""
    misses = {}
    for gate in ("quantile", "conformal"):
        rates = []
        for seed in range(4):
            data = PlantedData(rows=150, width=64, clarity=(0.3,), seed=seed)
            result = fit(
                data,
                layer=0,
                gate=gate,
                gate_score="ser",
                subspace_rank=40,
                gate_epsilon=0.1,
                experts="reduced_rank",
                residual_rank=1,
            )
            rates.append(result.report["gate"]["misses"]["value"])
        misses[gate] = np.mean(rates)
    assert misses["quantile"] > 0.5 > misses["conformal"]


def test_five_general_prompts_are_enough_for_a_state_gate() -> None:
    data = PlantedData(general=9)
    assert len(data.general(SITE, "fit")) == 5
    result = fit(data, gate_score="state")
    method = FineSteer(result.config, result.tensors)
    new = PlantedData(general=120)
    gate = method.decide(states(SITE, new.general(SITE, "fit"))).gate
    assert gate is not None and float((gate > 0).float().mean()) < 0.2


def test_without_general_prompts_the_gate_knows_one_class() -> None:
    data = PlantedData(general=0)
    result = fit(data, gate_score="auto")
    assert result.config.gate_score == "ser" and result.report["gate"]["false_alarms"]["n"] == 0
    for settings, named in (
        ({"gate_score": "state"}, "gate_score='state'"),
        ({"gate": "logistic", "gate_score": "auto"}, "gate='logistic'"),
    ):
        with pytest.raises(DatasetError, match=named):
            fit(data, **settings)
