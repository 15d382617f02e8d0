"""The search that all methods share, on a world with a known best answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedData

from finesteer_hf import CAAConfig, ConstantVector
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import Limits
from finesteer_hf.methods._shared.search import SCREENED, Place, search, search_places, settle
from finesteer_hf.methods._shared.trials import SHORT_LIST, Trial
from finesteer_hf.methods.caa import CAA
from finesteer_hf.processors import Decision, Positions, QueryStates, SteeringProcessor
from finesteer_hf.sites import Site


SITE = Site("resid_post", 2)
FREE = Limits.of({"general_kl": 1e9, "likelihood": 1e9})


class Asked(PlantedData):
    """Records which runs were made."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.limits = FREE
        self.looks: list[tuple[int, float]] = []

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> list[DosePoint]:
        self.looks.append((len(strengths), share))
        return super().dose_response(build, strengths, share)


class Several(SteeringProcessor):
    """A vector at each of several sites."""

    def __init__(self, vectors: dict[Site, torch.Tensor], strength: float, positions: Positions) -> None:
        self.vectors, self.strength, self.positions = vectors, strength, positions
        self.writes = tuple(vectors)

    def decide(self, queries: QueryStates) -> Decision:
        return Decision(vectors={site: vector[None] for site, vector in self.vectors.items()})


def trial(data: PlantedData, factor: float, layer: int = 2) -> Trial:
    """A constant vector along the mean shift, its length in units of the shift's."""
    site = Site("resid_post", layer)
    shift = torch.from_numpy(data.shifts(site, "fit").mean(0))
    norm = float(np.median(np.linalg.norm(data.query(site, "fit"), axis=1)))
    return Trial(
        lambda strength: ConstantVector(site, factor * shift, strength=strength),
        abs(factor) * float(shift.norm()),
        norm,
    )


def test_doses_are_absolute_so_a_vector_s_own_length_plays_no_part() -> None:
    data = Asked()
    strengths = {}
    for factor in (1e-3, 1.0, 50.0):
        found = search(data, "auto", {2: trial(data, factor)})
        strengths[factor] = found.strength * factor
        assert found.key == 2 and found.report["layers_tried"] is None
    assert strengths[1e-3] == pytest.approx(strengths[1.0], rel=0.02) == pytest.approx(strengths[50.0], rel=0.02)
    assert strengths[1.0] > 0.3


def test_caa_finds_the_same_dose_for_a_vector_of_any_length() -> None:
    def pushed(factor: float) -> float:
        data = Asked()
        for layer in range(4):
            # Shorter answers' states, the same states otherwise: the vector shrinks, and what is wanted of it does not.
            data._chosen[layer] = data._rejected[layer] + factor * (data._chosen[layer] - data._rejected[layer])
        true = {site: PlantedData().shifts(site, "validation") for site in (Site("resid_post", 2),)}
        data.shifts = lambda site, *parts: true[site]  # type: ignore[method-assign, assignment]
        result = CAA.fit(data, CAAConfig(layer=2, positions="generated"))
        return float(result.config.strength) * float(result.tensors["vector"].norm())

    assert pushed(0.01) == pytest.approx(pushed(1.0), rel=0.05)


def test_many_trials_are_first_tried_on_a_few_prompts() -> None:
    data = Asked()
    factors = dict(zip("abcdef", (-1.0, -0.5, 1.0, -2.0, -1.5, -0.1), strict=True))
    found = search(data, "auto", {name: trial(data, factor) for name, factor in factors.items()}, what="way")
    assert found.key == "c"
    assert data.looks[: len(factors)] == [(1 + len(SCREENED), 0.25)] * len(factors)
    assert [row["way"] for row in found.report["ways_screened"]] == list(factors)
    tried = [row["way"] for row in found.report["ways_tried"]]
    assert len(tried) == SHORT_LIST and tried[0] == "c"


def test_a_number_is_tried_as_it_is_and_stays() -> None:
    data = Asked()
    found = search(data, 0.5, {"less": trial(data, 0.1), "more": trial(data, 1.0)}, what="way")
    assert (found.key, found.strength, found.report["dose_response"]) == ("more", 0.5, [])


def test_if_nothing_is_held_out_the_first_is_taken() -> None:
    class Nothing(Asked):
        def dose_response(self, build: Any, strengths: Any, share: float = 1.0) -> list[DosePoint]:
            points = super().dose_response(build, strengths, share)
            return [dataclasses.replace(point, bottleneck=math.nan, preference=math.nan) for point in points]

    data = Nothing()
    ways = {name: trial(data, factor) for name, factor in zip("abcdef", (-1.0, 1.0, 2.0, 3.0, 4.0, 5.0), strict=True)}
    assert search(data, 1.0, ways, what="way").key == "a"


