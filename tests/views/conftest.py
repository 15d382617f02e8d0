"""The model and the tokenizer that the views look at."""

from __future__ import annotations

import pytest

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


@pytest.fixture
def model():
    model = toy_model()
    SteeredModelForCausalLM.from_model(model)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    return toy_tokenizer()
