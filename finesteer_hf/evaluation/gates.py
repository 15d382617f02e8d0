"""Figures of a gate, without a judge: misses, false alarms, separation, dose."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import roc_auc_score, roc_curve

from finesteer_hf.evaluation.measures.statistics import Mean, Proportion, mean_with_interval, proportion


@dataclass(frozen=True)
class GateFigures:
    """Figures of a gate on held-out queries.

    A gate fires on a query if its value is at least `threshold`; the dose is the gate's value itself.

    Attributes:
        miss: share of IR queries on which it does not fire (FNR).
        false_alarm: share of general queries on which it fires (FPR).
        fires_ir: share of IR queries on which it fires.
        dose_ir: mean gate value on IR queries.
        dose_general: mean gate value on general queries.
        zero_general: share of general queries whose gate is exactly 0, which leaves the model bit-identical.
        auroc: AUROC of the score, IR against general; NaN if one side is empty.
        tpr_at_1_fpr: largest share of IR queries above a score threshold that at most 1% of general queries pass.
        threshold: gate value from which it fires.
    """

    miss: Proportion
    false_alarm: Proportion
    fires_ir: Proportion
    dose_ir: Mean
    dose_general: Mean
    zero_general: Proportion
    auroc: float
    tpr_at_1_fpr: float
    threshold: float


def gate_figures(
    gate_ir: ArrayLike,
    gate_general: ArrayLike,
    *,
    score_ir: ArrayLike | None = None,
    score_general: ArrayLike | None = None,
    threshold: float = 0.5,
) -> GateFigures:
    """Figures of a gate from its values on IR and on general queries.

    Args:
        gate_ir: gate values of IR queries, `[n]` in [0, 1].
        gate_general: gate values of general queries, `[m]`.
        score_ir: scores behind the gate, larger for IR; by default the gate itself.
        score_general: the same for general queries.
        threshold: gate value from which it counts as firing.

    Raises:
        ValueError: if a value is not in [0, 1], or scores and gates differ in number.
    """
    ir, general = (np.asarray(values, dtype=np.float64).ravel() for values in (gate_ir, gate_general))
    for name, values in (("gate_ir", ir), ("gate_general", general)):
        if values.size and not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(f"{name} must hold gate values in [0, 1].")
    scores = []
    for name, given, gate in (("score_ir", score_ir, ir), ("score_general", score_general, general)):
        score = gate if given is None else np.asarray(given, dtype=np.float64).ravel()
        if score.shape != gate.shape:
            raise ValueError(f"{name} has {score.size} entries for {gate.size} gate values.")
        scores.append(score)
    return GateFigures(
        miss=proportion(ir < threshold),
        false_alarm=proportion(general >= threshold),
        fires_ir=proportion(ir >= threshold),
        dose_ir=mean_with_interval(ir),
        dose_general=mean_with_interval(general),
        zero_general=proportion(general == 0),
        auroc=auroc(scores[0], scores[1]),
        tpr_at_1_fpr=tpr_at_fpr(scores[0], scores[1], 0.01),
        threshold=threshold,
    )


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Area under the ROC curve of scores; NaN if one side is empty."""
    labels, scores = _labelled(positive, negative)
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < labels.size else float("nan")


def tpr_at_fpr(positive: ArrayLike, negative: ArrayLike, fpr: float) -> float:
    """Largest true-positive rate whose false-positive rate is at most `fpr`; NaN if one side is empty."""
    labels, scores = _labelled(positive, negative)
    if not 0 < labels.sum() < labels.size:
        return float("nan")
    false_rate, true_rate, _ = roc_curve(labels, scores, drop_intermediate=False)
    return float(true_rate[false_rate <= fpr].max())


def _labelled(positive: ArrayLike, negative: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    ir, general = (np.asarray(values, dtype=np.float64).ravel() for values in (positive, negative))
    return np.r_[np.ones(ir.size), np.zeros(general.size)], np.r_[ir, general]