def test_settling_tries_strengths_around_a_good_dose() -> None:
    data = Asked()
    way = trial(data, 1.0)
    strength, report = settle(data, "auto", way, near=0.2)
    tried = [point["strength"] for point in report["dose_response"]]
    assert min(tried[1:]) == pytest.approx(way.strength_of(0.1), rel=1e-3) and strength in tried
    wide = [point["strength"] for point in settle(data, "auto", way, near=None)[1]["dose_response"]]
    assert len(wide) > len(tried)


# -- places -----------------------------------------------------------------------------------------------------------


def places(data: PlantedData, wrong: Sequence[int] = (), better_everywhere: bool = False) -> Callable[[Place], Trial]:
    """Vectors along the mean shift, at some layers away from it; `all` may push further than `generated`."""

    def trial_of(place: Place) -> Trial:
        vectors = {}
        for layer in place.layers:
            site = Site("resid_post", layer)
            shift = torch.from_numpy(data.shifts(site, "fit").mean(0))
            vectors[site] = -shift if layer in wrong else shift
        first = next(iter(vectors))
        norm = float(np.median(np.linalg.norm(data.query(first, "fit"), axis=1)))
        length = float(torch.stack(list(vectors.values())).norm())
        if place.positions == "all" and not better_everywhere:
            vectors = {site: -vector for site, vector in vectors.items()}
        return Trial(lambda strength: Several(vectors, strength, place.positions), length, norm)

    return trial_of


def test_single_blocks_are_compared_with_the_best_of_them_together_and_with_all() -> None:
    data = Asked(clarity=(0.5,) * 6)
    found = search_places(data, "auto", range(6), places(data, (1, 3)), positions="generated", several=True)
    tried = [row["place"] for row in found.report["places_tried"]]
    screened = {row["place"] for row in found.report["places_screened"]}
    assert screened == {f"block {layer}, generated" for layer in range(6)}
    # The two that push away are not among the four; they are among all.
    assert set(tried[:4]) == {f"block {layer}, generated" for layer in (0, 2, 4, 5)}
    assert tried[4:] == ["blocks 0, 2, 4, 5, generated", "blocks 0, 1, 2, 3, 4, 5, generated"]
    best = max(row["bottleneck"] for row in found.report["places_tried"])
    assert best == next(row["bottleneck"] for row in found.report["places_tried"] if row["place"] == str(found.key))
    assert found.report["positions_tried"] is None


def test_a_method_of_one_block_gets_one() -> None:
    data = Asked(clarity=(0.5,) * 6)
    found = search_places(data, "auto", range(6), places(data), positions="all", several=False)
    assert len(found.key.layers) == 1 and found.key.positions == "all"
    assert all("blocks" not in row["place"] for row in found.report["places_tried"])


@pytest.mark.parametrize(("better", "expected"), [(True, "generated"), (False, "generated")])
def test_open_positions_stay_from_the_query_on_where_all_is_no_better(better: bool, expected: str) -> None:
    # In this world positions change nothing but the sign that is given here, so `all` is level or worse.
    data = Asked(clarity=(0.5,) * 3)
    trial_of = places(data, better_everywhere=better)
    found = search_places(data, "auto", range(3), trial_of, positions="auto", several=False)
    assert found.key.positions == expected
    assert [row["positions"] for row in found.report["positions_tried"]] == ["generated", "all"]


def test_open_positions_are_all_where_that_is_better() -> None:
    data = Asked(clarity=(0.5,) * 3)
    right = places(data, better_everywhere=True)

    def trial_of(place: Place) -> Trial:
        # From the query on, this one only leads astray.
        found = right(place)
        if place.positions == "all":
            return found
        return dataclasses.replace(found, build=lambda strength: found.build(-0.05 * strength))

    found = search_places(data, "auto", range(3), trial_of, positions="auto", several=False)
    assert found.key.positions == "all"


def test_a_first_look_goes_lower_where_its_doses_cost_too_much() -> None:
    class Sloped(PlantedData):
        """Each variant gains and costs in proportion to a slope; a half of the low dose is within the limits for all."""

        def dose_response(self, build: Any, strengths: Any, share: float = 1.0) -> list[DosePoint]:
            found = []
            for strength in strengths:
                slope = float(build(strength).vector.norm())
                gain = 0.5 + slope * strength if slope * strength < 0.3 else 0.5
                found.append(DosePoint(strength, 0.0, 0.0, kl=60 * slope * strength**2, preference=gain))
            return found

    slopes = (0.02, 0.03, 0.04, 0.05, 0.06, 0.5)
    data = Sloped()
    build = {
        slope: (lambda s, slope=slope: ConstantVector(SITE, torch.tensor([slope]), strength=s)) for slope in slopes
    }
    trials = {str(slope): Trial.of_factor(build[slope]) for slope in slopes}
    # The steepest breaks the limit at both doses of the first look, and is the best within it.
    found = search(data, "auto", trials, what="way")
    assert found.key == "0.5" and found.strength < 0.1
