"""SWAI against the log-odds written out, and its scores in `generate` and in plain forwards."""

import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.methods.swai import SWAIConfig, TokenScores, log_odds
from finesteer_hf.testing import toy_model, toy_tokenizer
from finesteer_hf.testing.conformance import fit_on_toy


@pytest.fixture(scope="module")
def adapter():
    return fit_on_toy(SWAIConfig(strength=0.5, top_k=20))[2]


def test_scores_are_monroe_s():
    target, rest, background = np.array([5, 0, 3, 0]), np.array([1, 4, 3, 0]), np.array([6, 4, 9, 0])
    z = log_odds(target, rest, background, prior=10)
    for w in range(3):
        alpha = 10 * background[w] / 19
        n, m = target[w] + alpha, rest[w] + alpha
        delta = math.log(n / (8 + 10 - n)) - math.log(m / (8 + 10 - m))
        assert z[w] == pytest.approx(delta / math.sqrt(1 / n + 1 / m))
    assert z[3] == 0
    assert z[2] == pytest.approx(0)


def test_the_fit_prefers_the_words_of_chosen_answers(adapter):
    words = toy_tokenizer().convert_ids_to_tokens(adapter.tensors["token_ids"].tolist())
    for word, z in zip(words, adapter.tensors["scores"].tolist(), strict=True):
        if word.startswith("oak"):
            assert z > 0
        if word.startswith("fox"):
            assert z < 0
    assert "<eos>" not in words


def test_only_the_top_is_raised():
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    ids, z = torch.tensor([0, 1, 4, 9]), torch.tensor([-2.0, 1.0, 3.0, 7.0])
    got = TokenScores(ids, z, 0.5, top_k=2)(torch.zeros(2, 1), logits)
    assert got.tolist() == [[4.0, 4.5, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 6.5]]
    got = TokenScores(ids, z, 0.5, top_k=3, top_m=1)(torch.zeros(2, 1), logits)
    assert got.tolist() == [[5.0, 4.5, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0, 6.5]]
    got = TokenScores(ids, z, torch.tensor([0.0, 1.0]), top_k=2)(torch.zeros(2, 1), logits)
    assert torch.equal(got[0], logits[0])
    assert got[1].tolist() == [1.0, 2.0, 3.0, 4.0, 8.0]


class PlainTable(LogitsProcessor):
    def __init__(self, adapter, strength):
        self.z = torch.zeros(54)
        self.z[adapter.tensors["token_ids"]] = adapter.tensors["scores"]
        self.strength = strength

    def __call__(self, input_ids, scores):
        top = scores >= scores.topk(20, dim=-1).values[:, -1:]
        return scores + self.strength * self.z * top


def test_generate_equals_a_plain_logits_processor(adapter):
    ids = torch.randint(6, 54, (3, 6), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 8, "do_sample": False, "repetition_penalty": 1.3}
    plain = toy_model().generate(ids, logits_processor=LogitsProcessorList([PlainTable(adapter, 1.0)]), **settings)
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    assert torch.equal(model.generate(ids, steering_scale=2.0, **settings), plain)
    assert not torch.equal(model.generate(ids, steering=None, **settings), plain)


def test_plain_forwards_steer_what_is_generated_and_nothing_else(adapter):
    base = toy_model()
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    ids = torch.randint(6, 54, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        unsteered, steered = base(ids).logits, model(ids, prompt_lengths=torch.tensor([4, 5])).logits
        table = PlainTable(adapter, 0.5)
        for row, start in enumerate((3, 4)):
            assert torch.equal(steered[row, :start], unsteered[row, :start])
            torch.testing.assert_close(steered[row, start:], table(None, unsteered[row, start:]))
        kept = model(ids, prompt_lengths=torch.tensor([4, 5]), logits_to_keep=3).logits
        torch.testing.assert_close(kept, steered[:, -3:])
        last = model(ids, return_dict=False)[0]
        torch.testing.assert_close(last[:, -1], table(None, unsteered[:, -1]))
        assert torch.equal(last[:, :-1], unsteered[:, :-1])
        with pytest.raises(ValueError, match="labels"):
            model(ids, labels=ids)
        with model.disable_steering():
            assert torch.equal(model(ids).logits, unsteered)


def test_a_forward_that_fails_steers_no_later_one(adapter):
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    ids = torch.randint(6, 54, (1, 7), generator=torch.Generator().manual_seed(1))
    head, model.lm_head = model.lm_head, torch.nn.Linear(3, 3)
    with torch.no_grad():
        with pytest.raises(RuntimeError):
            model(ids)
        model.lm_head = head
        with model.disable_steering():
            assert torch.equal(model(ids).logits, toy_model()(ids).logits)


def test_an_automatic_strength_brings_answers_nearer():
    _, _, adapter = fit_on_toy(SWAIConfig(top_k=54, strength="kl:0.5"))
    curve = adapter.config.fit["report"]["dose_response"]
    chosen = next(point for point in curve if point["strength"] == adapter.config.strength)
    assert chosen["bottleneck"] > curve[0]["bottleneck"]


@pytest.mark.parametrize("field", [{"top_k": 0}, {"top_m": 0}, {"prior": 0.0}, {"positions": "all"}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        SWAIConfig(**field)
