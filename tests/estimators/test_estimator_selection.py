"""Held-out figures, folds and the one-standard-error rule."""

from __future__ import annotations

import numpy as np
import pytest

from finesteer_hf.estimators import (
    calibration_slope,
    held_out_r2,
    make_folds,
    mean_cosine,
    one_standard_error,
    row_losses,
)


def test_r2_is_against_the_constant_predictor() -> None:
    rng = np.random.default_rng(0)
    target, constant = rng.normal(size=(20, 3)) + 5, np.full(3, 5.0)
    assert held_out_r2(target, target, constant) == 1.0
    assert held_out_r2(target, np.tile(constant, (20, 1)), constant) == 0.0
    assert held_out_r2(target, target + 100, constant) < 0
    assert np.isnan(held_out_r2(np.ones((2, 2)), np.ones((2, 2)), np.ones(2)))
    np.testing.assert_allclose(row_losses(target, constant), ((target - 5) ** 2).sum(axis=1))


def test_slope_and_cosine() -> None:
    rng = np.random.default_rng(0)
    prediction = rng.normal(size=(30, 4))
    constant = np.ones(4)
    target = constant + 1.7 * (prediction - constant)
    assert calibration_slope(target, prediction, constant) == pytest.approx(1.7)
    assert calibration_slope(target, np.tile(constant, (30, 1)), constant) == 1.0
    assert mean_cosine(target, 3 * target) == pytest.approx(1.0)
    assert mean_cosine(target, np.zeros_like(target)) == 0.0


def test_folds_cover_every_row_once_and_keep_groups_whole() -> None:
    groups = np.random.default_rng(0).integers(7, size=50)
    for labels in (None, groups):
        folds = make_folds(50, 5, labels)
        np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(50))
        for train, test in folds:
            assert not set(train) & set(test)
            if labels is not None:
                assert not set(labels[train]) & set(labels[test])
    assert len(make_folds(3, 5)) == 3
    with pytest.raises(ValueError, match="folds=5 and 1 groups"):
        make_folds(10, 5, np.zeros(10))


def test_one_standard_error_takes_the_simplest_that_is_not_clearly_worse() -> None:
    rng = np.random.default_rng(0)
    best = rng.uniform(1, 5, size=100)
    near = best + rng.normal(0.02, 1.0, size=100) - 0.02  # no worse beyond noise
    near += 0.01 - (near - best).mean()
    worse = best + rng.normal(0.5, 1.0, size=100)
    assert one_standard_error([best, near, worse], [10, 5, 1]) == 1
    assert one_standard_error([best, near, worse], [5, 10, 1]) == 0
    assert one_standard_error([best, worse], [2, 1], indifference=2.0) == 1


def test_rows_of_a_group_are_one_observation() -> None:
    rng = np.random.default_rng(0)
    best = rng.uniform(1, 5, size=10)
    other = best + np.array([3, -1, 2, -2, 2, -2, 3, -2, 1, -1.0])  # mean .3, standard error .66
    repeated = [np.repeat(best, 20), np.repeat(other, 20)]
    assert one_standard_error([best, other], [2, 1]) == 1
    assert one_standard_error(repeated, [2, 1]) == 0  # copies pretend to be evidence
    assert one_standard_error(repeated, [2, 1], np.repeat(np.arange(10), 20)) == 1
