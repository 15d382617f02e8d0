"""Settings of FineSteer: what is refused, what is filled in, what a file must say."""

from __future__ import annotations

import json
import re

import pytest

from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods._shared.trials import candidate_layers
from finesteer_hf.methods.finesteer import FineSteer, FineSteerConfig
from finesteer_hf.methods.finesteer.config import sites_of
from finesteer_hf.sites import Site


INFO = ModelInfo(num_layers=12, hidden_size=16, num_heads=4, head_size=4, vocab_size=50)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"gate": "soft"}, "'soft'"),
        ({"gate_score": "cosine"}, "'cosine'"),
        ({"gate_guarantee": "exact"}, "'exact'"),
        ({"gate_epsilon": 0.0}, "0.0"),
        ({"gate_epsilon": 1.5}, "1.5"),
        ({"gate_delta": -0.1}, "-0.1"),
        ({"gate_gamma": 0}, "0"),
        ({"gate": "ser", "gate_score": "state"}, "'state'"),
        ({"layer": -1}, "-1"),
        ({"layer": True}, "True"),
        ({"subspace_rank": 0}, "0"),
        ({"num_experts": 2.5}, "2.5"),
        ({"residual_rank": -3}, "-3"),
        ({"key_dim": 0}, "0"),
        ({"experts": "reduced_rank", "num_experts": 3}, "3"),
        ({"residual": "qr"}, "'qr'"),
        ({"compat": "v2"}, "'v2'"),
        ({"strength": "strong"}, "'strong'"),
        ({"strength": "kl:-1"}, "'kl:-1'"),
        ({"strength": float("inf")}, "inf"),
        ({"positions": "last"}, "'last'"),
        ({"layer": 3, "write_site": "head_out[3]"}, "head_out"),
        ({"layer": 3, "write_site": "mlp_act[3]"}, "mlp_act"),
        ({"layer": 3, "write_site": "attention[3]"}, "attention"),
        ({"layer": 3, "write_site": "resid_post[4]"}, "disagree"),
        ({"read_site": "resid_post[2]"}, "needs a layer"),
        ({"layer": 3, "write_site": "resid_post[3]", "num_hidden_layers": 3}, "out of range"),
        ({"target": "states"}, "'states'"),
        ({"refine": -1}, "-1"),
        ({"refine": 1.5}, "1.5"),
        ({"layer": 3, "write_site": []}, "[]"),
        ({"layer": 3, "write_site": ["resid_post[3]", "head_out[5]"]}, "head_out"),
        ({"layer": 3, "write_site": ["resid_post[5]", "resid_post[7]"]}, "disagree"),
        ({"layer": 3, "write_site": ["resid_post[3]", "resid_post[3]"]}, "without repetition"),
        ({"layer": 5, "write_site": ["resid_post[5]", "resid_post[3]"]}, "ascending"),
        ({"write_site": ["resid_post[3]", "resid_post[5]"]}, "layer='auto'"),
        ({"layer": 3, "write_site": ["resid_post[3]", "resid_post[9]"], "num_hidden_layers": 6}, "out of range"),
        ({"compat": "official", "target": "gradient"}, "target='difference'"),
        ({"compat": "official", "layer": 3, "write_site": ["resid_post[3]", "resid_post[5]"]}, "one write site"),
    ],
)
def test_invalid_settings_are_refused_with_their_value(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        FineSteerConfig(**settings)


def test_paper_is_the_paper() -> None:
    config = FineSteerConfig.paper()
    assert (config.gate, config.gate_score, config.experts, config.residual) == ("quantile", "ser", "paper", "pca")
    assert (config.residual_rank, config.num_experts, config.strength, config.positions) == (10, "auto", 2.5, "all")
    assert (config.target, config.refine) == ("difference", 0)
    assert FineSteerConfig.paper(layer=4, residual="orthogonal").residual == "orthogonal"


def test_sites_follow_layer_and_compat() -> None:
    assert sites_of(FineSteerConfig(), 5) == (Site("resid_post", 5), (Site("resid_post", 5),))
    official = FineSteerConfig.paper(compat="official", layer=5)
    assert sites_of(official, 5) == (Site("resid_pre", 5), (Site("resid_post", 5),))
    chosen = FineSteerConfig(layer=5, read_site="resid_post[2]")
    assert sites_of(chosen, 5) == (Site("resid_post", 2), (Site("resid_post", 5),))
    several = FineSteerConfig(layer=5, write_site=["resid_pre[5]", "resid_post[5]", "resid_post[7]"])
    own = (Site("resid_pre", 5), Site("resid_post", 5), Site("resid_post", 7))
    assert sites_of(several, 5) == (own[0], own) and several.write_sites == own


def test_needs_names_the_sites_of_every_candidate() -> None:
    assert FineSteer.needs(FineSteerConfig(layer=5, compat="official"), INFO).sites == (
        Site("resid_pre", 5),
        Site("resid_post", 5),
    )
    layers = [site.layer for site in FineSteer.needs(FineSteerConfig(), INFO).sites]
    assert layers == [2, 3, 4, 5, 6, 7, 8, 9]
    several = FineSteerConfig(layer=5, write_site=["resid_post[5]", "resid_pre[7]"], read_site="resid_post[2]")
    assert FineSteer.needs(several, INFO).sites == (Site("resid_post", 2), Site("resid_post", 5), Site("resid_pre", 7))
    with pytest.raises(ValueError, match=r"layer=12.*0 to 11"):
        FineSteer.needs(FineSteerConfig(layer=12), INFO)
    with pytest.raises(ValueError, match=r"resid_post\[40\].*0 to 11"):
        FineSteer.needs(FineSteerConfig(layer=5, read_site="resid_post[40]"), INFO)


@pytest.mark.parametrize(
    ("settings", "pools"),
    [
        ({}, {"query", "answer_mean", "gradient"}),
        ({"target": "gradient"}, {"query", "gradient"}),
        ({"target": "difference"}, {"query", "answer_mean"}),
        ({"compat": "official"}, {"query", "answer_mean"}),
        ({"experts": "paper"}, {"query", "answer_mean"}),
        ({"experts": "paper", "target": "gradient"}, {"query", "gradient"}),
    ],
)
def test_needs_names_what_the_target_is_made_of(settings: dict, pools: set[str]) -> None:
    assert set(FineSteer.needs(FineSteerConfig(layer=5, **settings), INFO).pools) == pools


@pytest.mark.parametrize(
    ("depth", "first", "last", "count"), [(1, 0, 0, 1), (2, 0, 1, 2), (32, 6, 25, 20), (80, 15, 63, 25)]
)
def test_candidates_leave_out_both_ends(depth: int, first: int, last: int, count: int) -> None:
    layers = candidate_layers("auto", depth)
    assert (layers[0], layers[-1], len(layers)) == (first, last, count)


def test_an_unfitted_config_cannot_steer() -> None:
    with pytest.raises(AdapterFileError, match=r"layer.*positions.*gate_score.*hidden_size"):
        FineSteer.tensor_shapes(FineSteerConfig(strength=1.0))


def test_a_file_that_requires_more_is_refused(tmp_path) -> None:
    FineSteerConfig(layer=2, requires=["gate:conformal", "gate:telepathy"]).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="gate:telepathy"):
        SteeringConfig.from_json_file(tmp_path / "steering_config.json")


