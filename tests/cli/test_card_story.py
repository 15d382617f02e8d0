"""A card's text before its tables, made only from the adapter's figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from finesteer_hf import SteeringAdapter, SteeringConfig
from finesteer_hf.evaluation.measures.statistics import mean_with_interval, proportion
from finesteer_hf.hub.card import write_card
from finesteer_hf.hub.card_story import tell
from finesteer_hf.method_api import DosePoint


@dataclass(kw_only=True)
class PlainConfig(SteeringConfig):
    steering_type: ClassVar[str] = "CAA"


EXAMPLE = {
    "prompt": "What\nis | it?",
    "unsteered": "Folklore.",
    "steered": "The truth.",
    "gate": 0.5,
    "source": "a set",
}
GATE = {
    "false_alarms": proportion(1, 20).to_dict(),
    "misses": proportion(2, 40).to_dict(),
    "not_guaranteed": "anything about queries of other kinds",
}
EVALUATION = [
    {"dataset": "Q", "metric": "gate fires", "unsteered": None, "steered": proportion(9, 10).to_dict()},
    {
        "dataset": "Q",
        "metric": "MC1",
        "unsteered": proportion(2, 10).to_dict(),
        "steered": proportion(5, 10).to_dict(),
    },
    {"dataset": "G", "metric": "identical output", "unsteered": None, "steered": proportion(8, 10).to_dict()},
    {
        "dataset": "Q",
        "metric": "own words under the base, nats a token",
        "unsteered": mean_with_interval([-0.5, -0.7]).to_dict(),
        "steered": mean_with_interval([-0.8, -0.9]).to_dict(),
    },
]


def adapter(**fit: Any) -> SteeringAdapter:
    config = PlainConfig(base_model_name_or_path="org/base", strength=2.0, fit=fit)
    return SteeringAdapter(config, {"vector": torch.zeros(8)})


def test_a_card_goes_from_its_effect_to_its_tables(tmp_path: Path) -> None:
    curve = [asdict(DosePoint(2.0, 0.1, 0.1, 0.03))]
    made = adapter(
        about="True answers",
        examples=[EXAMPLE],
        evaluation=EVALUATION,
        split="prompt",
        report={"gate": GATE, "dose_response": curve},
    )
    text = write_card(made, tmp_path).read_text().split("# CAA steering adapter")[1]
    order = [
        "True answers. It moves the answers of org/base",
        "Q, MC1: 20.0%",
        "| asked | What is \\| it? |",
        "| unsteered | Folklore. |",
        "| **steered** | The truth. |",
        "a set; gate 0.50; greedy answers",
        "## How to use",
        "## What it costs",
        "32 bytes beside the model",
        "General answers identical to the base's, token by token: G: 80.0%",
        "0.25 nats per token less likely",
        "The gate opens on held-out general prompts: 5.0%",
        "stays closed on held-out prompts that it should steer: 5.0%",
        "95th percentile: 0.03 nats",
        "## What it was not tested on",
        "Anything other than Q; G.",
        "New kinds of prompts",
        "The gate guarantees nothing about queries of other kinds",
        "## Figures",
        "| Q | MC1 |",
        "![Dose response",
        "## Settings",
        "| strength | 2 |",
        "## Data",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "| about |" not in text and "example" not in text


def test_a_card_does_not_claim_what_was_not_measured() -> None:
    story = tell(adapter(split="group", held_out=True, report={"layer": 1}))
    assert story.effect == "" and story.examples == [] and "on every prompt" in story.what
    assert any("no gate" in cost for cost in story.costs)
    assert story.untested[0].startswith("Any benchmark") and not any("New kinds" in item for item in story.untested)
    assert any("in-sample" in item for item in tell(adapter(held_out=False)).untested)
    assert tell(adapter()).costs == ["Memory: 32 bytes beside the model."]


@pytest.mark.parametrize("odd", [None, 3, "text", [1], [None], {"a": 1}, {"value": "x", "low": None, "high": 2}])
@pytest.mark.parametrize("name", ["about", "examples", "evaluation", "report", "split", "held_out"])
def test_figures_of_another_type_are_left_out(name: str, odd: Any) -> None:
    tell(adapter(**{name: odd}))
    for inner in ("gate", "dose_response"):
        tell(adapter(report={inner: odd}))
    tell(adapter(report={"gate": {"misses": odd}}, evaluation=[{"dataset": odd, "metric": odd, "steered": odd}]))
    tell(adapter(examples=[odd, {"prompt": "a", "unsteered": "b", "steered": odd, "gate": odd}]))
