"""What the trained map reads: whitened directions of the queries, as many as are set."""

from __future__ import annotations

import numpy as np
import pytest
from kept_data import kept_data

from finesteer_hf.methods.finesteer import FineSteerConfig, refine
from finesteer_hf.sites import Site
from finesteer_hf.testing.conformance import fit_on_toy


SITE = Site("resid_post", 1)


def test_principal_directions_are_whitened() -> None:
    queries = kept_data(str(SITE)).query(SITE, "fit").astype(np.float64)
    mean, down = refine._principal_directions(queries, 3)
    features = (queries - mean.numpy()) @ down.double().numpy()
    assert down.shape == (32, 3)
    np.testing.assert_allclose(features.T @ features / len(queries), np.eye(3), atol=1e-3)
    np.testing.assert_allclose(features.mean(axis=0), 0.0, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 3])
def test_training_keeps_a_rank_that_is_set(rank: int) -> None:
    settings = {"layer": 1, "target": "gradient", "gate": "always", "positions": "generated", "refine": 1}
    adapter = fit_on_toy(FineSteerConfig(strength=1.0, experts="reduced_rank", residual_rank=rank, **settings))[2]
    assert adapter.config.residual_rank == rank and adapter.tensors["residual.up"].shape[0] == rank
    path = adapter.config.fit["report"]["experts"]["training"]["path"]
    assert path[-1]["epoch"] == 1
