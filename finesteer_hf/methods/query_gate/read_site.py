"""Where a gate reads, for methods whose own sites do not determine it."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import RidgePath
from finesteer_hf.estimators.linear_algebra import row_space
from finesteer_hf.method_api import FitData, ModelInfo
from finesteer_hf.methods._shared.rows import general_rows, general_texts, query_rows, rows_vary
from finesteer_hf.methods._shared.trials import candidate_layers
from finesteer_hf.methods.query_gate.config import QueryGateConfig
from finesteer_hf.methods.query_gate.form import PromptForm
from finesteer_hf.sites import Site, resid_post


# Rows used to rank sites; the cost is cubic, and more do not change the ranks.
SWEEP_ROWS = 1000
# Sites that separate the queries worse than the best by this AUROC are left out: their gate would be imprecise.
BLUNT = 0.01


def candidate_reads(config: QueryGateConfig, info: ModelInfo) -> tuple[Site, ...]:
    """The site that a config names, or the outputs of the blocks between 20% and 80% of the depth.

    Raises:
        ValueError: if the site is out of the model's range.
    """
    if config.read_site is None:
        return tuple(resid_post(layer) for layer in candidate_layers("auto", info.num_layers))
    site = Site.parse(config.read_site)
    if site.layer >= info.num_layers:
        raise ValueError(f"read_site={site} is out of range: the model has layers 0 to {info.num_layers - 1}.")
    return (site,)


def choose_read_site(data: FitData, config: QueryGateConfig) -> tuple[Site, dict[str, float | None]]:
    """The earliest candidate that separates the `fit` part's queries from general prompts about as well as the best.

    Returns:
        The site, the middle one if there are no general prompts, and the `separability` of each candidate.

    Raises:
        DatasetError: if all queries have the same state at every candidate.
    """
    queries = {site: query_rows(data, site, ("fit",)) for site in candidate_reads(config, data.info)}
    varying = [site for site, rows in queries.items() if rows_vary(rows)]
    if not varying:
        raise DatasetError(
            f"All queries have the same state at {', '.join(map(str, queries))}, so no gate can separate them. Choose a "
            "later read_site."
        )
    form = PromptForm.of(data, varying[0], ("fit",), config.gate_epsilon)
    judged = form.judged(general_texts(data, varying[0], ("fit",))[:SWEEP_ROWS])
    found = {
        site: separability(queries[site][:SWEEP_ROWS], general_rows(data, site, ("fit",))[:SWEEP_ROWS], judged)
        for site in varying
    }
    table: dict[str, float | None] = {str(site): value for site, value in found.items()}
    told = {site: value for site, value in found.items() if value is not None}
    if not told:
        return varying[len(varying) // 2], table
    return next(site for site in varying if site in told and told[site] >= max(told.values()) - BLUNT), table


def separability(queries: np.ndarray, general: np.ndarray, judged: np.ndarray | None = None) -> float | None:
    """Held-out AUROC of a ridge classifier of queries against general prompts, from exact leave-one-out residuals.

    Args:
        queries: `[rows, d]`.
        general: `[rows, d]`.
        judged: `[len(general)]` bool, the general prompts counted in the AUROC, at least one; None for all.

    Returns:
        The AUROC; None with fewer than two general prompts.
    """
    if len(general) < 2:
        return None
    both: np.ndarray[Any, np.dtype[np.float64]] = np.concatenate([queries, general]).astype(np.float64)
    truth = np.repeat([1.0, 0.0], [len(queries), len(general)])
    path = RidgePath.of(row_space(both)[0], truth[:, None])
    curve = path.held_out_curve()
    scores = truth - path.held_out_residuals(max(curve, key=lambda ridge: curve[ridge]))[:, 0]
    counted = np.ones(len(truth), dtype=bool)
    if judged is not None:
        counted[len(queries) :] = judged
    return float(roc_auc_score(truth[counted], scores[counted]))
