"""Conditions on judged prompts: verdicts, gates and comparisons, with a small gated test method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import half_plane_adapter

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.evaluation.behaviour import JudgedPrompt, Outcome, evaluate
from finesteer_hf.evaluation.comparison import ComparisonRow, compare, table_cells
from finesteer_hf.evaluation.data.benchmarks import BENCHMARKS, load_benchmark
from finesteer_hf.evaluation.data.playground_eval import general_prompts, target_prompts
from finesteer_hf.evaluation.examples import examples_of
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.prompts import as_chat, encode_prompt
from finesteer_hf.evaluation.measures.statistics import mcnemar, paired_p_value


TEXTS = ["what is the sky made of ?", "tell me about cats", "sing a song", "tell me about dogs", "is it red or blue ?"]


def judged(judge: Any) -> list[JudgedPrompt]:
    return [
        JudgedPrompt(str(i), as_chat(text), judge, f"c{i % 2}", ChoiceItem(as_chat(text), ("yes",), ("no",)))
        for i, text in enumerate(TEXTS)
    ]


@pytest.fixture
def outcomes(model: Any, tokenizer: Any, half_plane: None) -> tuple[Any, Outcome, Outcome]:
    states = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(torch.tensor([encode_prompt(tokenizer, as_chat(text))]), output_hidden_states=True)
        states.append(hidden.hidden_states[2][0, -1])
    # A plane that has queries on both of its sides.
    normal = states[0] - torch.stack(states).mean(0)
    adapter = half_plane_adapter(normal)
    steered = SteeredModelForCausalLM.from_model(model, steering=adapter)
    prompts = judged(lambda text: None if not text else len(text) % 2 == 0)
    base = evaluate(steered, tokenizer, prompts, max_new_tokens=5)
    after = evaluate(steered, tokenizer, prompts, adapter="default", max_new_tokens=5)
    gates = np.array([float(state @ normal > 0) for state in states])
    return gates, base, after


def test_gates_are_recorded_in_the_order_of_the_prompts(outcomes: tuple[Any, Outcome, Outcome]) -> None:
    gates, base, after = outcomes
    assert 0 < gates.sum() < len(gates)
    np.testing.assert_array_equal(after.recorded("gate"), gates)
    assert base.recorded("gate") is None and base.fires() is None and after.recorded("experts") is None
    fires = after.fires()
    assert fires is not None and fires.k == int(gates.sum())
    scores = after.recorded("score")
    assert scores is not None and ((scores > 0) == (gates > 0)).all()


def test_a_closed_gate_leaves_answers_identical(outcomes: tuple[Any, Outcome, Outcome]) -> None:
    gates, base, after = outcomes
    same = [a == b for a, b in zip(base.answers.ids, after.answers.ids, strict=True)]
    assert all(same[i] for i in range(len(gates)) if gates[i] == 0)
    assert after.identical_to(base).k == sum(same) < len(same)
    closed = gates == 0
    np.testing.assert_array_equal(base.choices.mc2[closed], after.choices.mc2[closed])
    assert (base.choices.mc2[~closed] != after.choices.mc2[~closed]).all()


def test_comparisons_are_paired(outcomes: tuple[Any, Outcome, Outcome]) -> None:
    _, base, after = outcomes
    assert base.verdicts == [None if not text else len(text) % 2 == 0 for text in base.answers.texts]
    test = after.against(base)
    assert test.only_second - test.only_first == after.share.k - base.share.k
    assert after.mc2_change(base).value == pytest.approx(float((after.choices.mc2 - base.choices.mc2).mean()))
    rows = compare("set", "even", base, after)
    assert [row.metric for row in rows] == ["even", "MC1", "MC2", "gate fires", "identical output"]
    assert rows[0].p_value == test.p_value and rows[3].cells()[2] == "-"
    assert rows[1].p_value == mcnemar(base.choices.mc1, after.choices.mc1).p_value
    assert rows[2].p_value == paired_p_value(base.choices.mc2, after.choices.mc2)
    assert rows[0].to_dict()["steered"] == after.share.to_dict()


def test_a_card_shows_a_win_and_a_loss_the_first_of_each(outcomes: tuple[Any, Outcome, Outcome]) -> None:
    gates, base, after = outcomes
    changed = [a != b for a, b in zip(base.answers.ids, after.answers.ids, strict=True)]
    first = changed.index(True)
    unjudged = [replace(outcome, verdicts=[None] * len(changed)) for outcome in (base, after)]
    (found,) = examples_of("the toys", *unjudged)
    assert found["prompt"] == base.prompts[first].text and found["gate"] == gates[first]
    assert (found["unsteered"], found["steered"]) == (base.answers.texts[first], after.answers.texts[first])
    assert "the first whose answer changes" in found["source"]

    last = len(changed) - 1 - changed[::-1].index(True)
    verdicts = [row == last for row in range(len(changed))]
    lost = replace(base, verdicts=[False] * len(changed))
    examples = examples_of("the toys", lost, replace(after, verdicts=verdicts))
    assert (
        examples[0]["prompt"] == base.prompts[last].text and "becomes the wanted one (1 such)" in examples[0]["source"]
    )
    assert [e["prompt"] for e in examples[1:]] == ([base.prompts[first].text] if first != last else [])
    assert examples_of("the toys", base, base) == []


def test_the_playgrounds_halves_are_disjoint_and_its_judges_know_the_answers() -> None:
    for task in ("truthful", "safety"):
        fit, test = target_prompts(task, half="fit"), target_prompts(task, half="test")
        assert {p.text for p in fit}.isdisjoint(p.text for p in test)
        assert len(target_prompts(task, limit=20)) == 20
        draws = [[p.id for p in target_prompts(task, limit=20, seed=1)] for _ in range(2)]
        assert draws[0] == draws[1]
    question = target_prompts("truthful")[0]
    assert question.choices is not None
    assert (
        question.judge(question.choices.correct[0]) is True and question.judge(question.choices.incorrect[0]) is False
    )
    kinds = {p.category for p in target_prompts("truthful", split="kind")}
    assert kinds.isdisjoint(p.category for p in target_prompts("truthful", half="fit", split="kind"))
    assert {p.id for p in general_prompts()}.isdisjoint(p.id for p in general_prompts(half="fit"))


def test_benchmarks_by_name() -> None:
    sets = load_benchmark("playground", limit=7)
    assert [len(found.prompts) for found in sets] == [7, 7, 7]
    with pytest.raises(ValueError, match="truthfulqa"):
        load_benchmark("mmlu")
    assert "gsm8k" in BENCHMARKS


def test_a_table_stars_what_is_significant_after_holm() -> None:
    # .01 x 3 is below .05; then .03 x 2 is not, and what follows falls with it.
    rows = [ComparisonRow("data", "figure", None, None, p) for p in (0.03, None, 0.01, 0.04)]
    assert [cells[-1] for cells in table_cells(rows)] == ["0.03", "-", "0.01*", "0.04"]
    assert [cells[-1] for cells in table_cells(rows[:2])] == ["0.03*", "-"]
