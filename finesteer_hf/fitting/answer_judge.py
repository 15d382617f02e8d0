"""Judges answers: are they of the kind of the chosen answers, or of the rejected ones?

Under teacher forcing a vector that is added at each answer token raises the chosen answer's likelihood without the model
ever saying it. So where a classifier can tell the two kinds apart, the model's own answers are judged by it. The
classifier is a logistic regression on the mean state of an answer in the unsteered model. It reads what an answer says
rather than its words: fitted on four phrases of refusal, it knows others.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


# The judge is trusted if it puts this share of pairs that it was not fitted on in the right order, of at least so many.
TOLD_APART, ENOUGH_PAIRS, FOLDS = 0.95, 16, 4
# Rows that it is fitted on; kinds that need more of them to be told apart are not.
EXAMPLES = 64
# Block whose states it reads, as a share of the depth; its figures differ little between 20% and 90%.
DEPTH = 0.6
# Inverse of the penalty on standardised states, of which there are more than rows.
INVERSE_PENALTY = 0.01


class AnswerJudge:
    """Tells chosen answers from rejected ones by their mean states.

    Args:
        chosen, rejected: mean states of answers of the same rows, `[rows, d]`.
    """

    def __init__(self, chosen: NDArray[np.floating], rejected: NDArray[np.floating]) -> None:
        self._model: Pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=INVERSE_PENALTY, max_iter=1000))
        states = np.concatenate([chosen, rejected]).astype(np.float64)
        labels = np.repeat([1, 0], len(chosen))
        rows = np.tile(np.arange(len(chosen)), 2)
        self.trusted = len(chosen) >= ENOUGH_PAIRS and self._right(states, labels, rows) >= TOLD_APART
        self._model.fit(states, labels)

    def probability(self, states: NDArray[np.floating]) -> NDArray[np.float64]:
        """Probability that answers are of the chosen kind, `[rows]`, from their mean states `[rows, d]`."""
        return np.asarray(self._model.predict_proba(states.astype(np.float64))[:, 1], dtype=np.float64)

    def _right(self, states: NDArray[np.float64], labels: NDArray[np.int64], rows: NDArray[np.int64]) -> float:
        """Share of pairs in the right order, each judged by a fit without it."""
        folds = GroupKFold(FOLDS, shuffle=True, random_state=0)
        scores = cross_val_predict(self._model, states, labels, groups=rows, cv=folds, method="decision_function")
        chosen, rejected = np.split(scores, 2)
        return float((chosen > rejected).mean())
