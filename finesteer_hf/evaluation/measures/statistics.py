"""Shares with intervals, and paired comparisons; every figure has its n."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats


IntervalMethod = Literal["wilson", "clopper-pearson"]
_SCIPY_METHOD = {"wilson": "wilson", "clopper-pearson": "exact"}


@dataclass(frozen=True)
class Proportion:
    """A share of items with its confidence interval.

    Attributes:
        k: number of hits.
        n: number of items; with 0 the value and the bounds are NaN.
        value: `k / n`.
        low: lower bound of the interval.
        high: upper bound.
    """

    k: int
    n: int
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.brief} n={self.n}" if self.n else "no items"

    @property
    def brief(self) -> str:
        """The share and its interval, for tables that show n once per row."""
        return f"{100 * self.value:.1f}% [{100 * self.low:.1f}, {100 * self.high:.1f}]" if self.n else "no items"

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready form; NaN becomes None."""
        if self.n == 0:
            return {"k": 0, "n": 0, "value": None, "low": None, "high": None}
        return {"k": self.k, "n": self.n, "value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Mean:
    """A mean with its interval: BCa bootstrap, or a score interval if the items are 0 or 1.

    Attributes:
        value: the mean.
        low: lower bound.
        high: upper bound.
        n: number of items.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.brief} n={self.n}" if self.n else "no items"

    @property
    def brief(self) -> str:
        """The mean and its interval, for tables that show n once per row."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.n else "no items"

    def to_dict(self) -> dict[str, float | int | None]:
        """JSON-ready form; NaN becomes None."""
        if self.n == 0:
            return {"value": None, "low": None, "high": None, "n": 0}
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True)
class PairedTest:
    """McNemar's exact test of two conditions on the same items.

    Attributes:
        only_first: hits of the first condition only.
        only_second: hits of the second condition only.
        p_value: two-sided, exact binomial on the discordant items; 1 if there are none.
        n: number of items.
    """

    only_first: int
    only_second: int
    p_value: float
    n: int


def proportion(
    hits: Iterable[Any] | int, n: int | None = None, *, confidence: float = 0.95, method: IntervalMethod = "wilson"
) -> Proportion:
    """Share of hits with its interval.

    Args:
        hits: booleans, one per item; or the number of hits, with `n`.
        n: number of items, if `hits` is a number.
        confidence: level of the two-sided interval.
        method: `wilson` (score interval) or `clopper-pearson` (exact, never too narrow).

    Raises:
        ValueError: for invalid counts (`k > n`, negative) and for an unknown method.
    """
    if method not in _SCIPY_METHOD:
        raise ValueError(f"method must be one of {list(_SCIPY_METHOD)}, got {method!r}.")
    if n is None:
        if isinstance(hits, int):
            raise ValueError("Give n, the number of items, when `hits` is a count.")
        values = [bool(hit) for hit in hits]
        k, n = sum(values), len(values)
    elif isinstance(hits, (int, np.integer)):
        k = int(hits)
    else:
        raise ValueError("Give either booleans or a count with n, not both.")
    if not 0 <= k <= n:
        raise ValueError(f"A share needs 0 <= k <= n, got k={k}, n={n}.")
    if n == 0:
        return Proportion(0, 0, float("nan"), float("nan"), float("nan"))
    interval = stats.binomtest(k, n).proportion_ci(confidence_level=confidence, method=_SCIPY_METHOD[method])
    return Proportion(k, n, k / n, float(interval.low), float(interval.high))


