"""The subspace of intervention-required queries and its energy ratio (FineSteer, arXiv 2604.15488, Eq. 6-7)."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import (
    ArrayLike,
    Matrix,
    State,
    as_groups,
    as_matrix,
    fraction,
    one_of,
    run,
    runtime_tensor,
)
from finesteer_hf.estimators.linear_algebra import principal_directions
from finesteer_hf.estimators.selection import make_folds


TINY = torch.finfo(torch.float32).tiny


def scaled_deviation(h: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split h - mean into entries of at most 1 and a scale, so that its squares cannot overflow.

    Args:
        h: [..., d], any floating dtype.
        mean: [d] fp32.

    Returns:
        deviation [..., d] fp32 with entries in [-1, 1] and scale [..., 1] fp32, positive.
    """
    deviation = h.float() - mean
    scale = deviation.abs().amax(dim=-1, keepdim=True).clamp_min(TINY)
    return deviation / scale, scale


def subspace_energy_ratio(h: torch.Tensor, mean: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return s(h) = ||V^T (h - mu)||^2 / ||h - mu||^2 (Eq. 6-7): the denominator is the *total* energy.

    It is scale-free, and h and 2 mu - h have the same score.

    Args:
        h: query states [..., d], any floating dtype.
        mean: mu [d] fp32.
        basis: V [d, k] fp32, orthonormal columns.

    Returns:
        [...] fp32 in [0, 1]; 0 for h = mu.
    """
    deviation, _ = scaled_deviation(h, mean)
    inside = (deviation @ basis).square().sum(dim=-1)
    total = deviation.square().sum(dim=-1).clamp_min(TINY)
    return (inside / total).clamp(0.0, 1.0)


class IntervenedSubspace(BaseEstimator):
    """Mean and leading directions of intervention-required (IR) queries; the score is their energy ratio.

    Args:
        rank: number of directions k, or "auto" to choose it on held-out rows.
        criterion: how "auto" chooses: "gap" takes the largest k whose in-sample mean SER exceeds the cross-fitted one
            by at most `gap_tolerance`; "likelihood" takes the k with the best held-out log-likelihood of probabilistic
            PCA.
        max_fraction: "auto" stops at this fraction of the rows (and at half the width); an explicit rank above it
            only warns.
        gap_tolerance: in SER units.
        folds: folds of the cross-fit.
        seed: seed of the folds.

    Attributes:
        mean_ [d], basis_ [d, k] (fp32), variances_ [k] of the rows along the basis, rank_, n_rows_.
        curve_: one dict per candidate rank: rank, in_sample, held_out (mean SER), gap, log_likelihood (per held-out
            row).
        chosen_params_: what "auto" chose.
    """

    def __init__(
        self,
        rank: int | str = "auto",
        *,
        criterion: str = "gap",
        max_fraction: float = 1 / 8,
        gap_tolerance: float = 0.05,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.rank = rank
        self.criterion = criterion
        self.max_fraction = max_fraction
        self.gap_tolerance = gap_tolerance
        self.folds = folds
        self.seed = seed

    def fit(self, ir: ArrayLike, general: ArrayLike | None = None, groups: Any = None) -> IntervenedSubspace:
        """Learn the subspace.

        Args:
            ir: states of IR queries [M, d].
            general: not used; this is a one-class estimator.
            groups: [M] labels; rows of a group stay on one side of each cross-fit.

        Raises:
            ValueError: for bad rows, a rank out of range, and rows without variation.
        """
        rows = as_matrix(ir, "ir")
        labels = as_groups(groups, len(rows))
        one_of(self.criterion, ("gap", "likelihood"), "criterion")
        limit = min(len(rows) - 1, rows.shape[1])
        cap = max(1, min(int(len(rows) * fraction(self.max_fraction, "max_fraction")), rows.shape[1] // 2))
        mean = rows.mean(axis=0)
        centred = rows - mean
        wanted = cap if self.rank == "auto" else self._explicit_rank(limit, int(len(rows) * self.max_fraction))
        squared, directions = principal_directions(centred, wanted, self.seed)
        if len(squared) == 0:
            raise ValueError(f"ir: all {len(rows)} rows are equal, so there is no subspace to learn.")
        if self.rank != "auto" and len(squared) < wanted:
            raise ValueError(
                f"rank={wanted}, but the rows of ir span only {len(squared)} directions around their mean."
            )
        self.curve_: list[dict[str, float]] = []
        self.rank_ = len(squared)
        if self.rank == "auto" and len(rows) >= 4:
            self.curve_ = self._curve(rows, centred, directions, labels)
            self.rank_ = self._choose()
        elif self.rank == "auto":
            self.rank_ = 1
        self.n_rows_ = len(rows)
        self.mean_ = mean.astype(np.float32)
        self.basis_ = np.ascontiguousarray(directions[:, : self.rank_], dtype=np.float32)
        self.variances_ = (squared[: self.rank_] / (len(rows) - 1)).astype(np.float32)
        self.chosen_params_ = {"rank": self.rank_}
        return self

    def _explicit_rank(self, limit: int, cap: int) -> int:
        if not isinstance(self.rank, int | np.integer) or isinstance(self.rank, bool):
            raise ValueError(f"rank={self.rank!r} must be an integer or 'auto'.")
        if not 1 <= self.rank <= limit:
            raise ValueError(f"rank={self.rank} must be between 1 and min(rows - 1, d) = {limit}.")
        if self.rank > cap:
            warnings.warn(
                f"rank={self.rank} is above {self.max_fraction:.3g} of the rows ({cap}): the energy ratio of the rows "
                "it was fitted on will be far above that of new queries.",
                stacklevel=3,
            )
        return int(self.rank)

    def _curve(
        self, rows: Matrix, centred: Matrix, directions: Matrix, groups: NDArray[Any] | None
    ) -> list[dict[str, float]]:
        """Score every rank at once: the bases are nested, so energies are running sums."""
        top = directions.shape[1]
        in_sample = _nested_energy_ratios(centred, directions).mean(axis=0)
        held_out, likelihood = [], []
        for train, test in make_folds(len(rows), self.folds, groups, self.seed):
            mean = rows[train].mean(axis=0)
            squared, basis = principal_directions(rows[train] - mean, top, self.seed)
            top = min(top, len(squared))
            held_out.append(_nested_energy_ratios(rows[test] - mean, basis[:, :top]))
            total = np.square(rows[train] - mean).sum() / (len(train) - 1)
            likelihood.append(_ppca_log_likelihood(rows[test] - mean, basis, squared / (len(train) - 1), total))
        ratios = np.concatenate([fold[:, :top] for fold in held_out]).mean(axis=0)
        density = np.concatenate([fold[:, :top] for fold in likelihood]).mean(axis=0)
        return [
            {
                "rank": k + 1,
                "in_sample": float(in_sample[k]),
                "held_out": float(ratios[k]),
                "gap": float(in_sample[k] - ratios[k]),
                "log_likelihood": float(density[k]),
            }
            for k in range(top)
        ]

    def _choose(self) -> int:
        if self.criterion == "likelihood":
            return int(max(self.curve_, key=lambda row: row["log_likelihood"])["rank"])
        return int(max((row["rank"] for row in self.curve_ if row["gap"] <= self.gap_tolerance), default=1))

    def score_samples(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return the energy ratio of states [B, d]: [B] in [0, 1], higher is more like the IR queries."""
        check_is_fitted(self)
        checked = as_matrix(states, "states", min_rows=1, width=len(self.mean_))
        return run(subspace_energy_ratio, checked, self.state())

    def state(self) -> State:
        """Return the arguments of `subspace_energy_ratio`: mean [d], basis [d, k]."""
        check_is_fitted(self)
        return {"mean": runtime_tensor(self.mean_), "basis": runtime_tensor(self.basis_)}


def _nested_energy_ratios(centred: Matrix, directions: Matrix) -> Matrix:
    energies = np.cumsum(np.square(centred @ directions), axis=1)
    total = np.square(centred).sum(axis=1, keepdims=True)
    return energies / np.where(total > 0, total, 1.0)


def _ppca_log_likelihood(centred: Matrix, directions: Matrix, variances: Matrix, total_variance: float) -> Matrix:
    """Log-density of rows under probabilistic PCA (Tipping and Bishop 1999) for each rank 1..k, [rows, k]."""
    width, top = directions.shape
    ranks = np.arange(1, top + 1)
    noise = np.maximum(total_variance - np.cumsum(variances), 1e-12 * total_variance) / np.maximum(width - ranks, 1)
    squares = np.square(centred @ directions)
    outside = np.square(centred).sum(axis=1, keepdims=True) - np.cumsum(squares, axis=1)
    distance = np.cumsum(squares / variances, axis=1) + outside / noise
    log_determinant = np.cumsum(np.log(variances)) + (width - ranks) * np.log(noise)
    return -0.5 * (width * np.log(2 * np.pi) + log_determinant + distance)
