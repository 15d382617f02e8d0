"""Ranks of methods on the same items, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Rank:
    """A method's rank among others; 1 is the best.

    Attributes:
        value: rank of its mean score; methods with equal means share the mean of their places.
        low: best rank within the interval.
        high: worst rank within it.
        n: number of items.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:g} [{self.low:g}, {self.high:g}]"


def ranks_with_intervals(
    scores: Mapping[str, Sequence[float] | np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Rank]:
    """Rank of each method by its mean over the same items, with a percentile bootstrap interval over items.

    All methods are ranked again on each draw of items, so that shared effects (hard items, easy ones) do not widen the
    interval. Methods that tie in a draw take the best shared place for the lower bound and the worst for the upper
    one, so the intervals of two methods with the same answers overlap. The interval shows how much the order depends
    on the choice of items.

    Args:
        scores: by method, one number (or boolean) per item, larger is better, items in the same order.
        confidence: level of each method's interval.
        resamples: draws of items.
        seed: seed of the draws.

    Returns:
        By method, in the order given.

    Raises:
        ValueError: if there are no items, a score is not finite, or methods have different numbers of items.

    Source: Hall and Miller (2009), Using the bootstrap to quantify the authority of an empirical ranking, Ann. Statist. 37.
    """
    rows = {name: np.asarray(values, dtype=np.float64).ravel() for name, values in scores.items()}
    counts = {name: row.size for name, row in rows.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f"Ranks need the same items for every method, and at least one: got {counts}.")
    if wrong := [name for name, row in rows.items() if not np.isfinite(row).all()]:
        raise ValueError(f"Ranks need finite scores; those of {', '.join(wrong)} are not.")
    table = np.stack(list(rows.values()))
    items = table.shape[1]
    draws = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples)
    # Rounded, so that methods with the same answers tie whatever the order of summation.
    means = np.round(draws @ table.T / items, 12)
    tail = (1 - confidence) / 2
    best, worst = (stats.rankdata(-means, method=method, axis=1) for method in ("min", "max"))
    low = np.quantile(best, tail, axis=0, method="inverted_cdf")
    high = np.quantile(worst, 1 - tail, axis=0, method="inverted_cdf")
    value = stats.rankdata(-np.round(table.mean(1), 12))
    return {name: Rank(float(value[i]), float(low[i]), float(high[i]), items) for i, name in enumerate(rows)}
