"""Intervals and paired tests against formulas written out."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from finesteer_hf.evaluation.statistics import (
    mcnemar,
    mean_with_interval,
    paired_difference,
    paired_p_value,
    proportion,
)


def wilson(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (1, 1), (83, 100), (100, 120)])
def test_wilson_interval_is_the_score_interval(k: int, n: int) -> None:
    share = proportion(k, n)
    low, high = wilson(k, n)
    assert share.low == pytest.approx(low, abs=1e-12)
    assert share.high == pytest.approx(high, abs=1e-12)
    assert (share.k, share.n, share.value) == (k, n, k / n)


def test_clopper_pearson_bounds_have_the_exact_tails() -> None:
    from scipy.stats import binom

    share = proportion(7, 50, method="clopper-pearson")
    assert binom.sf(6, 50, share.low) == pytest.approx(0.025, abs=1e-8)
    assert binom.cdf(7, 50, share.high) == pytest.approx(0.025, abs=1e-8)


def test_proportion_reads_booleans_and_prints_n_and_interval() -> None:
    share = proportion([True] * 83 + [False] * 17)
    assert str(share).startswith("83.0% [") and str(share).endswith("n=100")
    assert str(proportion([])) == "no items"
    assert proportion([]).to_dict()["value"] is None


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="k <= n"):
        proportion(3, 2)
    with pytest.raises(ValueError, match="Give n"):
        proportion(3)
    with pytest.raises(ValueError, match="wilson"):
        proportion(1, 2, method="wald")  # type: ignore[arg-type]


def test_mcnemar_is_the_binomial_of_the_discordant_items() -> None:
    first = [1, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 0, 1, 1, 1, 1, 1, 1, 1, 0]
    test = mcnemar(first, second)
    assert (test.only_first, test.only_second, test.n) == (1, 6, 10)
    assert test.p_value == pytest.approx(2 * sum(math.comb(7, i) for i in (0, 1)) / 2**7)
    assert mcnemar([1, 0], [1, 0]).p_value == 1.0
    with pytest.raises(ValueError, match="same items"):
        mcnemar([1], [1, 0])


def test_bootstrap_interval_covers_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(60):
        interval = mean_with_interval(generator.normal(1.0, 2.0, 40), seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert covered >= 50


def test_paired_difference_is_that_of_the_items() -> None:
    first, second = np.arange(20.0), np.arange(20.0) + np.linspace(0, 1, 20)
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(0.5)
    assert difference.low < 0.5 < difference.high
    assert paired_difference([1.0, 2.0], [2.0, 3.0]).low == 1.0
    with pytest.raises(ValueError, match="same items"):
        paired_difference([1.0], [1.0, 2.0])


def test_p_of_a_paired_mean_is_the_share_of_sign_flips_that_reach_as_far() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=8), generator.normal(0.7, size=8)
    difference = second - first
    flips = np.array(list(itertools.product((-1, 1), repeat=8))) @ difference / 8
    reached = np.mean(np.abs(flips) >= abs(difference.mean()) - 1e-12)
    assert paired_p_value(first, second) == pytest.approx(reached)
    assert paired_p_value(first, first) == 1.0 and paired_p_value([], []) == 1.0
    assert paired_p_value(np.zeros(400), np.full(400, 0.1) + generator.normal(0, 0.01, 400)) < 0.001
    with pytest.raises(ValueError, match="same items"):
        paired_p_value([1.0], [1.0, 2.0])
