"""The model that run-time tests steer."""

from __future__ import annotations

import pytest

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.testing.toy import toy_model


@pytest.fixture
def model():
    model = toy_model()
    SteeredModelForCausalLM.from_model(model)
    return model
