"""Scores besides the energy ratio: against plain numpy, on what the ratio misses, and the choice between them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from finesteer_hf.estimators import (
    SCORES,
    AutoScore,
    ConformalGate,
    IntervenedSubspace,
    MonitoringScore,
    StateScore,
    cross_fitted_scores,
)


def ir_cloud(rng: np.random.Generator, rows: int, width: int = 64) -> np.ndarray:
    return rng.normal(size=(rows, width)) * np.arange(1, width + 1) ** -0.5 + 1.0


def auroc(score, ir: np.ndarray, other: np.ndarray) -> float:
    truth = np.repeat([1, 0], [len(ir), len(other)])
    return float(roc_auc_score(truth, np.concatenate([score.score_samples(ir), score.score_samples(other)])))


def test_weighted_state_score_is_weighted_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    ir, general = ir_cloud(rng, 40, 8), ir_cloud(rng, 60, 8) - 0.7
    weights = rng.uniform(0.2, 1.8, 40), rng.uniform(0.2, 1.8, 60)
    weights = weights[0] / weights[0].mean(), weights[1] / weights[1].mean()
    rows, truth = np.concatenate([ir, general]), np.repeat([1, 0], [40, 60])
    scale = rows.std(axis=0) * np.sqrt(8)
    plain = LogisticRegression(C=10.0, class_weight="balanced", tol=1e-8, max_iter=5000)
    plain.fit((rows - rows.mean(axis=0)) / scale, truth, sample_weight=np.concatenate(weights))
    expected = plain.decision_function((ir - rows.mean(axis=0)) / scale)
    fitted = StateScore(10.0).fit(ir, general, weights=weights)
    np.testing.assert_allclose(fitted.score_samples(ir), expected, atol=1e-3)
    assert not np.allclose(fitted.score_samples(ir), StateScore(10.0).fit(ir, general).score_samples(ir), atol=1e-2)
    crossed = [cross_fitted_scores(fitted, ir, general, weights=each)[0] for each in (None, weights)]
    assert not np.allclose(*crossed, atol=1e-2)


def test_t2q_is_bonferroni_of_two_two_sided_conformal_p_values() -> None:
    rng = np.random.default_rng(0)
    ir, new = ir_cloud(rng, 120), ir_cloud(rng, 40)
    fitted = MonitoringScore(6).fit(ir)
    mu, V, variances = fitted.subspace_.mean_, fitted.subspace_.basis_, fitted.subspace_.variances_
    expected = []
    for h in new:
        along = V.T @ (h - mu)
        statistics = np.log(np.sum(along**2 / variances)), np.log(np.sum((h - mu - V @ along) ** 2))
        p_values = []
        for s, reference in zip(statistics, (fitted.t2_reference_, fitted.q_reference_), strict=True):
            low, high = 1 + np.sum(reference <= s), 1 + np.sum(reference >= s)
            p_values.append(2 * min(low, high) / (len(reference) + 1))
        expected.append(min(1.0, 2 * min(p_values)))
    inside = np.array(expected) > 4 / 121  # beyond the reference the distance breaks ties, tested below
    assert inside.sum() > 30
    np.testing.assert_allclose(fitted.score_samples(new)[inside], np.array(expected)[inside], atol=1e-5)


def test_t2q_keeps_the_order_of_far_queries_and_never_overflows() -> None:
    rng = np.random.default_rng(0)
    ir = ir_cloud(rng, 100)
    fitted = MonitoringScore(4).fit(ir)
    direction = rng.normal(size=64)
    far = fitted.subspace_.mean_ + np.outer([10.0, 100.0, 1e4, 1e15], direction)
    scores = fitted.score_samples(far)
    assert (np.diff(scores) < 0).all()
    assert (scores > 0).all()
    assert np.isfinite(fitted.score_samples(fitted.subspace_.mean_[None])).all()


def test_t2q_sees_what_the_energy_ratio_cannot() -> None:
    rng = np.random.default_rng(0)
    ir, new = ir_cloud(rng, 300), ir_cloud(rng, 300)
    ratio, monitoring = IntervenedSubspace(8).fit(ir), MonitoringScore(8).fit(ir)
    along = ir_cloud(rng, 300) + 6 * ir.std(axis=0).max() * ratio.basis_[:, 0]
    shrunk = ratio.mean_ + 0.4 * (ir_cloud(rng, 300) - ratio.mean_)
    assert auroc(ratio, new, along) < 0.1  # displaced along V: more energy inside, not less
    assert auroc(ratio, new, shrunk) == pytest.approx(0.5, abs=0.1)
    assert auroc(monitoring, new, along) > 0.95
    assert auroc(monitoring, new, shrunk) > 0.95


def test_state_score_is_logistic_regression_on_standardised_states() -> None:
    rng = np.random.default_rng(0)
    ir, general = ir_cloud(rng, 60, 20) + 0.3, ir_cloud(rng, 40, 20)
    fitted = StateScore(2.0).fit(ir, general)
    rows = np.concatenate([ir, general])
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0) / np.sqrt(20)
    model = LogisticRegression(C=2.0, class_weight="balanced", tol=1e-10).fit(scaled, np.repeat([1, 0], [60, 40]))
    np.testing.assert_allclose(fitted.score_samples(rows), model.decision_function(scaled), atol=1e-3)


def test_folding_and_the_row_space_change_nothing_when_wide() -> None:
    rng = np.random.default_rng(0)
    ir, general = ir_cloud(rng, 30, 200) + 0.2, ir_cloud(rng, 20, 200)
    fitted = StateScore(1.0).fit(ir, general)
    rows = np.concatenate([ir, general])
    scaled = (rows - rows.mean(axis=0)) / rows.std(axis=0) / np.sqrt(200)
    model = LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10).fit(scaled, np.repeat([1, 0], [30, 20]))
    np.testing.assert_allclose(fitted.score_samples(rows), model.decision_function(scaled), atol=1e-3)
    assert set(fitted.state()) == {"weight", "bias"}


def test_five_general_prompts_are_enough_for_a_clear_difference() -> None:
    rng = np.random.default_rng(0)
    shift = rng.normal(size=256) * 0.15
    ir, held_out = ir_cloud(rng, 200, 256) + shift, ir_cloud(rng, 200, 256) + shift
    fitted = StateScore().fit(ir, ir_cloud(rng, 5, 256))
    assert len(fitted.curve_) == len(StateScore.GRID)
    assert auroc(fitted, held_out, ir_cloud(rng, 200, 256)) > 0.95


def test_auto_takes_the_fewest_false_alarms_and_its_gate_holds() -> None:
    rng = np.random.default_rng(0)
    shift = rng.normal(size=64) * 0.3
    ir, general = ir_cloud(rng, 150), ir_cloud(rng, 60) + shift
    auto = AutoScore().fit(ir, general)
    rates = {row["name"]: row["false_alarm_rate"] for row in auto.table_}
    assert set(rates) == {"ser", "t2q", "state"}
    assert rates[auto.name_] == min(rates.values())
    gate = ConformalGate().fit(auto.score_samples(ir_cloud(rng, 100)), auto.score_samples(ir_cloud(rng, 100) + shift))
    assert gate.false_alarms_ <= 15
    assert (gate.gate(auto.score_samples(ir_cloud(rng, 1000))) < 1).mean() < 0.05 + 3 * 0.022


def test_auto_without_general_rows_is_one_class() -> None:
    ir = ir_cloud(np.random.default_rng(0), 60)
    auto = AutoScore().fit(ir)
    assert (auto.name_, auto.table_) == ("ser", [])
    with pytest.raises(ValueError, match="needs general states"):
        AutoScore(("state",)).fit(ir)
    with pytest.raises(ValueError, match="'cosine' is unknown; use one of 'ser', 't2q', 'state'"):
        AutoScore(("cosine",)).fit(ir)


def test_cross_fitted_scores_come_from_fits_that_have_not_seen_the_row() -> None:
    rng = np.random.default_rng(0)
    ir, new = rng.normal(size=(100, 200)), rng.normal(size=(400, 200))
    fitted = IntervenedSubspace(12).fit(ir)
    crossed, nothing = cross_fitted_scores(fitted, ir)
    assert nothing is None
    assert fitted.score_samples(ir).mean() > 2 * fitted.score_samples(new).mean()
    assert crossed.mean() == pytest.approx(fitted.score_samples(new).mean(), rel=0.1)


@pytest.mark.parametrize("kind", [IntervenedSubspace, MonitoringScore])
def test_a_rank_chosen_for_all_rows_does_not_warn_in_a_fold(kind: type) -> None:
    rng = np.random.default_rng(0)
    ir = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 96))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = kind().fit(ir)
        cross_fitted_scores(fitted, ir)
    # The cap of all rows is 8, that of a fold of 51 rows is 6: these directions are all there are, so 8 is chosen.
    assert fitted.chosen_params_["rank"] == 8
    with pytest.warns(UserWarning, match="above 0.125 of the rows"):
        kind(8 + 1, max_fraction=1 / 8).fit(ir + 0.01 * rng.normal(size=ir.shape))


@pytest.mark.parametrize("name", sorted(SCORES))
def test_scores_refuse_bad_rows(name: str) -> None:
    rng = np.random.default_rng(0)
    ir, general = ir_cloud(rng, 40), ir_cloud(rng, 40) + 1
    score = SCORES[name]().fit(ir, general)
    assert score.score_samples(ir).dtype == np.float32
    with pytest.raises(ValueError, match="5 wide"):
        score.score_samples(np.ones((2, 5)))
    broken = ir.copy()
    broken[[3, 7], 2] = np.nan
    for bad, message in [
        (np.empty((0, 64)), r"\[0, 64\]"),
        (ir[:1], "at least"),
        (broken, r"2 of 40 rows contain NaN or Inf \(the first is row 3\)"),
        (ir[0], "two-dimensional"),
    ]:
        with pytest.raises(ValueError, match=message):
            SCORES[name]().fit(bad, general)


def test_state_score_needs_both_classes_of_one_width() -> None:
    ir = ir_cloud(np.random.default_rng(0), 20)
    with pytest.raises(ValueError, match="only one class"):
        StateScore().fit(ir)
    with pytest.raises(ValueError, match="10 wide, but ir is 64 wide"):
        StateScore().fit(ir, np.ones((5, 10)))
    with pytest.raises(ValueError, match="C=-1"):
        StateScore(-1.0).fit(ir, ir + 1)
    with pytest.raises(ValueError, match="all rows are equal"):
        StateScore().fit(np.ones((4, 3)), np.ones((4, 3)))
