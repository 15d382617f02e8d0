"""Choosing lambda on held-out rows: by the wanted answers under a budget of divergence, by a divergence, or a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from finesteer_hf.methods.base import DosePoint, FitData
from finesteer_hf.processors import SteeringProcessor


# Multiples of the vector; a fitted vector is a difference of states, so 1 is its natural length.
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Nats that the 95th percentile of general prompts' tokens may diverge by under `auto`.
KL_BUDGET = 0.1
# Share of general prompts whose answers may change under `auto`, where that is measured.
CHANGED_BUDGET = 0.05
# How often the grid is continued downwards to meet a budget, or upwards while wanted answers still become likelier.
MAX_HALVINGS, MAX_GROWTHS, GROWTH = 6, 3, 1.5
# How often the gaps beside the best strength are halved, in logarithms: the range that helps can be narrow.
HALVED_GAPS = 2
# `kl:x` is met to this share of x.
KL_TOLERANCE, MAX_REFINEMENTS = 0.05, 4


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
        rule: a number; `auto`: of the strengths whose divergence on general prompts is within `KL_BUDGET` and whose
            share of changed answers, where it is measured, within `CHANGED_BUDGET`, the smallest whose
            `DosePoint.bottleneck` is within one standard error (of the difference, row by row) of the best;
            `kl:x`: the one whose 95th percentile of divergence is x nats; `norm:x`: the vector becomes x of the state's
            norm.
        data: the fit's data; `auto` and `kl:x` run the model on its validation part.
        build: makes the processor of a strength.
        vector_norm: median norm of the vectors.
        state_norm: median norm of the states that they are added to.
        strengths: lambdas of the curve, positive and ascending; it is continued where that is called for.

    Returns:
        The strength, the curve by ascending strength, from 0 on (empty for a number and for `norm:x`), and the reason.

    Raises:
        ValueError: for another rule; if vectors of norm zero are to be scaled; if no strength diverges as `kl:x` asks.
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
    limit = KL_BUDGET if rule == "auto" else _positive(rule, number)
    curve = list(data.dose_response(build, (0.0, *strengths)))
    if kind == "kl":
        return _at_divergence(curve, limit, data, build)
    return _by_bottleneck(curve, limit, data, build)


def _by_bottleneck(
    curve: list[DosePoint], budget: float, data: FitData, build: Callable[[float], SteeringProcessor]
) -> tuple[float, list[DosePoint], str]:
    def run(strengths: Sequence[float]) -> list[DosePoint]:
        return data.dose_response(build, sorted({*(point.strength for point in curve), *strengths}))

    def allowed(points: Sequence[DosePoint]) -> list[DosePoint]:
        return [p for p in points if p.kl <= budget and (p.changed is None or p.changed <= CHANGED_BUDGET)]

    least = curve[1].strength
    if not allowed(curve[1:]):
        curve = run([least / 2**power for power in range(1, MAX_HALVINGS + 1)])
    for _ in range(MAX_GROWTHS):
        last = curve[-1]
        if not allowed([last]) or last is not max(curve, key=lambda point: point.bottleneck):
            break
        curve = run([last.strength * GROWTH])
    limits = f"divergence on general prompts at most {budget:g} nats"
    if curve[0].changed is not None:
        limits += f", and at most {CHANGED_BUDGET:.0%} of their answers changed"
    if not allowed(curve[1:]):
        why = f"no strength keeps within the limits ({limits}); the smallest tried is taken"
        return curve[1].strength, curve, why
    for _ in range(HALVED_GAPS):
        curve = run(_beside_best(curve, allowed(curve[1:])))
    # Once more, so that the differences are those to the best strength within the budget.
    within = data.dose_response(build, [point.strength for point in allowed(curve[1:])])
    best = max(within, key=lambda point: point.bottleneck)
    chosen = next(point for point in within if point.bottleneck >= best.bottleneck - point.gap_se)
    why = (
        f"smallest within one standard error of the best: the least likely token of the wanted answers has probability "
        f"{best.bottleneck:.3f} at {best.strength:g}, unsteered {curve[0].bottleneck:.3f}; {limits}"
    )
    if best.bottleneck <= curve[0].bottleneck:
        why = f"no strength makes the held-out answers likelier; {why}"
    return chosen.strength, curve, why


def _beside_best(curve: Sequence[DosePoint], allowed: Sequence[DosePoint]) -> list[float]:
    """Geometric means of the best of the allowed strengths and its neighbours."""
    points = list(curve[1:])
    best = points.index(max(allowed, key=lambda point: point.bottleneck))
    beside = [points[i].strength for i in (best - 1, best + 1) if 0 <= i < len(points)]
    return [float(f"{math.sqrt(points[best].strength * strength):.4g}") for strength in beside]


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
            f"{curve[-1].strength:g}, for the gate is closed on them. Use strength='auto' or a number."
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
    """The strength at which a curve's divergence is `target`, log-log interpolated between its neighbours.

    Below the curve, divergence is taken to grow with the square of the strength; above it, the last strength is
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
                # A gate that opens somewhere in between: nothing to interpolate, so halve the interval.
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