def mcnemar(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> PairedTest:
    """Compare two conditions on the same items by McNemar's exact test.

    Args:
        first: booleans of the first condition, one per item.
        second: booleans of the second, in the same order.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(first) != len(second):
        raise ValueError(f"Paired conditions need the same items: got {len(first)} and {len(second)}.")
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    p_value = float(stats.binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedTest(only_first, only_second, p_value, len(first))


def paired_p_value(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of a mean paired difference by sign flips: exact for few items, else from 9,999 draws.

    Args:
        first: one number per item.
        second: the same items under another condition, in the same order.

    Raises:
        ValueError: if the lengths differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"Paired conditions need the same items: got {a.size} and {b.size}.")
    if np.array_equal(a, b):
        return 1.0
    result = stats.permutation_test(
        (a, b),
        lambda x, y, axis: np.mean(y - x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """P-values corrected for multiple tests by Holm's step-down procedure.

    Values of at most alpha after the correction are significant: the chance of any false positive is at most alpha,
    however the tests depend on each other. Never weaker than Bonferroni.

    Args:
        p_values: p-values of one family of tests, such as the rows of a table.

    Returns:
        The corrected values in the same order, at most 1.

    Raises:
        ValueError: if a value is not in [0, 1].

    Source: Holm (1979), A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6.
    """
    p = np.asarray(p_values, dtype=np.float64).ravel()
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values are between 0 and 1, got {p.tolist()}.")
    order = np.argsort(p, kind="stable")
    # The smallest p is multiplied by n, the next by n - 1; the results never decrease.
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def mean_with_interval(values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, seed: int = 0) -> Mean:
    """Mean with a BCa bootstrap interval of 2,000 resamples, or Wilson's interval if all values are 0 or 1.

    A bootstrap of few hits is too narrow: at n = 20 and a share of 5% a third of the intervals miss it, since samples
    without a hit give [0, 0].

    Args:
        values: one number per item.
        confidence: level of the interval.
        seed: seed of the resampling.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size and _binary(data):
        share = proportion(int(data.sum()), data.size, confidence=confidence)
        return Mean(share.value, share.low, share.high, share.n)
    return _bootstrapped(data, confidence, seed)


def _bootstrapped(data: np.ndarray, confidence: float, seed: int) -> Mean:
    if data.size == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    value = float(data.mean())
    # BCa is undefined if resampling changes the mean only by rounding.
    if np.ptp(data) <= 1e-12 * np.abs(data).max():
        return Mean(value, value, value, int(data.size))
    result = stats.bootstrap(
        (data,),
        np.mean,
        n_resamples=2000,
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return Mean(value, float(result.confidence_interval.low), float(result.confidence_interval.high), int(data.size))


def paired_difference(
    first: Sequence[float] | np.ndarray,
    second: Sequence[float] | np.ndarray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> Mean:
    """Mean of `second - first` over the same items, with a bootstrap interval; Tango's if the items are 0 or 1.

    Raises:
        ValueError: if the lengths differ.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"Paired conditions need the same items: got {a.size} and {b.size}.")
    if a.size and _binary(a) and _binary(b):
        gained, lost = int((b > a).sum()), int((a > b).sum())
        low, high = _difference_of_shares(gained, lost, a.size, confidence)
        return Mean((gained - lost) / a.size, low, high, int(a.size))
    return _bootstrapped(b - a, confidence, seed)


def _binary(values: np.ndarray) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _difference_of_shares(gained: int, lost: int, n: int, confidence: float) -> tuple[float, float]:
    """Score interval of the difference of two shares of the same items.

    Contains the differences that a score test does not reject; at 0 that test is McNemar's. Keeps its coverage if few
    or no items differ.

    Source: Tango (1998), Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design, Statistics in Medicine 17.
    """
    z = float(stats.norm.ppf((1 + confidence) / 2))
    observed = (gained - lost) / n

    def score(difference: float) -> float:
        # Most likely share of lost items if the shares differ by `difference`.
        b = (2 * n - gained + lost) * difference - gained - lost
        c = -lost * difference * (1 - difference)
        lost_share = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * lost_share + difference * (1 - difference))
        return float((gained - lost - n * difference) / np.sqrt(max(variance, 1e-300)))

    # The variance is 0 at the ends of [-1, 1], and at an estimate of 0 without changes: search just inside.
    inner = 1e-9
    low = -1.0 if observed == -1 else optimize.brentq(lambda at: score(at) - z, inner - 1, observed - inner)
    high = 1.0 if observed == 1 else optimize.brentq(lambda at: score(at) + z, observed + inner, 1 - inner)
    return float(low), float(high)
