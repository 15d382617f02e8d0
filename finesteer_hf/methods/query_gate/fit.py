"""Fitting the gate: a score of the query's state, and a dose for each score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from finesteer_hf.errors import DatasetError
from finesteer_hf.estimators import (
    GATES,
    SCORES,
    AutoScore,
    ConformalGate,
    QuantileGate,
    StateScore,
)
from finesteer_hf.methods.base import FitData, Part
from finesteer_hf.methods.query_gate.config import GateScore, QueryGateConfig
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, to_file
from finesteer_hf.methods.rows import general_rows, over_rows, query_rows
from finesteer_hf.sites import Site


# Of each class, for plots.
KEPT_SCORES = 200
# Fewer rows cannot be cross-fitted, so scores cannot be compared on them.
MIN_COMPARED, MIN_COMPARED_GENERAL = 12, 4


@dataclass(frozen=True)
class GateFit:
    """A fitted gate.

    Attributes:
        score: name of the score, or `auto` for a gate that looks at none.
        subspace_rank: rank of its subspace; as configured if it has none.
        tensors: by the names of the adapter's file.
        report: what was promised, and what held-out queries got.
        scores: held-out scores of both kinds of queries and the threshold, for plots.
    """

    score: GateScore
    subspace_rank: int | str
    tensors: dict[str, torch.Tensor]
    report: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def fit_gate(config: QueryGateConfig, data: FitData, read: Site) -> GateFit:
    """Fit score and gate on the states of a site.

    The conformal gate learns its score on the `fit` part and its threshold on `calibration`; whatever is chosen about
    the score is chosen on `fit` alone, so that the calibration queries are exchangeable with new ones. The paper's
    gates use both parts for both, as published.

    Raises:
        DatasetError: for too few rows, or if score or gate needs general prompts and there are none.
    """
    if config.gate == "always":
        return GateFit("auto", config.subspace_rank, {}, {"kind": "always"})
    conformal = config.gate == "conformal"
    seen: tuple[Part, ...] = ("fit",) if conformal else ("fit", "calibration")
    held: tuple[Part, ...] = ("calibration",) if conformal else seen
    ir, general = query_rows(data, read, seen), general_rows(data, read, seen)
    _check_rows(config, ir, general)
    name, score, candidates = _fit_score(config, ir, general, data.seed)
    held_general = general_rows(data, read, held)
    gate = _new_gate(config).fit(
        score.score_samples(query_rows(data, read, held)),
        score.score_samples(held_general) if len(held_general) else None,
    )
    tensors = to_file(SCORE_TENSORS[name], score.state()) | to_file(GATE_TENSORS[config.gate], gate.state())
    rank = score.chosen_params_.get("rank", config.subspace_rank)
    report = {"kind": config.gate, "score": name, "candidates": candidates, **_promise(config, gate)}
    figures, scores = _held_out(data, read, score, gate, full=1.0 if config.gate in ("conformal", "quantile") else 0.5)
    return GateFit(cast(GateScore, name), rank, tensors, report | figures, scores)


def _check_rows(config: QueryGateConfig, ir: np.ndarray, general: np.ndarray) -> None:
    wants = "gate='logistic'" if config.gate == "logistic" else "gate_score='state'"
    if len(general) < 2 and (config.gate == "logistic" or config.gate_score == "state"):
        raise DatasetError(
            f"{wants} tells intervention-required queries from general ones, and there are {len(general)} general prompts. "
            "Leave general_dataset at 'default' or give some, or use gate_score='ser' or 't2q' with another gate."
        )
    limit = min(len(ir) - 1, ir.shape[1])
    if config.subspace_rank != "auto" and config.gate_score != "state" and int(config.subspace_rank) > limit:
        raise DatasetError(
            f"subspace_rank={config.subspace_rank} is more than {len(ir)} distinct prompts of width {ir.shape[1]} span "
            f"(at most {limit}). Give more prompts, or a lower subspace_rank, or 'auto'."
        )


def _fit_score(
    config: QueryGateConfig, ir: np.ndarray, general: np.ndarray, seed: int
) -> tuple[str, Any, list[dict[str, Any]]]:
    """The score's name, the fitted score, and the comparison that it won."""
    wanted: str = config.gate_score
    if wanted == "auto" and config.gate == "conformal":
        if len(ir) >= MIN_COMPARED and len(general) >= MIN_COMPARED_GENERAL:
            auto = AutoScore(epsilon=config.gate_epsilon, rank=config.subspace_rank, seed=seed).fit(ir, general)
            return auto.name_, auto.estimator_, auto.table_
        wanted = "state" if len(general) >= 2 else "ser"
    elif wanted == "auto":
        wanted = "ser"
    if wanted == "state":
        return wanted, StateScore(seed=seed).fit(ir, general), []
    return wanted, SCORES[wanted](config.subspace_rank, seed=seed).fit(ir), []


