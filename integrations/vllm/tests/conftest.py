"""The plugin from its sources, a fake of the vLLM objects that it touches, and adapters fitted on a tiny model."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[3]
# The plugin is a package of its own, which this environment need not have installed; `planted` is a linear world.
sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src"), str(ROOT / "tests" / "methods")]

import fake_vllm  # noqa: E402

from finesteer_hf import SteeringAdapter, fit_steering  # noqa: E402
from finesteer_hf.adapters.algebra import constant_adapter  # noqa: E402
from finesteer_hf.interop import export_vllm  # noqa: E402
from finesteer_hf.methods.caa import CAAConfig  # noqa: E402
from finesteer_hf.methods.finesteer import FineSteerConfig  # noqa: E402
from finesteer_hf.sites import Site  # noqa: E402
from finesteer_hf.testing.toy import (  # noqa: E402
    toy_general_prompts,
    toy_model,
    toy_preferences,
    toy_tokenizer,
)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch):
    """The fake vLLM, installed under its name for one test, with the plugin freshly in place."""
    return fake_vllm.install(monkeypatch)


@pytest.fixture(scope="session")
def toy_adapters() -> dict[str, SteeringAdapter]:
    """Adapters for `toy_model`: gated at several sites, gated by another score, never gated, and constants."""
    torch = pytest.importorskip("torch", reason="adapters are fitted with torch, which is not installed")
    common = {"positions": "generated", "strength": 3.0, "target": "difference", "refine": 0}

    def fitted(config) -> SteeringAdapter:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fit_steering(
                toy_model(),
                toy_tokenizer(),
                toy_preferences(96),
                config,
                general_dataset=toy_general_prompts(48),
                progress=False,
            )

    generator = torch.Generator().manual_seed(5)
    vector = 2.0 * torch.randn(32, generator=generator)
    return {
        "several": fitted(
            FineSteerConfig(
                layer=1,
                write_site=["resid_post[1]", "resid_post[2]"],
                experts="reduced_rank",
                residual_rank=4,
                **common,
            )
        ),
        "mixture": fitted(
            FineSteerConfig(layer=0, gate="quantile", gate_score="t2q", experts="mixture", num_experts=2, **common)
        ),
        "official": fitted(
            FineSteerConfig(layer=2, gate="logistic", gate_score="ser", experts="paper", compat="official", **common)
        ),
        "always": fitted(FineSteerConfig(layer=1, gate="always", experts="reduced_rank", residual_rank=2, **common)),
        "caa": fitted(CAAConfig(layer=1, positions="generated", strength=4.0)),
        "constant": constant_adapter(
            {Site("resid_pre", 1): vector, Site("resid_pre", 2): -vector}, positions="generated", num_hidden_layers=3
        ),
    }


@pytest.fixture(scope="session")
def exported(toy_adapters, tmp_path_factory) -> dict[str, str]:
    """Folders of the adapters as the plugin reads them, by name."""
    root = tmp_path_factory.mktemp("exported")
    return {name: str(export_vllm(adapter, root / name)) for name, adapter in toy_adapters.items()}
