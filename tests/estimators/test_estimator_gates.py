"""The paper's gates against Eq. 8, 9 and 15 read literally, and the guarantee of the calibrated one by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from finesteer_hf.estimators import (
    GATES,
    AlwaysGate,
    ConformalGate,
    DirectGate,
    LogisticGate,
    QuantileGate,
    conformal_rank,
    false_alarm_upper_bound,
    lost_dose,
    miss_upper_bound,
    pac_rank,
    rows_needed,
)


def test_quantile_gate_is_equation_8() -> None:
    rng = np.random.default_rng(0)
    ir, new = rng.uniform(0.3, 0.9, 137).astype(np.float32), rng.uniform(0.2, 1.0, 300).astype(np.float32)
    gate = QuantileGate(epsilon=0.1, gamma=1.5).fit(ir)
    tau = min(t for t in ir if np.mean(ir <= t) >= 0.1)
    expected = [1.0 if s >= tau else (np.mean(ir <= s) / 0.1) ** 1.5 for s in new]
    np.testing.assert_allclose(gate.gate(new), expected, atol=1e-5)
    assert gate.threshold_ == pytest.approx(tau)
    assert np.mean(gate.gate(ir) < 1) <= 0.1  # in sample, by construction


def test_logistic_gate_is_equation_9_at_the_minimum_of_its_loss() -> None:
    rng = np.random.default_rng(0)
    ir, general = rng.normal(0.6, 0.1, 200), rng.normal(0.45, 0.1, 150)
    gate = LogisticGate(l2=1e-9).fit(ir, general)
    s = np.linspace(0, 1, 11)
    np.testing.assert_allclose(gate.gate(s), 1 / (1 + np.exp(-(gate.weight_ * s + gate.bias_))), atol=1e-5)

    def cross_entropy(w: float, b: float) -> float:
        return float(np.logaddexp(0, -(w * ir + b)).sum() + np.logaddexp(0, w * general + b).sum())

    best = cross_entropy(gate.weight_, gate.bias_)
    for dw, db in [(0.3, 0), (-0.3, 0), (0, 0.1), (0, -0.1), (0.3, -0.15)]:
        assert cross_entropy(gate.weight_ + dw, gate.bias_ + db) > best
    assert gate.gate(np.array([gate.threshold_]))[0] == pytest.approx(0.5, abs=1e-5)


def test_direct_gate_is_equation_15_and_always_is_one() -> None:
    s = np.array([0.0, 0.3, 1.0], dtype=np.float32)
    np.testing.assert_array_equal(DirectGate().fit(s).gate(s), s)
    np.testing.assert_array_equal(AlwaysGate().fit(s).gate(s), np.ones(3))
    with pytest.raises(ValueError, match=r"score in \[0, 1\]"):
        DirectGate().fit(np.array([-3.0, 5.0]))


def test_conformal_gate_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    calibration, new = rng.normal(size=97).astype(np.float32), rng.normal(size=400).astype(np.float32) - 1
    gate = ConformalGate(epsilon=0.1, gamma=2.0).fit(calibration)
    ordered = np.sort(calibration)
    expected = []
    for s in new:
        p = (1 + np.sum(calibration <= s)) / 98
        expected.append(0.0 if s < ordered[0] else min(1.0, (p / 0.1) ** 2))
    np.testing.assert_allclose(gate.gate(new), expected, atol=1e-5)
    assert gate.rank_ == math.floor(0.1 * 98) == 9
    assert gate.threshold_ == ordered[8]
    assert (gate.gate(new[new >= ordered[8]]) == 1).all()
    assert gate.bound_ == 9 / 98


@pytest.mark.parametrize(
    ("n", "epsilon", "marginal", "pac"),
    [(59, 0.05, 3, 1), (100, 0.10, 10, 5), (200, 0.05, 10, 5), (408, 0.05, 20, 13), (1000, 0.05, 50, 39)],
)
def test_ranks_are_the_published_table(n: int, epsilon: float, marginal: int, pac: int) -> None:
    assert conformal_rank(n, epsilon) == marginal
    assert pac_rank(n, epsilon, 0.05) == pac
    assert binom.cdf(pac - 1, n, epsilon) <= 0.05 < binom.cdf(pac, n, epsilon)
    assert miss_upper_bound(n, pac, 0.05) <= epsilon


def test_rows_needed_is_where_the_first_miss_is_allowed() -> None:
    for epsilon, delta, expected in [(0.05, None, 19), (0.01, None, 99), (0.05, 0.05, 59), (0.1, 0.05, 29)]:
        needed = rows_needed(epsilon, delta)
        assert needed == expected
        ranks = [
            conformal_rank(n, epsilon) if delta is None else pac_rank(n, epsilon, delta) for n in (needed - 1, needed)
        ]
        assert ranks == [0, 1]


@pytest.mark.parametrize("n", [25, 100, 333])
@pytest.mark.parametrize("epsilon", [0.05, 0.1])
def test_mean_miss_rate_over_calibration_sets_is_guaranteed(n: int, epsilon: float) -> None:
    rng = np.random.default_rng(n)
    gates = [ConformalGate(epsilon).fit(rng.normal(size=n)) for _ in range(400)]
    misses = norm.cdf([gate.threshold_ for gate in gates])  # exact, given the calibration set
    error = misses.std() / np.sqrt(len(misses))
    assert misses.mean() <= epsilon + 3 * error
    assert misses.mean() == pytest.approx(gates[0].bound_, abs=4 * error)


def test_pac_holds_for_all_but_delta_of_the_calibration_sets() -> None:
    rng = np.random.default_rng(0)
    gates = [ConformalGate(0.05, guarantee="pac", delta=0.1).fit(rng.normal(size=200)) for _ in range(500)]
    misses = norm.cdf([gate.threshold_ for gate in gates])
    marginal = norm.cdf([ConformalGate(0.05).fit(rng.normal(size=200)).threshold_ for _ in range(500)])
    assert np.mean(misses > 0.05) <= 0.1 + 3 * np.sqrt(0.09 / 500)
    assert np.mean(marginal > 0.05) > 0.3  # the marginal guarantee is about the mean only
    assert gates[0].bound_ == pytest.approx(beta.ppf(0.9, gates[0].rank_, 201 - gates[0].rank_))
    scores = rng.normal(size=1000)
    np.testing.assert_array_equal(
        gates[0].gate(scores) == 1, scores.astype(np.float32) >= np.float32(gates[0].threshold_)
    )


@pytest.mark.parametrize(("epsilon", "gamma"), [(0.05, 2.0), (0.1, 1.0), (0.2, 4.0)])
def test_lost_dose_of_ir_queries_is_bounded(epsilon: float, gamma: float) -> None:
    rng = np.random.default_rng(0)
    lost, bounds = [], []
    for _ in range(300):
        gate = ConformalGate(epsilon, gamma).fit(rng.normal(size=100))
        lost.append(1 - gate.gate(rng.normal(size=500)).mean())
        bounds.append(gate.lost_dose_bound_)
    error = np.std(lost) / np.sqrt(len(lost))
    assert np.mean(lost) == pytest.approx(bounds[0], abs=4 * error)
    assert lost_dose(100, epsilon, gamma, zero_rank=0) <= epsilon * gamma / (gamma + 1)
    assert bounds[0] <= epsilon * gamma / (gamma + 1) + 1e-3


def test_in_sample_quantile_has_no_such_guarantee() -> None:
    """If the score has seen its rows (here shifted up by half a deviation), the quantile misses twice eps (T21)."""
    rng = np.random.default_rng(0)
    misses = [norm.cdf(QuantileGate(0.05).fit(rng.normal(size=200) + 0.5).threshold_) for _ in range(200)]
    assert np.mean(misses) > 0.1


def test_too_few_rows_fire_always_and_say_how_many_are_needed() -> None:
    with pytest.warns(UserWarning, match=r"18 calibration rows, but epsilon=0.05 \(marginal\) needs 19"):
        gate = ConformalGate(0.05).fit(np.arange(18.0))
    np.testing.assert_array_equal(gate.gate(np.array([-1e9, 0.0, 5.0])), np.ones(3))
    assert gate.bound_ == 0.0
    with pytest.warns(UserWarning, match=r"\(pac\) needs 59"):
        ConformalGate(0.05, guarantee="pac").fit(np.arange(30.0))


def test_gate_is_exactly_zero_for_general_queries_and_one_for_most_ir() -> None:
    rng = np.random.default_rng(0)
    calibration = np.concatenate([rng.normal(size=120), [-8.0, -7.0]])  # two IR queries that look general
    general = rng.normal(-7.5, 0.5, size=200)
    plain, informed = ConformalGate(0.05).fit(calibration), ConformalGate(0.05).fit(calibration, general)
    fresh = rng.normal(-7.5, 0.5, size=200)
    assert (plain.gate(fresh) > 0).mean() > 0.5  # a stray IR query holds the door open
    assert (informed.gate(fresh) == 0).all()
    assert informed.threshold_ == plain.threshold_
    assert informed.false_alarms_ == 0
    assert informed.false_alarm_bound_ == pytest.approx(1 - 0.05 ** (1 / 200))
    assert informed.lost_dose_bound_ <= informed.bound_
    # one calibration set of 122: its miss rate is .05 on the mean with a standard deviation of .02
    assert (informed.gate(rng.normal(size=1000)) == 1).mean() > 1 - 0.05 - 3 * 0.02


def test_mondrian_threshold_is_the_lowest_and_holds_in_every_group() -> None:
    rng = np.random.default_rng(0)
    miss = {"easy": [], "hard": []}
    for _ in range(200):
        scores = np.concatenate([rng.normal(2, 1, 60), rng.normal(-1, 1, 60)])
        gate = ConformalGate(0.1).fit(scores, groups=np.repeat(["easy", "hard"], 60))
        miss["easy"].append(norm.cdf(gate.threshold_, 2))
        miss["hard"].append(norm.cdf(gate.threshold_, -1))
    assert gate.group_ == "hard"
    assert gate.threshold_ == min(gate.group_thresholds_.values())
    assert np.mean(miss["easy"]) < 0.01
    assert np.mean(miss["hard"]) < 0.1 + 3 * np.std(miss["hard"]) / np.sqrt(200)
    with pytest.warns(UserWarning, match="group 'small' has 3"):
        ConformalGate(0.1).fit(scores, groups=np.array(["small"] * 3 + ["large"] * 117))


def test_cross_fitted_calibration_is_called_approximate_and_doubles_the_bound() -> None:
    scores = np.random.default_rng(0).normal(size=100)
    split, crossed = ConformalGate().fit(scores), ConformalGate(cross_fitted=True).fit(scores)
    assert crossed.threshold_ == split.threshold_
    assert crossed.bound_ == pytest.approx(2 * split.bound_)
    assert crossed.guarantee_.startswith("approximate")


def test_false_alarm_bound_is_clopper_pearson() -> None:
    assert false_alarm_upper_bound(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert false_alarm_upper_bound(7, 7) == 1.0
    bound = false_alarm_upper_bound(3, 50)
    assert binom.cdf(3, 50, bound) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="not a rate"):
        false_alarm_upper_bound(5, 4)


@pytest.mark.parametrize("name", sorted(GATES))
def test_every_gate_stays_in_range_rises_and_refuses_nonsense(name: str) -> None:
    rng = np.random.default_rng(0)
    ir, general = rng.uniform(0.4, 0.9, 60), rng.uniform(0.1, 0.6, 60)
    gate = GATES[name]().fit(ir, general)
    dose = gate.gate(np.linspace(0, 1, 200))
    assert dose.dtype == np.float32
    assert ((dose >= 0) & (dose <= 1)).all()
    assert (np.diff(dose) >= -1e-6).all()
    assert (gate.n_calibration_, gate.n_general_) == (60, 60)
    for bad, message in [
        (np.array([]), "0 rows"),
        (np.array([0.5, np.nan, np.inf]), "2 of 3 rows"),
        (np.ones((3, 2)), "one-dimensional"),
        (np.array(["a"]), "must be numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            GATES[name]().fit(bad, general)


def test_gate_parameters_are_checked() -> None:
    s = np.linspace(0.1, 0.9, 50)
    for gate, message in [
        (ConformalGate(epsilon=0.0), "epsilon=0.0"),
        (ConformalGate(epsilon=1.5), "epsilon=1.5"),
        (ConformalGate(gamma=-1), "gamma=-1"),
        (ConformalGate(guarantee="sure"), "use one of 'marginal', 'pac'"),
        (ConformalGate(guarantee="pac", delta=2), "delta=2"),
        (QuantileGate(gamma=0), "gamma=0"),
        (LogisticGate(), "only one class"),
    ]:
        with pytest.raises(ValueError, match=message):
            gate.fit(s)
    with pytest.raises(ValueError, match="one label for each"):
        ConformalGate().fit(s, groups=["a"])


def test_threshold_of_kinds_is_the_brute_force_one() -> None:
    """The largest score with at most epsilon of the equally weighted kinds below."""
    rng = np.random.default_rng(0)
    for trial in range(20):
        kinds = rng.integers(6, size=80).astype(str)
        scores = np.round(rng.normal(size=80), 1 if trial % 2 else 6).astype(np.float32)  # with ties, and without
        below = {s: np.mean([np.mean(scores[kinds == kind] < s) for kind in np.unique(kinds)]) for s in scores}
        threshold = max(s for s, share in below.items() if share <= 0.1 + 1e-9)
        gate = ConformalGate(0.1, by_kind=True).fit(scores, groups=kinds)
        assert gate.threshold_ == threshold and gate.missed_ == pytest.approx(below[threshold])
        count = len(np.unique(kinds))
        assert gate.bound_ == pytest.approx((count * below[threshold] + 1) / (count + 1))
        assert (gate.gate(scores) == 1).tolist() == (scores >= threshold).tolist()


def test_kinds_of_one_row_each_have_the_bound_of_rows() -> None:
    scores = np.random.default_rng(0).normal(size=59)
    gate = ConformalGate(0.05, by_kind=True).fit(scores, groups=np.arange(59))
    assert gate.bound_ == pytest.approx(gate.rank_ / 60)


def test_the_bound_for_a_new_kind_holds_where_that_of_rows_fails() -> None:
    rng = np.random.default_rng(0)
    missed, missed_by_rows, bounds = [], [], []
    for _ in range(400):
        centres = rng.normal(size=9)
        kinds = np.repeat(np.arange(8), rng.integers(5, 40, size=8))
        scores = centres[kinds] + 0.3 * rng.normal(size=len(kinds))
        new = centres[8] + 0.3 * rng.normal(size=50)
        gate = ConformalGate(0.05, by_kind=True).fit(scores, groups=kinds)
        missed.append(np.mean(gate.gate(new) < 1))
        bounds.append(gate.bound_)
        missed_by_rows.append(np.mean(ConformalGate(0.05).fit(scores).gate(new) < 1))
    error = np.std(missed) / np.sqrt(len(missed))
    assert np.mean(missed) <= np.mean(bounds) + 2 * error
    assert np.mean(missed_by_rows) > 0.05 + 2 * error  # what rows promise does not hold here


def test_kinds_need_groups_and_exclude_pac() -> None:
    scores = np.arange(30.0)
    for gate, groups in ((ConformalGate(by_kind=True), None), (ConformalGate(by_kind=True, guarantee="pac"), scores)):
        with pytest.raises(ValueError, match="by_kind=True needs groups"):
            gate.fit(scores, groups=groups)
