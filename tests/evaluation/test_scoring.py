"""Teacher-forced likelihoods against one row at a time, with and without steering."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import DatasetError
from finesteer_hf.evaluation.measures.generation import greedy_answers, until_end
from finesteer_hf.evaluation.measures.likelihood import batches_by_length
from finesteer_hf.evaluation.measures.multiple_choice import ChoiceItem, choice_scores, score_choices
from finesteer_hf.evaluation.measures.prompts import as_chat, encode_pairs, encode_prompt
from finesteer_hf.evaluation.measures.scoring import answer_log_probs, steered_as


PROMPTS = [as_chat("what is the sky made of ?"), as_chat("tell me about cats"), "the sky is", as_chat("sing", "yes")]
ANSWERS = ["it is air .", "they are many small dogs and cats .", "blue", "no"]


def one_by_one(model: Any, tokenizer: Any, prompt: Any, answer: str) -> float:
    (prompt_ids,), (answer_ids,) = encode_pairs(tokenizer, [prompt], [answer])
    assert prompt_ids == encode_prompt(tokenizer, prompt)
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0].double()
    total = 0.0
    for i, token in enumerate(answer_ids):
        total += float(logits[len(prompt_ids) + i - 1].log_softmax(-1)[token])
    return total


def test_answers_score_as_they_do_alone(model: Any, tokenizer: Any) -> None:
    expected = [one_by_one(model, tokenizer, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    for batch_tokens in (1, 40, 10_000):
        found = answer_log_probs(model, tokenizer, PROMPTS, ANSWERS, batch_tokens=batch_tokens)
        np.testing.assert_allclose(found, expected, atol=1e-4)
    lengths = [len(a.split()) for a in ANSWERS]
    per_token = answer_log_probs(model, tokenizer, PROMPTS, ANSWERS, per_token=True)
    np.testing.assert_allclose(per_token, np.array(expected) / lengths, atol=1e-4)


def test_an_answer_ends_before_the_end_of_turn(tokenizer: Any) -> None:
    prompt = as_chat("tell me about cats")
    ids = encode_prompt(tokenizer, prompt)
    assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    _, answers = encode_pairs(tokenizer, [prompt], ["they are small ."])
    assert tokenizer.decode(answers[0]) == "they are small ."


def test_steering_reads_the_query_at_the_prompts_end(model: Any, tokenizer: Any) -> None:
    """A query-dependent vector must be that of the prompt, not of the answer's last token."""
    from finesteer_hf import Decision, QueryStates, Site, SteeringProcessor

    site = Site("resid_post", 1)
    seen: list[torch.Tensor] = []

    class Echo(SteeringProcessor):
        reads = writes = (site,)

        def decide(self, queries: QueryStates) -> Decision:
            seen.append(queries[site].clone())
            return Decision(vectors={site: queries[site]})

    steered = SteeredModelForCausalLM.from_model(model)
    with steered.steering_with([Echo()]):
        found = answer_log_probs(steered, tokenizer, PROMPTS[:2], ANSWERS[:2])
    base = steered.unload_steering()
    for prompt, answer, value in zip(PROMPTS[:2], ANSWERS[:2], found, strict=True):
        (prompt_ids,), (answer_ids,) = encode_pairs(tokenizer, [prompt], [answer])
        ids = torch.tensor([prompt_ids + answer_ids])
        with torch.no_grad():
            query = base(ids, output_hidden_states=True).hidden_states[2][0, len(prompt_ids) - 1]
            hook = base.model.layers[1].register_forward_hook(lambda m, a, out, q=query: out + q)
            logits = base(ids).logits[0].double().log_softmax(-1)
            hook.remove()
        want = sum(float(logits[i - 1, ids[0, i]]) for i in range(len(prompt_ids), ids.shape[1]))
        assert value == pytest.approx(want, abs=1e-4)


def test_rows_that_cannot_be_scored_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DatasetError, match="2 prompts for 1"):
        answer_log_probs(model, tokenizer, PROMPTS[:2], ANSWERS[:1])
    with pytest.raises(DatasetError, match=r"\[1\]"):
        answer_log_probs(model, tokenizer, PROMPTS[:2], ["yes", ""])
    with pytest.raises(TypeError, match="cannot be steered"):
        steered_as(model, "a")


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 9, 1, 7, 7, 20, 2]
    batches = list(batches_by_length(lengths, 16))
    assert sorted(row for batch in batches for row in batch) == list(range(7))
    assert all(len(batch) * max(lengths[row] for row in batch) <= 16 or len(batch) == 1 for batch in batches)


def test_mc_scores_are_their_definitions() -> None:
    p = np.array([0.2, 0.1, 0.15, 0.05, 1e-3, 2e-3])
    scores = choice_scores(np.log(p), [(2, 2), (1, 1)])
    assert scores.mc1.tolist() == [True, False]
    np.testing.assert_allclose(scores.mc2, [0.3 / 0.5, 1 / 3])
    far = choice_scores(np.array([-2000.0, -2001.0]), [(1, 1)])
    np.testing.assert_allclose(far.mc2, [1 / (1 + np.exp(-1))])


def test_choices_are_scored_from_their_own_prompt(model: Any, tokenizer: Any) -> None:
    items = [
        ChoiceItem(PROMPTS[0], (ANSWERS[0], "air"), ("stone", "it is fire .")),
        ChoiceItem(PROMPTS[1], ("yes",), ("no",)),
    ]
    scores = score_choices(model, tokenizer, items)
    for index, item in enumerate(items):
        right = [one_by_one(model, tokenizer, item.prompt, a) for a in item.correct]
        wrong = [one_by_one(model, tokenizer, item.prompt, a) for a in item.incorrect]
        assert scores.mc1[index] == (right[0] > max(wrong))
        expected = np.exp(right).sum() / (np.exp(right).sum() + np.exp(wrong).sum())
        assert scores.mc2[index] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DatasetError, match=r"\[0\]"):
        score_choices(model, tokenizer, [ChoiceItem("a", (), ("b",))])


def test_greedy_answers_are_those_of_each_prompt_alone(model: Any, tokenizer: Any) -> None:
    batch = greedy_answers(model, tokenizer, PROMPTS, max_new_tokens=6)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        expected = until_end(alone[0, ids.shape[1] :].tolist(), {2})
        assert batch.ids[index] == expected
        assert batch.texts[index] == tokenizer.decode(expected, skip_special_tokens=True).strip()
    assert until_end([5, 2, 0, 0], {2}) == [5, 2] and until_end([5, 6], {2}) == [5, 6]
