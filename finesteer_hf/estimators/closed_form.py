"""Query-dependent steering vectors in closed form: reduced-rank ridge regression of shifts on states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import ArrayLike, Matrix, State, as_groups, as_matrix, paired, run, runtime_tensor
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.estimators.ridge import RidgePath, group_blocks
from finesteer_hf.estimators.selection import (
    WORTHLESS_R2,
    held_out_r2,
    make_folds,
    mean_cosine,
    one_standard_error,
    usable_slope,
)


def low_rank_vector(
    h: torch.Tensor, mean: torch.Tensor, down: torch.Tensor, up: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Return v(h) = bias + up^T down^T (h - mean).

    Args:
        h: query states [..., d], any floating dtype.
        mean: [d] fp32.
        down: [d, r] fp32; r may be 0.
        up: [r, d] fp32.
        bias: [d] fp32.

    Returns:
        [..., d] fp32.
    """
    return ((h.float() - mean) @ down) @ up + bias


class ReducedRankSteering(BaseEstimator):
    """v(h) = delta_bar + B^T (h - h_bar), B of rank r; ridge and rank chosen on held-out rows: no epochs, no seed.

    The mean shift is kept in full; only the deviation from it is predicted. Since regression shrinks predictions, it
    is multiplied by the slope of the held-out shifts on it (at most 2).

    Args:
        rank: r, or "auto": the smallest within one standard error, or .001 of R^2, of the best cross-fitted loss; 0 if
            nothing is predicted.
        ridge: strength, or "auto": the lowest exact leave-one-out (with groups: leave-one-group-out) loss.
        max_rank: the highest rank of "auto"; 40 keeps an adapter of d = 4096 under 2 MB.
        calibrate: whether to multiply by the slope. It is always measured.
        folds, seed: those of the cross-fit that chooses the rank and measures the slope.

    Attributes:
        mean_ [d], bias_ [d], down_ [d, r], up_ [r, d] (orthonormal rows): v as stored, fp32.
        ridge_, rank_, slope_: learned values; held_out_r2_, held_out_cosine_: from the cross-fit, with the slope if v
            has it. They are slightly optimistic, since the rank is chosen on the same folds.
        ridge_curve_: dicts ridge, held_out_r2. rank_curve_: dicts rank, held_out_r2.
    """

    def __init__(
        self,
        rank: int | str = "auto",
        *,
        ridge: float | str = "auto",
        max_rank: int = 40,
        calibrate: bool = True,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.ridge = ridge
        self.max_rank = max_rank
        self.calibrate = calibrate
        self.folds = folds
        self.seed = seed

    def fit(self, states: ArrayLike, shifts: ArrayLike, groups: Any = None) -> ReducedRankSteering:
        """Learn v from query states [M, d] and shifts delta [M, d].

        Args:
            groups: [M] labels; rows of a group are held out together in every choice.

        Raises:
            ValueError: for bad rows, and a rank or ridge out of range.
        """
        h, delta = paired(states, shifts)
        labels = as_groups(groups, len(h))
        features, feature_basis = row_space(h)
        targets, target_basis = row_space(delta)
        path = RidgePath.of(features, targets)
        self.ridge_ = self._choose_ridge(path, labels)
        self._choose_rank(path, features, targets, labels)
        directions = path.response_directions(self.ridge_, self.rank_)
        scale = self.slope_ if self.calibrate else 1.0
        self.mean_ = (feature_basis @ path.feature_mean).astype(np.float32)
        self.bias_ = (target_basis @ path.target_mean).astype(np.float32)
        self.down_ = (feature_basis @ path.input_directions(self.ridge_, directions) * scale).astype(np.float32)
        self.up_ = (target_basis @ directions).T.astype(np.float32)
        return self

    def _choose_ridge(self, path: RidgePath, groups: NDArray[Any] | None) -> float:
        self.ridge_curve_: list[dict[str, float]] = []
        if self.ridge != "auto":
            ridge = float(self.ridge)
            if not (np.isfinite(ridge) and ridge >= 0):
                raise ValueError(f"ridge={self.ridge!r} must be a number of at least 0, or 'auto'.")
            return ridge
        curve = path.held_out_curve(group_blocks(groups))
        self.ridge_curve_ = [{"ridge": ridge, "held_out_r2": r2} for ridge, r2 in curve.items()]
        return max(curve, key=lambda ridge: curve[ridge])

    def _choose_rank(self, path: RidgePath, features: Matrix, targets: Matrix, groups: NDArray[Any] | None) -> None:
        """Refit without each fold and score all ranks at once: a rank-r prediction is r terms of a larger one."""
        limit = len(path.eigenvalues)
        whole = isinstance(self.rank, int | np.integer) and not isinstance(self.rank, bool)
        if not (self.rank == "auto" or (whole and 0 <= int(self.rank) <= limit)):
            raise ValueError(
                f"rank={self.rank!r} must be 'auto' or an integer from 0 to {limit}, the rank of the centred states."
            )
        top = path.response_directions(
            self.ridge_, min(self.max_rank, limit) if self.rank == "auto" else int(self.rank)
        ).shape[1]
        coefficients, along = np.zeros((2, len(targets), top))
        constants, directions = np.empty_like(targets), []
        folds = make_folds(len(targets), self.folds, groups, self.seed)
        for train, test in folds:
            part = RidgePath.of(features[train], targets[train])
            basis = part.response_directions(self.ridge_, top)
            used = basis.shape[1]
            constants[test] = part.target_mean
            coefficients[test, :used] = (features[test] - part.feature_mean) @ part.input_directions(
                self.ridge_, basis
            )
            along[test, :used] = (targets[test] - part.target_mean) @ basis
            directions.append(basis)
        total = np.square(targets - constants).sum(axis=1)
        gained = np.cumsum(2 * coefficients * along - np.square(coefficients), axis=1)
        losses = np.vstack([total, total[None, :] - gained.T])
        self.rank_curve_ = [
            {"rank": rank, "held_out_r2": 1.0 - float(loss.sum() / total.sum()) if total.any() else float("nan")}
            for rank, loss in enumerate(losses)
        ]
        self.rank_ = top
        if self.rank == "auto":
            indifference = WORTHLESS_R2 * float(total.mean())
            self.rank_ = one_standard_error(losses, range(top + 1), groups, indifference=indifference)
        moved = np.empty_like(targets)
        for (_, test), basis in zip(folds, directions, strict=True):
            used = min(self.rank_, basis.shape[1])
            moved[test] = coefficients[test, :used] @ basis[:, :used].T
        self.slope_ = usable_slope(targets, constants + moved, constants)
        predicted = constants + moved * (self.slope_ if self.calibrate else 1.0)
        self.held_out_r2_ = held_out_r2(targets, predicted, constants)
        self.held_out_cosine_ = mean_cosine(targets, predicted)

    def predict(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return v of states [B, d]: [B, d] fp32."""
        check_is_fitted(self)
        checked = as_matrix(states, "states", min_rows=1, width=len(self.mean_))
        return run(low_rank_vector, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `low_rank_vector`."""
        check_is_fitted(self)
        return {name: runtime_tensor(getattr(self, f"{name}_")) for name in ("mean", "down", "up", "bias")}
