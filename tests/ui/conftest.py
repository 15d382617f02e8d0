"""A workbench with the playground and its two adapters, and one that has a third, which mixes experts at all tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter, fit_steering, playground
from finesteer_hf.evaluation.data.playground_eval import fit_rows
from finesteer_hf.ui.workbench import Workbench


CARDS = Path(__file__).resolve().parents[2] / "hub_cards"


@pytest.fixture(scope="session")
def mixture() -> SteeringAdapter:
    settings = {"experts": "mixture", "num_experts": 4, "residual_rank": 1, "positions": "all"}
    config = FineSteerConfig(layer=4, strength=4.5, target="difference", **settings)
    rows = fit_rows("truthful", split="question", limit=120)
    general = list(playground.general_rows("fit"))
    return fit_steering(*playground.load(), rows, config, general_dataset=general, progress=False)


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
def mixing(bench: Workbench, mixture: SteeringAdapter) -> Workbench:
    bench.model.load_steering(mixture, "mixture")
    return bench


@pytest.fixture
def cards() -> Path:
    return CARDS
