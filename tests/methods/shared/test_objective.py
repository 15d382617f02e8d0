"""The leading figure, the limits, and the order of points."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from planted import PlantedData

from finesteer_hf import ConstantVector, Site, SteeringAdapter, fit_steering
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import LEADING, SAYABLE, Limits, Objective, is_sayable
from finesteer_hf.methods._shared.trials import Trial, point_row, try_each
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.testing import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer


UNSTEERED = DosePoint(
    0.0, 0.02, 0.01, 0.0, changed=0.0, preference=0.5, likelihood=-3.0, own_words=-0.5, own_length=20.0, repeated=0.1
)
# Open answers, steered within all limits: never said, but preferred.
OPEN = dataclasses.replace(
    UNSTEERED, strength=1.0, bottleneck=0.03, bottleneck_rise=0.01, bottleneck_rise_se=0.02, preference=0.7
)
# Short answers that come token by token.
SAID = dataclasses.replace(
    UNSTEERED,
    strength=2.0,
    bottleneck=0.4,
    bottleneck_rise=0.38,
    bottleneck_rise_se=0.05,
    preference=0.6,
    own_words=None,
)
# Each limit, the figure it limits, and how far that may go from the unsteered one.
FIGURES = {
    "general_kl": ("kl", 0.1),
    "general_changed": ("changed", 0.05),
    "own_words": ("own_words", -0.2),
    "likelihood": ("likelihood", -0.5),
    "repetition": ("repeated", 0.1),
}
OF_PREFERENCES = {"own_words", "likelihood"}


def moved(point: DosePoint, name: str, by: float) -> DosePoint:
    """A point with a figure so many times its limit's distance from the unsteered one."""
    figure, distance = FIGURES[name]
    return dataclasses.replace(point, **{figure: getattr(UNSTEERED, figure) + by * distance})


@pytest.mark.parametrize("name", FIGURES)
def test_each_limit_is_broken_by_its_own_figure_alone(name: str) -> None:
    assert getattr(Limits(), name) == pytest.approx(abs(FIGURES[name][1]))
    assert set(FIGURES) == {field.name for field in dataclasses.fields(Limits)}
    assert Limits().broken_by(OPEN, UNSTEERED, "preference") == []
    assert Limits().broken_by(moved(OPEN, name, 1.0), UNSTEERED, "preference") == []
    over = moved(OPEN, name, 1.01)
    assert Limits().broken_by(over, UNSTEERED, "preference") == [name]
    assert Limits().broken_by(over, UNSTEERED, "sayable") == ([] if name in OF_PREFERENCES else [name])
    # The other way there is nothing to limit.
    assert Limits().broken_by(moved(OPEN, name, -5.0), UNSTEERED, "preference") == []
    for wider, broken in ((1.02, []), (0.5, [name])):
        limits = Limits.of({name: wider * getattr(Limits(), name)})
        assert limits.broken_by(over, UNSTEERED, "preference") == broken


@pytest.mark.parametrize("name", ["general_changed", "own_words", "repetition"])
def test_what_is_not_measured_breaks_nothing(name: str) -> None:
    figure, _ = FIGURES[name]
    over, unmeasured = moved(OPEN, name, 9.0), {figure: None}
    assert Limits().broken_by(dataclasses.replace(over, **unmeasured), UNSTEERED, "preference") == []
    # Changed answers are those that are no longer the unsteered model's, so its own figure plays no part.
    broken = ["general_changed"] if name == "general_changed" else []
    assert Limits().broken_by(over, dataclasses.replace(UNSTEERED, **unmeasured), "preference") == broken


def test_limits_of_a_config_are_the_defaults_but_for_what_it_names() -> None:
    assert Limits.of({}) == Limits()
    own = Limits.of({"own_words": 0, "general_kl": 2.5})
    assert own == dataclasses.replace(Limits(), own_words=0, general_kl=2.5)
    assert Limits.of(own.to_dict()) == own
    with pytest.raises(ValueError, match=r"\['general_KL', 'speed'\].*'general_kl'.*'repetition'"):
        Limits.of({"speed": 1.0, "general_KL": 0.1})
    for bad in (-0.1, math.nan, "0.1", None, True):
        with pytest.raises(ValueError, match=r"limits\['likelihood'\]"):
            Limits.of({"likelihood": bad})  # type: ignore[dict-item]


def test_answers_are_sayable_where_steering_lifts_their_weakest_token() -> None:
    assert is_sayable(SAID) and not is_sayable(OPEN)
    assert is_sayable(dataclasses.replace(SAID, bottleneck=SAYABLE))
    assert not is_sayable(dataclasses.replace(SAID, bottleneck=SAYABLE - 1e-3))
    # Said before already, or by chance.
    assert not is_sayable(dataclasses.replace(SAID, bottleneck_rise=0.0))
    assert not is_sayable(dataclasses.replace(SAID, bottleneck_rise_se=SAID.bottleneck_rise / 2))


