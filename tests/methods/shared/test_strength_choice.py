"""The rules on curves with a closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from finesteer_hf import ConstantVector
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import Criterion, Limits
from finesteer_hf.methods._shared.strength import choose_strength, explore, median_norm, strength_at_kl


CRITERIA: tuple[Criterion, ...] = ("sayable", "wanted", "preference")
STRENGTHS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Curves:
    """Fit data whose dose response is a formula.

    Args:
        value: a probability that leads: of the least likely token, of wanted own answers, or of the preference.
        kl: divergence on general prompts.
        criterion: which of them it is; the others do not move.
        error: standard error of all that is measured.
        others: further figures of points.
    """

    def __init__(
        self,
        value: Callable[[float], float],
        kl: Callable[[float], float],
        criterion: Criterion = "sayable",
        error: float = 0.0,
        **others: Callable[[float], float],
    ) -> None:
        self.value, self.kl, self.criterion, self.error, self.others = value, kl, criterion, error, others
        self.asked: list[float] = []
        self.shares: set[float] = set()
        self.limits = Limits()

    def point(self, strength: float) -> DosePoint:
        value = self.value(strength)
        sayable, wanted = self.criterion == "sayable", self.criterion == "wanted"
        return DosePoint(
            strength,
            bottleneck=value if sayable else 0.0,
            bottleneck_se=9.0,
            kl=self.kl(strength),
            bottleneck_rise=value - self.value(0.0) if sayable else 0.0,
            bottleneck_rise_se=self.error,
            preference=value if self.criterion == "preference" else 0.5,
            preference_se=self.error,
            preference_rise_se=self.error,
            wanted=value if wanted else None,
            wanted_rise_se=self.error,
            **{name: figure(strength) for name, figure in self.others.items()},
        )

    def dose_response(self, build: Any, strengths: Sequence[float], share: float = 1.0) -> list[DosePoint]:
        assert list(strengths) == sorted(set(strengths))
        self.asked += strengths
        self.shares.add(share)
        return [self.point(strength) for strength in strengths]


def peak(at: float) -> Callable[[float], float]:
    return lambda s: 0.9 * math.exp(-((s - at) ** 2) / 4)


def choose(rule: Any, data: Any, **norms: float) -> Any:
    build = lambda s: ConstantVector("resid_post[0]", torch.ones(2), strength=s)  # noqa: E731
    return choose_strength(rule, data, build, **{"vector_norm": 2.0, "state_norm": 10.0, **norms}, strengths=STRENGTHS)


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


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_takes_the_best_within_the_limits(criterion: Any) -> None:
    data = Curves(peak(2.0), lambda s: 0.001 * s**2, criterion)
    strength, curve, why = choose("auto", data)
    assert strength == 2.0 and {0.0, *STRENGTHS} < {point.strength for point in curve}
    assert "0.900" in why and f"unsteered {0.9 * math.exp(-1):.3f}" in why and "at most 0.1 nats" in why
    # 0.05 s^2 stays within 0.1 up to s = sqrt(2), and 1 * 1.5 is the last gap to be halved twice.
    steep = Curves(peak(2.0), lambda s: 0.05 * s**2, criterion)
    assert choose("auto", steep)[0] == pytest.approx(1.5**0.75, rel=1e-3)
    # What garbles general prompts ends the curve, and nothing is asked twice.
    assert max(steep.asked) == 1.5 and len(steep.asked) == len(set(steep.asked)) and steep.shares == {1.0}
    assert not [s for s in steep.asked if 0.5 < s < 1.0], (
        "below the best, with a limit just above it, is nothing better"
    )
    steep.limits = Limits(general_kl=0.2)
    assert choose("auto", steep)[0] == 2.0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_refines_where_the_useful_range_is_narrow(criterion: Any) -> None:
    data = Curves(lambda s: math.exp(-((math.log(s / 3.6) / 0.2) ** 2)) if s else 0.0, lambda s: 0.0, criterion)
    strength, curve, _ = choose("auto", data)
    assert strength == pytest.approx(3.6, rel=0.05)
    assert [p.strength for p in curve] == sorted(p.strength for p in curve) and len(curve) == 1 + len(STRENGTHS) + 4


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_takes_the_best_even_if_a_smaller_one_is_within_the_error(criterion: Any) -> None:
    data = Curves(peak(2.0), lambda s: 0.0, criterion, error=0.2)
    strength, curve, _ = choose("auto", data)
    best = max(curve, key=lambda point: data.value(point.strength))
    smaller = next(point for point in curve if point.strength == 1.5)
    assert strength == best.strength == 2.0
    assert data.value(2.0) - data.value(smaller.strength) < data.error


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_goes_down_to_meet_the_limits_and_up_while_it_helps(criterion: Any) -> None:
    strong = Curves(lambda s: 0.2 + s / 100, lambda s: 100 * s**2, criterion)
    strength, curve, _ = choose("auto", strong)
    assert strength == max(p.strength for p in curve if p.kl <= Limits().general_kl) <= 1000**-0.5
    # Halved until a limit is met and no further, and nothing above the first strength that broke it.
    assert curve[1].strength == strength == 0.25 / 2**3 and curve[-1].strength == 0.25
    weak = Curves(lambda s: 0.2 + min(s, 10.0) / 20, lambda s: 0.0, criterion)
    strength, curve, _ = choose("auto", weak)
    assert 10.0 <= strength <= 6.0 * 1.5**2 and curve[-1].strength == 6.0 * 1.5**3


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_reports_when_nothing_helps_or_everything_harms(criterion: Any) -> None:
    strength, _, why = choose("auto", Curves(lambda s: 0.5 - s / 100, lambda s: 0.0, criterion))
    assert strength == 0.25 and why.startswith("no strength helps")
    strength, curve, why = choose("auto", Curves(lambda s: s / 10, lambda s: 5.0 if s else 0.0, criterion))
    assert strength == curve[1].strength == 0.25 / 2**6 and why.startswith("no strength is within")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_auto_keeps_changed_answers_within_their_limit_where_they_are_counted(criterion: Any) -> None:
    def rising(s: float) -> float:
        return 0.2 + s / 20

    counted = Curves(rising, lambda s: 0.0, criterion, changed=lambda s: 0.02 * s)
    strength, curve, why = choose("auto", counted)
    assert strength == max(p.strength for p in curve if 0.02 * p.strength <= Limits().general_changed)
    assert 2.0 < strength <= 2.5 and "at most 5% of their answers changed" in why
    assert "answers changed" not in choose("auto", Curves(rising, lambda s: 0.0, criterion))[2]


@pytest.mark.parametrize("name", ["own_words", "likelihood"])
def test_a_preference_must_not_cost_the_models_own_words(name: str) -> None:
    limit = getattr(Limits(), name)
    data = Curves(lambda s: 0.5 + s / 20, lambda s: 0.0, "preference", **{name: lambda s: -1.0 - 0.25 * limit * s**2})
    strength, curve, why = choose("auto", data)
    assert strength == 2.0 and f"at most {limit:g} nats per token less likely" in why
    assert curve[-1].strength == 3.0, "above the first strength that breaks it there is nothing to find"
    data.limits = dataclasses.replace(data.limits, **{name: 4 * limit})
    assert choose("auto", data)[0] == 4.0


def test_wanted_answers_may_be_unlikely_until_the_model_gives_them() -> None:
    def said(s: float) -> float:
        return min(0.01 * s**2, 0.4)

    data = Curves(said, lambda s: 0.0, likelihood=lambda s: -s)
    strength, _, why = choose("auto", data)
    assert data.asked[: 1 + len(STRENGTHS)] == [0.0, *STRENGTHS]
    assert said(strength) == 0.4 and "least likely token" in why and "chosen answers" not in why
    # The same figures, but answers that never come.
    never = Curves(lambda s: said(s) / 10, lambda s: 0.0, likelihood=lambda s: -s)
    strength, _, why = choose("auto", never)
    assert strength <= Limits().likelihood and why.startswith("no strength helps") and "chosen answers" in why


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_curve_ends_where_a_higher_dose_only_does_more_damage(share: float) -> None:
    data = Curves(lambda s: 0.5 + s / 100, lambda s: 0.04 * s, "preference")
    points = explore(data, None, (1.0, 2.0, 3.0, 4.0, 5.0), share)  # type: ignore[arg-type]
    assert [point.strength for point in points] == [0.0, 1.0, 2.0, 3.0] and data.shares == {share}
    repeating = Curves(peak(2.0), lambda s: 0.0, repeated=lambda s: 0.2 + 0.04 * s)
    points = explore(repeating, None, (1.0, 2.0, 3.0, 4.0))  # type: ignore[arg-type]
    assert [point.strength for point in points] == [0.0, 1.0, 2.0, 3.0]


def test_a_divergence_is_met_by_interpolation() -> None:
    for target in (1e-4, 0.07, 0.3, 40.0):
        data = Curves(lambda s: 0.0, lambda s: 0.08 * s**1.7 / (1 + 0.01 * s))
        strength, curve, _ = choose(f"kl:{target}", data)
        assert data.kl(strength) == pytest.approx(target, rel=0.05)
        assert strength in [point.strength for point in curve]
        assert len(set(data.asked)) <= 1 + len(STRENGTHS) + 7


def test_a_gate_that_opens_late_is_bisected_and_a_closed_one_reported() -> None:
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
