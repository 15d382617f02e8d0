"""The mathematics of steering, scikit-learn style: subspaces, scores, gates and vectors.

Nothing here uses models or tokens: arrays in, arrays out. An estimator learns in `fit`, and `state()` returns the fp32
tensors that its run-time function takes as keyword arguments. Only that function contains the formula:

    score = SCORE_FUNCTIONS[name](h, **score_estimator.state())     # h [B, d] -> [B]
    gate = GATE_FUNCTIONS[name](score, **gate_estimator.state())    # [B] -> [B] in [0, 1]
    vector = VECTOR_FUNCTIONS[name](h, **vector_estimator.state())  # h [B, d] -> [B, d]
"""

from __future__ import annotations

from finesteer_hf.estimators.closed_form import ReducedRankSteering, low_rank_vector
from finesteer_hf.estimators.experts import expert_weights
from finesteer_hf.estimators.gating.conformal import (
    conformal_rank,
    false_alarm_upper_bound,
    kinds_bound,
    kinds_rank,
    lost_dose,
    miss_upper_bound,
    pac_rank,
    rows_needed,
)
from finesteer_hf.estimators.gating.form import FormProbe
from finesteer_hf.estimators.gating.gate_functions import (
    always_gate,
    conformal_gate,
    direct_gate,
    logistic_gate,
    quantile_gate,
)
from finesteer_hf.estimators.gating.gates import (
    GATE_FUNCTIONS,
    GATES,
    AlwaysGate,
    ConformalGate,
    DirectGate,
    LogisticGate,
    QuantileGate,
)
from finesteer_hf.estimators.gating.score_choice import SCORE_FUNCTIONS, SCORES, AutoScore
from finesteer_hf.estimators.gating.scores import (
    MonitoringScore,
    StateScore,
    cross_fitted_scores,
    monitoring_statistics,
    state_score,
    t2q_score,
)
from finesteer_hf.estimators.mixture import MixtureSteering, mixture_vector
from finesteer_hf.estimators.mose import PaperMoSE, mose_vector
from finesteer_hf.estimators.ridge import RidgePath, held_out_residuals
from finesteer_hf.estimators.selection import (
    calibration_slope,
    held_out_r2,
    make_folds,
    mean_cosine,
    one_standard_error,
    row_losses,
)
from finesteer_hf.estimators.subspace import IntervenedSubspace, subspace_energy_ratio


VECTOR_FUNCTIONS = {"mixture": mixture_vector, "reduced_rank": low_rank_vector, "paper": mose_vector}

__all__ = [
    "GATES",
    "GATE_FUNCTIONS",
    "SCORES",
    "SCORE_FUNCTIONS",
    "VECTOR_FUNCTIONS",
    "AlwaysGate",
    "AutoScore",
    "ConformalGate",
    "DirectGate",
    "FormProbe",
    "IntervenedSubspace",
    "LogisticGate",
    "MixtureSteering",
    "MonitoringScore",
    "PaperMoSE",
    "QuantileGate",
    "ReducedRankSteering",
    "RidgePath",
    "StateScore",
    "always_gate",
    "calibration_slope",
    "conformal_gate",
    "conformal_rank",
    "cross_fitted_scores",
    "direct_gate",
    "expert_weights",
    "false_alarm_upper_bound",
    "held_out_r2",
    "held_out_residuals",
    "kinds_bound",
    "kinds_rank",
    "logistic_gate",
    "lost_dose",
    "low_rank_vector",
    "make_folds",
    "mean_cosine",
    "miss_upper_bound",
    "mixture_vector",
    "monitoring_statistics",
    "mose_vector",
    "one_standard_error",
    "pac_rank",
    "quantile_gate",
    "row_losses",
    "rows_needed",
    "state_score",
    "subspace_energy_ratio",
    "t2q_score",
]
