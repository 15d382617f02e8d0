"""The suite on methods from other papers: rotations, null spaces, conditions, flows and logits."""

import functools

import pytest

from finesteer_hf.methods.alphasteer import AlphaSteerConfig
from finesteer_hf.methods.angular import AngularConfig
from finesteer_hf.methods.cast import CASTConfig
from finesteer_hf.methods.contrastive import ContrastiveConfig
from finesteer_hf.methods.swai import SWAIConfig
from finesteer_hf.methods.truthflow import TruthFlowConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.conformance import check_files, fit_on_toy


CONFIGS = {
    "truthflow": TruthFlowConfig(
        layer=1, width=32, levels=3, rank=4, epochs=60, learning_rate=3e-3, batch_size=16, strength=4.0
    ),
    "swai": SWAIConfig(strength=1.0),
    "contrastive": ContrastiveConfig(layer=1, vector_strength=4.0, strength=1.5),
    "cast": CASTConfig(layers=[0, 1], condition_layers=[0, 1], strength=4.0, positions="all"),
    "cast, prompt mean": CASTConfig(layers=[0, 1], condition_layers=[0, 1], condition_pool="mean", strength=20.0),
    "cast, several": CASTConfig(
        conditions=["sun", "sea", "*"],
        behaviors=["sun", "*"],
        rules=["if C3 and not C1 then B1", "if C1 or C2 then B2"],
        layers=[0, 1],
        condition_layers=[0, 1],
        strength=20.0,
    ),
    "alphasteer": AlphaSteerConfig(layers=[1, 2], strength=4.0),
    "angular": AngularConfig(layers=[1], strength=1.0),
    "adaptive": AngularConfig(mode="adaptive", layers=[0, 1], strength=1.0),
    "selective": AngularConfig(mode="selective", layers=[1], strength=1.0),
}
# Every method in the settings that a method can get wrong by itself; what is the run time's work is under `slow`.
QUICK = {"left_padding", "beams", "mixed_rows"}


@functools.cache
def fitted(name):
    return fit_on_toy(CONFIGS[name])[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_files(name):
    check_files(fitted(name))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        pytest.param(name, feature, marks=[] if feature in QUICK else pytest.mark.slow)
        for name in CONFIGS
        for feature in sorted(FEATURES)
    ],
)
def test_feature(name, feature):
    check_feature(feature, fitted(name))
