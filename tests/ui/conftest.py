"""A workbench with the playground and its two adapters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finesteer_hf import SteeredModelForCausalLM, playground
from finesteer_hf.ui.workbench import Workbench


CARDS = Path(__file__).resolve().parents[2] / "hub_cards"


@pytest.fixture
def bench() -> Iterator[Workbench]:
    model, tokenizer = playground.load()
    steered = SteeredModelForCausalLM.from_model(model)
    for name in ("truthful", "safety"):
        steered.load_steering(str(CARDS / f"playground-{name}"), name)
    made = Workbench(steered, tokenizer, "playground", own=("truthful", "safety"))
    yield made
    made.close()


@pytest.fixture
def cards() -> Path:
    return CARDS
