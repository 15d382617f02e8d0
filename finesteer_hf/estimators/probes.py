"""Linear probes on attention heads: which heads separate wanted from unwanted states, and how (ITI, FASB)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression


MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class HeadProbes:
    """One logistic regression per head: p(wanted) = sigmoid(weight . x + bias).

    Attributes:
        weight: `[heads, size]` float64.
        bias: `[heads]`.
        accuracy: `[heads]` share of held-out states classified correctly.
        log_loss: `[heads]` mean negative log-likelihood of the held-out labels, in nats.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    log_loss: NDArray[np.float64]


def fit_head_probes(
    states: NDArray[np.floating],
    labels: NDArray[np.integer],
    held_out: NDArray[np.floating],
    held_out_labels: NDArray[np.integer],
) -> HeadProbes:
    """Fit a probe on each head and score it on held-out states.

    Args:
        states: `[n, heads, size]`.
        labels: `[n]`, 1 for wanted, 0 for unwanted; both must occur.
        held_out: `[m, heads, size]`.
        held_out_labels: `[m]`.
    """
    heads = states.shape[1]
    weight, bias = np.zeros((heads, states.shape[2])), np.zeros(heads)
    for head in range(heads):
        probe = LogisticRegression(max_iter=MAX_ITERATIONS).fit(states[:, head].astype(np.float64), labels)
        weight[head], bias[head] = probe.coef_[0], probe.intercept_[0]
    logits = np.einsum("nhs,hs->nh", held_out.astype(np.float64), weight) + bias
    wanted = held_out_labels.astype(bool)[:, None]
    return HeadProbes(
        weight=weight,
        bias=bias,
        accuracy=((logits > 0) == wanted).mean(axis=0),
        log_loss=np.logaddexp(0.0, np.where(wanted, -logits, logits)).mean(axis=0),
    )


def best_heads(accuracy: NDArray[np.float64], log_loss: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the heads with the best held-out accuracy; ties go to the smaller loss, then the earlier head."""
    return np.lexsort((np.arange(len(accuracy)), log_loss, -accuracy))[:count]


def centre_directions(states: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Unit vectors from the mean of the unwanted states to that of the wanted ones.

    Args:
        states: `[n, heads, size]`.
        labels: `[n]`, 1 or 0.

    Returns:
        `[heads, size]`.
    """
    wanted = labels.astype(bool)
    return unit_rows(states[wanted].mean(axis=0, dtype=np.float64) - states[~wanted].mean(axis=0, dtype=np.float64))


def unit_rows(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Vectors of length 1; zero vectors stay zero."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def spread_along(states: NDArray[np.floating], directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation of states `[n, heads, size]` projected on each head's direction, `[heads]`."""
    return np.einsum("nhs,hs->nh", states.astype(np.float64), directions).std(axis=0)