def _new_gate(config: QueryGateConfig) -> Any:
    if config.gate == "conformal":
        return ConformalGate(
            config.gate_epsilon, config.gate_gamma, guarantee=config.gate_guarantee, delta=config.gate_delta
        )
    if config.gate == "quantile":
        return QuantileGate(config.gate_epsilon, config.gate_gamma)
    return GATES[config.gate]()


def _promise(config: QueryGateConfig, gate: Any) -> dict[str, Any]:
    """What the calibration promises of new queries; the paper's gates promise nothing."""
    if config.gate != "conformal":
        return {"calibration_queries": gate.n_calibration_}
    return {
        "calibration_queries": gate.n_calibration_,
        "epsilon": config.gate_epsilon,
        "guarantee": gate.guarantee_,
        "miss_bound": gate.bound_,
        "lost_dose_bound": gate.lost_dose_bound_,
    }


def _held_out(data: FitData, read: Site, score: Any, gate: Any, full: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the gate does to queries that neither score nor threshold has seen.

    A miss is an intervention-required query below the full dose, a false alarm a general query with any dose.
    """
    ir_rows, general = query_rows(data, read, ("validation",)), general_rows(data, read, ("validation",))
    ir_scores, general_scores = _apply(score.score_samples, ir_rows), _apply(score.score_samples, general)
    ir_dose, general_dose = _apply(gate.gate, ir_scores), _apply(gate.gate, general_scores)
    truth = np.repeat([1, 0], [len(ir_scores), len(general_scores)])
    both = np.concatenate([ir_scores, general_scores])
    report = {
        "misses": share(int((ir_dose < full).sum()), len(ir_dose)),
        "false_alarms": share(int((general_dose > 0).sum()), len(general_dose)),
        "auroc": float(roc_auc_score(truth, both)) if 0 < truth.sum() < len(truth) else None,
        "dose_of_queries": over_rows(ir_dose, ir_dose.mean),
        "dose_of_general": over_rows(general_dose, general_dose.mean),
    }
    threshold = getattr(gate, "threshold_", None)
    return report, {"ir": _sample(ir_scores), "general": _sample(general_scores), "threshold": threshold}


def _apply(function: Any, rows: np.ndarray) -> np.ndarray:
    return np.asarray(function(rows), dtype=np.float64) if len(rows) else np.zeros(0)


def _sample(scores: np.ndarray) -> list[float]:
    """At most 200 scores, evenly spaced in rank."""
    ranks = np.linspace(0, len(scores) - 1, min(KEPT_SCORES, len(scores))).round().astype(int)
    return [float(value) for value in np.sort(scores)[ranks]]


def share(hits: int, rows: int) -> dict[str, float | int | None]:
    """A share with its exact (Clopper-Pearson) 95% interval, JSON-ready."""
    if rows == 0:
        return {"k": 0, "n": 0, "value": None, "low": None, "high": None}
    interval = binomtest(hits, rows).proportion_ci(method="exact")
    return {"k": hits, "n": rows, "value": hits / rows, "low": float(interval.low), "high": float(interval.high)}
