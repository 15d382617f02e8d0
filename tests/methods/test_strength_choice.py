"""The rules on curves that are known in closed form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from finesteer_hf import ConstantVector
from finesteer_hf.methods.base import DosePoint
from finesteer_hf.methods.strength import KL_BUDGET, STRENGTHS, choose_strength, median_norm, strength_at_kl


class Curves:
    """Fit data whose dose response is a formula."""

    def __init__(self, margin: Callable[[float], float], kl: Callable[[float], float], gap: float = 0.0) -> None:
        self.margin, self.kl, self.gap = margin, kl, gap
        self.asked: set[float] = set()

    def dose_response(self, build: Any, strengths: Sequence[float]) -> list[DosePoint]:
        assert list(strengths) == sorted(set(strengths))
        self.asked |= set(strengths)
        best = max(strengths, key=self.margin)
        return [DosePoint(s, self.margin(s), 9.0, self.kl(s), 0.5, 0.0 if s == best else self.gap) for s in strengths]


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


def test_auto_takes_the_best_margin_within_the_budget() -> None:
    data = Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.001 * s**2)
    strength, curve, why = choose("auto", data)
    assert strength == 2.0 and [point.strength for point in curve] == [0.0, *STRENGTHS]
    assert "-4.000" in why
    # 0.05 s^2 stays within 0.1 up to s = sqrt(2).
    assert choose("auto", Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.05 * s**2))[0] == 1.0


def test_auto_takes_the_smallest_within_one_standard_error_of_the_difference() -> None:
    data = Curves(lambda s: -((s - 2.0) ** 2), lambda s: 0.0, gap=0.3)
    assert choose("auto", data)[0] == 1.5


def test_auto_goes_down_to_meet_the_budget_and_up_while_it_helps() -> None:
    strong = Curves(lambda s: s, lambda s: 100 * s**2)
    strength, curve, _ = choose("auto", strong)
    assert strength == max(p.strength for p in curve if p.kl <= KL_BUDGET) == 0.25 / 8
    weak = Curves(lambda s: min(s, 10.0), lambda s: 0.0)
    strength, curve, _ = choose("auto", weak)
    assert strength == 6.0 * 1.5**2 and curve[-1].strength == 6.0 * 1.5**3


def test_auto_stops_where_wanted_answers_are_garbled() -> None:
    """A margin may grow without end while both answers become impossible."""

    class Overdose(Curves):
        def dose_response(self, build: Any, strengths: Sequence[float]) -> list[DosePoint]:
            fluency = {s: 0.9 - 0.01 * max(s - 2.0, 0.0) ** 2 for s in strengths}
            return [
                dataclasses.replace(p, fluency=fluency[p.strength]) for p in super().dose_response(build, strengths)
            ]

    data = Overdose(lambda s: s, lambda s: 0.0)
    strength, curve, why = choose("auto", data)
    assert strength == 3.0 and curve[-1].strength == 6.0 and "first choice" in why
    garbled = Overdose(lambda s: s, lambda s: 0.0)
    garbled.dose_response = lambda build, strengths: [  # type: ignore[method-assign]
        DosePoint(s, s, 0.1, 0.0, 0.5, 0.0, fluency=0.9 if s == 0 else 0.1) for s in strengths
    ]
    strength, _, why = choose("auto", garbled)
    assert strength == 0.25 and "garbles" in why


def test_auto_says_when_nothing_helps_or_everything_harms() -> None:
    strength, _, why = choose("auto", Curves(lambda s: -s, lambda s: 0.0))
    assert strength == 0.25 and why.startswith("no strength raises")
    strength, curve, why = choose("auto", Curves(lambda s: s, lambda s: 5.0 if s else 0.0))
    assert strength == curve[1].strength == 0.25 / 2**6 and why.startswith("every strength diverges")


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
    points = [DosePoint(s, 0.0, 0.0, 0.5 * s**2, 0.0) for s in (1.0, 2.0)]
    assert strength_at_kl(points, 0.125) == pytest.approx(0.5)
    assert strength_at_kl(points, 1.0) == pytest.approx(2**0.5)
    assert strength_at_kl(points, 99.0) == 2.0


def test_median_norm() -> None:
    assert median_norm(np.array([[3.0, 4.0], [0.0, 1.0], [0.0, 50.0]], dtype=np.float32)) == 5.0
