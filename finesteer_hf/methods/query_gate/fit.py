"""Fits the gate: a score of the query's state, and a dose for each score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
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
    cross_fitted_scores,
)
from finesteer_hf.method_api import FitData, Part
from finesteer_hf.methods._shared.rows import (
    general_rows,
    general_texts,
    over_rows,
    query_kinds,
    query_rows,
    query_texts,
)
from finesteer_hf.methods.query_gate.config import GateScore, QueryGateConfig
from finesteer_hf.methods.query_gate.form import PromptForm
from finesteer_hf.methods.query_gate.tensors import GATE_TENSORS, SCORE_TENSORS, to_file
from finesteer_hf.sites import Site


# Most stored scores of each class, for plots.
KEPT_SCORES = 200
# Fewer rows cannot be cross-fitted, so scores cannot be compared.
MIN_COMPARED, MIN_COMPARED_GENERAL = 12, 4
# Fewest categories with which `auto` calibrates for unseen kinds; fewer say too little about the next one.
MIN_KINDS = 5
# Number of fits without a kind; with more kinds, several are left out together.
MAX_KIND_FITS = 10
BOTH: tuple[Part, ...] = ("fit", "calibration")
# When `auto` calibrates on kinds, the gate may open on at most this share of held-out general prompts.
MOST_FALSE_ALARMS = 0.05
# To spare general prompts, the gate may miss at most this share of the queries; tried in these steps.
MOST_MISSED, EPSILON_STEP = 0.2, 0.01
NOT_OF_ROWS = (
    "anything about queries of other kinds or forms than the calibration's, or about attempts to get around it"
)
NOT_OF_KINDS = (
    "any single kind, kinds unlike those of the fit, other forms; approximate: the final score has seen all kinds"
)


@dataclass(frozen=True)
class GateFit:
    """A fitted gate.

    Attributes:
        score: name of the score, or `auto` for a gate without one.
        subspace_rank: rank of its subspace; as configured if it has none.
        tensors: tensors by their names in the adapter's file.
        report: the guarantee, and figures on held-out queries.
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

    With calibration on rows, the conformal gate learns its score on the `fit` part and its threshold on `calibration`;
    every choice about the score uses `fit` only, so that the calibration queries are exchangeable with new ones. With
    calibration on kinds, the score is fitted on both parts, and the threshold comes from each kind's scores under a
    fit without that kind. The paper's gates use both parts for both, as published.

    Raises:
        DatasetError: for too few rows, if score or gate needs general prompts and there are none, or if kinds should
            be left out and there are none.
    """
    if config.gate == "always":
        return GateFit("auto", config.subspace_rank, {}, {"kind": "always"})
    conformal = config.gate == "conformal"
    kinds = _kinds_left_out(config, data, read) if conformal else None
    by_row = conformal and kinds is None
    seen: tuple[Part, ...] = ("fit",) if by_row else BOTH
    # General prompts need not be exchangeable with anything, so the score learns from all of them.
    ir, general = query_rows(data, read, seen), general_rows(data, read, BOTH)
    _check_rows(config, ir, general)
    form = PromptForm.of(data, read, seen, config.gate_epsilon)
    others = general_texts(data, read, BOTH)
    weights = form.weights(query_texts(data, read, seen), others)
    learning = _Learning(ir, general, kinds, form.judged(others), weights, data.seed)
    name, score, candidates = _fit_score(config, learning)
    gate: Any
    if kinds is not None:
        scores, unseen = _cross_fitted(score, learning, min(MAX_KIND_FITS, len(np.unique(kinds))))
        gate = _calibrated(
            config, lambda epsilon: _new_gate(config, epsilon, by_kind=True).fit(scores, unseen, groups=kinds)
        )
        opens_on = 0.0 if unseen is None else float((unseen >= gate.threshold_).mean())
        if config.gate_calibration == "auto" and opens_on > MOST_FALSE_ALARMS:
            # A kind unlike all others pulls the threshold down so far that the gate opens for everything.
            by_rows = fit_gate(dataclasses.replace(config, gate_calibration="rows"), data, read)
            by_rows.report["kinds_would_open_on_general"] = opens_on
            return by_rows
    else:
        held: tuple[Part, ...] = ("calibration",) if by_row else BOTH
        scores, unseen = score.score_samples(query_rows(data, read, held)), None
        if by_row and min(len(ir), len(general)) >= MIN_COMPARED_GENERAL:
            unseen = _cross_fitted(score, learning)[1]
        elif len(general):
            unseen = score.score_samples(general)
        gate = _calibrated(config, lambda epsilon: _new_gate(config, epsilon).fit(scores, unseen))
    tensors = to_file(SCORE_TENSORS[name], score.state()) | to_file(GATE_TENSORS[config.gate], gate.state())
    rank = score.chosen_params_.get("rank", config.subspace_rank)
    report = {"kind": config.gate, "score": name, "candidates": candidates, **_promise(config, gate)}
    if kinds is not None:
        report |= _of_kinds(scores, kinds, gate.threshold_, gate.missed_)
    full = 1.0 if config.gate in ("conformal", "quantile") else 0.5
    figures, plotted = _held_out(data, read, score, gate, form, full)
    return GateFit(cast(GateScore, name), rank, tensors, report | figures, plotted)


def _kinds_left_out(config: QueryGateConfig, data: FitData, read: Site) -> np.ndarray | None:
    """The categories of the prompts of both parts if the threshold should hold for new categories; else None.

    Raises:
        DatasetError: if that is requested but the data do not allow it.
    """
    if config.gate_calibration == "rows" or config.gate_guarantee == "pac":
        return None
    kinds, general = query_kinds(data, read, BOTH), len(general_rows(data, read, BOTH))
    count = 0 if kinds is None else len(np.unique(kinds))
    # Scores of general prompts are cross-fitted too.
    enough = general == 0 or general >= MIN_COMPARED_GENERAL
    if config.gate_calibration == "auto":
        return kinds if count >= MIN_KINDS and enough else None
    if count < 2 or not enough:
        raise DatasetError(
            f"gate_calibration='kinds' leaves out one category at a time, but there are {count} (and {general} general "
            f"prompts, of which it needs none or {MIN_COMPARED_GENERAL}). Give rows a `category`, or use 'rows'."
        )
    return kinds


def _of_kinds(scores: np.ndarray, kinds: np.ndarray, threshold: float, missed: float) -> dict[str, Any]:
    """What the threshold misses of kinds that were left out of the score's fit."""
    below = {str(kind): (scores[kinds == kind] < threshold) for kind in np.unique(kinds)}
    worst = max(below, key=lambda kind: float(below[kind].mean()))
    return {
        "kinds": len(below),
        "misses_of_left_out_kinds": missed,
        "worst_kind": worst,
        "misses_of_worst_kind": share(int(below[worst].sum()), len(below[worst])),
    }


