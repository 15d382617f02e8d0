"""Answers under teacher forcing against plain forwards, and gradients against finite differences."""

import torch

from finesteer_hf import Site, SteeringProcessor
from finesteer_hf.fitting.answers import run_answers
from finesteer_hf.fitting.data.encoding import Passage
from finesteer_hf.testing import toy_model


SITE = Site("resid_post", 1)
PASSAGES = [Passage((2, 7, 9, 11, 30, 31), 3), Passage((2, 8, 40, 41, 42, 12, 13, 14), 5), Passage((2, 9, 33), 1)]


class Shift(SteeringProcessor):
    maps = (SITE,)
    positions = "generated"

    def __init__(self, vector):
        self.vector = vector

    def transform(self, site, hidden, view):
        return hidden + view.mask[..., None] * self.vector


def test_logits_and_states_are_those_of_each_text_alone():
    model = toy_model()
    for passage, run in zip(PASSAGES, run_answers(model, PASSAGES, sites=(SITE,)), strict=True):
        with torch.no_grad():
            out = model(torch.tensor([passage.ids]), output_hidden_states=True)
        start = passage.answer_start
        torch.testing.assert_close(run.logits, out.logits[0, start - 1 : -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(run.states[SITE], out.hidden_states[2][0, start - 1 : -1], atol=1e-5, rtol=1e-5)
        assert run.ids.tolist() == list(passage.ids[start:])
        log_probs = out.logits[0, start - 1 : -1].log_softmax(-1)
        expected = -log_probs[range(len(run.ids)), run.ids].mean()
        torch.testing.assert_close(run.nll, expected, atol=1e-5, rtol=1e-5)
        assert not run.logits.requires_grad


def test_gradients_reach_the_steering_and_not_the_model():
    model = toy_model()
    vector = torch.zeros(32, requires_grad=True)

    def loss(shift):
        return sum(run.nll for run in run_answers(model, PASSAGES, Shift(shift)))

    (gradient,) = torch.autograd.grad(loss(vector), vector)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(1e-3 * direction) - loss(-1e-3 * direction)) / 2e-3
    torch.testing.assert_close(gradient @ direction, slope, atol=1e-2, rtol=1e-2)
    loss(vector).backward()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert type(model) is type(toy_model())


def test_the_head_gets_contiguous_states_although_only_some_are_kept():
    # With frozen weights torch multiplies a view row by row on a CPU, 20 times slower in bfloat16.
    model, got = toy_model(), []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: got.append((args[0].shape[1], args[0].is_contiguous())))
    list(run_answers(model, PASSAGES[:2], Shift(torch.zeros(32))))
    assert got == [(6, True)]
    model(torch.tensor([PASSAGES[0].ids] * 2), logits_to_keep=3)
    assert got[1] == (3, False)
    assert not head._forward_pre_hooks
