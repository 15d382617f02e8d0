"""Prototypes of clustered shifts and a discriminant that routes states to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.covariance import ledoit_wolf

from finesteer_hf.estimators.arrays import Matrix
from finesteer_hf.estimators.experts import cluster, cluster_means, clustering_features
from finesteer_hf.estimators.linear_algebra import principal_directions
from finesteer_hf.estimators.selection import make_folds


ROUTING_DIMENSIONS = 128
SMALLEST_EXPERT = 5


@dataclass(frozen=True)
class RoutedPrototypes:
    """K prototypes and their router: weight [K, p], bias [K], prototypes [K, q], sizes [K] (rows of each cluster)."""

    weight: Matrix
    bias: Matrix
    prototypes: Matrix
    sizes: NDArray[np.intp]

    def predict(self, features: Matrix) -> Matrix:
        """Return the routed prototypes of features [n, p]: [n, q]."""
        return softmax(features @ self.weight.T + self.bias, axis=1) @ self.prototypes


def shrunken_prototypes(shifts: Matrix, labels: NDArray[np.intp]) -> Matrix:
    """Return cluster means shrunk to the overall mean: delta_bar + n_k t^2 / (n_k t^2 + s^2) (mean_k - delta_bar).

    s^2 is the variance within clusters and t^2 the variance between them, both summed over dimensions.

    Args:
        shifts: [M, q].
        labels: [M] from 0.

    Returns:
        [K, q].
    """
    overall, means = shifts.mean(axis=0), cluster_means(shifts, labels)
    sizes = np.bincount(labels)
    within = np.square(shifts - means[labels]).sum() / max(len(shifts) - len(sizes), 1)
    spread = np.square(means - overall).sum(axis=1)
    between = max(float((sizes * spread).sum() - (len(sizes) - 1) * within) / len(shifts), 0.0)
    total = sizes * between + within
    keep = sizes * between / np.where(total > 0, total, 1.0)
    return overall + keep[:, None] * (means - overall)


def fit_prototypes(
    features: Matrix, shifts: Matrix, counts: Sequence[int], *, groups: NDArray[Any] | None = None, seed: int = 0
) -> list[RoutedPrototypes]:
    """Cluster the shifts, and learn to predict the cluster from the state.

    Routing is linear discriminant analysis with a pooled Ledoit-Wolf covariance on the leading principal components, which
    gives log-priors plus affine log-likelihood ratios; the ratios are scaled by the one factor that minimises the
    cross-fitted log-loss, so that routing that cannot separate the clusters falls back to their frequencies.

    Args:
        features: [M, p] states.
        shifts: [M, q].
        counts: numbers of experts, each fitted separately; fewer experts are used if one would have under 5 rows.
        groups: [M] labels, kept together when the factor is fitted.
        seed: seed of K-means and folds.

    Returns:
        The prototypes of each count.
    """
    mean = features.mean(axis=0)
    single = RoutedPrototypes(
        np.zeros((1, features.shape[1])), np.zeros(1), shifts.mean(axis=0)[None, :], np.array([len(shifts)])
    )
    if max(counts) == 1:
        return [single] * len(counts)
    clustered = clustering_features(shifts, normalise=True, seed=seed)
    _, components = principal_directions(features - mean, ROUTING_DIMENSIONS, seed)
    coordinates = (features - mean) @ components
    folds = make_folds(len(features), 5, groups, seed)

    def fitted(count: int) -> RoutedPrototypes:
        labels = _usable_clusters(clustered, count, seed)
        sizes = np.bincount(labels)
        if len(sizes) == 1:
            return single
        evidence = np.zeros((len(features), len(sizes)))
        for train, test in folds:
            weight, offset = _discriminant(coordinates[train], labels[train], len(sizes))
            evidence[test] = coordinates[test] @ weight.T + offset
        log_prior = np.log(sizes / sizes.sum())
        factor = _sharpness(evidence, log_prior, labels)
        weight, offset = _discriminant(coordinates, labels, len(sizes))
        folded = factor * weight @ components.T
        return RoutedPrototypes(
            folded, log_prior + factor * offset - folded @ mean, shrunken_prototypes(shifts, labels), sizes
        )

    return [fitted(count) for count in counts]


def _usable_clusters(features: Matrix, count: int, seed: int) -> NDArray[np.intp]:
    for fewer in range(min(count, len(features) // SMALLEST_EXPERT), 1, -1):
        try:
            labels = cluster(features, fewer, restarts=5, seed=seed)
        except ValueError:  # fewer distinct shifts than clusters
            continue
        if np.bincount(labels).min() >= SMALLEST_EXPERT:
            return labels
    return np.zeros(len(features), dtype=np.intp)


def _discriminant(coordinates: Matrix, labels: NDArray[np.intp], count: int) -> tuple[Matrix, Matrix]:
    """Return the affine log-likelihood ratios, weight [K, p] and offset [K]; 0 for a class without rows.

    The pooled covariance is shrunk once; scikit-learn's discriminant shrinks each class and takes five times as long.
    """
    weight, offset = np.zeros((count, coordinates.shape[1])), np.zeros(count)
    classes, members = np.unique(labels, return_inverse=True)
    means = cluster_means(coordinates, members)
    within = coordinates - means[members]
    if len(classes) < 2 or not within.any():
        return weight, offset
    covariance, _ = ledoit_wolf(within, assume_centered=True)
    solved = scipy.linalg.solve(covariance, means.T, assume_a="pos").T
    ratios = -0.5 * (solved * means).sum(axis=1)
    weight[classes], offset[classes] = solved, ratios - ratios.mean()
    return weight, offset


def _sharpness(evidence: Matrix, log_prior: Matrix, labels: NDArray[np.intp]) -> float:
    rows = np.arange(len(labels))

    def log_loss(factor: float) -> float:
        return -float(log_softmax(log_prior + factor * evidence, axis=1)[rows, labels].mean())

    return float(minimize_scalar(log_loss, bounds=(0.0, 2.0), method="bounded").x)
