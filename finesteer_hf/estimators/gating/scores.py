"""Gate scores beside the energy ratio: process-monitoring statistics and a linear classifier of the state.

A score is one number per query, higher if the query looks more like an intervention-required (IR) one. It is a
trigger, not a probability: a gate (`gates.py`) turns it into a dose after calibration on rows that the score has not
seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import (
    ArrayLike,
    Matrix,
    State,
    as_groups,
    as_matrix,
    positive,
    run,
    runtime_tensor,
)
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.estimators.selection import make_folds, one_standard_error
from finesteer_hf.estimators.subspace import TINY, IntervenedSubspace, scaled_deviation


# IR and general rows.
RowWeights = tuple[NDArray[np.float64], NDArray[np.float64]]
# Folds use the rank of the fit on all rows, which gave the warning already.
NO_CAP = 1 - 1e-9


def monitoring_statistics(
    h: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor, variances: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logarithms of T^2 = sum_j (v_j^T (h - mu))^2 / lambda_j and Q = ||(I - V V^T)(h - mu)||^2.

    The two statistics of PCA process monitoring (Jackson and Mudholkar 1979): the distance along the subspace and from
    it. Logarithms do not overflow for any norm.

    Args:
        h: [..., d], any floating dtype.
        mean: [d] fp32.
        basis: [d, k] fp32, orthonormal.
        variances: lambda [k] fp32, positive.

    Returns:
        log T^2 and log Q, each [...] fp32, finite.
    """
    deviation, scale = scaled_deviation(h, mean)
    along = deviation @ basis
    away = deviation - along @ basis.T
    log_scale = 2.0 * scale.squeeze(-1).log()
    relative = variances / variances.amax()
    t2 = (along.square() / relative).sum(dim=-1).clamp_min(TINY).log() - variances.amax().log()
    return t2 + log_scale, away.square().sum(dim=-1).clamp_min(TINY).log() + log_scale


