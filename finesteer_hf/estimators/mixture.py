"""Interpretable experts in closed form: routed prototypes plus a reduced-rank residual, each only if it helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import ArrayLike, Matrix, State, as_groups, as_matrix, paired, run, runtime_tensor
from finesteer_hf.estimators.closed_form import ReducedRankSteering, low_rank_vector
from finesteer_hf.estimators.experts import expert_weights
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.estimators.routing import RoutedPrototypes, fit_prototypes
from finesteer_hf.estimators.selection import (
    WORTHLESS_R2,
    calibration_slope,
    held_out_r2,
    make_folds,
    mean_cosine,
    one_standard_error,
    row_losses,
    usable_slope,
)


# folds of the experts whose residuals are regressed; the outer cross-fit judges the result
INNER_FOLDS = 3


def mixture_vector(
    h: torch.Tensor,
    router_weight: torch.Tensor,
    router_bias: torch.Tensor,
    prototypes: torch.Tensor,
    mean: torch.Tensor,
    down: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return v(h) = C softmax(R h + b) + up^T down^T (h - mean) + bias.

    Args:
        h: query states [..., d], any floating dtype.
        router_weight, router_bias: R [K, d] and b [K] fp32.
        prototypes: C^T [K, d] fp32, in the units of the shifts.
        mean, down, up, bias: those of the residual, as in `low_rank_vector`.
        weights: softmax(R h + b) [..., K], if already computed.

    Returns:
        [..., d] fp32.
    """
    if weights is None:
        weights = expert_weights(h, router_weight, router_bias)
    return weights @ prototypes + low_rank_vector(h, mean, down, up, bias)


@dataclass(frozen=True)
class _Trial:
    """One combination, cross-fitted: its held-out predictions [M, q] and squared errors [M]."""

    num_experts: int
    with_residual: bool
    residual_rank: float
    predicted: Matrix
    losses: Matrix

    @property
    def stored_vectors(self) -> float:
        """Number of stored vectors of width d: the measure of complexity."""
        return (2 * self.num_experts if self.num_experts > 1 else 1) + 2 * self.residual_rank


