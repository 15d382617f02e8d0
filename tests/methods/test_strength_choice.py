"""The rules on curves that are known in closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from finesteer_hf import ConstantVector
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.methods.strength import (
    CHANGED_BUDGET,
    KL_BUDGET,
    STRENGTHS,
    choose_strength,
    median_norm,
    strength_at_kl,
)


class Curves:
    """Fit data whose dose response is a formula."""

    def __init__(self, bottleneck: Callable[[float], float], kl: Callable[[float], float], gap: float = 0.0) -> None:
        self.bottleneck, self.kl, self.gap = bottleneck, kl, gap
        self.asked: set[float] = set()

    def dose_response(self, build: Any, strengths: Sequence[float]) -> list[DosePoint]:
        assert list(strengths) == sorted(set(strengths))
        self.asked |= set(strengths)
        best = max(strengths, key=self.bottleneck)
        return [DosePoint(s, self.bottleneck(s), 9.0, self.kl(s), 0.0 if s == best else self.gap) for s in strengths]


def choose(rule: Any, data: Any, **norms: float) -> Any:
    build = lambda s: ConstantVector("resid_post[0]", torch.ones(2), strength=s)  # noqa: E731
    return choose_strength(rule, data, build, **{"vector_norm": 2.0, "state_norm": 10.0, **norms})


def test_a_number_and_a_norm_run_nothing() -> None:
    assert choose(1.5, None) == (1.5, [], "given")
    strength, curve, why = choose("norm:0.2", None)
    assert strength == pytest.approx(1.0) and curve == [] and "0.2" in why
    with pytest.raises(ValueError, match="norm is 0"):
        choose("norm:0.2", None, vector_norm=0.0)


@pytest.mark.parametrize("rule", ["best", "kl:", "kl:-1", "kl:x", "norm:0", "norm:inf", "auto:1"])
def test_other_rules_are_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="strength"):
        choose(rule, Curves(lambda s: s, lambda s: 0.0))


def test_auto_takes_the_best_within_the_budget() -> None:
    data = Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.001 * s**2)
    strength, curve, why = choose("auto", data)
    assert strength == 2.0 and {0.0, *STRENGTHS} < {point.strength for point in curve}
    assert "-4.000" in why
    # 0.05 s^2 stays within 0.1 up to s = sqrt(2), and 1 * 1.5 is the last gap to be halved twice.
    assert choose("auto", Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.05 * s**2))[0] == pytest.approx(
        1.5**0.75, rel=1e-3
    )


def test_auto_looks_closer_where_the_range_that_helps_is_narrow() -> None:
    data = Curves(lambda s: math.exp(-((math.log(s / 3.6) / 0.2) ** 2)) if s else 0.0, lambda s: 0.0)
    strength, curve, _ = choose("auto", data)
    assert strength == pytest.approx(3.6, rel=0.05)
    assert [p.strength for p in curve] == sorted(p.strength for p in curve) and len(curve) == 1 + len(STRENGTHS) + 4


def test_auto_takes_the_smallest_within_one_standard_error_of_the_difference() -> None:
    data = Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.0, gap=0.3)
    assert choose("auto", data)[0] == 1.5


def test_auto_goes_down_to_meet_the_budget_and_up_while_it_helps() -> None:
    strong = Curves(lambda s: s, lambda s: 100 * s**2)
    strength, curve, _ = choose("auto", strong)
    assert strength == max(p.strength for p in curve if p.kl <= KL_BUDGET) <= 1000**-0.5
    assert curve[1].strength == 0.25 / 2**6
    weak = Curves(lambda s: min(s, 10.0), lambda s: 0.0)
    strength, curve, _ = choose("auto", weak)
    assert 10.0 <= strength <= 6.0 * 1.5**2 and curve[-1].strength == 6.0 * 1.5**3


def test_auto_says_when_nothing_helps_or_everything_harms() -> None:
    strength, _, why = choose("auto", Curves(lambda s: -s, lambda s: 0.0))
    assert strength == 0.25 and why.startswith("no strength makes")
    strength, curve, why = choose("auto", Curves(lambda s: s, lambda s: 5.0 if s else 0.0))
    assert strength == curve[1].strength == 0.25 / 2**6 and why.startswith("no strength keeps within")


def test_auto_keeps_changed_answers_within_their_budget_where_they_are_counted() -> None:
    class Counted(Curves):
        def dose_response(self, build: Any, strengths: Sequence[float]) -> list[DosePoint]:
            points = super().dose_response(build, strengths)
            return [dataclasses.replace(p, changed=0.02 * p.strength) for p in points]

    strength, curve, why = choose("auto", Counted(lambda s: s, lambda s: 0.0))
    assert strength == max(p.strength for p in curve if 0.02 * p.strength <= CHANGED_BUDGET)
    assert 2.0 < strength <= 2.5 and "at most 5% of their answers changed" in why
    assert "answers changed" not in choose("auto", Curves(lambda s: s, lambda s: 0.0))[2]


def test_a_divergence_is_met_by_interpolation() -> None:
    for target in (1e-4, 0.07, 0.3, 40.0):
        data = Curves(lambda s: 0.0, lambda s: 0.08 * s**1.7 / (1 + 0.01 * s))
        strength, curve, _ = choose(f"kl:{target}", data)
        assert data.kl(strength) == pytest.approx(target, rel=0.05)
        assert strength in [point.strength for point in curve]
        assert len(data.asked) <= 1 + len(STRENGTHS) + 7


def test_a_gate_that_opens_late_is_bisected_and_a_closed_one_said() -> None:
    gated = Curves(lambda s: 0.0, lambda s: 0.1 * s if s > 2.5 else 0.0)
    strength, _, _ = choose("kl:0.27", gated)
    assert 2.5 < strength <= 3.0
    with pytest.raises(ValueError, match="gate is closed"):
        choose("kl:0.1", Curves(lambda s: 0.0, lambda s: 0.0))


def test_interpolation_below_between_and_above() -> None:
    points = [DosePoint(s, 0.0, 0.0, 0.5 * s**2) for s in (1.0, 2.0)]
    assert strength_at_kl(points, 0.125) == pytest.approx(0.5)
    assert strength_at_kl(points, 1.0) == pytest.approx(2**0.5)
    assert strength_at_kl(points, 99.0) == 2.0


def test_median_norm() -> None:
    assert median_norm(np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 50.0]], dtype=np.float32)) == 5.0
