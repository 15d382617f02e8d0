"""Closed forms against brute force: leave-one-out by refitting, reduced rank by an SVD, mixtures by their parts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from finesteer_hf.estimators import MixtureSteering, PaperMoSE, ReducedRankSteering, held_out_r2, held_out_residuals
from finesteer_hf.estimators.routing import fit_prototypes, shrunken_prototypes


def regression(rows: int, width: int, rank: int = 3, noise: float = 1.0, seed: int = 0, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(rows, width)) * np.arange(1, width + 1) ** -0.3 + 2.0
    maps = rng.normal(size=(width, rank)) @ rng.normal(size=(rank, width)) * scale / np.sqrt(width)
    return states, (states - 2.0) @ maps + rng.normal(size=width) + noise * rng.normal(size=(rows, width))


def brute_ridge(states: np.ndarray, shifts: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    h_bar, delta_bar = states.mean(axis=0), shifts.mean(axis=0)
    A = states - h_bar
    return h_bar, delta_bar, np.linalg.solve(A.T @ A + ridge * np.eye(A.shape[1]), A.T @ (shifts - delta_bar))


@pytest.mark.parametrize(("rows", "width"), [(25, 40), (40, 12)])
@pytest.mark.parametrize("ridge", [0.3, 30.0])
def test_leave_one_out_is_exact(rows: int, width: int, ridge: float) -> None:
    states, shifts = regression(rows, width)
    expected = np.empty_like(shifts)
    for i in range(rows):
        rest = np.arange(rows) != i
        h_bar, delta_bar, B = brute_ridge(states[rest], shifts[rest], ridge)
        expected[i] = shifts[i] - delta_bar - (states[i] - h_bar) @ B
    np.testing.assert_allclose(held_out_residuals(states, shifts, ridge), expected, atol=1e-7)


def test_leave_one_group_out_is_exact() -> None:
    states, shifts = regression(30, 20)
    groups = np.random.default_rng(0).integers(6, size=30)
    expected = np.empty_like(shifts)
    for group in range(6):
        rest = groups != group
        h_bar, delta_bar, B = brute_ridge(states[rest], shifts[rest], 2.0)
        expected[~rest] = shifts[~rest] - delta_bar - (states[~rest] - h_bar) @ B
    np.testing.assert_allclose(held_out_residuals(states, shifts, 2.0, groups), expected, atol=1e-7)


@pytest.mark.parametrize(("rows", "width"), [(30, 50), (60, 20)])
def test_full_rank_is_ridge_regression(rows: int, width: int) -> None:
    states, shifts = regression(rows, width)
    full = min(rows - 1, width)
    fitted = ReducedRankSteering(full, ridge=1.5, calibrate=False).fit(states, shifts)
    h_bar, delta_bar, B = brute_ridge(states, shifts, 1.5)
    new = np.random.default_rng(1).normal(size=(10, width))
    np.testing.assert_allclose(fitted.predict(new), delta_bar + (new - h_bar) @ B, atol=1e-4)


def test_reduced_rank_is_the_svd_of_the_least_squares_fit() -> None:
    states, shifts = regression(80, 15)
    fitted = ReducedRankSteering(3, ridge=0.0, calibrate=False).fit(states, shifts)
    h_bar, delta_bar, B = brute_ridge(states, shifts, 0.0)
    V = np.linalg.svd((states - h_bar) @ B, full_matrices=False)[2][:3].T
    np.testing.assert_allclose(fitted.predict(states), delta_bar + (states - h_bar) @ B @ V @ V.T, atol=1e-4)


def test_reduced_rank_ridge_is_the_svd_of_the_augmented_fit_and_beats_other_bases() -> None:
    states, shifts = regression(40, 25)
    ridge = 5.0
    fitted = ReducedRankSteering(2, ridge=ridge, calibrate=False).fit(states, shifts)
    h_bar, delta_bar, B = brute_ridge(states, shifts, ridge)
    A, D = states - h_bar, shifts - delta_bar
    augmented = np.vstack([A, np.sqrt(ridge) * np.eye(25)]) @ B
    V = np.linalg.svd(augmented, full_matrices=False)[2][:2].T
    np.testing.assert_allclose(fitted.predict(states), delta_bar + A @ B @ V @ V.T, atol=1e-4)

    def objective(W: np.ndarray) -> float:
        return np.square(D - A @ B @ W @ W.T).sum() + ridge * np.square(B @ W @ W.T).sum()

    principal = np.linalg.svd(D, full_matrices=False)[2][:2].T
    fitted_basis = fitted.up_.T.astype(float)
    assert objective(fitted_basis) < objective(principal)
    assert objective(fitted_basis) == pytest.approx(objective(V), rel=1e-6)


def test_predictable_directions_beat_principal_ones_held_out() -> None:
    """Large variance that the state does not predict dominates PCA of the shifts, but not the fitted map."""
    rng = np.random.default_rng(0)
    states, shifts = regression(400, 60, rank=4, noise=0.3, scale=2.0)
    shifts = shifts + rng.normal(size=(400, 8)) @ rng.normal(size=(8, 60))
    train, test = slice(0, 250), slice(250, None)
    fitted = ReducedRankSteering(4).fit(states[train], shifts[train])
    h_bar, delta_bar, B = brute_ridge(states[train], shifts[train], fitted.ridge_)
    W = np.linalg.svd(shifts[train] - delta_bar, full_matrices=False)[2][:4].T
    principal = delta_bar + (states[test] - h_bar) @ B @ W @ W.T
    ours = held_out_r2(shifts[test], fitted.predict(states[test]), delta_bar)
    full = delta_bar + (states[test] - h_bar) @ B
    assert ours > held_out_r2(shifts[test], principal, delta_bar) + 0.1
    assert ours > held_out_r2(shifts[test], full, delta_bar)


def test_rank_and_ridge_are_chosen_on_held_out_rows() -> None:
    states, shifts = regression(250, 40, rank=3, noise=0.5)
    fitted = ReducedRankSteering().fit(states, shifts)
    assert 2 <= fitted.rank_ <= 4
    curve = {row["rank"]: row["held_out_r2"] for row in fitted.rank_curve_}
    assert curve[0] == 0.0
    assert curve[fitted.rank_] > max(curve.values()) - 0.02
    residuals = {
        row["ridge"]: np.square(held_out_residuals(states, shifts, row["ridge"])).sum() for row in fitted.ridge_curve_
    }
    assert fitted.ridge_ == min(residuals, key=residuals.get)
    assert fitted.held_out_r2_ == pytest.approx(curve[fitted.rank_], abs=0.02)


def test_shifts_without_signal_give_the_constant_or_close() -> None:
    constants = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        states, shifts = rng.normal(size=(100, 30)), rng.normal(size=(100, 30)) + 1
        fitted = ReducedRankSteering().fit(states, shifts)
        constants.append(fitted.rank_ == 0)
        new = rng.normal(size=(1000, 30)) + 1
        assert held_out_r2(new, fitted.predict(rng.normal(size=(1000, 30))), shifts.mean(axis=0)) > -0.02
    assert sum(constants) >= 6
    rng = np.random.default_rng(0)
    states, shifts = rng.normal(size=(100, 30)), rng.normal(size=(100, 30)) + 1
    mixture = MixtureSteering(folds=3).fit(states, shifts)
    assert (mixture.num_experts_, mixture.residual_rank_) == (1, 0)
    np.testing.assert_allclose(mixture.predict(states), np.tile(shifts.mean(axis=0), (100, 1)), atol=1e-6)


def test_slope_undoes_the_shrinkage() -> None:
    states, shifts = regression(60, 80, noise=2.0)
    shrunk, corrected = (ReducedRankSteering(3, ridge=500.0, calibrate=c).fit(states, shifts) for c in (False, True))
    assert shrunk.slope_ == corrected.slope_ > 1.05
    assert corrected.held_out_r2_ > shrunk.held_out_r2_
    delta_bar = shifts.mean(axis=0)
    np.testing.assert_allclose(
        corrected.predict(states) - delta_bar,
        shrunk.slope_ * (shrunk.predict(states) - delta_bar),
        rtol=1e-3,
        atol=1e-4,
    )


def test_groups_make_the_choice_more_careful() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 10)
    states = rng.normal(size=(12, 40))[groups] + 0.1 * rng.normal(size=(120, 40))
    shifts = rng.normal(size=(12, 40))[groups] + 0.1 * rng.normal(size=(120, 40))  # a group is told, nothing else
    assert ReducedRankSteering().fit(states, shifts).held_out_r2_ > 0.8
    grouped = ReducedRankSteering().fit(states, shifts, groups)
    assert grouped.held_out_r2_ < 0.1
    assert grouped.rank_ == 0


def test_default_adapter_of_width_4096_stays_under_two_megabytes() -> None:
    states, shifts = regression(60, 4096)
    state = ReducedRankSteering(40).fit(states, shifts).state()
    assert sum(tensor.numel() * 4 for tensor in state.values()) + 4 * 2 * 4096 * 4 < 2e6


def modes(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three modes that the state predicts, with shifts of different size; the last rows are held out."""
    rng = np.random.default_rng(seed)
    mode = rng.integers(3, size=rows)
    states = 2.0 * np.random.default_rng(7).normal(size=(3, 30))[mode] + rng.normal(size=(rows, 30))
    centres = np.random.default_rng(8).normal(size=(3, 30)) * np.array([[1.0], [2.0], [3.0]])
    return states, centres[mode] + rng.normal(size=(rows, 30))


