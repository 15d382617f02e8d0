"""Which tokens a fit steers, on a world where that decides what the model says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from planted import PlantedData
from quick_fit import fit

from finesteer_hf.method_api import DosePoint, FitResult
from finesteer_hf.methods._shared.search import PROMPT_BLOCKS
from finesteer_hf.processors import SteeringProcessor


OPEN = {"strength": "auto", "positions": "auto", "residual_rank": 0}


class Judged(PlantedData):
    """Own answers are judged, and wanted answers are likelier with some positions.

    Args:
        positions: what gets the bonus.
        bonus: how much likelier wanted answers are there.
        sayable: whether wanted answers come word by word.
    """

    def __init__(self, positions: str, bonus: float, *, sayable: bool = False) -> None:
        super().__init__()
        self.positions, self.bonus, self.sayable = positions, bonus, sayable
        self.steered: set[str] = set()

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> list[DosePoint]:
        found = []
        for point in super().dose_response(build, strengths, share):
            positions = build(point.strength).positions
            bonus = self.bonus * min(1.0, point.strength) if positions == self.positions else 0.0
            if point.strength:
                self.steered.add(positions)
            judged: dict[str, Any] = {
                "wanted": 0.5 * point.preference + bonus,
                "wanted_rise_se": 0.05,
                "own_words": -1.0,
            }
            judged |= (
                {"bottleneck": point.bottleneck + bonus}
                if self.sayable
                else {"bottleneck": 0.001, "bottleneck_rise": 0.0}
            )
            found.append(dataclasses.replace(point, **judged))
        return found


def chosen(data: PlantedData, **settings: Any) -> FitResult:
    return fit(data, **{**OPEN, **settings})


def test_the_prompt_is_steered_where_that_makes_the_model_say_what_is_wanted() -> None:
    result = chosen(Judged("prompt", 0.4), layer="auto", experts="auto", residual_rank="auto")
    assert result.config.positions == "prompt" and result.config.target == "difference"
    table = result.report["prompt_tried"]
    places = [row["place"] for row in table if "place" in row]
    assert len(set(places)) <= PROMPT_BLOCKS and all(place.startswith("difference, block") for place in places)
    assert [row["positions"] for row in table if "positions" in row] == ["generated", "prompt"]
    # The experts are chosen again, for the new place.
    assert {row["experts"] for row in table if "experts" in row} >= {"rank 0"}
    assert [row["positions"] for row in result.report["positions_tried"]] == ["prompt", "all"]
    assert result.report["objective"]["criterion"] == "wanted"


@pytest.mark.parametrize("bonus", [-0.2, 0.0, 0.04])
def test_level_results_go_to_what_needs_no_second_pass(bonus: float) -> None:
    result = chosen(Judged("prompt", bonus))
    assert result.config.positions == "generated" and result.report["prompt_tried"]


def test_all_tokens_are_steered_where_that_is_better_still() -> None:
    assert chosen(Judged("all", 0.4)).config.positions == "all"


@pytest.mark.parametrize(("bonus", "positions"), [(0.4, "prompt"), (0.0, "generated")])
def test_the_prompt_is_tried_where_the_wanted_answers_come_word_by_word_too(bonus: float, positions: str) -> None:
    result = chosen(Judged("prompt", bonus, sayable=True))
    assert result.report["objective"]["criterion"] == "sayable"
    assert result.report["prompt_tried"] and result.config.positions == positions


@pytest.mark.parametrize(
    ("target", "tried"),
    [("difference", {"difference"}), ("gradient", {"gradient"}), ("auto", {"difference", "gradient"})],
)
def test_the_prompt_is_tried_with_whatever_vectors_may_be_fitted_to(target: str, tried: set[str]) -> None:
    result = chosen(Judged("prompt", 0.4), layer="auto", target=target)
    assert result.config.positions == "prompt"
    assert {row["place"].split(",")[0] for row in result.report["prompt_tried"] if "place" in row} == tried


def test_experts_that_are_set_stay_in_the_prompt_too() -> None:
    result = chosen(Judged("prompt", 0.4), experts="reduced_rank", residual_rank=2)
    assert (result.config.positions, result.config.residual_rank) == ("prompt", 2)


@pytest.mark.parametrize("settings", [{"positions": "generated"}, {"strength": 1.0}])
def test_what_is_set_stays(settings: dict[str, Any]) -> None:
    data = Judged("prompt", 0.4)
    result = chosen(data, **settings)
    assert result.report["prompt_tried"] is None and "prompt" not in data.steered
    assert result.config.positions == "generated"
