"""Answers after cached prompts against whole texts, one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fitting_toys import random_rows, small_model
from teacher_forcing import SignedAnswers, SignedVector, by_hand
from transformers import LogitsProcessor

from finesteer_hf import ConstantVector, SteeredModelForCausalLM
from finesteer_hf.fitting.answers import StateRecorder, answer_logits, run_answers
from finesteer_hf.fitting.capture.prompt_cache import PromptCache
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.fitting.own_words import own_words
from finesteer_hf.processors import SteeringProcessor
from finesteer_hf.sites import Site


KINDS = ("llama", "gpt2", "gpt_neox", "opt")


def answers(count: int = 6, seed: int = 0) -> list[Passage]:
    """Two answers to each prompt; prompts and answers of several lengths, prompts of at least two tokens."""
    rows = [row for row in random_rows(3 * count, seed) if len(row.prompt.ids) > 1][:count]
    assert len({len(row.prompt.ids) for row in rows}) > 2
    return [passage for row in rows for passage in (row.chosen, row.rejected)]


def steered(kind: str = "llama") -> Any:
    return SteeredModelForCausalLM.from_model(small_model(kind))


def logits_of(model: Any, batch: list[Passage], processors: Any, cache: PromptCache | None) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(answer_logits(model, batch, processors, cache))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_answers_after_cached_prompts_equal_those_of_whole_texts(kind: str, strength: float) -> None:
    model, plain, batch = steered(kind), small_model(kind), answers()
    cache = PromptCache(model)
    assert cache.serves(batch, [SignedAnswers(strength)])
    found = logits_of(model, batch, [SignedAnswers(strength)], cache)
    assert cache.prompts > 0
    for passage, logits in zip(batch, found, strict=True):
        if kind == "llama":
            expected = by_hand(plain, passage, strength, "generated")[passage.answer_start - 1 :]
        else:
            (alone,) = logits_of(model, [passage], [SignedAnswers(strength)], None)
            expected = alone.log_softmax(-1)
        torch.testing.assert_close(logits.log_softmax(-1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_its_texts_alone(kind: str) -> None:
    model, batch = steered(kind), answers()
    together = logits_of(model, batch, [SignedAnswers(1.0)], PromptCache(model))
    for passage, logits in zip(batch, together, strict=True):
        (alone,) = logits_of(model, [passage], [SignedAnswers(1.0)], PromptCache(model))
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_states_and_likelihoods_of_answers_are_the_same(strength: float) -> None:
    model, batch = small_model("llama"), answers()
    sites = (Site("resid_pre", 0), Site("resid_post", 1), Site("resid_post", 3))
    whole = list(run_answers(model, batch, SignedAnswers(strength), sites))
    behind = list(run_answers(model, batch, SignedAnswers(strength), sites, PromptCache(model)))
    for one, two in zip(whole, behind, strict=True):
        assert torch.equal(one.ids, two.ids)
        torch.testing.assert_close(one.nll, two.nll, rtol=1e-5, atol=1e-5)
        for site in sites:
            assert one.states[site].shape == (len(one.ids), 32)
            torch.testing.assert_close(one.states[site], two.states[site], rtol=1e-4, atol=1e-4)


def test_own_words_are_the_same() -> None:
    model = small_model("llama")
    prompts = [Passage(passage.ids[: passage.answer_start]) for passage in answers()[::2]]
    for strength in (0.0, 3.0):
        cache = PromptCache(model)
        processors = [SignedAnswers(strength)] if strength else []
        assert own_words(model, prompts, 12, processors, cache) == own_words(model, prompts, 12, processors)
        assert cache.prompts == len(prompts)


def test_a_prompt_is_run_once_for_all_its_answers() -> None:
    model, batch = steered(), answers()
    cache, seen = PromptCache(model), []
    prompts = {passage.ids[: passage.answer_start - 1] for passage in batch}
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    logits_of(model, batch, [], cache)
    assert cache.prompts == len(prompts)
    answer_tokens = max(len(passage.ids) - passage.answer_start + 1 for passage in batch)
    seen.clear()
    for strength in (0.5, 1.0, 2.0):
        logits_of(model, batch, [SignedAnswers(strength)], cache)
    # Neither run again nor read again: what is left of each trial is the query and the answers.
    assert cache.prompts == len(prompts) and seen == [(len(batch), answer_tokens)] * 3
    logits_of(model, answers(seed=5), [], cache)
    assert cache.prompts == len(prompts | {passage.ids[: passage.answer_start - 1] for passage in answers(seed=5)})


def test_cached_prompts_are_the_base_models_whatever_is_active() -> None:
    model, batch = steered(), answers()
    expected = logits_of(model, batch, [], None)
    with model.steering_with([ConstantVector("resid_post[0]", torch.full((32,), 3.0))]):
        found = logits_of(model, batch, [], PromptCache(model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


class LooksBack(SignedAnswers):
    lookback = 4


class Favour(LogitsProcessor):
    """Adds to the logit of a token that depends on the whole text so far."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        favoured = torch.nn.functional.one_hot(input_ids.sum(1) % scores.shape[1], scores.shape[1])
        return scores + 5.0 * favoured