def _check_rows(config: QueryGateConfig, ir: np.ndarray, general: np.ndarray) -> None:
    wants = "gate='logistic'" if config.gate == "logistic" else "gate_score='state'"
    if len(general) < 2 and (config.gate == "logistic" or config.gate_score == "state"):
        raise DatasetError(
            f"{wants} separates intervention-required queries from general ones, but there are {len(general)} of those. "
            "Leave general_dataset at 'default' or give some, or use gate_score='ser' or 't2q' with another gate."
        )
    limit = min(len(ir) - 1, ir.shape[1])
    if config.subspace_rank != "auto" and config.gate_score != "state" and int(config.subspace_rank) > limit:
        raise DatasetError(
            f"subspace_rank={config.subspace_rank} is more than {len(ir)} distinct prompts of width {ir.shape[1]} span "
            f"(at most {limit}). Give more prompts, a lower subspace_rank, or 'auto'."
        )


@dataclass(frozen=True)
class _Learning:
    """The data that a score learns from.

    Attributes:
        ir, general: states, `[rows, d]`.
        kinds: `[len(ir)]`, held out together in every choice; None for single rows.
        judged: `[len(general)]`, the general prompts that count when scores are compared.
        weights: weights of both in a classifier of states; None for equal ones.
        seed: seed of the fits.
    """

    ir: np.ndarray
    general: np.ndarray
    kinds: np.ndarray | None
    judged: np.ndarray
    weights: tuple[np.ndarray, np.ndarray] | None
    seed: int


def _fit_score(config: QueryGateConfig, rows: _Learning) -> tuple[str, Any, list[dict[str, Any]]]:
    """The score's name, the fitted score, and the comparison."""
    ir, general, kinds, seed = rows.ir, rows.general, rows.kinds, rows.seed
    wanted: str = config.gate_score
    if wanted == "auto" and config.gate == "conformal":
        if len(ir) >= MIN_COMPARED and len(general) >= MIN_COMPARED_GENERAL:
            auto = AutoScore(epsilon=config.gate_epsilon, rank=config.subspace_rank, seed=seed)
            auto.fit(ir, general, kinds, judged=rows.judged, weights=rows.weights)
            return auto.name_, auto.estimator_, auto.table_
        wanted = "state" if len(general) >= 2 else "ser"
    elif wanted == "auto":
        wanted = "ser"
    if wanted == "state":
        return wanted, StateScore(seed=seed).fit(ir, general, weights=rows.weights), []
    return wanted, SCORES[wanted](config.subspace_rank, seed=seed).fit(ir, groups=kinds), []


