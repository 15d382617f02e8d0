"""The gate score that raises the fewest false alarms, chosen on held-out rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.metrics import roc_auc_score
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import ArrayLike, State, as_matrix, fraction, one_of
from finesteer_hf.estimators.gating.gates import conformal_rank, false_alarm_upper_bound
from finesteer_hf.estimators.gating.scores import (
    GateScore,
    MonitoringScore,
    RowWeights,
    StateScore,
    cross_fitted_scores,
    state_score,
    t2q_score,
)
from finesteer_hf.estimators.subspace import IntervenedSubspace, subspace_energy_ratio


SCORES: dict[str, type[GateScore]] = {"ser": IntervenedSubspace, "t2q": MonitoringScore, "state": StateScore}
SCORE_FUNCTIONS = {"ser": subspace_energy_ratio, "t2q": t2q_score, "state": state_score}


class AutoScore(BaseEstimator):
    """Fit every candidate score and keep the best by cross-fitted false alarms at the calibrated miss rate.

    A candidate's threshold is the conformal one of its cross-fitted IR scores; a false alarm is a held-out general row
    at or above it. Ties go to the higher AUROC, then to the earlier candidate. Without general rows the first
    candidate that needs none is fitted.

    Args:
        candidates: names from "ser", "t2q", "state".
        epsilon: the miss rate at which false alarms are counted.
        rank: rank of the subspaces.
        folds, seed: those of every cross-fit.

    Attributes:
        name_, estimator_: the choice, fitted on all rows.
        table_: one dict per candidate: name, false_alarm_rate, false_alarm_bound (95 %), auroc.
        chosen_params_: parameters of the choice.
    """

    def __init__(
        self,
        candidates: tuple[str, ...] = ("ser", "t2q", "state"),
        *,
        epsilon: float = 0.05,
        rank: int | str = "auto",
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        self.candidates = candidates
        self.epsilon = epsilon
        self.rank = rank
        self.folds = folds
        self.seed = seed

    def fit(
        self,
        ir: ArrayLike,
        general: ArrayLike | None = None,
        groups: Any = None,
        *,
        judged: Any = None,
        weights: RowWeights | None = None,
    ) -> AutoScore:
        """Choose and fit on IR states [M, d], M >= 12, and general states [N, d], N >= 4, or None.

        Args:
            ir, general: the states.
            groups: [M] labels of IR rows that are held out together when candidates are compared.
            judged: [N] bool, the general rows whose false alarms and AUROC count, such as those in the IR queries'
                form; None for all. The fit uses all.
            weights: weights of the rows in the state score, as for `StateScore.fit`.

        Raises:
            ValueError: for bad rows, an unknown candidate, or missing general rows if all candidates need them.
        """
        fraction(self.epsilon, "epsilon")
        for name in self.candidates:
            one_of(name, SCORES, "candidates")
        positives = as_matrix(ir, "ir", min_rows=12)
        if general is None:
            names = [name for name in self.candidates if name != "state"]
            if not names:
                raise ValueError("candidates=('state',) needs general states; pass them, or add 'ser' or 't2q'.")
            self.name_, self.table_ = names[0], []
            self.estimator_ = self._make(self.name_).fit(positives, groups=groups)
        else:
            negatives = as_matrix(general, "general", min_rows=4, width=positives.shape[1], width_of="ir")
            fitted = {name: self._make(name) for name in self.candidates}
            for score in fitted.values():
                if isinstance(score, StateScore):
                    # C is chosen on single rows: the log-loss of left-out kinds measures confidence, not order, and
                    # chooses far too flat a classifier (XSTest held out by type: AUROC .75, against .84 this way).
                    score.fit(positives, negatives, weights=weights)
                else:
                    score.fit(positives, negatives, groups)
            counted = np.ones(len(negatives), dtype=bool) if judged is None else np.asarray(judged, dtype=bool)
            self.table_ = [
                self._judge(name, score, positives, negatives, groups, counted, weights)
                for name, score in fitted.items()
            ]
            best = min(self.table_, key=lambda row: (row["false_alarm_rate"], -row["auroc"]))
            self.name_ = best["name"]
            self.estimator_ = fitted[self.name_]
        self.chosen_params_ = self.estimator_.chosen_params_
        return self

    def _make(self, name: str) -> GateScore:
        if name == "state":
            return StateScore(folds=self.folds, seed=self.seed)
        return SCORES[name](self.rank, folds=self.folds, seed=self.seed)

    def _judge(
        self, name: str, score: GateScore, ir: Any, general: Any, groups: Any, judged: Any, weights: RowWeights | None
    ) -> dict[str, Any]:
        ir_scores, general_scores = cross_fitted_scores(
            score, ir, general, groups=groups, folds=self.folds, seed=self.seed, weights=weights
        )
        assert general_scores is not None
        general_scores = general_scores[judged]
        rank = conformal_rank(len(ir_scores), self.epsilon)
        threshold = np.sort(ir_scores)[rank - 1] if rank else -math.inf
        alarms = int((general_scores >= threshold).sum())
        return {
            "name": name,
            "false_alarm_rate": alarms / len(general_scores),
            "false_alarm_bound": false_alarm_upper_bound(alarms, len(general_scores)),
            "auroc": float(
                roc_auc_score(
                    np.repeat([1, 0], [len(ir), len(general_scores)]), np.concatenate([ir_scores, general_scores])
                )
            ),
        }

    def score_samples(self, states: ArrayLike) -> NDArray[np.float32]:
        """Return the chosen score of states [B, d]: [B], higher is more like the IR queries."""
        check_is_fitted(self)
        return self.estimator_.score_samples(states)

    def state(self) -> State:
        """Return the arguments of `SCORE_FUNCTIONS[name_]`."""
        check_is_fitted(self)
        return self.estimator_.state()
