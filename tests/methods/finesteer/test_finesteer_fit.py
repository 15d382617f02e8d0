"""Fitting FineSteer on a world whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedData, states
from quick_fit import SITE, fit
from sklearn.linear_model import Ridge

from finesteer_hf.errors import DatasetError
from finesteer_hf.method_api import FitResult, Part
from finesteer_hf.methods._shared.rows import contrast_rows, query_rows
from finesteer_hf.methods._shared.trials import SHORT_LIST
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig
from finesteer_hf.methods.finesteer.experts import SIZE_LIMIT, highest_rank, small_width
from finesteer_hf.methods.finesteer.fit import SCREENED, SCREENED_GAIN
from finesteer_hf.sites import Site


@pytest.fixture(scope="module")
def automatic() -> tuple[PlantedData, FitResult]:
    # The planted world runs no texts, so nothing is trained through it; the toy model has that.
    data = PlantedData()
    open_choices = ("layer", "strength", "target", "positions", "experts", "gate_score")
    return data, fit(data, **dict.fromkeys(open_choices, "auto"))


def test_the_clearest_layer_is_found(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    assert result.config.layer == 2
    assert (result.config.read_site, result.config.write_site) == ("resid_post[2]", "resid_post[2]")
    by_layer = {row["layer"]: row["r2"] for row in result.report["layers"]}
    assert max(by_layer, key=by_layer.__getitem__) == 2 and set(by_layer) == {0, 1, 2, 3}
    tried = [row for row in result.report["layers_tried"] if "strength" in row]
    assert {row["layer"] for row in tried} <= set(by_layer) and len(tried) <= SHORT_LIST


def test_only_places_that_gain_something_to_first_order_are_steered(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    table = result.report["layers_tried"]
    assert len({row["place"] for row in table}) == len(table)
    tried = [row for row in table if "strength" in row]
    left, best = [row for row in table if row not in tried], max(row["gain"] for row in table)
    differences = [row["gain"] for row in tried if row["place"].startswith("difference")]
    assert 0 < len(differences) <= SCREENED and left
    assert min(row["gain"] for row in tried) >= SCREENED_GAIN * best
    for row in left:
        assert row["gain"] < SCREENED_GAIN * best or row["gain"] <= min(differences)
    assert [row["place"] for row in tried] == sorted(
        (row["place"] for row in tried), key=lambda place: place.startswith("difference")
    )


def test_simpler_vectors_are_measured_beside_it(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    reached = max(point["bottleneck"] for point in result.report["dose_response"])
    baselines = result.report["baselines"]
    assert reached > baselines["constant"]["bottleneck"] > baselines["random direction"]["bottleneck"] > 0


def test_the_rank_is_the_one_that_steers_held_out_rows_best(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    tried = {row["experts"]: row["bottleneck"] for row in result.report["experts_tried"]}
    assert {"rank 0", "rank 1", "trained mixture"} < set(tried)
    assert max(tried, key=tried.__getitem__) == f"rank {result.config.residual_rank}"


def test_a_small_trained_mixture_is_tried_and_taken_only_where_it_steers_better(
    automatic: tuple[PlantedData, FitResult],
) -> None:
    _, result = automatic
    tried = {row["experts"]: row["bottleneck"] for row in result.report["experts_tried"]}
    assert tried["trained mixture"] < max(tried.values()) and result.config.experts != "paper"
    few = fit(PlantedData(rows=90), experts="auto")  # 54 rows to fit on
    for other in (few, fit(PlantedData(), experts="reduced_rank")):
        assert "trained mixture" not in {row["experts"] for row in other.report["experts_tried"]}


@pytest.mark.parametrize("width", [128, 4096, 8192])
def test_the_small_mixture_keeps_within_the_size_of_an_adapter(width: int) -> None:
    small, spare = small_width(width, 100_000), 100_000
    config = FineSteerConfig(
        layer=1,
        read_site="resid_post[1]",
        write_site="resid_post[1]",
        positions="generated",
        gate="always",
        gate_score="state",
        experts="paper",
        num_experts=10,
        residual_rank=10,
        key_dim=small,
        hidden_dim=small,
        hidden_size=width,
        num_hidden_layers=4,
        strength=1.0,
    )
    shapes = FineSteer.tensor_shapes(config)
    assert shapes["residual.hidden_weight"] == (small, width) and shapes["residual.output_weight"] == (10, small)
    assert 4 * sum(math.prod(shape) for shape in shapes.values()) + spare <= 2_000_000


def test_everything_left_open_is_filled_in(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    assert result.config.unfitted() == [] and isinstance(result.config.strength, float)
    assert result.config.requires == [
        "gate:conformal",
        f"experts:{result.config.experts}",
        f"score:{result.config.gate_score}",
    ]
    assert set(result.tensors) == set(FineSteer.tensor_shapes(result.config))


def test_the_report_is_json_and_holds_the_figures(automatic: tuple[PlantedData, FitResult]) -> None:
    data, result = automatic
    report = json.loads(json.dumps(result.report, allow_nan=False))
    held_out = len(data.query(SITE, "validation"))
    assert report["vector"]["rows"] == held_out and report["vector"]["r2"] > 0.5
    assert report["gate"]["misses"]["n"] == held_out and report["gate"]["auroc"] > 0.9
    interval = report["gate"]["misses"]
    assert interval["low"] <= interval["value"] <= interval["high"]
    assert {row["name"] for row in report["gate"]["candidates"]} == {"ser", "t2q", "state"}
    assert len(report["gate_scores"]["ir"]) == held_out and report["gate_scores"]["ir"] == sorted(
        report["gate_scores"]["ir"]
    )
    tried = [(row["num_experts"], row["residual_rank"] > 0) for row in report["experts"]["ablations"]]
    assert (1, False) in tried and (1, True) in tried
    assert report["dose_response"][0]["strength"] == 0.0
    # the shift itself is the best dose: more overshoots
    best = max(report["dose_response"], key=lambda point: point["bottleneck"])
    assert best["strength"] >= result.config.strength


@pytest.mark.parametrize("seed", [0, 1])
def test_closed_forms_explain_what_can_be_explained_and_no_less_than_the_paper(seed: int) -> None:
    data = PlantedData(seed=seed)
    rows = contrast_rows(data, SITE, [SITE], ("fit", "calibration"))
    new = contrast_rows(data, SITE, [SITE], ("validation",))

    def r2(vectors: np.ndarray) -> float:
        return 1 - np.square(new.shifts - vectors).sum() / np.square(new.shifts - rows.shifts.mean(0)).sum()

    ridge = max(r2(Ridge(alpha).fit(rows.queries, rows.shifts).predict(new.queries)) for alpha in (0.1, 1, 10, 100))
    found = {}
    for experts in ("auto", "paper"):
        result = fit(data, experts=experts, gate="always", gate_score="auto")
        method = FineSteer(result.config, result.tensors)
        found[experts] = r2(method.decide(states(SITE, new.queries)).vectors[SITE].numpy())
        assert found[experts] == pytest.approx(result.report["vector"]["r2"], abs=1e-4)
    assert found["auto"] > ridge - 0.02
    assert found["auto"] >= found["paper"]


def test_the_score_with_the_fewest_false_alarms_wins(automatic: tuple[PlantedData, FitResult]) -> None:
    _, result = automatic
    table = result.report["gate"]["candidates"]
    best = min(table, key=lambda row: (row["false_alarm_rate"], -row["auroc"]))
    assert result.config.gate_score == best["name"]


def test_rows_of_one_prompt_are_one_query() -> None:
    data = PlantedData(rows=240, repeats=3)
    parts: tuple[Part, ...] = ("fit", "calibration")
    rows = contrast_rows(data, SITE, [SITE], parts)
    assert rows.groups is not None and len(np.unique(rows.groups)) * 3 == len(rows)
    result = fit(data, gate_score="ser", subspace_rank=4)
    assert len(result.tensors["gate.calibration"]) == len(query_rows(data, SITE, ("calibration",))) == 16


def test_parts_that_share_their_rows_are_counted_once() -> None:
    data = PlantedData(rows=40)
    everything = np.arange(40)
    data._parts = dict.fromkeys(data._parts, everything)
    assert len(contrast_rows(data, SITE, [SITE], ("fit", "calibration"))) == 40
    assert fit(data, gate_score="ser", subspace_rank=2).report["vector"]["rows"] == 40


def test_official_reads_and_learns_one_block_before_it_writes() -> None:
    data = PlantedData()
    result = fit(data, layer=3, compat="official", experts="reduced_rank", residual_rank=2)
    method = FineSteer(result.config, result.tensors)
    assert method.reads == (Site("resid_pre", 3),) and method.writes == (Site("resid_post", 3),)
    learned = data.shifts(Site("resid_pre", 3), "fit", "calibration").astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(result.tensors["residual.bias"].numpy(), learned, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 500, "experts": "mixture"}, "num_experts=500.*192"),
        ({"residual_rank": 30}, "residual_rank=30.*24"),
        ({"subspace_rank": 200, "gate_score": "ser"}, "subspace_rank=200.*24"),
        ({"experts": "paper", "residual_rank": 0}, "residual_rank=0"),
        ({"layer": 9}, "layer=9.*0 to 3"),
    ],
)
def test_what_the_rows_do_not_allow_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(PlantedData(), **settings)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(DatasetError, match="at least 10 rows"):
        fit(PlantedData(rows=12))


def test_states_without_information_are_refused() -> None:
    data = PlantedData(clarity=(0.0, 1.0, 1.0, 1.0))
    data._query[0][:] = 3.0
    with pytest.raises(DatasetError, match=r"same state at resid_pre\[0\]"):
        fit(data, layer=0, compat="official")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_states_that_are_not_finite_are_refused(bad: float) -> None:
    data = PlantedData()
    data._query[2][data._parts["fit"][7], 3] = bad
    with pytest.raises(ValueError, match=r"1 of 144 rows.*queries.*NaN or Inf.*row 7"):
        fit(data)


def test_strength_rules() -> None:
    data = PlantedData()
    given = fit(data, strength=1.75, residual_rank=2)
    assert given.config.strength == 1.75 and data.doses == 0 and given.report["dose_response"] == []
    by_norm = fit(data, strength="norm:0.25", residual_rank=2)
    vectors = by_norm.report["vector"]
    assert data.doses == 0
    assert by_norm.config.strength * vectors["vector_norm"] == pytest.approx(0.25 * vectors["state_norm"])
    by_divergence = fit(data, strength="kl:0.5", gate="always")
    points = {point["strength"]: point["kl"] for point in by_divergence.report["dose_response"]}
    assert points[by_divergence.config.strength] == pytest.approx(0.5, rel=0.1)


def test_fitting_is_repeatable_and_leaves_the_config_alone() -> None:
    config = FineSteerConfig(layer=2, strength=1.0, num_experts=2, residual_rank=2)
    before = dataclasses.replace(config)
    one, two = (FineSteer.fit(PlantedData(rows=120, general=60), config) for _ in range(2))
    assert config == before
    assert one.config == two.config and one.report == two.report
    assert all(torch.equal(one.tensors[name], two.tensors[name]) for name in one.tensors)


def test_the_rank_that_held_out_rows_may_choose_fits_the_size() -> None:
    assert highest_rank(128, 4, 0) == 32
    assert highest_rank(1024, 4, 0) == 64
    rank = highest_rank(4096, 4, 4096 * 4)
    assert 40 <= rank <= 56
    assert 4096 * 4 + 4 * 4096 * (2 * 4 + 2 + 2 * rank) <= SIZE_LIMIT < 2_000_000
