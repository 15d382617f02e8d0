"""The suite on methods that rescale, gate or bend the states of heads and layers."""

import functools

import pytest

from finesteer_hf.methods.florain import FlorainConfig
from finesteer_hf.methods.inferaligner import InferAlignerConfig
from finesteer_hf.methods.sadi import SADIConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.conformance import check_files, fit_on_toy


CONFIGS = {
    "florain": FlorainConfig(layer=1, rank=4, epochs=40, strength=1.0),
    "sadi": SADIConfig(num_elements=3, strength=4.0),
    "sadi-hidden": SADIConfig(elements="hidden", num_elements=4, strength=6.0),
    "sadi-neurons": SADIConfig(elements="neurons", num_elements=40, strength=6.0),
    "inferaligner": InferAlignerConfig(layers=[0, 1], strength=3.0),
    "inferaligner-guard": InferAlignerConfig(layers=[1, 2], guard_layer=2, vector="queries", strength=2.0),
    "sadi-official": SADIConfig(num_elements=3, strength=20.0, compat="official"),
}
# What a method can get wrong by itself: which columns it maps, which rows, and what it keeps between forwards.
QUICK = {"left_padding", "beams", "chunked_prefill", "mixed_rows", "prompt_lengths"}


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