class MixtureSteering(BaseEstimator):
    """The default vector: v(h) = C softmax(R h + b) + U^T D^T (h - h_bar) + c, without gradient training.

    Experts are clusters of the shifts, with prototypes in the shifts' units, routed by a linear discriminant of the
    state. The residual is a reduced-rank ridge regression of what held-out routing leaves. One expert without a
    residual is the constant mean shift. The combinations are cross-fitted, and the simplest within one standard error
    (or .001 of R^2) of the best is kept; `ablations_` has the whole comparison.

    Args:
        num_experts: K, or "auto" for 1 to 4.
        residual_rank: r, 0 for no residual, or "auto" (chosen by `ReducedRankSteering`, or none).
        max_rank: the highest residual rank of "auto".
        calibrate: whether to multiply the deviation from the mean shift by its held-out slope.
        folds, seed: those of the cross-fits and of K-means.

    Attributes:
        router_weight_ [K, d], router_bias_ [K], prototypes_ [K, d], mean_ [d], down_ [d, r], up_ [r, d], bias_ [d]:
            v as stored, fp32.
        num_experts_, residual_rank_, expert_sizes_ [K], slope_, held_out_r2_, held_out_cosine_.
        ablations_: dicts num_experts, residual_rank (mean over folds), held_out_r2, cosine, slope,
            standard_error (of the R^2 difference from the best), chosen. K = 1 and r = 0 are always included.
    """

    EXPERT_CANDIDATES = (1, 2, 3, 4)

    def __init__(
        self,
        num_experts: int | str = "auto",
        *,
        residual_rank: int | str = "auto",
        max_rank: int = 40,
        calibrate: bool = True,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.num_experts = num_experts
        self.residual_rank = residual_rank
        self.max_rank = max_rank
        self.calibrate = calibrate
        self.folds = folds
        self.seed = seed

    def fit(self, states: ArrayLike, shifts: ArrayLike, groups: Any = None) -> MixtureSteering:
        """Learn v from query states [M, d] and shifts delta [M, d], M >= 10.

        Args:
            groups: [M] labels; rows of a group are held out together in every choice.

        Raises:
            ValueError: for bad rows, more experts than rows, experts with too few rows each, and a rank out of range.
        """
        h, delta = paired(states, shifts, min_rows=10)
        labels = as_groups(groups, len(h))
        counts = self._expert_counts(len(h))
        self._check_rank(min(len(h) - 1, h.shape[1]))
        features, feature_basis = row_space(h)
        targets, target_basis = row_space(delta)
        experts = dict(
            zip(counts, fit_prototypes(features, targets, counts, groups=labels, seed=self.seed), strict=True)
        )
        if self.num_experts == "auto":
            experts = {count: fitted for count, fitted in experts.items() if len(fitted.sizes) == count}
        elif len(experts[counts[-1]].sizes) < counts[-1]:
            raise ValueError(
                f"num_experts={counts[-1]} leaves an expert with too few of the {len(h)} rows; "
                f"at most {len(experts[counts[-1]].sizes)} are possible."
            )
        choice = self._compare(features, targets, labels, list(experts))
        self._keep(experts[choice], features, targets, labels, (feature_basis, target_basis))
        return self

    def _expert_counts(self, rows: int) -> tuple[int, ...]:
        if self.num_experts == "auto":
            return self.EXPERT_CANDIDATES
        count = self.num_experts
        if not isinstance(count, int | np.integer) or isinstance(count, bool) or not 1 <= count <= rows:
            raise ValueError(
                f"num_experts={count!r} must be 'auto' or an integer from 1 to the number of rows, {rows}."
            )
        return (1,) if count == 1 else (1, int(count))

    def _check_rank(self, limit: int) -> None:
        rank = self.residual_rank
        whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool)
        if not (rank == "auto" or (whole and 0 <= int(rank) <= limit)):
            raise ValueError(f"residual_rank={rank!r} must be 'auto' or an integer from 0 to {limit}.")

    def _fit_residual(
        self, experts: RoutedPrototypes, features: Matrix, targets: Matrix, groups: NDArray[Any] | None
    ) -> ReducedRankSteering:
        """Regress on the states the part of each shift that experts fitted without the row leave."""
        left = targets - targets.mean(axis=0)
        count = len(experts.sizes)
        if count > 1:
            for train, test in make_folds(len(features), INNER_FOLDS, groups, self.seed + 1):
                own = _rows(groups, train)
                (part,) = fit_prototypes(features[train], targets[train], [count], groups=own, seed=self.seed)
                left[test] = targets[test] - part.predict(features[test])
        rank = self.residual_rank
        if not isinstance(rank, str):
            rank = min(int(rank), len(features) - 1, features.shape[1])
        residual = ReducedRankSteering(
            rank or "auto", max_rank=self.max_rank, calibrate=self.calibrate, folds=self.folds, seed=self.seed
        )
        return residual.fit(features, left, groups)

    def _compare(self, features: Matrix, targets: Matrix, groups: NDArray[Any] | None, counts: list[int]) -> int:
        """Cross-fit the combinations, fill `ablations_`, set the choice and its slope; return its number of experts.

        All numbers of experts are compared without a residual; with one, only K = 1 and the best other K.
        """
        self._folds = make_folds(len(features), self.folds, groups, self.seed)
        experts = [
            fit_prototypes(features[train], targets[train], counts, groups=_rows(groups, train), seed=self.seed)
            for train, _ in self._folds
        ]
        experts_of = dict(zip(counts, zip(*experts, strict=True), strict=True))
        constants = np.empty_like(targets)
        for train, test in self._folds:
            constants[test] = targets[train].mean(axis=0)
        trials = [self._cross_fit(features, targets, groups, count, experts_of[count], False) for count in counts]
        several = [trial for trial in trials if trial.num_experts > 1]
        contenders = [1] + ([min(several, key=lambda trial: trial.losses.mean()).num_experts] if several else [])
        trials += [self._cross_fit(features, targets, groups, count, experts_of[count], True) for count in contenders]
        losses = np.stack([trial.losses for trial in trials])
        eligible = [index for index, trial in enumerate(trials) if self._eligible(trial, counts)]
        best = one_standard_error(
            losses[eligible],
            [trials[index].stored_vectors for index in eligible],
            groups,
            indifference=WORTHLESS_R2 * float(row_losses(targets, constants).mean()),
        )
        chosen = trials[eligible[best]]
        self._tabulate(trials, chosen, targets, constants)
        self._with_residual = chosen.with_residual
        self.slope_ = usable_slope(targets, chosen.predicted, constants)
        final = chosen.predicted
        if self.calibrate:
            final = constants + self.slope_ * (final - constants)
        self.held_out_r2_ = held_out_r2(targets, final, constants)
        self.held_out_cosine_ = mean_cosine(targets, final)
        return chosen.num_experts

    def _cross_fit(
        self,
        features: Matrix,
        targets: Matrix,
        groups: NDArray[Any] | None,
        count: int,
        experts_of_folds: Sequence[RoutedPrototypes],
        with_residual: bool,
    ) -> _Trial:
        predicted, ranks = np.empty_like(targets), []
        for (train, test), experts in zip(self._folds, experts_of_folds, strict=True):
            predicted[test] = experts.predict(features[test])
            if with_residual:
                residual = self._fit_residual(experts, features[train], targets[train], _rows(groups, train))
                predicted[test] += residual.predict(features[test])
                ranks.append(residual.rank_)
        rank = float(np.mean(ranks)) if ranks else 0.0
        return _Trial(count, with_residual, rank, predicted, row_losses(targets, predicted))

    def _eligible(self, trial: _Trial, counts: list[int]) -> bool:
        """Whether a combination may be chosen; the others are only for comparison."""
        if self.num_experts != "auto" and trial.num_experts != counts[-1]:
            return False
        return self.residual_rank == "auto" or trial.with_residual == (self.residual_rank != 0)

    def _tabulate(self, trials: list[_Trial], chosen: _Trial, targets: Matrix, constants: Matrix) -> None:
        total = row_losses(targets, constants).sum()
        best = min(trials, key=lambda trial: trial.losses.mean()).losses
        self.ablations_: list[dict[str, Any]] = [
            {
                "num_experts": trial.num_experts,
                "residual_rank": trial.residual_rank,
                "held_out_r2": held_out_r2(targets, trial.predicted, constants),
                "cosine": mean_cosine(targets, trial.predicted),
                "slope": calibration_slope(targets, trial.predicted, constants),
                "standard_error": float((trial.losses - best).std(ddof=1) * np.sqrt(len(best)) / (total or 1.0)),
                "chosen": trial is chosen,
            }
            for trial in trials
        ]

    def _keep(
        self,
        experts: RoutedPrototypes,
        features: Matrix,
        targets: Matrix,
        groups: NDArray[Any] | None,
        bases: tuple[Matrix, Matrix],
    ) -> None:
        """Store the chosen combination, fitted on all rows, as fp32 in the space of states and shifts."""
        scale = self.slope_ if self.calibrate else 1.0
        overall = targets.mean(axis=0)
        mean, bias = features.mean(axis=0), np.zeros(targets.shape[1])
        down, up = np.zeros((features.shape[1], 0)), np.zeros((0, targets.shape[1]))
        if self._with_residual:
            residual = self._fit_residual(experts, features, targets, groups)
            mean, bias = residual.mean_.astype(np.float64), scale * residual.bias_.astype(np.float64)
            down, up = scale * residual.down_.astype(np.float64), residual.up_.astype(np.float64)
        inputs, outputs = bases
        self.num_experts_, self.expert_sizes_, self.residual_rank_ = len(experts.sizes), experts.sizes, down.shape[1]
        self.router_weight_ = (experts.weight @ inputs.T).astype(np.float32)
        self.router_bias_ = experts.bias.astype(np.float32)
        self.prototypes_ = ((overall + scale * (experts.prototypes - overall)) @ outputs.T).astype(np.float32)
        self.mean_, self.down_ = (inputs @ mean).astype(np.float32), (inputs @ down).astype(np.float32)
        self.up_, self.bias_ = (up @ outputs.T).astype(np.float32), (outputs @ bias).astype(np.float32)

    def predict(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return v of states [B, d]: [B, d] fp32."""
        check_is_fitted(self)
        checked = as_matrix(states, "states", min_rows=1, width=len(self.mean_))
        return run(mixture_vector, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `mixture_vector`."""
        check_is_fitted(self)
        names = ("router_weight", "router_bias", "prototypes", "mean", "down", "up", "bias")
        return {name: runtime_tensor(getattr(self, f"{name}_")) for name in names}


def _rows(groups: NDArray[Any] | None, rows: NDArray[np.intp]) -> NDArray[Any] | None:
    return None if groups is None else groups[rows]
