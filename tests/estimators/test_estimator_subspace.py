"""The energy ratio and its subspace against plain numpy, and what the ratio detects and misses."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from finesteer_hf.estimators import ConformalGate, IntervenedSubspace, QuantileGate, subspace_energy_ratio
from finesteer_hf.estimators.linear_algebra import gram_eigen, principal_directions, row_space


def power_law(rng: np.random.Generator, rows: int, width: int, exponent: float = 1.0) -> np.ndarray:
    return rng.normal(size=(rows, width)) * np.arange(1, width + 1) ** (-exponent / 2)


@pytest.mark.parametrize(("rows", "width"), [(40, 100), (100, 40)])
def test_subspace_and_ratio_equal_a_plain_svd(rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    ir, queries = power_law(rng, rows, width) + 3.0, power_law(rng, 20, width) + 2.5
    fitted = IntervenedSubspace(5).fit(ir)

    mu = ir.mean(axis=0)
    _, singular, right = np.linalg.svd(ir - mu, full_matrices=False)
    expected = []
    for h in queries:  # Eq. 6-7, one query at a time
        inside = sum(float(right[j] @ (h - mu)) ** 2 for j in range(5))
        expected.append(inside / float((h - mu) @ (h - mu)))
    np.testing.assert_allclose(fitted.score_samples(queries), expected, atol=1e-5)
    np.testing.assert_allclose(fitted.variances_, singular[:5] ** 2 / (rows - 1), rtol=1e-5)
    np.testing.assert_allclose(np.abs(fitted.basis_.T @ right[:5].T), np.eye(5), atol=1e-5)


def test_numpy_torch_and_bfloat16_inputs_agree() -> None:
    ir = torch.from_numpy(power_law(np.random.default_rng(0), 60, 24)).bfloat16()
    reference = IntervenedSubspace(3).fit(ir.float().numpy())
    given = IntervenedSubspace(3).fit(ir)
    np.testing.assert_array_equal(given.basis_, reference.basis_)
    np.testing.assert_allclose(given.score_samples(ir), reference.score_samples(ir.double()), atol=1e-6)


def test_denominator_is_the_total_energy_not_a_second_subspace() -> None:
    mean, basis = torch.zeros(4), torch.eye(4)[:, :1]
    h = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert subspace_energy_ratio(h, mean, basis).item() == pytest.approx(0.25)


def test_ratio_is_symmetric_scale_free_and_bounded() -> None:
    rng = np.random.default_rng(1)
    ir = power_law(rng, 80, 32) + 1.0
    fitted = IntervenedSubspace(4).fit(ir)
    h = power_law(rng, 50, 32) + 2.0
    ratio = fitted.score_samples(h)
    np.testing.assert_allclose(fitted.score_samples(2 * fitted.mean_ - h), ratio, atol=1e-5)
    np.testing.assert_allclose(fitted.score_samples(fitted.mean_ + 7.0 * (h - fitted.mean_)), ratio, atol=1e-5)
    assert ((ratio >= 0) & (ratio <= 1)).all()


def test_no_norm_overflows_and_the_mean_itself_scores_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q
    mean, h = torch.zeros(64), torch.randn(8, 64, generator=generator)
    expected = subspace_energy_ratio(h, mean, basis)
    half = (h / h.abs().max() * 60_000).half()  # ||h||^2 is above the largest fp16 number many times
    torch.testing.assert_close(
        subspace_energy_ratio(half, mean, basis), subspace_energy_ratio(half.double().float(), mean, basis)
    )
    torch.testing.assert_close(subspace_energy_ratio(half, mean, basis), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(subspace_energy_ratio(h * 1e30, mean, basis), expected)
    torch.testing.assert_close(subspace_energy_ratio(h * 1e-25, mean, basis), expected)
    assert subspace_energy_ratio(mean[None], mean, basis).item() == 0.0


def test_automatic_rank_keeps_the_gap_small_and_stays_under_its_cap() -> None:
    rng = np.random.default_rng(0)
    ir = power_law(rng, 160, 300)
    fitted = IntervenedSubspace().fit(ir)
    assert len(fitted.curve_) == 160 // 8
    assert fitted.curve_[fitted.rank_ - 1]["gap"] <= 0.05
    assert fitted.rank_ == len(fitted.curve_) or fitted.curve_[fitted.rank_]["gap"] > 0.05
    row = fitted.curve_[3]  # the curve is what refitting at each rank gives
    assert row["in_sample"] == pytest.approx(IntervenedSubspace(4).fit(ir).score_samples(ir).mean(), abs=1e-5)


def test_likelihood_finds_the_planted_rank() -> None:
    rng = np.random.default_rng(0)
    ir = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 40)) * 3 + rng.normal(size=(200, 40))
    assert IntervenedSubspace(criterion="likelihood").fit(ir).rank_ == 3


def test_groups_stay_together_when_the_rank_is_chosen() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 8)
    ir = rng.normal(size=(20, 50))[groups] + 0.1 * rng.normal(size=(160, 50))
    grouped = IntervenedSubspace().fit(ir, groups=groups).curve_[-1]["gap"]
    assert grouped > IntervenedSubspace().fit(ir).curve_[-1]["gap"] + 0.05


def test_rank_above_the_cap_warns_and_impossible_ranks_are_refused() -> None:
    ir = power_law(np.random.default_rng(0), 40, 64)
    with pytest.warns(UserWarning, match="above 0.125 of the rows"):
        IntervenedSubspace(20).fit(ir)
    with pytest.raises(ValueError, match="between 1 and"):
        IntervenedSubspace(40).fit(ir)
    with pytest.raises(ValueError, match="span only 2"):
        IntervenedSubspace(5).fit(np.tile(ir[:3], (14, 1)))
    with pytest.raises(ValueError, match="all 10 rows are equal"):
        IntervenedSubspace().fit(np.ones((10, 4)))


def test_published_shape_misses_in_sample_and_holds_when_split() -> None:
    """M=408, k=128, eps=.05: the in-sample quantile misses most new IR queries, the conformal gate does not (T21)."""
    naive, calibrated = [], []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ir, new = power_law(rng, 408, 1024), power_law(rng, 1000, 1024)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole, split = IntervenedSubspace(128).fit(ir), IntervenedSubspace(128).fit(ir[:286])
        quantile = QuantileGate(0.05).fit(whole.score_samples(ir))
        conformal = ConformalGate(0.05).fit(split.score_samples(ir[286:]))
        naive.append((quantile.gate(whole.score_samples(new)) < 1).mean())
        calibrated.append((conformal.gate(split.score_samples(new)) < 1).mean())
    assert np.mean(naive) > 0.7
    # three calibration sets of 122: the standard deviation of one miss rate is .02
    assert np.mean(calibrated) < 0.05 + 3 * 0.02 / np.sqrt(3)


def test_randomised_directions_capture_what_exact_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    centred = power_law(np.random.default_rng(0), 300, 200)
    exact, _ = principal_directions(centred, 10)
    monkeypatch.setattr("finesteer_hf.estimators.linear_algebra.RANDOMISED_ABOVE_ROWS", 100)
    monkeypatch.setattr("finesteer_hf.estimators.linear_algebra.RANDOMISED_ABOVE_SIDE", 100)
    approximate, directions = principal_directions(centred, 10)
    np.testing.assert_allclose(approximate, exact, rtol=0.01)
    np.testing.assert_allclose(directions.T @ directions, np.eye(10), atol=1e-8)


@pytest.mark.parametrize(("rows", "width"), [(30, 80), (80, 30), (2, 5)])
def test_factorisations_reproduce_the_table(rows: int, width: int) -> None:
    table = np.random.default_rng(0).normal(size=(rows, width))
    coordinates, basis = row_space(table)
    np.testing.assert_allclose(coordinates @ basis.T, table, atol=1e-10)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
    left, values, right = gram_eigen(table)
    np.testing.assert_allclose((left * np.sqrt(values)) @ right.T, table, atol=1e-6)
