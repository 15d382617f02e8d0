"""Exact fp64 factorisations of tables with far fewer rows than columns."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from sklearn.utils.extmath import randomized_svd

from finesteer_hf.estimators.arrays import Matrix


# Above this many rows an exact Gram eigenproblem of a wide table costs more than its accuracy is worth.
RANDOMISED_ABOVE_ROWS = 5_000
RANDOMISED_ABOVE_SIDE = 1_024


def row_space(matrix: Matrix) -> tuple[Matrix, Matrix]:
    """Write a table in an orthonormal basis of its row space, without loss.

    Distances, Gram matrices, ridge and PCA do not change, so a fit at d=4096 on 400 rows becomes a fit at d=400.

    Args:
        matrix: [rows, d] fp64.

    Returns:
        coordinates [rows, p] and basis [d, p], p = min(rows, d), with matrix = coordinates @ basis.T.
    """
    rows, width = matrix.shape
    if rows >= width:
        return matrix, np.eye(width)
    basis, triangle = scipy.linalg.qr(matrix.T, mode="economic", check_finite=False)
    return triangle.T, basis


def gram_eigen(centred: Matrix, count: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """Factorise centred = left * sqrt(eigenvalues) @ right.T by the smaller of its two Gram matrices.

    Args:
        centred: [rows, d] fp64.
        count: number of leading directions; None for all.

    Returns:
        left [rows, k], eigenvalues [k] descending (squared singular values), right [d, k]. k is less than `count` if
        the table has a lower numerical rank. The largest entry of each direction is positive.
    """
    rows, width = centred.shape
    tall = rows >= width
    gram = centred.T @ centred if tall else centred @ centred.T
    side = len(gram)
    wanted = side if count is None else min(count, side)
    if wanted == 0:
        return np.empty((rows, 0)), np.empty(0), np.empty((width, 0))
    if wanted < side // 8:  # only then is part of the spectrum cheaper than all of it
        values, vectors = scipy.linalg.eigh(gram, subset_by_index=[side - wanted, side - 1], check_finite=False)
    else:
        values, vectors = scipy.linalg.eigh(gram, driver="evd", check_finite=False)
    values, vectors = values[::-1][:wanted], vectors[:, ::-1][:, :wanted]
    kept = values > max(rows, width) * np.finfo(np.float64).eps * max(float(values[0]), 0.0)
    values, vectors = values[kept], vectors[:, kept]
    other = (centred if tall else centred.T) @ (vectors / np.sqrt(values))
    left, right = (other, vectors) if tall else (vectors, other)
    if right.shape[1]:
        sign = np.sign(right[np.abs(right).argmax(axis=0), np.arange(right.shape[1])])
        left, right = left * sign, right * sign
    return left, values, right


def principal_directions(centred: Matrix, count: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Return the top right singular vectors of a centred table.

    Exact, by the Gram matrix; randomised (Halko et al. 2011, four power iterations) only for very long and wide
    tables.

    Args:
        centred: [rows, d] fp64.
        count: number of directions.
        seed: seed of the randomised method.

    Returns:
        squared singular values [k] descending and orthonormal directions [d, k], k <= count.
    """
    if len(centred) > RANDOMISED_ABOVE_ROWS and centred.shape[1] > RANDOMISED_ABOVE_SIDE:
        _, singular, right_rows = randomized_svd(
            centred, count, n_oversamples=16, n_iter=4, random_state=seed, flip_sign=False
        )
        directions = right_rows.T
        sign = np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])])
        return singular**2, directions * sign
    _, values, right = gram_eigen(centred, count)
    # dividing by small singular values loses orthogonality; a sign-preserving QR restores it
    directions, triangle = scipy.linalg.qr(right, mode="economic", check_finite=False)
    return values, directions * np.sign(np.diag(triangle))
