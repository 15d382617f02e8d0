"""Intervals and paired tests against explicit formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from finesteer_hf.evaluation.measures.statistics import (
    holm,
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


def test_holm_equals_a_calculation_by_hand() -> None:
    # 0.01 x 4, 0.015 x 3 = 0.045, 0.02 x 2 = 0.04 (held up to 0.045), 0.5 x 1.
    assert holm([0.02, 0.5, 0.01, 0.015]).tolist() == pytest.approx([0.045, 0.5, 0.04, 0.045])
    assert holm([0.9, 0.8]).tolist() == pytest.approx([1.0, 1.0]) and holm([]).size == 0
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, float("nan")])


def test_holm_refuses_what_the_closed_test_of_all_subsets_refuses() -> None:
    """Holm is the closure of Bonferroni: a hypothesis falls if each set with it has p at most alpha/size."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        p = generator.uniform(0, 0.2, 5).round(2)
        sets = [chosen for size in range(1, 6) for chosen in itertools.combinations(range(5), size)]
        for row, corrected in enumerate(holm(p)):
            closed = max(min(1.0, len(chosen) * p[list(chosen)].min()) for chosen in sets if row in chosen)
            assert corrected == pytest.approx(closed)


def bca(values: np.ndarray) -> tuple[float, float]:
    """The bootstrap interval of zeros and ones."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, n_resamples=500, method="BCa", rng=np.random.default_rng(0))
    return found.confidence_interval.low, found.confidence_interval.high


def test_shares_of_few_hits_are_covered_where_a_bootstrap_misses_them() -> None:
    generator = np.random.default_rng(0)
    samples = (generator.random((400, 20)) < 0.05).astype(float)
    ours = [mean_with_interval(sample) for sample in samples]
    theirs = {sample.sum(): bca(sample) for sample in samples}
    covered = np.mean([found.low <= 0.05 <= found.high for found in ours])
    bootstrapped = np.mean([low <= 0.05 <= high for low, high in (theirs[sample.sum()] for sample in samples)])
    assert covered >= 0.9 and bootstrapped <= 0.75
    none = mean_with_interval(np.zeros(20))
    assert (none.low, none.high) == pytest.approx(wilson(0, 20), abs=1e-12)


def test_the_interval_of_paired_shares_is_tangos() -> None:
    """The published example: 12 of 50 patients differ one way, 2 the other."""
    first = np.r_[np.ones(36), np.zeros(12), np.ones(2)]
    second = np.r_[np.ones(36), np.ones(12), np.zeros(2)]
    found = paired_difference(first, second)
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0611, 0.3447), abs=5e-5)
    other = paired_difference(second, first)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_the_ends_of_a_paired_interval_are_refused_by_the_score_test_at_its_level() -> None:
    """Brute force: the most likely shares under a difference by search, not by the formula's root."""
    gained, lost, n = 5, 1, 30
    found = paired_difference(np.r_[np.zeros(5), np.ones(25)], np.r_[np.ones(5), np.zeros(1), np.ones(24)])
    shares = np.linspace(1e-6, 0.5, 200_001)
    for end, sign in ((found.low, 1), (found.high, -1)):
        kept = shares[(shares + end > 0) & (2 * shares + end < 1)]
        likely = gained * np.log(kept + end) + lost * np.log(kept) + (n - gained - lost) * np.log(1 - 2 * kept - end)
        best = kept[likely.argmax()]
        score = (gained - lost - n * end) / math.sqrt(n * (2 * best + end - end * end))
        assert sign * score == pytest.approx(1.96, abs=1e-3)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (0, 1), (20, 0), (0, 20), (10, 10)])
def test_paired_intervals_hold_their_estimate_at_the_edges(gained: int, lost: int) -> None:
    same = 20 - gained - lost
    first = np.r_[np.zeros(gained), np.ones(lost + same)]
    second = np.r_[np.ones(gained), np.zeros(lost), np.ones(same)]
    found = paired_difference(first, second)
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.high > found.low
    if gained == lost == 0:
        z = stats.norm.ppf(0.975)
        assert found.high == pytest.approx(z * z / (20 + z * z)) == -found.low


def test_a_change_that_is_the_same_everywhere_has_no_width() -> None:
    first = np.linspace(0, 0.1, 20)
    found = paired_difference(first, first + 0.3)
    assert found.low == found.high == found.value == pytest.approx(0.3)


def test_rare_changes_are_covered() -> None:
    """Each pair of counts once, with its probability: coverage without simulation."""
    n, gain, loss = 40, 0.04, 0.01
    covered = 0.0
    for gained, lost in itertools.product(range(10), range(6)):
        counts = (gained, lost, n - gained - lost)
        first = np.repeat([0.0, 1.0, 1.0], counts)
        second = np.repeat([1.0, 0.0, 1.0], counts)
        found = paired_difference(first, second)
        if found.low <= gain - loss <= found.high:
            covered += stats.multinomial.pmf(counts, n, (gain, loss, 1 - gain - loss))
    assert covered > 0.94
