"""Ranks, thresholds and bounds of split-conformal calibration."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta, binom

from .arrays import fraction


def conformal_rank(n: int, epsilon: float) -> int:
    """Give l = floor(epsilon (n + 1)): firing at or above the l-th smallest score misses at most epsilon on average.

    The average is over calibration sets and the next exchangeable query. 0 means that the gate has to fire always.
    """
    return math.floor(fraction(epsilon, "epsilon") * (n + 1) + 1e-9)


def pac_rank(n: int, epsilon: float, delta: float) -> int:
    """Give the largest l with BinomCDF(l - 1; n, epsilon) <= delta.

    Firing at or above the l-th smallest score misses at most epsilon, for all but a fraction delta of the calibration
    sets: given the set, the miss rate is at most Beta(l, n + 1 - l) distributed (Vovk 2012).
    """
    below = binom.cdf(np.arange(n), n, fraction(epsilon, "epsilon")) <= fraction(delta, "delta")
    return int(np.count_nonzero(below))


def rows_needed(epsilon: float, delta: float | None = None) -> int:
    """Give the fewest calibration rows with which a gate may miss at all: marginal, or PAC when delta is given."""
    if delta is None:
        return math.ceil(1.0 / fraction(epsilon, "epsilon") - 1.0 - 1e-9)
    return math.ceil(math.log(fraction(delta, "delta")) / math.log1p(-fraction(epsilon, "epsilon")) - 1e-9)


def miss_upper_bound(n: int, rank: int, delta: float) -> float:
    """Give the 1 - delta quantile of the miss rate given the calibration set, Beta(rank, n + 1 - rank)."""
    return float(beta.ppf(1.0 - fraction(delta, "delta"), rank, n + 1 - rank)) if rank else 0.0


def false_alarm_upper_bound(alarms: int, total: int, confidence: float = 0.95) -> float:
    """Give the one-sided Clopper-Pearson upper bound of a rate seen as `alarms` of `total` general queries.

    Raises:
        ValueError: no queries, or more alarms than queries.
    """
    if total < 1 or not 0 <= alarms <= total:
        raise ValueError(f"{alarms} alarms of {total} queries is no rate; both come from counting general queries.")
    level = fraction(confidence, "confidence")
    return 1.0 if alarms == total else float(beta.ppf(level, alarms + 1, total - alarms))


def lost_dose(n: int, level: float, gamma: float, zero_rank: int) -> float:
    """Give E[1 - g | IR] of the soft gate exactly, for continuous exchangeable scores.

    The p-value of an IR query is then uniform on 1/(n+1), ..., 1. Without a hard zero the result is at most
    level * gamma / (gamma + 1).

    Args:
        n: calibration rows.
        level: epsilon at which g reaches 1.
        gamma: exponent.
        zero_rank: g is 0 below the zero_rank-th smallest calibration score.
    """
    p_values = np.arange(1, n + 2) / (n + 1)
    gate = np.minimum(1.0, p_values / level) ** gamma
    gate[:zero_rank] = 0.0
    return float(np.mean(1.0 - gate))