def _cross_fitted(score: Any, rows: _Learning, folds: int = 5) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores of both classes from fits that have not seen them."""
    general = rows.general if len(rows.general) else None
    return cross_fitted_scores(
        score, rows.ir, general, groups=rows.kinds, folds=folds, seed=rows.seed, weights=rows.weights
    )


def _calibrated(config: QueryGateConfig, fitted: Callable[[float], Any]) -> Any:
    """The gate with the fewest misses among those that open on few general prompts; if none does, the strictest.

    Args:
        config: settings of the gate.
        fitted: returns the gate that may miss a given share of the queries.
    """
    gate = fitted(config.gate_epsilon)
    if config.gate != "conformal" or config.gate_guarantee == "pac" or not gate.rank_:
        # With too few rows for the requested share, the gate always opens, and the report says so.
        return gate
    for epsilon in np.arange(config.gate_epsilon + EPSILON_STEP, MOST_MISSED + 1e-9, EPSILON_STEP):
        if getattr(gate, "false_alarms_", 0) <= config.gate_false_alarms * getattr(gate, "n_general_", 0):
            break
        gate = fitted(round(float(epsilon), 6))
    return gate


def _new_gate(config: QueryGateConfig, epsilon: float, by_kind: bool = False) -> Any:
    if config.gate == "conformal":
        return ConformalGate(
            epsilon,
            config.gate_gamma,
            guarantee=config.gate_guarantee,
            delta=config.gate_delta,
            cross_fitted=by_kind,
            by_kind=by_kind,
        )
    if config.gate == "quantile":
        return QuantileGate(epsilon, config.gate_gamma)
    return GATES[config.gate]()


def _promise(config: QueryGateConfig, gate: Any) -> dict[str, Any]:
    """The calibration's guarantee for new queries; the paper's gates have none."""
    if config.gate != "conformal":
        return {"calibration_queries": gate.n_calibration_}
    return {
        "calibration": "kinds" if gate.by_kind else "rows",
        "calibration_queries": gate.n_calibration_,
        "epsilon": gate.epsilon,
        "epsilon_asked": config.gate_epsilon,
        "guarantee": gate.guarantee_,
        "not_guaranteed": NOT_OF_KINDS if gate.by_kind else NOT_OF_ROWS,
        "miss_bound": gate.bound_,
        "lost_dose_bound": gate.lost_dose_bound_,
    }


def _held_out(
    data: FitData, read: Site, score: Any, gate: Any, form: PromptForm, full: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The gate's figures on queries that neither score nor threshold has seen.

    A miss is an intervention-required query below the full dose, a false alarm a general query with any dose. General
    queries in the form of the intervention-required ones are also counted separately.
    """
    validation: tuple[Part, ...] = ("validation",)
    texts, others = query_texts(data, read, validation), general_texts(data, read, validation)
    ir_rows, general = query_rows(data, read, ("validation",)), general_rows(data, read, ("validation",))
    ir_scores, general_scores = _apply(score.score_samples, ir_rows), _apply(score.score_samples, general)
    ir_dose, general_dose = _apply(gate.gate, ir_scores), _apply(gate.gate, general_scores)
    same = form.same(others)
    report = {
        "misses": share(int((ir_dose < full).sum()), len(ir_dose)),
        "false_alarms": share(int((general_dose > 0).sum()), len(general_dose)),
        "auroc": _auroc(ir_scores, general_scores),
        "false_alarms_same_form": share(int((general_dose[same] > 0).sum()), int(same.sum())),
        "auroc_same_form": _auroc(ir_scores, general_scores[same]),
        "form": form.report(texts, others, np.concatenate([ir_dose, general_dose]) > 0),
        "dose_of_queries": over_rows(ir_dose, ir_dose.mean),
        "dose_of_general": over_rows(general_dose, general_dose.mean),
    }
    threshold = getattr(gate, "threshold_", None)
    return report, {"ir": _sample(ir_scores), "general": _sample(general_scores), "threshold": threshold}


def _auroc(ir: np.ndarray, general: np.ndarray) -> float | None:
    if not len(ir) or not len(general):
        return None
    return float(roc_auc_score(np.repeat([1, 0], [len(ir), len(general)]), np.concatenate([ir, general])))


def _apply(function: Any, rows: np.ndarray) -> np.ndarray:
    return np.asarray(function(rows), dtype=np.float64) if len(rows) else np.zeros(0)


def _sample(scores: np.ndarray) -> list[float]:
    """At most 200 scores, evenly spaced by rank."""
    ranks = np.linspace(0, len(scores) - 1, min(KEPT_SCORES, len(scores))).round().astype(int)
    return [float(value) for value in np.sort(scores)[ranks]]


def share(hits: int, rows: int) -> dict[str, float | int | None]:
    """A share with its exact (Clopper-Pearson) 95% interval, JSON-ready."""
    if rows == 0:
        return {"k": 0, "n": 0, "value": None, "low": None, "high": None}
    interval = binomtest(hits, rows).proportion_ci(method="exact")
    return {"k": hits, "n": rows, "value": hits / rows, "low": float(interval.low), "high": float(interval.high)}
