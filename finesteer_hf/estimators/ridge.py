"""Ridge regression of shifts on states: one eigenproblem gives every strength, rank and held-out residual."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finesteer_hf.estimators.arrays import ArrayLike, Matrix, as_groups, paired
from finesteer_hf.estimators.linear_algebra import gram_eigen, row_space


@dataclass(frozen=True)
class RidgePath:
    """The eigendecomposed regression delta - delta_bar = (h - h_bar) B of M rows, for every ridge at once.

    Attributes:
        feature_mean: h_bar [p].
        target_mean: delta_bar [q].
        targets: delta - delta_bar [M, q].
        left: U [M, k], eigenvalues: w [k] descending, right: V [p, k], of h - h_bar = U sqrt(w) V^T.
        projected: U^T (delta - delta_bar) [k, q].
    """

    feature_mean: Matrix
    target_mean: Matrix
    targets: Matrix
    left: Matrix
    eigenvalues: Matrix
    right: Matrix
    projected: Matrix

    @classmethod
    def of(cls, features: Matrix, targets: Matrix) -> RidgePath:
        """Decompose features [M, p] against targets [M, q]."""
        feature_mean, target_mean = features.mean(axis=0), targets.mean(axis=0)
        left, eigenvalues, right = gram_eigen(features - feature_mean)
        centred = targets - target_mean
        return cls(feature_mean, target_mean, centred, left, eigenvalues, right, left.T @ centred)

    def held_out_curve(self, blocks: Sequence[NDArray[Any]] | None = None) -> dict[float, float]:
        """Return the exact held-out R^2 of ridge strengths: each decade around the mean eigenvalue, thirds near the
        best.

        Args:
            blocks: as in `held_out_residuals`.

        Returns:
            Strength to R^2 against the constant predictor, itself refitted without the row; by ascending strength.
        """
        constant = float(np.square(self.held_out_residuals(np.inf, blocks)).sum())
        scale = float(self.eigenvalues.mean()) if len(self.eigenvalues) else 1.0

        def r2(ridge: float) -> float:
            loss = float(np.square(self.held_out_residuals(ridge, blocks)).sum())
            return 1.0 - loss / constant if constant else float("nan")

        curve = {ridge: r2(ridge) for ridge in (scale * np.logspace(-4, 4, 9)).tolist()}
        best = max(curve, key=lambda ridge: curve[ridge])
        curve |= {ridge: r2(ridge) for ridge in (best * 10.0 ** (np.array([-2, -1, 1, 2]) / 3)).tolist()}
        return dict(sorted(curve.items()))

    def held_out_residuals(self, ridge: float, blocks: Sequence[NDArray[Any]] | None = None) -> Matrix:
        """Return each row's residual under a fit without the row (or its block), exactly and without refitting.

        With the hat matrix S = 1 1^T / M + U diag(w / (w + ridge)) U^T, which contains both means, the residual of
        a left-out block is (I - S_bb)^{-1} e_b; for a single row e_i / (1 - S_ii).

        Args:
            ridge: strength.
            blocks: row indices that are left out together; None for single rows.

        Returns:
            [M, q].

        Raises:
            ValueError: if a row is always fitted exactly (leverage 1), so that nothing is held out.
        """
        rows = len(self.targets)
        shrink = self.eigenvalues / (self.eigenvalues + ridge)
        residual = self.targets - (self.left * shrink) @ self.projected
        if blocks is None:
            slack = 1.0 - 1.0 / rows - np.square(self.left) @ shrink
            if slack.min() < 1e-9:
                raise ValueError(
                    f"ridge={ridge:g} interpolates the {rows} rows: nothing is held out. Use a larger ridge."
                )
            return residual / slack[:, None]
        held_out = np.empty_like(residual)
        by_size: dict[int, list[NDArray[Any]]] = {}
        for block in blocks:
            by_size.setdefault(len(block), []).append(block)
        for size, alike in by_size.items():
            members = np.stack(alike)  # [blocks, size]
            left = self.left[members]
            hat = 1.0 / rows + (left * shrink) @ left.transpose(0, 2, 1)
            held_out[members] = np.linalg.solve(np.eye(size) - hat, residual[members])
        return held_out

    def response_directions(self, ridge: float, rank: int) -> Matrix:
        """Return the orthonormal output directions [q, r] of the best rank-r map at this ridge, best first.

        They are the right singular vectors of the fitted values of the augmented least-squares problem [A; sqrt(ridge)
        I] B = [D; 0], whose Gram matrix is P^T diag(w / (w + ridge)) P (Izenman 1975; Mukherjee and Zhu 2011). Without
        ridge, of the ordinary fitted values. They are not those of the shifts, which may be large where nothing is
        predictable.
        """
        shrink = self.eigenvalues / (self.eigenvalues + ridge)
        return gram_eigen(np.sqrt(shrink)[:, None] * self.projected, rank)[2]

    def input_directions(self, ridge: float, directions: Matrix) -> Matrix:
        """Return B @ directions [p, r]: a state times it gives the state's coefficients."""
        weights = np.sqrt(self.eigenvalues) / (self.eigenvalues + ridge)
        return self.right @ (weights[:, None] * (self.projected @ directions))


def group_blocks(groups: NDArray[Any] | None) -> list[NDArray[np.intp]] | None:
    """Return the row indices of each group; None without groups; ValueError if all rows are in one group."""
    if groups is None:
        return None
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"groups: all rows are in '{names[0]}', so no group can be held out. Give 2 groups, or none.")
    if len(names) == len(groups):
        return None
    return [np.flatnonzero(groups == name) for name in names]


def held_out_residuals(states: ArrayLike, shifts: ArrayLike, ridge: float, groups: Any = None) -> Matrix:
    """Return exact leave-one-out (or leave-one-group-out) residuals of ridge regression with an intercept.

    Args:
        states: [M, d].
        shifts: [M, d].
        ridge: strength of the penalty ridge * ||B||_F^2 on the centred problem.
        groups: [M] labels, or None for single rows.

    Returns:
        [M, d] fp64: shift minus the prediction of a fit without the row (or its group), means included.
    """
    h, delta = paired(states, shifts, min_rows=3)
    path = RidgePath.of(row_space(h)[0], delta)
    return path.held_out_residuals(ridge, group_blocks(as_groups(groups, len(h))))
