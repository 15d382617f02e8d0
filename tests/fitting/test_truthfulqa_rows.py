"""TruthfulQA's published file as rows of a fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from finesteer_hf.fitting.data import parse_preferences
from finesteer_hf.fitting.inputs import prepare_inputs
from finesteer_hf.testing.toy import toy_tokenizer


FILE = Path(__file__).parents[3] / "shared" / "data" / "truthfulqa" / "TruthfulQA.csv"


@pytest.mark.skipif(not FILE.is_file(), reason="needs ../shared/data/truthfulqa/TruthfulQA.csv")
def test_all_questions_become_rows() -> None:
    from finesteer_hf.evaluation.truthfulqa import load_truthfulqa, preference_rows

    records = preference_rows(load_truthfulqa(FILE), pairs="all", max_pairs=3)
    rows = parse_preferences(records)
    assert len({str(row.prompt) for row in rows}) == 817
    assert len({row.group for row in rows}) == 38
    inputs = prepare_inputs(toy_tokenizer(), records, None, None, seed=0, split="group")
    parts = [{inputs.units[i] for i in inputs.split.rows[part]} for part in ("fit", "calibration", "validation")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 38
