"""The constant vector against ten lines of numpy."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from planted import PlantedData, states

from finesteer_hf.adapters.adapter import SteeringAdapter, tensors_equal
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.method_api import ModelInfo, Part, Pool
from finesteer_hf.methods.caa import CAA, CAAConfig
from finesteer_hf.sites import Site


SITE = Site("resid_post", 2)
PARTS: tuple[Part, ...] = ("fit", "calibration")


class TwoPools(PlantedData):
    """Answers whose last token's state differs from their mean's by a known offset."""

    def chosen(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        return super().chosen(site, part) + (2.0 if pool == "answer_last" else 0.0)


def test_the_vector_is_the_mean_difference_of_answers() -> None:
    data = TwoPools()
    mean = data.shifts(SITE, *PARTS).astype(np.float64).mean(axis=0)
    for pool, offset in (("answer_mean", 0.0), ("answer_last", 2.0)):
        vector = CAA.fit(data, CAAConfig(layer=2, strength=1.0, pool=pool)).tensors["vector"]
        np.testing.assert_allclose(vector.numpy(), mean + offset, atol=1e-5)
        assert vector.dtype == torch.float32


def test_a_vector_of_queries_points_from_general_prompts_to_these() -> None:
    data = PlantedData()
    vector = CAA.fit(data, CAAConfig(layer=2, strength=1.0, vector="queries")).tensors["vector"]
    own, other = (np.concatenate([rows(SITE, part) for part in PARTS]) for rows in (data.query, data.general))
    np.testing.assert_allclose(vector.numpy(), own.mean(0, np.float64) - other.mean(0, np.float64), atol=1e-5)


def test_every_query_gets_the_same_and_is_not_read() -> None:
    data = PlantedData()
    result = CAA.fit(data, CAAConfig(layer=2, strength=1.5))
    method = CAA(result.config, result.tensors)
    decision = method.decide(states(SITE, data.query(SITE, "fit")))
    assert method.reads == () and method.writes == (SITE,) and method.strength == 1.5
    assert method.positions == "generated" and decision.gate is None
    assert torch.equal(decision.vectors[SITE], result.tensors["vector"][None])


def test_layer_and_strength_are_chosen_on_held_out_rows() -> None:
    data = PlantedData(clarity=(0.1, 0.4, 1.0, 0.3))
    for layer in (0, 1, 3):
        # at these layers the answers are the same but for noise
        data._chosen[layer] = data._rejected[layer] + np.random.default_rng(layer).standard_normal(
            data._rejected[layer].shape
        ).astype(np.float32)
    result = CAA.fit(data, CAAConfig())
    assert result.config.layer == 2 and isinstance(result.config.strength, float) and result.config.strength > 0
    report = json.loads(json.dumps(result.report, allow_nan=False))
    screened = [f"block {layer}, {tokens}" for tokens in ("generated", "prompt") for layer in range(4)]
    assert [row["place"] for row in report["places_screened"]] == screened
    assert max(report["places_tried"], key=lambda row: row["preference"])["place"] == "block 2, generated"
    assert report["dose_response"][0]["strength"] == 0.0


def test_a_given_strength_runs_no_model() -> None:
    data = PlantedData()
    assert CAA.fit(data, CAAConfig(layer=1, strength="norm:0.5")).config.strength > 0
    assert CAA.fit(data, CAAConfig(layer=1, strength=2.0)).config.strength == 2.0
    assert data.doses == 0


def test_sites_and_pools_that_are_captured() -> None:
    info = ModelInfo(num_layers=12, hidden_size=16, num_heads=4, head_size=4, vocab_size=50)
    request = CAA.needs(CAAConfig(layer=5, pool="answer_last"), info)
    assert request.sites == (Site("resid_post", 5),) and request.pools == ("query", "answer_last")
    assert CAA.needs(CAAConfig(vector="queries"), info).pools == ("query",)
    with pytest.raises(ValueError, match=r"layer=12.*0 to 11"):
        CAA.needs(CAAConfig(layer=12), info)


@pytest.mark.parametrize(
    "settings",
    [{"layer": -1}, {"layer": "last"}, {"pool": "max"}, {"vector": "both"}, {"layer": 4, "num_hidden_layers": 4}],
)
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        CAAConfig(**settings)


def test_one_class_has_no_contrast() -> None:
    with pytest.raises(DatasetError, match="general"):
        CAA.fit(PlantedData(general=0), CAAConfig(layer=2, vector="queries", strength=1.0))
    with pytest.raises(AdapterFileError, match="layer"):
        CAA(CAAConfig(strength=1.0), {"vector": torch.zeros(3)})


def test_saving_and_loading_changes_nothing(tmp_path) -> None:
    result = CAA.fit(PlantedData(), CAAConfig(layer=2, strength=1.0))
    SteeringAdapter(result.config, result.tensors).save_pretrained(tmp_path)
    again = SteeringAdapter.from_pretrained(tmp_path)
    assert again.config == result.config and tensors_equal(again.tensors, result.tensors)


# -- the mean gradient ------------------------------------------------------------------------------------------------


def test_a_vector_of_gradients_points_along_their_mean_a_tenth_of_the_state_far() -> None:
    data = PlantedData()
    vector = CAA.fit(data, CAAConfig(layer=2, strength=1.0, vector="gradient")).tensors["vector"].numpy()
    rows = [data.chosen(SITE, part, "gradient") - data.rejected(SITE, part, "gradient") for part in PARTS]
    mean = np.concatenate(rows).astype(np.float64).mean(axis=0)
    length = 0.1 * np.median(np.linalg.norm(data.query(SITE, "fit").astype(np.float64), axis=1))
    np.testing.assert_allclose(vector, mean / np.linalg.norm(mean) * length, rtol=1e-4, atol=1e-6)
    assert vector.dtype == np.float32


def test_a_fit_of_gradients_asks_for_them() -> None:
    assert CAA.needs(CAAConfig(vector="gradient", layer=1), PlantedData().info).pools == ("query", "gradient")


def test_the_paper_steers_after_the_user_s_turn_and_reads_the_answer_s_letter() -> None:
    config = CAAConfig.paper(layer=13)
    assert (config.positions, config.pool, config.layer) == ("generated", "answer_last", 13)
    assert CAAConfig().positions == "auto"


def test_too_few_gradients_are_refused() -> None:
    data = PlantedData(rows=5)
    data._parts = {part: rows[:0] for part, rows in data._parts.items()}
    with pytest.raises(DatasetError, match="gradients of 0 rows"):
        CAA.fit(data, CAAConfig(layer=2, strength=1.0, vector="gradient"))
