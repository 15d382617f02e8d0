"""Statistics of states that are read in chunks of a few thousand rows, so that they need not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.preprocessing import StandardScaler

from finesteer_hf.method_api import FitData, Part, Pool, Side
from finesteer_hf.sites import Site


def mean_difference(
    data: FitData, sides: tuple[Side, Side], site: Site, parts: Sequence[Part], pool: Pool = "answer_mean"
) -> tuple[NDArray[np.float64], tuple[int, int]]:
    """The mean of one side's states minus the mean of the other's.

    Args:
        data: the states.
        sides: whose states; the second is subtracted.
        site: where they are taken.
        parts: parts of the rows.
        pool: pool of the answers.

    Returns:
        The difference, `[width]` float64, zeros if a side has no rows; and the number of rows of each side.
    """
    means, counts = zip(*(_mean(data, side, site, parts, pool) for side in sides), strict=True)
    if 0 in counts:
        return np.zeros(max(len(mean) for mean in means)), counts
    return means[0] - means[1], counts


def _mean(data: FitData, side: Side, site: Site, parts: Sequence[Part], pool: Pool) -> tuple[NDArray[np.float64], int]:
    """Mean, accumulated in float64, and number of rows."""
    scaler = StandardScaler(with_std=False)
    count = 0
    for chunk in data.chunks(side, site, parts, pool):
        scaler.partial_fit(chunk)
        count += len(chunk)
    return (scaler.mean_ if count else np.zeros(0)), count


def median_query_norm(data: FitData, site: Site, part: Part = "fit") -> float:
    """Median Euclidean norm of the queries at a site."""
    chunks = data.chunks("query", site, (part,))
    return float(np.median(np.concatenate([np.linalg.norm(chunk.astype(np.float64), axis=1) for chunk in chunks])))