def test_the_data_decide_what_leads() -> None:
    limits = Limits()
    assert Objective.of([UNSTEERED, OPEN], limits).criterion == "preference"
    assert Objective.of([UNSTEERED, OPEN, SAID], limits).criterion == "sayable"
    # Only what keeps to the limits of sayable answers counts; what they may cost beyond is no reason.
    for name in FIGURES:
        criterion = "sayable" if name in OF_PREFERENCES else "preference"
        assert Objective.of([UNSTEERED, OPEN, moved(SAID, name, 1.5)], limits).criterion == criterion
    # The unsteered model says nothing of steering.
    known = dataclasses.replace(UNSTEERED, bottleneck=0.9, bottleneck_rise=0.5)
    assert Objective.of([known, OPEN], limits).criterion == "preference"
    # Judged answers lead before preferences, and behind answers that are given token by token.
    judged, spoken = (
        dataclasses.replace(UNSTEERED, wanted=0.2),
        dataclasses.replace(OPEN, wanted=0.6, wanted_rise_se=0.1),
    )
    assert Objective.of([judged, spoken], limits).criterion == "wanted"
    assert Objective.of([judged, spoken, SAID], limits).criterion == "sayable"
    # By chance, at too high a price, or not judged.
    for point in (dataclasses.replace(spoken, wanted=0.4), moved(spoken, "own_words", 1.5), OPEN):
        assert Objective.of([judged, point], limits).criterion == "preference"
    with pytest.raises(StopIteration):
        Objective.of([OPEN], limits)


@pytest.mark.parametrize("criterion", list(LEADING))
def test_merit_is_by_limits_first_and_then_by_what_leads(criterion: Any) -> None:
    figure, _, rise_se = LEADING[criterion]
    values = (0.9, 0.3, 0.6, 0.8, math.nan)
    points = [dataclasses.replace(OPEN, strength=float(i + 1), **{figure: value}) for i, value in enumerate(values)]
    points[0], points[3] = moved(points[0], "general_kl", 2.0), moved(points[3], "repetition", 2.0)
    unsteered = dataclasses.replace(UNSTEERED, wanted=0.1)
    objective = Objective(unsteered, Limits(), criterion)
    assert [p.strength for p in sorted(points, key=objective.merit, reverse=True)] == [3.0, 2.0, 5.0, 1.0, 4.0]
    assert objective.allowed([UNSTEERED, *points]) == [points[1], points[2], points[4]]
    assert objective.value(points[2]) == 0.6 and objective.value(points[4]) == -math.inf
    assert objective.broken(points[3]) == ["repetition"] and objective.broken(points[1]) == []
    assert objective.to_dict() == {"criterion": criterion, "limits": Limits().to_dict()}
    assert "0.600" in objective.describe(points[2]) and f"{getattr(unsteered, figure):.3f}" in objective.describe(
        points[2]
    )
    assert ("own words" in objective.describe_limits()) == (criterion != "sayable")
    assert objective.rise_se(dataclasses.replace(OPEN, **{rise_se: 0.07})) == 0.07


def test_wanted_answers_count_less_the_less_likely_the_base_finds_them() -> None:
    unsteered = dataclasses.replace(UNSTEERED, wanted=0.1, own_words=-1.0)
    objective = Objective(unsteered, Limits(), "wanted")

    def value(wanted: float | None, own_words: float, gain: float = 0.0) -> float:
        likelihood = unsteered.likelihood + gain
        return objective.value(dataclasses.replace(OPEN, wanted=wanted, own_words=own_words, likelihood=likelihood))

    assert value(0.8, -1.0) == value(0.8, -0.5) == 0.8, "text that is more fluent than the base's earns nothing"
    assert value(0.8, -1.5) == pytest.approx(0.8 * math.exp(-0.5))
    assert value(0.93, -1.2) < value(0.9, -1.05), "a judge that is nearly sure is worth no broken text"
    assert value(None, -1.0) == -math.inf
    # What new answers must surprise the base is no cost: half of what the chosen answers gain.
    assert value(0.8, -1.2, gain=0.4) == 0.8
    assert value(0.8, -1.5, gain=0.4) == pytest.approx(0.8 * math.exp(-0.3))


# -- trying several ways ----------------------------------------------------------------------------------------------


def trials(data: PlantedData, **lengths: float) -> dict[str, Trial]:
    """Constant vectors of some lengths along the mean shift, each with its opposite."""
    site = Site("resid_post", 2)
    shift = torch.from_numpy(data.shifts(site, "fit").mean(0))

    def trial(factor: float) -> Trial:
        build = lambda strength: ConstantVector(site, factor * shift, strength=strength)  # noqa: E731
        return Trial(build, abs(factor) * float(shift.norm()), float(shift.norm()))

    return {name: trial(factor) for name, factor in lengths.items()}


