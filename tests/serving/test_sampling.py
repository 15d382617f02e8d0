"""Seeds, returned sequences and records belong to a request, whatever else is in its batch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from engines import engine, results

from finesteer_hf import SWAIConfig
from finesteer_hf.serving.requests import child_id
from finesteer_hf.serving.sampling import Penalties, Sampling, TokenBias, logits_processors_of
from finesteer_hf.testing.conformance import fit_on_toy


def generated(model, prompt, steering, sampling, sequence=0, scale=1.0, new_tokens=6):
    """The same request through `generate`, alone."""
    plan = model._steering.plan((), (), 1.0)
    own = logits_processors_of(plan, sampling, len(prompt), sequence)
    out = model.generate(
        torch.tensor([prompt]),
        steering=steering,
        steering_scale=scale,
        logits_processor=own,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


SAMPLINGS = [
    Sampling(temperature=1.0, seed=1),
    Sampling(temperature=0.7, top_p=0.9, seed=2),
    Sampling(temperature=1.5, top_k=5, seed=2**40),
    Sampling(temperature=1.0, seed=3, presence_penalty=0.8, frequency_penalty=0.4, logit_bias={9: 2.0, 11: -100.0}),
    Sampling(),
]


@pytest.mark.parametrize("generation", [{"do_sample": False}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("setting", [{}, {"num_blocks": 10}, {"max_batch_tokens": 9}], ids=str)
def test_sampled_requests_say_what_they_say_alone(model, prompts, setting, generation):
    steerings = [None, "finesteer-all", "constant-generated", "alphasteer-prompt"]
    asked = [(i, steerings[(i + r) % 4], SAMPLINGS[(i + 2 * r) % 5]) for r in range(4) for i in range(len(prompts))]
    with engine(model, generation, **setting) as manager:
        ids = [manager.add_request(prompts[i], steering=steering, sampling=s) for i, steering, s in asked]
        got = results(manager, ids)
    wrong = [
        (asked[place], got[name].generated_tokens)
        for place, name in enumerate(ids)
        if got[name].generated_tokens != generated(model, prompts[asked[place][0]], *asked[place][1:])
    ]
    assert not wrong, f"{len(wrong)} of {len(asked)}: {wrong[:3]}"


@pytest.mark.parametrize("setting", [{}, {"num_blocks": 10}, {"max_batch_tokens": 9}], ids=str)
@pytest.mark.parametrize("steering", [None, "finesteer-all", "several-generated"])
def test_returned_sequences_share_the_decision_and_draw_for_themselves(model, prompts, steering, setting):
    sampling = Sampling(temperature=1.2, seed=11)
    with engine(model, **setting) as manager:
        ids = [
            manager.add_request(prompt, steering=steering, sampling=sampling, num_return_sequences=3)
            for prompt in prompts[:6]
        ]
        every = [[name, child_id(name, 0), child_id(name, 1)] for name in ids]
        got = results(manager, [name for names in every for name in names])
        assert manager.stats.decisions == (6 if steering else 0)
        assert not manager.session.requests and not manager.session.table.in_use
    for prompt, names in zip(prompts, every, strict=False):
        answers = [got[name].generated_tokens for name in names]
        assert answers == [generated(model, prompt, steering, sampling, number) for number in range(3)]
        assert len({tuple(answer) for answer in answers}) > 1
        reports = [got[name].steering for name in names]
        assert reports[0] == reports[1] == reports[2]


def test_a_prompt_of_one_token_may_have_several_answers(model):
    sampling = Sampling(temperature=1.0, seed=3)
    with engine(model) as manager:
        name = manager.add_request([7], steering="constant-all", sampling=sampling, num_return_sequences=2)
        got = results(manager, [name, child_id(name, 0)])
    for number, own in enumerate((name, child_id(name, 0))):
        assert got[own].generated_tokens == generated(model, [7], "constant-all", sampling, number)


def test_requests_without_a_seed_differ(model, prompts):
    with engine(model) as manager:
        ids = [
            manager.add_request(prompts[0], sampling=Sampling(temperature=1.0), max_new_tokens=12) for _ in range(4)
        ]
        got = results(manager, ids)
    assert len({tuple(got[name].generated_tokens) for name in ids}) > 1


@pytest.mark.parametrize("setting", [{}, {"num_blocks": 10}], ids=str)
def test_logprobs_are_the_steered_models_own(model, prompts, setting):
    asked = [(i, Sampling(temperature=t, seed=5, logprobs=3)) for i in range(len(prompts)) for t in (0.0, 1.3)]
    with engine(model, **setting) as manager:
        ids = [manager.add_request(prompts[i], steering="caa-all", sampling=s) for i, s in asked]
        got = results(manager, ids)
    for name, (index, _) in zip(ids, asked, strict=True):
        tokens, prompt = got[name].generated_tokens, prompts[index]
        with model.steering("caa-all"), torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), prompt_lengths=[len(prompt)]).logits[0].float()
        want = logits[len(prompt) - 1 : -1].log_softmax(-1)
        record = got[name].token_logprobs
        assert [entry.token for entry in record] == tokens
        assert [entry.logprob for entry in record] == pytest.approx(
            want.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist(), abs=1e-3
        )
        for entry, row in zip(record, want, strict=True):
            assert [value for _, value in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)


def test_methods_that_act_on_logits_are_served(model, prompts):
    model.load_steering(fit_on_toy(SWAIConfig(strength=8.0))[2], "swai")
    model.set_steering(None)
    try:
        stack = {"swai": 1.0, "constant-all": 0.5}
        samplings = [None, Sampling(temperature=1.0, seed=4)]
        asked = [(i, steering, s) for i in range(6) for steering in ("swai", stack, None) for s in samplings]
        with engine(model) as manager:
            ids = [manager.add_request(prompts[i], steering=steering, sampling=s) for i, steering, s in asked]
            got = results(manager, ids)
        for name, (index, steering, sampling) in zip(ids, asked, strict=True):
            own = sampling or Sampling()
            # In `generate` an adapter's processors come after those that it is given; draws come last.
            plan = model._steering.plan(tuple(_pairs(steering)), (), 1.0)
            ids_ = torch.tensor([prompts[index]])
            body = {k: v for k, v in _pairs(steering) if k != "swai"} or None
            out = model.generate(
                ids_,
                steering=body,
                logits_processor=logits_processors_of(plan, own, len(prompts[index])),
                max_new_tokens=6,
                do_sample=False,
            )
            assert got[name].generated_tokens == out[0, ids_.shape[1] :].tolist()
        greedy = [
            got[name].generated_tokens
            for name, (_, s, draw) in zip(ids, asked, strict=True)
            if s == "swai" and not draw
        ]
        want = [
            model.generate(torch.tensor([prompts[i]]), steering="swai", max_new_tokens=6, do_sample=False)[
                0, len(prompts[i]) :
            ].tolist()
            for i in range(6)
        ]
        assert greedy == want
    finally:
        model.delete_steering("swai")


def _pairs(steering):
    if steering is None:
        return []
    return list(steering.items()) if isinstance(steering, dict) else [(steering, 1.0)]


def test_penalties_and_bias_are_openais():
    scores = torch.zeros(1, 6)
    ids = torch.tensor([[0, 0, 1, 2, 2]])
    got = Penalties(presence=0.5, frequency=0.25, prompt_length=2)(ids, scores)
    # Token 0 stands in the prompt only.
    assert got.tolist() == [[0.0, -0.75, -1.0, 0.0, 0.0, 0.0]]
    assert TokenBias({3: 1.5, 4: -2.0})(ids, scores).tolist() == [[0, 0, 0, 1.5, -2.0, 0]]


def test_a_seed_is_drawn_where_none_is_given(model, prompts):
    given = Sampling(temperature=1.0)
    with engine(model) as manager:
        name = manager.add_request(prompts[0], sampling=given)
        asked = manager.session.requests[name].asked
        results(manager, [name])
    assert given.seed is None and asked.sampling == dataclasses.replace(given, seed=asked.sampling.seed)
    assert asked.sampling.seed is not None