class OnLogits(SignedAnswers):
    def logits_processors(self, scale: Any) -> list[Any]:
        return [Favour()]


class AgainstTheBase(SignedAnswers):
    def contrast_processors(self, scale: Any, unsteered: Any) -> list[Any]:
        return [lambda input_ids, scores: 2.0 * scores - unsteered(input_ids)]


@pytest.mark.parametrize(
    "processor",
    [SignedVector(1.0, "all"), SignedVector(1.0, "prompt"), LooksBack(1.0), OnLogits(1.0), AgainstTheBase(1.0)],
    ids=["all", "prompt", "lookback", "logits", "contrast"],
)
def test_processors_that_act_before_the_query_run_whole_texts(processor: SteeringProcessor) -> None:
    model, batch = steered(), answers()
    cache = PromptCache(model)
    recorder = StateRecorder([Site("resid_post", 0)])
    assert cache.serves(batch, []) and cache.serves(batch, [recorder])
    assert not cache.serves(batch, [processor]) and not cache.serves(batch, [recorder, processor])
    if not processor.lookback:
        found = logits_of(model, batch, [processor], cache)
        assert cache.prompts == 0
        torch.testing.assert_close(found, logits_of(model, batch, [processor], None))


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "mamba", "bloom"])
def test_windows_states_and_unknown_positions_run_whole_texts(kind: str) -> None:
    model, batch = steered(kind), answers()
    cache = PromptCache(model)
    assert not cache.usable and not cache.serves(batch, [])
    torch.testing.assert_close(logits_of(model, batch, [], cache), logits_of(model, batch, [], None))
    assert cache.prompts == 0


def test_one_token_prompts_run_whole_texts() -> None:
    model, batch = steered(), answers()
    short = Passage((7, 8, 9), 1)
    cache = PromptCache(model)
    assert not cache.serves([*batch, short], []) and not cache.serves([short], [])
    assert cache.serves([Passage((6, 7, 8, 9), 2)], [])
    found = logits_of(model, [*batch, short], [SignedAnswers(1.0)], cache)
    torch.testing.assert_close(found, logits_of(model, [*batch, short], [SignedAnswers(1.0)], None))
    assert cache.prompts == 0


def test_the_cache_stays_within_its_limit() -> None:
    model, batch = steered(), answers()
    whole = logits_of(model, batch, [SignedAnswers(1.0)], None)
    # Keys and values of two heads of size 8 in 4 layers, float32.
    a_token = 2 * 4 * 2 * 8 * 4
    prompts = sorted({passage.ids[: passage.answer_start - 1] for passage in batch}, key=len)
    for most in (0, a_token * len(prompts[-1]), a_token * sum(map(len, prompts))):
        cache = PromptCache(model, most)
        for passes in (1, 2):
            found = logits_of(model, batch, [SignedAnswers(1.0)], cache)
            torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
            kept = sum(len(prompt) for prompt in cache._kept)
            assert kept * a_token == cache._bytes <= most
            assert cache.prompts == len(prompts) + (passes - 1) * (len(prompts) - len(cache._kept))
        assert (kept == 0) == (most == 0)
    assert set(cache._kept) == set(prompts)
