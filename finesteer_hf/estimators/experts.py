"""Clusters of shifts: the experts of FineSteer's mixture, and dense routing over them (Eq. 11-12)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import calinski_harabasz_score

from .arrays import Matrix


CLUSTERING_DIMENSIONS = 256


def expert_weights(h: torch.Tensor, router_weight: torch.Tensor, router_bias: torch.Tensor) -> torch.Tensor:
    """Give alpha(h) = softmax(R h + b), dense over the experts.

    Args:
        h: query states [..., d], any floating dtype.
        router_weight: R [K, d] fp32. The paper's (W_K C)^T W_Q / sqrt(d_k), folded, is one.
        router_bias: b [K] fp32.

    Returns:
        [..., K] fp32, rows sum to 1.
    """
    return torch.softmax(h.float() @ router_weight.T + router_bias, dim=-1)


def clustering_features(shifts: Matrix, *, normalise: bool, seed: int = 0) -> Matrix:
    """Give what K-means sees: shifts [M, d], of unit length if `normalise`, in at most 256 principal directions."""
    if normalise:
        norms = np.linalg.norm(shifts, axis=1, keepdims=True)
        shifts = shifts / np.where(norms > 0, norms, 1.0)
    dimensions = min(CLUSTERING_DIMENSIONS, len(shifts) - 1, shifts.shape[1])
    return PCA(dimensions, svd_solver="full", random_state=seed).fit_transform(shifts)


def cluster(features: Matrix, num_experts: int, *, restarts: int = 20, seed: int = 0) -> NDArray[np.intp]:
    """Assign rows [M, p] to `num_experts` K-means clusters: [M] labels from 0.

    Raises:
        ValueError: fewer distinct rows than experts.
    """
    distinct = len(np.unique(features, axis=0))
    if not 1 <= num_experts <= distinct:
        raise ValueError(f"num_experts={num_experts} must lie between 1 and the {distinct} distinct shifts there are.")
    return KMeans(num_experts, n_init=restarts, random_state=seed).fit_predict(features).astype(np.intp)


def calinski_harabasz_curve(features: Matrix, candidates: Sequence[int], *, seed: int = 0) -> dict[int, float]:
    """Give the Calinski-Harabasz index of K-means for each number of experts that the rows allow (K < rows).

    The index is undefined at K = 1, and a maximum at the lowest candidate is thin evidence for several modes.

    Raises:
        ValueError: no candidate has fewer clusters than there are distinct rows.
    """
    distinct = len(np.unique(features, axis=0))
    possible = [count for count in candidates if 2 <= count < distinct]
    if not possible:
        raise ValueError(
            f"num_experts='auto' tries {min(candidates)} to {max(candidates)} experts, but there are {distinct} "
            "distinct shifts: give more rows, or num_experts=1."
        )
    return {
        count: float(calinski_harabasz_score(features, cluster(features, count, restarts=10, seed=seed)))
        for count in possible
    }


def cluster_means(shifts: Matrix, labels: NDArray[np.intp]) -> Matrix:
    """Give the mean shift of each cluster, [K, d], in the space the shifts come in."""
    return np.stack([shifts[labels == label].mean(axis=0) for label in range(int(labels.max()) + 1)])
