"""The study's scorer against one text at a time: plain, prompted, steered and with LoRA."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_toys import half_plane_adapter
from peft import LoraConfig, get_peft_model

from benchmarks.real.real_choices import score_items
from benchmarks.real.real_conditions import Condition
from benchmarks.real.real_measures import divergence, kl_divergence, own_words
from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem
from finesteer_hf.evaluation.measures.prompts import as_chat


QUESTIONS = ("what is the sky made of ?", "tell me about cats", "how to sing a song ?")


def items(system: str | None = None) -> list[ChoiceItem]:
    return [
        ChoiceItem(as_chat(QUESTIONS[0], system), ("it is air", "water and air", "air"), ("stone", "it is red fire")),
        ChoiceItem(as_chat(QUESTIONS[1], system), ("they are small",), ("they are large", "blue", "many green dogs")),
        ChoiceItem(as_chat(QUESTIONS[2], system), ("yes here is how", "no"), ("sorry , no",)),
    ]


def test_a_divergence_is_that_of_the_formula() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, 3, 8).log_softmax(-1)
    found = kl_divergence(p, q)
    for row in range(3):
        a, b = p[row].double().exp(), q[row].double().exp()
        assert found[row] == pytest.approx(float((a * (a / b).log()).sum()), rel=1e-5)
    assert kl_divergence(p, p).max() == 0
    never = torch.tensor([[float("-inf"), 0.0]])
    assert kl_divergence(never, torch.tensor([[0.5, 0.5]]).log()) == pytest.approx(np.log(2))


def one_at_a_time(condition: Condition, asked: list[ChoiceItem]) -> np.ndarray:
    """Log-probabilities from whole rows of logits, token by token."""
    found = []
    for item in asked:
        prompt = condition.tokenizer.apply_chat_template(item.prompt, add_generation_prompt=True, return_dict=False)
        for answer in (*item.correct, *item.incorrect):
            ids = condition.tokenizer(answer, add_special_tokens=False)["input_ids"]
            extra = {"prompt_lengths": [len(prompt)]} if condition.adapter else {}
            with condition.on(), torch.no_grad():
                logits = condition.model(input_ids=torch.tensor([[*prompt, *ids]]), **extra).logits[0].log_softmax(-1)
            found.append(sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)))
    return np.array(found)


def steered(model: Any, positions: Any) -> Any:
    model = SteeredModelForCausalLM.from_model(model)
    torch.manual_seed(3)
    model.load_steering(half_plane_adapter(torch.randn(32), positions=positions), "row")
    return model


@pytest.fixture(params=["plain", "system", "all", "generated", "prompt", "lora"])
def condition(request: pytest.FixtureRequest, model: Any, tokenizer: Any, half_plane: None) -> Condition:
    if request.param == "plain":
        return Condition(model, tokenizer)
    if request.param == "system":
        return Condition(SteeredModelForCausalLM.from_model(model), tokenizer, system="the sky is green")
    if request.param == "lora":
        torch.manual_seed(0)
        lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        return Condition(lora.eval(), tokenizer, lora=True)
    return Condition(steered(model, request.param), tokenizer, adapter="row", scale=1.5)


def test_answers_of_a_question_in_one_row(condition: Condition) -> None:
    asked = items(condition.system)
    scores = score_items(condition, asked)
    assert scores.packed
    assert scores.counts == [(3, 2), (1, 3), (2, 1)]
    expected = one_at_a_time(condition, asked)
    np.testing.assert_allclose(scores.log_probs, expected, atol=2e-4)
    figures = scores.figures()
    assert figures["mc1"] == [
        float(expected[0] > expected[3:5].max()),
        float(expected[5] > expected[6:9].max()),
        float(expected[9] > expected[11]),
    ]
    p = np.exp(expected)
    assert figures["mc2"][1] == pytest.approx(p[5] / p[5:9].sum(), abs=1e-4)
    a_token = np.exp(expected / scores.tokens)
    assert figures["mc2_token"][2] == pytest.approx(a_token[9:11].sum() / a_token[9:].sum(), abs=1e-4)
    assert scores.a_token()["incorrect"][2] == pytest.approx(expected[11] / 3, abs=1e-4)


def test_scores_see_the_steering(model: Any, tokenizer: Any, half_plane: None) -> None:
    condition = Condition(steered(model, "all"), tokenizer, adapter="row", scale=1.5)
    scores = [score_items(at, items()).log_probs for at in (condition, condition.base(), condition.at(0.0))]
    assert np.abs(scores[0] - scores[1]).max() > 0.01
    np.testing.assert_array_equal(scores[1], scores[2])


def test_one_row_is_used_only_if_it_agrees(model: Any, tokenizer: Any) -> None:
    """A model that ignores the mask sees the other answers: it is scored one answer a row."""
    forward = model.forward

    def deaf(*args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    whole = copy.deepcopy(model)
    model.forward = deaf
    scores = score_items(Condition(model, tokenizer), items())
    assert not scores.packed
    # Rows of one length, so that this model's deafness to pads does not matter either.
    np.testing.assert_allclose(scores.log_probs, one_at_a_time(Condition(whole, tokenizer), items()), atol=2e-4)


def test_own_words_are_judged_by_the_base(model: Any, tokenizer: Any, half_plane: None) -> None:
    condition = Condition(steered(model, "all"), tokenizer, adapter="row", scale=2.0, system=None)
    found = own_words(condition, QUESTIONS)
    assert len(found["texts"]) == len(found["gate"]) == 3
    plain = own_words(condition.base(), QUESTIONS)
    assert np.mean(plain["own_words"]) > np.mean(found["own_words"])
    base = condition.base()
    for row, question in enumerate(QUESTIONS):
        prompt = base.prompt_ids(question)
        with base.on(), torch.no_grad():
            ids = condition.answers([question], 32).ids[0]
            logits = base.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
        mean = np.mean([float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(ids)])
        assert found["own_words"][row] == pytest.approx(mean, abs=1e-3)


def test_divergence_from_the_base(model: Any, tokenizer: Any, half_plane: None) -> None:
    condition = Condition(steered(model, "all"), tokenizer, adapter="row")
    answers = [[7, 8, 9], [10, 11], [12]]
    assert divergence(condition.base(), QUESTIONS, answers) == [0.0] * 3
    found = divergence(condition, QUESTIONS, answers)
    prompt = condition.prompt_ids(QUESTIONS[1])
    ids = torch.tensor([[*prompt, 10, 11]])
    with torch.no_grad():
        with condition.base().on():
            p = condition.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        with condition.on():
            q = condition.model(input_ids=ids, prompt_lengths=[len(prompt)]).logits[0, len(prompt) - 1 : -1]
    expected = (p.exp() * (p - q.log_softmax(-1))).sum(-1).mean()
    assert found[1] == pytest.approx(float(expected), abs=1e-4)
