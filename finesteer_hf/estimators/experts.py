"""Clusters of shifts: the experts of FineSteer's mixture, and dense routing over them (Eq. 11-12)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import calinski_harabasz_score, silhouette_score

from finesteer_hf.estimators.arrays import Matrix
from finesteer_hf.estimators.linear_algebra import principal_directions


CLUSTERING_DIMENSIONS = 256


def expert_weights(h: torch.Tensor, router_weight: torch.Tensor, router_bias: torch.Tensor) -> torch.Tensor:
    """Return alpha(h) = softmax(R h + b), dense over the experts.

    Args:
        h: query states [..., d], any floating dtype.
        router_weight: R [K, d] fp32. Folded from the paper's (W_K C)^T W_Q / sqrt(d_k), for example.
        router_bias: b [K] fp32.

    Returns:
        [..., K] fp32; rows sum to 1.
    """
    return torch.softmax(h.float() @ router_weight.T + router_bias, dim=-1)


def clustering_features(shifts: Matrix, *, normalise: bool, seed: int = 0) -> Matrix:
    """Return K-means' input: shifts [M, d], of unit length if `normalise`, in at most 256 principal directions."""
    if normalise:
        shifts = unit_length(shifts)
    centred = shifts - shifts.mean(axis=0)
    return centred @ principal_directions(centred, CLUSTERING_DIMENSIONS, seed)[1]


def unit_length(rows: Matrix) -> Matrix:
    """Divide rows [M, d] by their norms; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def cluster(features: Matrix, num_experts: int, *, restarts: int = 20, seed: int = 0) -> NDArray[np.intp]:
    """Assign rows [M, p] to `num_experts` K-means clusters: [M] labels from 0.

    Raises:
        ValueError: if there are fewer distinct rows than experts.
    """
    if num_experts > len(features):
        raise ValueError(f"num_experts={num_experts} is more than the {len(features)} rows.")
    if features.shape[1] == 0:
        features = np.zeros((len(features), 1))  # equal rows have no principal direction
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # raised below, as an error
        labels = KMeans(num_experts, n_init=restarts, random_state=seed).fit_predict(features).astype(np.intp)
    found = len(np.unique(labels))
    if found < num_experts:
        raise ValueError(f"num_experts={num_experts}, but only {found} shifts are different.")
    return labels


def calinski_harabasz_curve(features: Matrix, candidates: Sequence[int], *, seed: int = 0) -> dict[int, float]:
    """Return the Calinski-Harabasz index of K-means for each number of experts that the rows allow (K < rows).

    The index is undefined at K = 1, and a maximum at the lowest candidate is weak evidence for several modes.

    Raises:
        ValueError: if no candidate has fewer clusters than there are rows.
    """
    clusterings = _clusterings(features, candidates, seed)
    return {count: float(calinski_harabasz_score(features, labels)) for count, labels in clusterings.items()}


def median_of_criteria(features: Matrix, candidates: Sequence[int], *, seed: int = 0) -> int:
    """Return the median of three choices of K, as FineSteer's published code does for its orthogonal residual.

    The three: the elbow (the sharpest bend of the sum of squares within clusters), the best silhouette and the best
    Calinski-Harabasz index.

    Raises:
        ValueError: if no candidate has fewer clusters than there are rows.
    """
    clusterings = _clusterings(features, candidates, seed)
    counts = list(clusterings)
    within = [np.square(features - cluster_means(features, labels)[labels]).sum() for labels in clusterings.values()]
    elbow = counts[int(np.argmax(np.abs(np.diff(within, n=2)))) + 1] if len(counts) > 2 else counts[0]
    best = [
        counts[int(np.argmax([index(features, labels) for labels in clusterings.values()]))]
        for index in (silhouette_score, calinski_harabasz_score)
    ]
    return int(np.median([elbow, *best]))


def _clusterings(features: Matrix, candidates: Sequence[int], seed: int) -> dict[int, NDArray[np.intp]]:
    possible = [count for count in candidates if 2 <= count < len(features)]
    if not possible:
        raise ValueError(
            f"num_experts='auto' tries {min(candidates)} to {max(candidates)} experts, but there are only {len(features)} "
            "rows: give more, or num_experts=1."
        )
    return {count: cluster(features, count, restarts=10, seed=seed) for count in possible}


def cluster_means(shifts: Matrix, labels: NDArray[np.intp]) -> Matrix:
    """Return the mean shift of each cluster, [K, d], in the space of the shifts."""
    return np.stack([shifts[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