def _two_sided(statistic: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    count = reference.numel()
    below = torch.searchsorted(reference, statistic, right=True)
    above = count - torch.searchsorted(reference, statistic, right=False)
    p_value = (2.0 * (1 + torch.minimum(below, above)) / (count + 1)).clamp(max=1.0)
    # beyond the reference all p-values tie at the smallest; the distance keeps far queries in order
    beyond = (reference[0] - statistic).clamp_min(0.0) + (statistic - reference[-1]).clamp_min(0.0)
    return p_value / (1.0 + beyond / (reference[-1] - reference[0]).clamp_min(1e-6))


def t2q_score(
    h: torch.Tensor,
    mean: torch.Tensor,
    basis: torch.Tensor,
    variances: torch.Tensor,
    t2_reference: torch.Tensor,
    q_reference: torch.Tensor,
) -> torch.Tensor:
    """Return the smaller of two two-sided conformal p-values, of T^2 and of Q, doubled (Bonferroni).

    Args:
        h: [..., d], any floating dtype.
        mean, basis, variances: those of the subspace, fp32 [d], [d, k], [k].
        t2_reference, q_reference: sorted log-statistics of IR rows, each from a subspace fitted without it, fp32 [n].

    Returns:
        [...] fp32 in (0, 1]; within the reference, a p-value of belonging to the IR queries; beyond it, below the
        smallest p-value and decreasing with distance.
    """
    t2, q = monitoring_statistics(h, mean, basis, variances)
    return (2.0 * torch.minimum(_two_sided(t2, t2_reference), _two_sided(q, q_reference))).clamp(max=1.0)


def state_score(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the log-odds weight . h + bias of IR against general queries: h [..., d], weight [d], bias [] -> [...]."""
    return h.float() @ weight + bias


class MonitoringScore(BaseEstimator):
    """T^2 and Q of the IR subspace as one two-sided p-value: one-class, and detects what the energy ratio misses.

    A shift along the subspace, a shrunken copy of the cloud and a reflection through the mean leave the energy ratio
    high or unchanged; here they get a small p-value (except the reflection).

    Args:
        rank, max_fraction: those of the subspace, as in `IntervenedSubspace`.
        folds, seed: those of the cross-fit for the reference statistics.

    Attributes:
        subspace_: the fitted `IntervenedSubspace`.
        t2_reference_, q_reference_: sorted cross-fitted log-statistics [M] fp32.
        chosen_params_: what "auto" chose.
    """

    def __init__(
        self, rank: int | str = "auto", *, max_fraction: float = 1 / 8, folds: int = 5, seed: int = 0
    ) -> None:
        self.rank = rank
        self.max_fraction = max_fraction
        self.folds = folds
        self.seed = seed

    def fit(self, ir: ArrayLike, general: ArrayLike | None = None, groups: Any = None) -> MonitoringScore:
        """Learn from IR states [M, d], M >= 8; `general` is not used; `groups` [M] keeps rows together in folds.

        Raises:
            ValueError: for bad rows, or a rank out of range.
        """
        rows = as_matrix(ir, "ir", min_rows=8)
        labels = as_groups(groups, len(rows))
        self.subspace_ = IntervenedSubspace(
            self.rank, max_fraction=self.max_fraction, folds=self.folds, seed=self.seed
        ).fit(rows, groups=labels)
        self.chosen_params_ = dict(self.subspace_.chosen_params_)
        t2_reference, q_reference = [], []
        for train, test in make_folds(len(rows), self.folds, labels, self.seed):
            fold_rank = min(self.subspace_.rank_, len(train) - 1)
            fold = IntervenedSubspace(fold_rank, max_fraction=NO_CAP).fit(rows[train])
            state = fold.state() | {"variances": runtime_tensor(fold.variances_)}
            t2, q = monitoring_statistics(torch.from_numpy(rows[test]), **state)
            t2_reference.append(t2.numpy())
            q_reference.append(q.numpy())
        self.t2_reference_ = np.sort(np.concatenate(t2_reference))
        self.q_reference_ = np.sort(np.concatenate(q_reference))
        return self

    def score_samples(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return the combined p-value of states [B, d]: [B] in (0, 1], higher is more like the IR queries."""
        check_is_fitted(self)
        checked = as_matrix(states, "states", min_rows=1, width=len(self.subspace_.mean_))
        return run(t2q_score, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `t2q_score`."""
        check_is_fitted(self)
        return {
            **self.subspace_.state(),
            "variances": runtime_tensor(self.subspace_.variances_),
            "t2_reference": runtime_tensor(self.t2_reference_),
            "q_reference": runtime_tensor(self.q_reference_),
        }


class StateScore(BaseEstimator):
    """Regularised logistic regression of IR against general queries on the state itself, folded into one vector.

    Standardised dimensions are divided by sqrt(d), so that one grid of C fits every width; both classes have the same
    weight, whatever their sizes. Works with a few general prompts.

    Args:
        C: inverse L2 strength, or "auto": the strongest regularisation within one standard error of the best
            cross-fitted log-loss, 1.0 if a class has fewer than 3 rows.
        folds, seed: those of that choice.

    Attributes:
        weight_ [d] fp32, bias_ (float), C_, curve_ (one dict per C: C, log_loss), chosen_params_.
    """

    GRID = tuple(10.0**power for power in range(-2, 4))

    def __init__(self, C: float | str = "auto", *, folds: int = 5, seed: int = 0) -> None:
        self.C = C
        self.folds = folds
        self.seed = seed

    def fit(
        self,
        ir: ArrayLike,
        general: ArrayLike | None = None,
        groups: Any = None,
        *,
        weights: RowWeights | None = None,
    ) -> StateScore:
        """Learn from IR states [M, d] and general states [N, d].

        Args:
            ir: rows of label 1.
            general: rows of label 0; at least 2.
            groups: [M] labels of the IR rows, kept together when C is chosen.
            weights: weights of the IR and the general rows, [M] and [N] with mean 1 each; None for equal ones.

        Raises:
            ValueError: if there are no general rows (one class only), for bad rows, and if widths differ.
        """
        if general is None:
            raise ValueError(
                "the state score separates IR from general queries, but there is only one class: pass general states "
                "(5 are enough to start), or use the score 'ser' or 't2q', which need none."
            )
        positives = as_matrix(ir, "ir")
        negatives = as_matrix(general, "general", width=positives.shape[1], width_of="ir")
        labels = as_groups(groups, len(positives))
        rows = np.concatenate([positives, negatives])
        truth = np.repeat([1, 0], [len(positives), len(negatives)])
        heavy = np.ones(len(rows)) if weights is None else np.concatenate(weights)
        centre, scale = rows.mean(axis=0), rows.std(axis=0)
        if not scale.any():
            raise ValueError("ir and general: all rows are equal, so nothing separates them.")
        scale = np.where(scale > 0, scale, 1.0) * np.sqrt(rows.shape[1])
        coordinates, basis = row_space((rows - centre) / scale)
        self.curve_: list[dict[str, float]] = []
        self.C_ = self._choose(coordinates, truth, labels, heavy) if self.C == "auto" else positive(float(self.C), "C")
        model = self._classifier(self.C_).fit(coordinates, truth, sample_weight=heavy)
        weight = (basis @ model.coef_[0]) / scale
        self.weight_ = weight.astype(np.float32)
        self.bias_ = float(model.intercept_[0] - centre @ weight)
        self.chosen_params_ = {"C": self.C_}
        return self

    @staticmethod
    def _classifier(strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, class_weight="balanced", max_iter=2_000, tol=1e-6, warm_start=True)

    def _choose(self, rows: Matrix, truth: NDArray[Any], groups: NDArray[Any] | None, heavy: NDArray[Any]) -> float:
        smallest = int(min(truth.sum(), (1 - truth).sum()))
        if smallest < 3:
            return 1.0
        ir, general = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
        folds = min(self.folds, smallest if groups is None else min(smallest, len(np.unique(groups))))
        if folds < 2:
            return 1.0
        splits = zip(
            make_folds(len(ir), folds, groups, self.seed),
            make_folds(len(general), folds, None, self.seed),
            strict=True,
        )
        losses = np.zeros((len(self.GRID), len(truth)))
        weight = np.where(truth == 1, 0.5 / len(ir), 0.5 / len(general)) * len(truth) * heavy
        for (ir_train, ir_test), (general_train, general_test) in splits:
            train = np.concatenate([ir[ir_train], general[general_train]])
            test = np.concatenate([ir[ir_test], general[general_test]])
            model = self._classifier(self.GRID[0])  # each strength starts from the last one's solution
            for index, strength in enumerate(self.GRID):
                model.set_params(C=strength).fit(rows[train], truth[train], sample_weight=heavy[train])
                odds = model.decision_function(rows[test])
                losses[index, test] = np.logaddexp(0.0, np.where(truth[test] == 1, -odds, odds)) * weight[test]
        self.curve_ = [
            {"C": strength, "log_loss": float(loss.mean())} for strength, loss in zip(self.GRID, losses, strict=True)
        ]
        return self.GRID[one_standard_error(losses, self.GRID)]

    def score_samples(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return the log-odds of states [B, d]: [B], higher is more like the IR queries."""
        check_is_fitted(self)
        checked = as_matrix(states, "states", min_rows=1, width=len(self.weight_))
        return run(state_score, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `state_score`: weight [d], bias []."""
        check_is_fitted(self)
        return {"weight": runtime_tensor(self.weight_), "bias": runtime_tensor(self.bias_)}


GateScore = IntervenedSubspace | MonitoringScore | StateScore


def cross_fitted_scores(
    fitted: GateScore,
    ir: ArrayLike,
    general: ArrayLike | None = None,
    *,
    groups: Any = None,
    folds: int = 5,
    seed: int = 0,
    weights: RowWeights | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Score every row with a fit that has not seen it, using the hyper-parameters of the given fit.

    Args:
        fitted: a fitted score.
        ir, general: the rows, [M, d] and [N, d].
        groups: [M]; IR rows of a group stay together.
        folds, seed: those of the cross-fit.
        weights: weights of the state score's fit; other scores have none.

    Returns:
        Scores [M] and, if general rows are given, [N]. Calibrating on these uses no extra rows, but the guarantee
        weakens from eps to about 2 eps (CV+, Barber et al. 2021): use `ConformalGate(cross_fitted=True)`.
    """
    check_is_fitted(fitted)
    positives = as_matrix(ir, "ir", min_rows=4)
    negatives = None if general is None else as_matrix(general, "general", min_rows=4, width=positives.shape[1])
    labels = as_groups(groups, len(positives))
    parts = len(positives) if labels is None else len(np.unique(labels))
    count = min(folds, parts, parts if negatives is None else len(negatives))
    ir_scores = np.empty(len(positives), dtype=np.float32)
    general_scores = None if negatives is None else np.empty(len(negatives), dtype=np.float32)
    general_folds = [(None, None)] * count if negatives is None else make_folds(len(negatives), count, None, seed)
    frozen = clone(fitted).set_params(**fitted.chosen_params_)
    ir_folds = make_folds(len(positives), count, labels, seed)
    if not isinstance(frozen, StateScore):
        smallest = min(len(train) for train, _ in ir_folds)
        frozen.set_params(max_fraction=NO_CAP, rank=min(fitted.chosen_params_["rank"], smallest - 1))
    for (train, test), (general_train, general_test) in zip(ir_folds, general_folds, strict=True):
        seen = None if negatives is None else negatives[general_train]
        own = None if labels is None else labels[train]
        part = clone(frozen)
        if isinstance(part, StateScore) and weights is not None:
            part.fit(positives[train], seen, own, weights=(weights[0][train], weights[1][general_train]))
        else:
            part.fit(positives[train], seen, groups=own)
        ir_scores[test] = part.score_samples(positives[test])
        if general_scores is not None and negatives is not None:
            general_scores[general_test] = part.score_samples(negatives[general_test])
    return ir_scores, general_scores
