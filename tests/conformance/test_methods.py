"""The suite on fitted methods."""

import functools

import pytest

from finesteer_hf import CAAConfig, FineSteerConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.conformance import check_files, fit_on_toy


CONFIGS = {
    "finesteer": FineSteerConfig(
        layer=1, gate_score="state", experts="mixture", num_experts=2, residual_rank=2, strength=4.0, positions="all"
    ),
    "finesteer-several": FineSteerConfig(
        layer=0,
        write_site=["resid_post[0]", "resid_pre[2]", "resid_post[2]"],
        target="gradient",
        gate_score="state",
        experts="reduced_rank",
        residual_rank=2,
        refine=0,
        strength=12.0,
        positions="generated",
    ),
    "finesteer-paper": FineSteerConfig.paper(
        layer=1, subspace_rank=4, num_experts=4, residual_rank=3, compat="official"
    ),
    "caa": CAAConfig(layer=1, strength=4.0),
}
# The others differ from the default in their tensors, read and write sites, little in what the run time does with them.
QUICK = {"left_padding", "chunked_prefill", "beams", "compiled_static_cache"}


@functools.cache
def fitted(name):
    return fit_on_toy(CONFIGS[name])[2]


@pytest.mark.parametrize("name", CONFIGS)
def test_files(name):
    check_files(fitted(name))


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        pytest.param(name, feature, marks=[] if name == "finesteer" or feature in QUICK else pytest.mark.slow)
        for name in CONFIGS
        for feature in sorted(FEATURES)
    ],
)
def test_feature(name, feature):
    check_feature(feature, fitted(name))
