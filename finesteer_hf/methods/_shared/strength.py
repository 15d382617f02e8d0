"""Chooses lambda on held-out rows: by the objective within its limits, by a divergence, or by a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from finesteer_hf.method_api import DosePoint, FitData
from finesteer_hf.methods._shared.objective import Objective
from finesteer_hf.processors import SteeringProcessor


# How often the grid is extended downwards to meet a limit, or upwards while a higher dose still helps.
MAX_HALVINGS, MAX_GROWTHS, GROWTH = 6, 3, 1.5
# How often the gaps beside the best strength are halved, in logarithms: the useful range can be narrow.
HALVED_GAPS = 2
# Relative tolerance of `kl:x`.
KL_TOLERANCE, MAX_REFINEMENTS = 0.05, 4


def choose_strength(
    rule: float | str,
    data: FitData,
    build: Callable[[float], SteeringProcessor],
    *,
    vector_norm: float,
    state_norm: float,
    strengths: Sequence[float],
) -> tuple[float, list[DosePoint], str]:
    """Choose a strength, with a reason.

    Args:
        rule: a number; `auto`: the best by `Objective` within the data's limits; `kl:x`: the 95th percentile of the
            divergence becomes x nats; `norm:x`: the vector's norm becomes x times the state's.
        data: the fit's data; `auto` and `kl:x` run the model on its validation part.
        build: makes the processor of a strength.
        vector_norm: median norm of the vectors.
        state_norm: median norm of the states that they are added to.
        strengths: lambdas of the curve, positive and ascending; it stops early if higher doses only do more damage,
            and is extended if needed.

    Returns:
        The strength, the curve by ascending strength from 0 on (empty for a number and `norm:x`), and the reason.

    Raises:
        ValueError: for an unknown rule; if vectors to scale have norm zero; if no strength reaches the divergence of
            `kl:x`.
    """
    if isinstance(rule, (int, float)):
        return float(rule), [], "given"
    kind, _, number = rule.partition(":")
    if kind == "norm" and number:
        share = _positive(rule, number)
        if not vector_norm > 0:
            raise ValueError(f"strength={rule!r} scales vectors to a norm, but their norm is {vector_norm}.")
        return share * state_norm / vector_norm, [], f"the vector is {share:g} of the state's norm"
    if rule != "auto" and not (kind == "kl" and number):
        raise ValueError(f"strength must be a number, 'auto', 'kl:<nats>' or 'norm:<share>', got {rule!r}.")
    if kind == "kl":
        limit = _positive(rule, number)
        return _at_divergence(list(data.dose_response(build, (0.0, *strengths))), limit, data, build)
    return _best_within_limits(data, build, strengths)


def explore(
    data: FitData, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
) -> list[DosePoint]:
    """The curve from 0 up to and including the first strength that cannot be the best.

    Above a strength that breaks a limit and helps less than a weaker one, or that garbles general prompts, nothing can
    be better, and each strength costs a pass over the held-out answers. If no strength is within the limits, half the
    smallest is tried, and half of that; if the last one is within them and the best, a higher one is tried.

    Args:
        data: runs the model on its validation part.
        build: makes the processor of a strength.
        strengths: positive, ascending.
        share: share of the held-out prompts.

    Returns:
        Points by ascending strength.
    """
    points = list(data.dose_response(build, (0.0,), share))
    for strength in strengths:
        points += data.dose_response(build, (strength,), share)
        if _is_past(points, data):
            break
    for _ in range(MAX_HALVINGS):
        if _allowed(points, data):
            break
        points[1:1] = data.dose_response(build, (points[1].strength / 2,), share)
    for _ in range(MAX_GROWTHS):
        objective, last = Objective.of(points, data.limits), points[-1]
        if objective.broken(last) or objective.value(last) < max(map(objective.value, points)):
            break
        points += data.dose_response(build, (last.strength * GROWTH,), share)
    return points


def _allowed(points: Sequence[DosePoint], data: FitData) -> list[DosePoint]:
    return Objective.of(points, data.limits).allowed(points)


def _is_past(points: Sequence[DosePoint], data: FitData) -> bool:
    objective, last = Objective.of(points, data.limits), points[-1]
    broken = objective.broken(last)
    if not broken:
        return False
    # A wanted answer that is becoming likely is unlikely under the base; that alone is no reason to stop.
    rising = last.bottleneck >= max(point.bottleneck for point in points) and last.bottleneck > points[0].bottleneck
    return "general_kl" in broken or not rising


def _best_within_limits(
    data: FitData, build: Callable[[float], SteeringProcessor], strengths: Sequence[float]
) -> tuple[float, list[DosePoint], str]:
    curve = explore(data, build, strengths)
    if not _allowed(curve, data):
        limits = Objective.of(curve, data.limits).describe_limits()
        why = f"no strength is within the limits ({limits}); the smallest tried is taken"
        return curve[1].strength, curve, why
    for _ in range(HALVED_GAPS):
        known = {point.strength: point for point in curve}
        new = [strength for strength in _beside_best(curve, Objective.of(curve, data.limits)) if strength not in known]
        known |= {point.strength: point for point in data.dose_response(build, new)} if new else {}
        curve = [known[strength] for strength in sorted(known)]
    objective = Objective.of(curve, data.limits)
    best = max(objective.allowed(curve), key=objective.value)
    why = f"best within the limits: {objective.describe(best)}; {objective.describe_limits()}"
    if objective.value(best) <= objective.value(curve[0]):
        why = f"no strength helps the held-out answers; {why}"
    return best.strength, curve, why


def _beside_best(curve: Sequence[DosePoint], objective: Objective) -> list[float]:
    """Geometric means of the best allowed strength and its neighbours.

    If the next higher one breaks a limit, the effect still rises with the dose, and only that gap is tried.
    """
    points = list(curve[1:])
    at = points.index(max(objective.allowed(curve), key=objective.value))
    beside = points[at + 1 : at + 2]
    if not beside or not objective.broken(beside[0]):
        beside = points[max(at - 1, 0) : at] + beside
    return [float(f"{math.sqrt(points[at].strength * point.strength):.4g}") for point in beside]


def _at_divergence(
    curve: list[DosePoint], target: float, data: FitData, build: Callable[[float], SteeringProcessor]
) -> tuple[float, list[DosePoint], str]:
    def run(strength: float) -> list[DosePoint]:
        return data.dose_response(build, sorted({*(point.strength for point in curve), strength}))

    for _ in range(MAX_GROWTHS):
        if curve[-1].kl >= target:
            break
        curve = run(curve[-1].strength * 2)
    if curve[-1].kl <= 0:
        raise ValueError(
            f"strength='kl:{target:g}' cannot be met: general prompts do not diverge at any strength up to "
            f"{curve[-1].strength:g}, because the gate is closed on them. Use strength='auto' or a number."
        )
    for _ in range(MAX_REFINEMENTS):
        nearest = min(curve[1:], key=lambda point: abs(point.kl - target))
        guess = strength_at_kl(curve[1:], target)
        known = any(math.isclose(guess, point.strength) for point in curve)
        if known or abs(nearest.kl - target) <= KL_TOLERANCE * target:
            break
        curve = run(guess)
    nearest = min(curve[1:], key=lambda point: abs(point.kl - target))
    return nearest.strength, curve, f"95th percentile of the divergence is {nearest.kl:.3g} nats"


def strength_at_kl(curve: Sequence[DosePoint], target: float) -> float:
    """The strength at which a curve's divergence is `target`, log-log interpolated between neighbours.

    Below the curve, divergence is assumed to grow with the square of the strength; above it, the last strength is
    returned.

    Args:
        curve: points of positive strength, ascending.
        target: nats, positive.
    """
    below: DosePoint | None = None
    for point in curve:
        if point.kl >= target:
            if below is None:
                return point.strength * math.sqrt(target / point.kl)
            if below.kl <= 0:
                # A gate opens somewhere in between: interpolation is not possible, so halve the interval.
                return math.sqrt(below.strength * point.strength)
            slope = math.log(point.strength / below.strength) / math.log(point.kl / below.kl)
            return below.strength * math.exp(slope * math.log(target / below.kl))
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
