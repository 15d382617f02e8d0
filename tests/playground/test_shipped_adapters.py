"""The adapters in `hub_cards/` are complete and behave as their cards say."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finesteer_hf import SteeredModelForCausalLM, SteeringAdapter, playground
from finesteer_hf.evaluation.behaviour import evaluate
from finesteer_hf.evaluation.data.playground_eval import general_prompts, target_prompts
from finesteer_hf.hub.card_facts import share_text


HUB_CARDS = Path(__file__).resolve().parents[2] / "hub_cards"
TASKS = ("truthful", "safety")


@pytest.mark.parametrize("task", TASKS)
def test_a_card_shows_every_figure_of_its_adapter(task):
    folder = HUB_CARDS / f"playground-{task}"
    card = (folder / "README.md").read_text(encoding="utf-8")
    rows = SteeringAdapter.from_pretrained(str(folder)).config.fit["evaluation"]
    assert {row["metric"] for row in rows} >= {"wanted answers", "gate fires", "identical output", "right answers"}
    assert all(share_text(row["steered"]) in card for row in rows)
    assert all(f"]({name})" in card and (folder / name).is_file() for name in ("dose_response.png", "gate_scores.png"))
    assert "](https://huggingface.co" not in card


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("task", TASKS)
def test_an_adapter_steers_as_its_card_says(task):
    model = SteeredModelForCausalLM.from_pretrained(None, steering=str(HUB_CARDS / f"playground-{task}"))
    tokenizer = AutoTokenizer.from_pretrained(playground.model_path())
    (figure,) = [r for r in model.steering_adapters["default"].config.fit["evaluation"] if r["p_value"] is not None][
        :1
    ]
    targets, general = target_prompts(task, limit=100), general_prompts(limit=50)
    steered = evaluate(model, tokenizer, targets, adapter="default", choices=False, max_new_tokens=24)
    low, high = steered.share.low, steered.share.high
    assert low <= figure["steered"]["value"] <= high and low > figure["unsteered"]["high"] + 0.2
    quiet = evaluate(model, tokenizer, general, adapter="default", max_new_tokens=24)
    assert quiet.identical_to(evaluate(model, tokenizer, general, max_new_tokens=24)).value == 1.0
