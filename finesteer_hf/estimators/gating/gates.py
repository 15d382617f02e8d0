"""Gates: from a score to a dose g in [0, 1]. The paper's three, always-on, and the calibrated one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from finesteer_hf.estimators.arrays import (
    ArrayLike,
    State,
    as_groups,
    as_vector,
    fraction,
    one_of,
    positive,
    run,
    runtime_tensor,
)
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
from finesteer_hf.estimators.gating.gate_functions import (
    always_gate,
    conformal_gate,
    direct_gate,
    logistic_gate,
    quantile_gate,
)


class _Gate(BaseEstimator):
    """Base of all gates: fit on scores, compute doses, count false alarms on general queries.

    Attributes (if general scores are given): n_general_, false_alarms_ (rows with g > 0), false_alarm_bound_
    (95 % Clopper-Pearson), general_dose_ (mean g).
    """

    function: ClassVar[Callable[..., torch.Tensor]]

    def fit(self, ir_scores: ArrayLike, general_scores: ArrayLike | None = None, groups: Any = None) -> Any:
        """Calibrate on scores of IR queries [n] and, if the gate or its report uses them, of general queries [m].

        Args:
            ir_scores: scores of IR rows; for the guarantee, rows that the score was not fitted on.
            general_scores: scores of held-out general rows.
            groups: [n] labels; only `ConformalGate` uses them.

        Raises:
            ValueError: for no rows, NaN or Inf, or a parameter out of range.
        """
        scores = as_vector(ir_scores, "ir_scores").astype(np.float32)
        general = None if general_scores is None else as_vector(general_scores, "general_scores").astype(np.float32)
        self._calibrate(scores, general, as_groups(groups, len(scores)))
        self.n_calibration_ = len(scores)
        if general is not None:
            dose = self.gate(general)
            self.n_general_ = len(general)
            self.false_alarms_ = int((dose > 0).sum())
            self.false_alarm_bound_ = false_alarm_upper_bound(self.false_alarms_, len(general))
            self.general_dose_ = float(dose.mean())
        return self

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        raise NotImplementedError

    def gate(self, scores: ArrayLike) -> NDArray[np.float32]:
        """Return the dose of scores [B]: [B] fp32 in [0, 1]."""
        return run(type(self).function, as_vector(scores, "scores"), self.state())

    def state(self) -> State:
        """Return the arguments of the run-time function besides the score."""
        return {}


class AlwaysGate(_Gate):
    """g = 1: steer every query."""

    function = staticmethod(always_gate)

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        self.bound_ = 0.0


class DirectGate(_Gate):
    """g = s, the energy ratio itself (Eq. 15). IR queries get much less than full strength."""

    function = staticmethod(direct_gate)

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        if scores.min() < 0.0 or scores.max() > 1.0:
            raise ValueError(
                f"ir_scores range from {scores.min():.3g} to {scores.max():.3g}; g = s needs a score in [0, 1]: 'ser'."
            )


class QuantileGate(_Gate):
    """The paper's one-class gate (Eq. 8). Its tau is valid for the rows it was fitted on, and misses far more new
    ones.

    Args:
        epsilon: nominal miss rate, tau is the lower epsilon-quantile of the IR scores.
        gamma: exponent below tau.

    Attributes:
        threshold_, calibration_scores_ (sorted [n] fp32), n_calibration_.
    """

    function = staticmethod(quantile_gate)

    def __init__(self, epsilon: float = 0.05, gamma: float = 2.0) -> None:
        self.epsilon = epsilon
        self.gamma = gamma

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        positive(self.gamma, "gamma")
        self.calibration_scores_ = np.sort(scores)
        # the smallest t with F(t) >= eps
        self.threshold_ = float(
            np.quantile(self.calibration_scores_, fraction(self.epsilon, "epsilon"), method="inverted_cdf")
        )

    def state(self) -> State:
        """Return the arguments of `quantile_gate`."""
        check_is_fitted(self, "threshold_")
        return {
            "threshold": runtime_tensor(self.threshold_),
            "calibration_scores": runtime_tensor(self.calibration_scores_),
            "epsilon": runtime_tensor(self.epsilon),
            "gamma": runtime_tensor(self.gamma),
        }


class LogisticGate(_Gate):
    """The paper's supervised gate (Eq. 9): two scalars fitted by binary cross-entropy.

    Args:
        l2: weight of the penalty on the slope per standard deviation of the score; it keeps separable data finite.

    Attributes:
        weight_, bias_, threshold_ (the score at which g = 1/2).
    """

    function = staticmethod(logistic_gate)

    def __init__(self, l2: float = 1e-4) -> None:
        self.l2 = l2

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        if general is None:
            raise ValueError(
                "the logistic gate is fitted on IR against general queries, but there is only one class: pass "
                "general_scores, or use the gate 'conformal', 'quantile' or 'ser'."
            )
        both = np.concatenate([scores, general]).astype(np.float64)
        centre, scale = both.mean(), both.std()
        if scale == 0:
            raise ValueError("ir_scores and general_scores are all equal, so no slope can be fitted.")
        strength = 1.0 / (positive(self.l2, "l2") * len(both))
        model = LogisticRegression(C=strength, max_iter=1_000, tol=1e-8)
        model.fit(((both - centre) / scale)[:, None], np.repeat([1, 0], [len(scores), len(general)]))
        self.weight_ = float(model.coef_[0, 0] / scale)
        self.bias_ = float(model.intercept_[0] - self.weight_ * centre)
        self.threshold_ = -self.bias_ / self.weight_ if self.weight_ else math.nan

    def state(self) -> State:
        """Return the arguments of `logistic_gate`."""
        check_is_fitted(self, "weight_")
        return {"weight": runtime_tensor(self.weight_), "bias": runtime_tensor(self.bias_)}


class ConformalGate(_Gate):
    """Split-conformal soft gate: its miss rate on exchangeable IR queries has a finite-sample bound.

    With the n calibration scores sorted, g is 1 from the l-th smallest on and falls below it. "marginal":
    l = floor(eps (n + 1)), so P(g < 1 | IR) <= l / (n + 1) <= eps over calibration sets. "pac": the largest l for
    which the miss rate stays at most eps with probability 1 - delta over calibration sets. The bound holds for
    queries exchangeable with the calibration rows: no other distribution, no adaptive attacker.

    g is exactly 0 below the smallest calibration score. With general scores, g is 0 up to the lowest calibration score
    that passes no more of them than the threshold does.

    Args:
        epsilon: miss rate.
        gamma: exponent below the threshold.
        guarantee: "marginal" or "pac".
        delta: failure probability of "pac".
        cross_fitted: the scores come from `cross_fitted_scores`: every bound doubles and is marked approximate.
        by_kind: groups are kinds, and a new query has a new kind, so kinds are exchangeable, not rows. All kinds have
            the same weight, and the threshold misses at most epsilon of them on average. The bound, which allows for
            one more kind, is coarse with few kinds: (K epsilon + 1) / (K + 1). Not with "pac".

    Attributes:
        threshold_, rank_ (l; 0: fires always), level_ (the p-value at which g reaches 1), floor_, calibration_scores_.
        bound_: bound of the miss rate; guarantee_: that bound in words; lost_dose_bound_: bound of E[1 - g | IR].
        missed_: with `by_kind`, the mean over kinds of the share of their rows below the threshold.
        group_thresholds_, group_: with other groups (Mondrian), each threshold, and the group with the lowest one,
            whose scores are stored: the bound then holds within every group.
    """

    function = staticmethod(conformal_gate)

    def __init__(
        self,
        epsilon: float = 0.05,
        gamma: float = 2.0,
        *,
        guarantee: str = "marginal",
        delta: float = 0.05,
        cross_fitted: bool = False,
        by_kind: bool = False,
    ) -> None:
        self.epsilon = epsilon
        self.gamma = gamma
        self.guarantee = guarantee
        self.delta = delta
        self.cross_fitted = cross_fitted
        self.by_kind = by_kind

    def _rank(self, n: int) -> int:
        return (
            conformal_rank(n, self.epsilon) if self.guarantee == "marginal" else pac_rank(n, self.epsilon, self.delta)
        )

    def _calibrate(self, scores: Any, general: Any, groups: NDArray[Any] | None) -> None:
        positive(self.gamma, "gamma")
        fraction(self.epsilon, "epsilon")
        fraction(self.delta, "delta")
        one_of(self.guarantee, ("marginal", "pac"), "guarantee")
        if self.by_kind:
            self._calibrate_by_kind(scores, general, groups)
            return
        by_group = {"all": scores} if groups is None else {str(g): scores[groups == g] for g in np.unique(groups)}
        ranks = {group: self._rank(len(part)) for group, part in by_group.items()}
        self.group_thresholds_ = {
            group: float(np.partition(part, ranks[group] - 1)[ranks[group] - 1]) if ranks[group] else -math.inf
            for group, part in by_group.items()
        }
        self.group_ = min(self.group_thresholds_, key=lambda group: self.group_thresholds_[group])
        self.threshold_ = self.group_thresholds_[self.group_]
        self.calibration_scores_ = np.sort(by_group[self.group_])
        self.rank_ = ranks[self.group_]
        self._set_bounds(general, {group: (len(part), ranks[group]) for group, part in by_group.items()})
        if self.rank_ == 0:
            self._warn_always(len(self.calibration_scores_), groups is not None)

    def _calibrate_by_kind(self, scores: Any, general: Any, kinds: NDArray[Any] | None) -> None:
        if kinds is None or self.guarantee == "pac":
            raise ValueError(
                "by_kind=True needs groups, the kind of each row, and guarantee='marginal': a few kinds cannot give "
                f"a bound with probability 1 - delta. Got guarantee={self.guarantee!r} and groups={kinds!r}."
            )
        names = np.unique(kinds)
        self.rank_, self.missed_ = kinds_rank(scores, kinds, self.epsilon)
        self.calibration_scores_ = np.sort(scores)
        self.threshold_ = float(self.calibration_scores_[self.rank_ - 1])
        # level in the pooled rows, where the dose is looked up; with kinds of unequal size it is not epsilon
        self.level_ = (self.rank_ + 1) / (len(scores) + 1)
        self._set_floor(general)
        count, factor = len(names), 2.0 if self.cross_fitted else 1.0
        dose = self.gate(scores)
        lost = float(np.mean([1.0 - dose[kinds == name].mean() for name in names]))
        self.bound_ = min(1.0, factor * kinds_bound(count, self.missed_))
        self.lost_dose_bound_ = min(1.0, factor * kinds_bound(count, lost))
        self.guarantee_ = (
            f"P(g < 1 | IR of a new kind) <= {self.bound_:.4f}, on average over sets of {count} kinds, if kinds are "
            "exchangeable"
        )
        if self.cross_fitted:
            self.guarantee_ = f"approximate (each kind scored by a fit without it): {self.guarantee_}"

    def _set_floor(self, general: Any) -> int:
        """Put the hard zero as high as possible without passing more general rows; return its rank."""
        zero_rank = min(1, self.rank_)
        if general is not None and self.rank_:
            allowed = (general >= self.threshold_).sum()
            passed = (general[None, :] >= self.calibration_scores_[: self.rank_, None]).sum(axis=1)
            zero_rank = int(np.argmax(passed <= allowed)) + 1
        self.floor_ = float(self.calibration_scores_[zero_rank - 1]) if zero_rank else -math.inf
        return zero_rank

    def _set_bounds(self, general: Any, sizes: dict[str, tuple[int, int]]) -> None:
        n = len(self.calibration_scores_)
        self.level_ = min(self.epsilon, (self.rank_ + 1) / (n + 1))
        zero_rank = self._set_floor(general)
        factor = 2.0 if self.cross_fitted else 1.0
        pac = self.guarantee == "pac"
        misses = {
            group: miss_upper_bound(m, rank, self.delta) if pac else rank / (m + 1)
            for group, (m, rank) in sizes.items()
        }
        self.bound_ = min(1.0, factor * max(misses.values())) if self.rank_ else 0.0
        # for other groups only the probability of a score below the threshold is known, not the distance
        elsewhere = max((rank / (m + 1) for group, (m, rank) in sizes.items() if group != self.group_), default=0.0)
        lost = max(lost_dose(n, self.level_, self.gamma, zero_rank), elsewhere) if self.rank_ else 0.0
        self.lost_dose_bound_ = min(1.0, factor * lost)
        self.guarantee_ = f"P(g < 1 | IR) <= {self.bound_:.4f}, " + (
            f"with probability {1 - self.delta:g} over calibration sets" if pac else "on average over calibration sets"
        )
        if self.cross_fitted:
            self.guarantee_ = f"approximate (cross-fitted scores): {self.guarantee_}"

    def _warn_always(self, n: int, grouped: bool) -> None:
        needed = rows_needed(self.epsilon, None if self.guarantee == "marginal" else self.delta)
        where = f"group {self.group_!r} has" if grouped else "there are"
        warnings.warn(
            f"{where} {n} calibration rows, but epsilon={self.epsilon:g} ({self.guarantee}) needs {needed}: the gate "
            "fires on every query. Give more rows, or a larger epsilon.",
            stacklevel=4,
        )

    def state(self) -> State:
        """Return the arguments of `conformal_gate`."""
        check_is_fitted(self, "threshold_")
        return {
            "threshold": runtime_tensor(self.threshold_),
            "floor": runtime_tensor(self.floor_),
            "calibration_scores": runtime_tensor(self.calibration_scores_),
            "level": runtime_tensor(self.level_),
            "gamma": runtime_tensor(self.gamma),
        }


GATES: dict[str, type[_Gate]] = {
    "conformal": ConformalGate,
    "quantile": QuantileGate,
    "logistic": LogisticGate,
    "ser": DirectGate,
    "always": AlwaysGate,
}
GATE_FUNCTIONS = {name: gate.function for name, gate in GATES.items()}
