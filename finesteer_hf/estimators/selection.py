"""How a fit is evaluated and chosen: folds, held-out figures, the one-standard-error rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold, KFold

from finesteer_hf.estimators.arrays import ArrayLike, Matrix, as_float64


Fold = tuple[NDArray[np.intp], NDArray[np.intp]]


def make_folds(rows: int, folds: int = 5, groups: NDArray[Any] | None = None, seed: int = 0) -> list[Fold]:
    """Split rows into (train, test) index pairs; rows of one group are never on both sides.

    There are fewer folds if there are fewer rows or groups than `folds`.

    Raises:
        ValueError: if fewer than two folds are possible.
    """
    parts = rows if groups is None else len(np.unique(groups))
    count = min(folds, parts)
    if count < 2:
        what = "rows" if groups is None else "groups"
        raise ValueError(f"cross-validation needs at least 2 folds, got folds={folds} and {parts} {what}.")
    splitter = KFold if groups is None else GroupKFold
    return list(splitter(count, shuffle=True, random_state=seed).split(np.empty((rows, 0)), groups=groups))


def row_losses(target: ArrayLike, prediction: ArrayLike) -> Matrix:
    """Return the squared error ||target - prediction||^2 of each row, [rows] fp64."""
    return np.square(as_float64(target, "target") - as_float64(prediction, "prediction")).sum(axis=-1)


def held_out_r2(target: ArrayLike, prediction: ArrayLike, constant: ArrayLike) -> float:
    """Return 1 - SSE(prediction) / SSE(constant): the share explained beyond the constant predictor.

    Args:
        target: shifts [rows, d] that the fit has not seen.
        prediction: [rows, d].
        constant: mean shift of the fitted rows, [d] or, if folds differ, [rows, d].

    Returns:
        At most 1; 0 is no better than steering every query the same; nan if the constant has no error to explain.
    """
    total = float(row_losses(target, constant).sum())
    return 1.0 - float(row_losses(target, prediction).sum()) / total if total > 0 else float("nan")


def mean_cosine(target: ArrayLike, prediction: ArrayLike) -> float:
    """Return the mean cosine between each shift and its prediction, both [rows, d]; a zero vector counts as 0."""
    a, b = as_float64(target, "target"), as_float64(prediction, "prediction")
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)))


def calibration_slope(target: ArrayLike, prediction: ArrayLike, constant: ArrayLike) -> float:
    """Return the slope of target on prediction, both relative to `constant` (regression shrinks, so slope > 1).

    Args:
        target: held-out shifts [rows, d].
        prediction: [rows, d].
        constant: [d] or [rows, d].

    Returns:
        The least-squares slope; 1.0 if the prediction never leaves the constant.
    """
    base = as_float64(constant, "constant")
    moved = as_float64(prediction, "prediction") - base
    energy = float(np.square(moved).sum())
    return float(((as_float64(target, "target") - base) * moved).sum()) / energy if energy > 0 else 1.0


# A thousandth of the variance of the shifts is not worth a stored vector, however significant it is.
WORTHLESS_R2 = 1e-3
# Larger slopes come from predictions too small to measure one.
MAX_SLOPE = 2.0


def usable_slope(target: ArrayLike, prediction: ArrayLike, constant: ArrayLike) -> float:
    """Return `calibration_slope` clipped to [0, MAX_SLOPE], as a factor for predictions."""
    return float(np.clip(calibration_slope(target, prediction, constant), 0.0, MAX_SLOPE))


def one_standard_error(
    losses: Matrix | Sequence[Matrix],
    complexity: Sequence[float],
    groups: NDArray[Any] | None = None,
    *,
    indifference: float = 0.0,
) -> int:
    """Choose the simplest candidate whose held-out loss is within one standard error of the best.

    The standard error is that of the paired difference from the best candidate, row by row: the losses of one row
    under two candidates are correlated, so an unpaired error would accept almost anything.

    Args:
        losses: [candidates, rows] held-out loss of each row.
        complexity: [candidates], smaller is simpler.
        groups: [rows] labels; rows of a group count as one observation of the difference.
        indifference: a mean loss per row that is not worth any complexity.

    Returns:
        Index of the choice.
    """
    table = np.asarray(losses, dtype=np.float64)
    best = int(table.mean(axis=1).argmin())
    difference = table - table[best]
    if groups is not None:
        _, member = np.unique(groups, return_inverse=True)
        difference = np.stack([np.bincount(member, weights=row) for row in difference])
    units = difference.shape[1]
    error = difference.std(axis=1, ddof=1) / np.sqrt(units) if units > 1 else np.zeros(len(table))
    allowed = np.maximum(error, indifference * table.shape[1] / units)
    within = np.flatnonzero(difference.mean(axis=1) <= allowed)
    return min(within.tolist(), key=lambda index: (complexity[index], table[index].mean()))
