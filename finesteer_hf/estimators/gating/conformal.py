"""Ranks, thresholds and bounds of split-conformal calibration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from finesteer_hf.estimators.arrays import fraction


def conformal_rank(n: int, epsilon: float) -> int:
    """Return l = floor(epsilon (n + 1)): firing at or above the l-th smallest score misses at most epsilon on average.

    The average is over calibration sets and the next exchangeable query. 0 means that the gate must always fire.
    """
    return math.floor(fraction(epsilon, "epsilon") * (n + 1) + 1e-9)


def pac_rank(n: int, epsilon: float, delta: float) -> int:
    """Return the largest l with BinomCDF(l - 1; n, epsilon) <= delta.

    Firing at or above the l-th smallest score misses at most epsilon, for all but a fraction delta of the calibration
    sets: given the set, the miss rate is at most Beta(l, n + 1 - l) distributed (Vovk 2012).
    """
    below = binom.cdf(np.arange(n), n, fraction(epsilon, "epsilon")) <= fraction(delta, "delta")
    return int(np.count_nonzero(below))


def kinds_rank(scores: NDArray[Any], kinds: NDArray[Any], epsilon: float) -> tuple[int, float]:
    """Return how many scores may be at or below a threshold over kinds, and the share that it misses.

    Every kind has the same weight, whatever its number of rows, because kinds are exchangeable, not rows. The
    threshold is the largest score with at most `epsilon` of the weight strictly below it (Lee, Barber and Willett
    2023, without their mass for the new kind; `kinds_bound` adds it).

    Args:
        scores: `[n]` scores of rows, each fitted without the row's kind.
        kinds: `[n]` labels.
        epsilon: miss rate.

    Returns:
        The rank of the threshold in the sorted scores, at least 1, and the mean over kinds of the share of rows below.
    """
    fraction(epsilon, "epsilon")
    _, member, sizes = np.unique(kinds, return_inverse=True, return_counts=True)
    weights = 1.0 / (len(sizes) * sizes[member])
    order = np.argsort(scores, kind="stable")
    ordered, below = scores[order], np.concatenate([[0.0], np.cumsum(weights[order])])
    # the weight strictly below a score is the weight before the first of its ties
    strictly = below[np.searchsorted(ordered, ordered, side="left")]
    rank = int(np.count_nonzero(strictly <= epsilon + 1e-9))
    return rank, float(strictly[rank - 1])


def kinds_bound(kinds: int, missed: float) -> float:
    """Return a bound on the miss rate for the next of `kinds` + 1 exchangeable kinds, one of which may be missed
    completely.

    With one row per kind it is rank / (n + 1) of `conformal_rank`.
    """
    return (kinds * missed + 1.0) / (kinds + 1.0)


def rows_needed(epsilon: float, delta: float | None = None) -> int:
    """Return the fewest calibration rows with which a gate may miss any query: marginal, or PAC if delta is given."""
    if delta is None:
        return math.ceil(1.0 / fraction(epsilon, "epsilon") - 1.0 - 1e-9)
    return math.ceil(math.log(fraction(delta, "delta")) / math.log1p(-fraction(epsilon, "epsilon")) - 1e-9)


def miss_upper_bound(n: int, rank: int, delta: float) -> float:
    """Return the 1 - delta quantile of the miss rate given the calibration set, Beta(rank, n + 1 - rank)."""
    return float(beta.ppf(1.0 - fraction(delta, "delta"), rank, n + 1 - rank)) if rank else 0.0


def false_alarm_upper_bound(alarms: int, total: int, confidence: float = 0.95) -> float:
    """Return the one-sided Clopper-Pearson upper bound of a rate of `alarms` in `total` general queries.

    Raises:
        ValueError: if there are no queries, or more alarms than queries.
    """
    if total < 1 or not 0 <= alarms <= total:
        raise ValueError(f"{alarms} alarms in {total} queries is not a rate; count both on the same general queries.")
    level = fraction(confidence, "confidence")
    return 1.0 if alarms == total else float(beta.ppf(level, alarms + 1, total - alarms))


def lost_dose(n: int, level: float, gamma: float, zero_rank: int) -> float:
    """Return E[1 - g | IR] of the soft gate exactly, for continuous exchangeable scores.

    The p-value of an IR query is then uniform on 1/(n+1), ..., 1. Without a hard zero the result is at most
    level * gamma / (gamma + 1).

    Args:
        n: number of calibration rows.
        level: epsilon at which g reaches 1.
        gamma: exponent.
        zero_rank: g is 0 below the zero_rank-th smallest calibration score.
    """
    p_values = np.arange(1, n + 2) / (n + 1)
    gate = np.minimum(1.0, p_values / level) ** gamma
    gate[:zero_rank] = 0.0
    return float(np.mean(1.0 - gate))