def test_the_best_trial_is_taken_whatever_its_length() -> None:
    data = PlantedData()
    data.limits = Limits.of({"general_kl": 1e9})
    name, table = try_each(data, trials(data, away=-1.0, long=8.0, half=0.5), "auto", what="way", doses=(0.5, 1.0))
    assert table is not None and [row["way"] for row in table] == ["away", "long", "half"]
    # Doses are lengths of the vector: the same one is reached by both, and the first of equals is taken.
    assert name == "long" and table[1]["preference"] == pytest.approx(table[2]["preference"], rel=1e-3)
    assert [row["strength"] for row in table[1:]] == pytest.approx([1 / 8, 2.0])
    unsteered = 1 / (1 + math.e)
    assert table[0]["preference"] < unsteered < table[1]["preference"] and all(row["broken"] == [] for row in table)


def test_a_point_that_breaks_a_limit_counts_only_if_all_do() -> None:
    data = PlantedData()
    best = trials(data, short=0.01, full=1.0)
    data.limits = Limits.of({"general_kl": 0.5})
    name, table = try_each(data, best, 1.0)
    assert name == "short" and table is not None
    assert [row["broken"] for row in table] == [[], ["general_kl"]] and table[0]["preference"] < table[1]["preference"]
    data.limits = Limits.of({"general_kl": 0.0})
    assert try_each(data, best, 1.0)[0] == "full"


def test_the_share_of_the_prompts_is_passed_on_and_none_held_out_takes_the_first() -> None:
    class Shares(PlantedData):
        shares: set[float] = set()

        def dose_response(self, build: Any, strengths: Any, share: float = 1.0) -> list[DosePoint]:
            self.shares.add(share)
            points = super().dose_response(build, strengths, share)
            return [dataclasses.replace(p, bottleneck=math.nan) for p in points] if share == 0.25 else points

    data = Shares()
    try_each(data, trials(data, one=1.0), "auto", share=0.5)
    assert data.shares == {0.5}
    assert try_each(data, trials(data, one=-1.0, two=1.0), "auto", share=0.25) == ("one", None)


def test_a_row_of_a_report_says_what_was_broken() -> None:
    objective = Objective(UNSTEERED, Limits(), "preference")
    row = point_row(moved(OPEN, "own_words", 3.0), objective)
    assert row["broken"] == ["own_words"] and row["own_words"] == pytest.approx(-1.1)
    figures = {"strength", "bottleneck", "preference", "wanted", "likelihood", "own_words", "kl"}
    assert figures | {"criterion", "broken"} == set(row)


# -- through a fit ----------------------------------------------------------------------------------------------------


def fit(**settings: Any) -> SteeringAdapter:
    config = CAAConfig(layer=1, **settings)
    return fit_steering(
        toy_model(),
        toy_tokenizer(),
        toy_preferences(),
        config,
        general_dataset=toy_general_prompts(),
        progress=False,
    )


@pytest.mark.filterwarnings("ignore")
def test_limits_of_a_config_hold_in_its_fit_and_are_kept_with_it(tmp_path: Any) -> None:
    found = {}
    for general_kl in (0.001, 1.0):
        adapter = fit(limits={"general_kl": general_kl})
        assert adapter.config.limits == {**Limits().to_dict(), "general_kl": general_kl}
        points = [DosePoint.from_report(row) for row in adapter.config.fit["report"]["dose_response"]]
        taken = next(point for point in points if point.strength == adapter.config.strength)
        objective = Objective.of(points, Limits.of(adapter.config.limits))
        assert taken == max(objective.allowed(points), key=objective.value) and taken.kl <= general_kl
        found[general_kl] = taken.strength
        adapter.save_pretrained(tmp_path / str(general_kl))
        assert SteeringAdapter.from_pretrained(tmp_path / str(general_kl)).config.limits == adapter.config.limits
    assert found[0.001] < found[1.0]


def test_invalid_limits_are_refused_before_the_model_runs() -> None:
    for limits, named in (({"speed": 1.0}, "speed"), ({"own_words": -1.0}, "own_words")):
        with pytest.raises(ValueError, match=named):
            fit_steering(None, None, [], CAAConfig(layer=1, limits=limits))


def test_own_words_may_lose_what_the_chosen_answers_gain() -> None:
    gained = dataclasses.replace(moved(OPEN, "own_words", 3.0), likelihood=UNSTEERED.likelihood + 1.0)
    assert Limits().broken_by(gained, UNSTEERED, "preference") == []
    assert Limits().broken_by(moved(gained, "own_words", 4.0), UNSTEERED, "preference") == ["own_words"]
    # What they lose is limited by itself, and lends nothing.
    lost = dataclasses.replace(OPEN, likelihood=UNSTEERED.likelihood - 0.1)
    assert Limits().broken_by(moved(lost, "own_words", 1.01), UNSTEERED, "preference") == ["own_words"]
