"""TruthfulQA's published file as rows of a fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finesteer_hf import FineSteerConfig, SteeredModelForCausalLM, fit_steering
from finesteer_hf.evaluation.measures.multiple_choice import score_choices
from finesteer_hf.fitting.data.inputs import prepare_inputs
from finesteer_hf.fitting.data.rows import read_preferences
from finesteer_hf.method_api import DosePoint
from finesteer_hf.methods._shared.objective import Limits, Objective
from finesteer_hf.testing.toy import toy_model, toy_tokenizer


FILE = Path(__file__).parents[4] / "shared" / "data" / "truthfulqa" / "TruthfulQA.csv"


@pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/truthfulqa/TruthfulQA.csv")
def test_all_questions_become_rows() -> None:
    from finesteer_hf.evaluation.data.truthfulqa import load_truthfulqa, preference_rows

    records = preference_rows(load_truthfulqa(FILE), pairs="all", max_pairs=3)
    rows = read_preferences(records).rows
    assert len({str(row.prompt) for row in rows}) == 817
    assert len({row.group for row in rows}) == 38
    inputs = prepare_inputs(toy_tokenizer(), records, None, None, seed=0, split="group")
    parts = [{inputs.units[i] for i in inputs.split.rows[part]} for part in ("fit", "calibration", "validation")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 38


@pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/truthfulqa/TruthfulQA.csv")
def test_the_published_questions_are_fitted_saved_loaded_and_scored(tmp_path: Path) -> None:
    from finesteer_hf.evaluation.data.truthfulqa import choice_items, load_truthfulqa, preference_rows

    questions = load_truthfulqa(FILE)
    train, test = questions[::6], questions[1::60]
    model, tokenizer = toy_model(), toy_tokenizer()
    adapter = fit_steering(model, tokenizer, preference_rows(train), FineSteerConfig(), progress=False)
    report = adapter.config.fit["report"]
    assert adapter.config.fit["rows"]["fit"] > 60 and report["gate"]["calibration_queries"] > 20
    assert report["vector"]["rows"] > 20
    points = [DosePoint.from_report(row) for row in report["dose_response"]]
    objective = Objective.of(points, Limits.of(adapter.config.limits))
    # The best of those within the limits, looked at closely.
    best = max(objective.allowed(points), key=objective.value)
    strengths = [point.strength for point in points]
    assert adapter.config.strength == best.strength and strengths == sorted(set(strengths))
    assert strengths[0] == 0.0 < strengths[1] <= best.strength and len(points) >= 5

    adapter.save_pretrained(tmp_path)
    steered = SteeredModelForCausalLM.from_model(toy_model(), steering=str(tmp_path))
    chat = [[{"role": "user", "content": question.question}] for question in test]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, padding=True, padding_side="left", return_tensors="pt", return_dict=True
    )
    out = steered.generate(**inputs, max_new_tokens=4, output_steering=True, return_dict_in_generate=True)
    gates = out.steering["default"]["gate"]
    assert gates.shape == (len(test),) and bool(((gates >= 0) & (gates <= 1)).all()) and float(gates.mean()) > 0.5
    plain = score_choices(model, tokenizer, choice_items(test))
    scores = score_choices(steered, tokenizer, choice_items(test))
    assert len(scores.mc2) == len(test) and not np.allclose(scores.mc2, plain.mc2)
