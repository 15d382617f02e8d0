"""Choosing lambda on held-out rows: by a margin under a budget of divergence, by a divergence, or by a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from finesteer_hf.methods.base import DosePoint, FitData
from finesteer_hf.processors import SteeringProcessor


# Multiples of the vector; a fitted vector is a difference of states, so 1 is its natural length.
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
KL_BUDGET = 0.1


def choose_strength(
    rule: float | str,
    data: FitData,
    build: Callable[[float], SteeringProcessor],
    *,
    vector_norm: float,
    state_norm: float,
    strengths: Sequence[float] = STRENGTHS,
) -> tuple[float, list[DosePoint], str]:
    """Choose a strength and say why.

    Args:
        rule: a number; `auto`: of the strengths whose divergence on general prompts is within the budget, the smallest
            whose margin is within one standard error (of the difference, row by row) of the best; `kl:x`: the largest with a 95th percentile of
            divergence of at most x nats, interpolated; `norm:x`: the vector becomes x of the state's norm.
        data: the fit's data; `auto` and `kl:x` run the model on its validation part.
        build: makes the processor of a strength.
        vector_norm: median norm of the vectors.
        state_norm: median norm of the states that they are added to.
        strengths: lambdas of the curve, ascending.

    Returns:
        The strength, the curve (empty for a number and for `norm:x`), and the reason.

    Raises:
        ValueError: for another rule.
    """
    if isinstance(rule, (int, float)):
        return float(rule), [], "given"
    kind, _, number = rule.partition(":")
    if kind == "norm" and number:
        share = _positive(rule, number)
        return share * state_norm / max(vector_norm, 1e-12), [], f"the vector is {share:g} of the state's norm"
    if rule != "auto" and not (kind == "kl" and number):
        raise ValueError(f"strength must be a number, 'auto', 'kl:<nats>' or 'norm:<share>', got {rule!r}.")
    limit = KL_BUDGET if rule == "auto" else _positive(rule, number)
    curve = data.dose_response(build, strengths)
    if kind == "kl":
        return strength_at_kl(curve, limit), curve, f"95th percentile of the divergence is {limit:g} nats"
    return (*_by_margin(curve, limit),)


def _by_margin(curve: list[DosePoint], budget: float) -> tuple[float, list[DosePoint], str]:
    allowed = [point for point in curve if not point.kl > budget]
    if not allowed:
        chosen = curve[0]
        return chosen.strength, curve, f"every strength diverges by more than {budget:g} nats; the smallest is taken"
    best = max(allowed, key=lambda point: point.margin)
    chosen = next(point for point in allowed if point.margin >= best.margin - point.gap_se)
    return (
        chosen.strength,
        curve,
        f"smallest within one standard error of the best margin, divergence <= {budget:g} nats",
    )


def strength_at_kl(curve: Sequence[DosePoint], limit: float) -> float:
    """The strength at which a curve's divergence is `limit`, log-log interpolated; its last one if it never is."""
    below: DosePoint | None = None
    for point in curve:
        if point.kl > limit:
            if below is None or below.kl <= 0:
                # Divergence grows with the square of a small strength.
                return point.strength * math.sqrt(limit / point.kl) if below is None else below.strength
            slope = math.log(point.strength / below.strength) / math.log(point.kl / below.kl)
            return below.strength * math.exp(slope * math.log(limit / below.kl))
        below = point
    return curve[-1].strength


def median_norm(states: np.ndarray) -> float:
    """Median Euclidean norm of rows."""
    return float(np.median(np.linalg.norm(np.asarray(states, dtype=np.float64), axis=1)))


def _positive(rule: str, number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not value > 0 or math.isinf(value):
        raise ValueError(f"strength={rule!r} needs a positive number after the colon.")
    return value
