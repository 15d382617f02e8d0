"""The suite on a method of a few lines, without a fit: only the run time."""

import pytest
import torch
from toy_method import ToyConfig

from finesteer_hf import SteeringAdapter
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.toy import toy_model


def toy_adapter(positions: str = "all") -> SteeringAdapter:
    generator = torch.Generator().manual_seed(0)
    width = 32
    tensors = {
        "shift": torch.randn(width, generator=generator),
        "map": torch.randn(width, width, generator=generator) / 4,
        "threshold": torch.tensor([0.0]),
    }
    config = ToyConfig(layer=1, hidden_size=width, num_hidden_layers=3, positions=positions)
    return SteeringAdapter(config, tensors)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_feature(feature, positions):
    check_feature(feature, toy_adapter(positions), toy_model())