def test_a_file_with_bad_settings_is_refused(tmp_path) -> None:
    path = FineSteerConfig(layer=2).save_pretrained(tmp_path)
    for name, value in (
        ("gate", "telepathy"),
        ("layer", "late"),
        ("gate_epsilon", 7),
        ("write_site", []),
        ("positions", "last"),
    ):
        content = json.loads(path.read_text())
        (tmp_path / "bad.json").write_text(json.dumps(content | {name: value}))
        with pytest.raises(AdapterFileError, match=name):
            SteeringConfig.from_json_file(tmp_path / "bad.json")


def test_a_file_keeps_every_setting(tmp_path) -> None:
    config = FineSteerConfig.paper(layer=2, residual="orthogonal", key_dim=8, compat="official", hidden_size=16)
    config.save_pretrained(tmp_path)
    assert SteeringConfig.from_json_file(tmp_path / "steering_config.json") == config
    sites = ["resid_post[2]", "resid_post[4]"]
    several = FineSteerConfig(layer=2, write_site=sites, target="gradient", refine=3, limits={"own_words": 0.1})
    several.save_pretrained(tmp_path)
    again = SteeringConfig.from_json_file(tmp_path / "steering_config.json")
    assert again == several and again.write_sites == (Site("resid_post", 2), Site("resid_post", 4))