def test_mixture_prediction_is_its_formula() -> None:
    states, shifts = modes(150)
    fitted = MixtureSteering(3, residual_rank=2, folds=3).fit(states, shifts, groups=np.arange(150) // 5)
    assert (fitted.num_experts_, fitted.residual_rank_) == (3, 2)
    expected = [
        fitted.prototypes_.T @ softmax(fitted.router_weight_ @ h + fitted.router_bias_)
        + fitted.up_.T @ (fitted.down_.T @ (h - fitted.mean_))
        + fitted.bias_
        for h in states
    ]
    np.testing.assert_allclose(fitted.predict(states), expected, atol=1e-4)


def test_prototypes_are_in_the_units_of_the_shifts_and_shrink_as_written() -> None:
    _, shifts = modes(120)
    labels = np.random.default_rng(0).integers(4, size=120)
    overall = shifts.mean(axis=0)
    means = np.stack([shifts[labels == k].mean(axis=0) for k in range(4)])
    sizes = np.bincount(labels)
    s2 = sum(np.square(shifts[labels == k] - means[k]).sum() for k in range(4)) / (120 - 4)
    t2 = max(0.0, (sum(n * np.square(m - overall).sum() for n, m in zip(sizes, means, strict=True)) - 3 * s2) / 120)
    expected = [overall + n * t2 / (n * t2 + s2) * (m - overall) for n, m in zip(sizes, means, strict=True)]
    np.testing.assert_allclose(shrunken_prototypes(shifts, labels), expected)


def test_routing_finds_the_modes_and_falls_back_to_frequencies_without_signal() -> None:
    states, shifts = modes(300)
    (fitted,) = fit_prototypes(states[:200], shifts[:200], [3])
    r2 = held_out_r2(shifts[200:], fitted.predict(states[200:]), shifts[:200].mean(axis=0))
    assert r2 > 0.6
    noise = np.random.default_rng(0).normal(size=(200, 30))
    one, blind = fit_prototypes(noise, shifts[:200], [1, 3])
    np.testing.assert_allclose(one.predict(noise), np.broadcast_to(shifts[:200].mean(0), shifts[:200].shape))
    alpha = softmax(noise @ blind.weight.T + blind.bias, axis=1)
    np.testing.assert_allclose(alpha, np.tile(blind.sizes / 200, (200, 1)), atol=0.1)


def test_mixture_uses_experts_for_modes_and_reports_every_ablation() -> None:
    states, shifts = modes(200)
    fitted = MixtureSteering(folds=3).fit(states, shifts)
    table = {(row["num_experts"], row["residual_rank"] > 0): row for row in fitted.ablations_}
    assert {(1, False), (2, False), (3, False), (4, False)} <= set(table)
    assert table[1, False]["held_out_r2"] == 0.0
    assert sum(row["chosen"] for row in fitted.ablations_) == 1
    best = max(row["held_out_r2"] for row in fitted.ablations_)
    new_states, new_shifts = modes(400, seed=1)
    achieved = held_out_r2(new_shifts, fitted.predict(new_states), shifts.mean(axis=0))
    assert achieved > best - 0.05
    assert achieved == pytest.approx(fitted.held_out_r2_, abs=0.05)


def test_default_is_no_worse_than_the_paper_held_out() -> None:
    for states, shifts in (modes(200), regression(200, 30, noise=0.7)):
        train, test = slice(0, 140), slice(140, None)
        constant = shifts[train].mean(axis=0)
        ours = MixtureSteering(folds=3).fit(states[train], shifts[train]).predict(states[test])
        paper = PaperMoSE(residual_rank=10).fit(states[train], shifts[train]).predict(states[test])
        assert held_out_r2(shifts[test], ours, constant) >= held_out_r2(shifts[test], paper, constant)


def test_equal_shifts_or_equal_states_give_the_constant() -> None:
    states, shifts = regression(30, 20)
    same = np.tile(shifts[:1], (30, 1))
    for estimator in (ReducedRankSteering(), MixtureSteering(folds=3)):
        np.testing.assert_allclose(estimator.fit(states, same).predict(states), same, atol=1e-5)
        blind = estimator.fit(np.ones_like(states), shifts).predict(states)
        np.testing.assert_allclose(blind, np.tile(shifts.mean(axis=0), (30, 1)), atol=1e-5)


def test_bad_input_is_refused() -> None:
    states, shifts = regression(30, 20)
    for estimator, message in [
        (ReducedRankSteering(21), "an integer from 0 to 20"),
        (ReducedRankSteering(2.5), "rank=2.5"),
        (ReducedRankSteering(ridge=-1.0), "ridge=-1.0"),
        (MixtureSteering(31), "num_experts=31 must be 'auto' or an integer from 1 to the number of rows, 30"),
        (MixtureSteering(12), "too few of the 30 rows"),
        (MixtureSteering(residual_rank=-1), "residual_rank=-1"),
    ]:
        with pytest.raises(ValueError, match=message):
            estimator.fit(states, shifts)
    for estimator in (ReducedRankSteering(), MixtureSteering()):
        with pytest.raises(ValueError, match="each state needs one shift"):
            estimator.fit(states, shifts[1:])
        with pytest.raises(ValueError, match="1 of 30 rows contain NaN"):
            estimator.fit(np.where(np.arange(30)[:, None] == 4, np.inf, states), shifts)
        with pytest.raises(ValueError, match="at least"):
            estimator.fit(states[:1], shifts[:1])
    with pytest.raises(ValueError, match="all rows are in 'one'"):
        ReducedRankSteering().fit(states, shifts, ["one"] * 30)
    with pytest.raises(ValueError, match="interpolates"):
        held_out_residuals(*regression(10, 20), ridge=0.0)
    with pytest.raises(ValueError, match="6 wide, but the fitted data is 20 wide"):
        ReducedRankSteering(1).fit(states, shifts).predict(np.ones((2, 6)))
