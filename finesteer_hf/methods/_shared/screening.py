"""First-order gains of vectors, without running the model steered.

One backward pass gives the gradient of a row's preference with respect to a vector at every site. Its inner product
with a candidate is the candidate's initial gain, so vectors at all sites can be ranked without a forward. The order
holds for small doses; at high ones gains saturate and texts break, so the few best are run steered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from finesteer_hf.method_api import FitData, Part
from finesteer_hf.methods._shared.strength import median_norm
from finesteer_hf.sites import Site


Vectors = Mapping[Site, NDArray[np.floating]]
# Norm of a vector in units of the state's at which gains are compared; for several sites, their total.
SCREEN_DOSE = 0.1


def preference_gradients(
    data: FitData, sites: Sequence[Site], parts: Sequence[Part]
) -> dict[Site, NDArray[np.float64]]:
    """Gradients of log p(chosen) - log p(rejected), in nats per token, at each site, `[rows, d]` float64."""
    return {
        site: np.concatenate(
            [
                data.chosen(site, part, "gradient").astype(np.float64) - data.rejected(site, part, "gradient")
                for part in parts
            ]
        )
        for site in sites
    }


def state_norms(data: FitData, sites: Sequence[Site]) -> dict[Site, float]:
    """Median norm of the queries' states at each site."""
    return {site: median_norm(data.query(site, "fit")) for site in sites}


def relative_norm(vectors: Vectors, norms: Mapping[Site, float]) -> float:
    """Median norm of vectors in units of the states', over all sites: the root of the sum of squares."""
    squares = sum((np.linalg.norm(v, axis=1) / max(norms[site], 1e-12)) ** 2 for site, v in vectors.items())
    return float(np.median(np.sqrt(squares)))


def first_order_gain(gradients: Vectors, vectors: Vectors, norms: Mapping[Site, float]) -> NDArray[np.float64]:
    """First-order gain in each row's preference of vectors at a dose of `SCREEN_DOSE`.

    Args:
        gradients: by site `[rows, d]`, see `preference_gradients`.
        vectors: by site `[rows or 1, d]`, of any length.
        norms: norms of the states at the sites.

    Returns:
        `[rows]`, in nats per token.
    """
    gained = sum((gradients[site] * vector).sum(axis=1) for site, vector in vectors.items())
    norm = relative_norm(vectors, norms)
    return np.asarray(gained * (SCREEN_DOSE / norm if norm > 0 else 0.0), dtype=np.float64)


def rank_agreement(gains: Sequence[float], values: Sequence[float]) -> float | None:
    """Spearman's rank correlation of screened gains and the values of steered trials; None with fewer than three."""
    if len(gains) < 3 or np.ptp(gains) == 0 or np.ptp(values) == 0:
        return None
    return float(spearmanr(gains, values).statistic)
