"""The suite's bench: prompts of the method's own kind, and a report if the gate is shut on them."""

import pytest
import torch
from test_toy_method import toy_adapter
from toy_method import ToyConfig

from finesteer_hf import CAAConfig, SteeringAdapter
from finesteer_hf.testing import check_feature, check_steering_method, toy_model
from finesteer_hf.testing.conformance import fit_on_toy, make_bench
from finesteer_hf.testing.toy import toy_general_prompts, toy_preferences, toy_tokenizer


TOY = [
    toy_tokenizer()(row["prompt"], add_special_tokens=False)["input_ids"]
    for row in [*toy_preferences()[:4], toy_general_prompts()[0]]
]
RANDOM = [
    torch.randint(6, 54, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    for seed, n in enumerate((7, 4, 9, 6))
]


def query_states(prompts):
    """States of the last tokens after block 1, `[prompts, width]`."""
    model = toy_model()
    with torch.no_grad():
        return torch.stack(
            [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -1] for ids in prompts]
        )


def gated(opened, shut):
    """The toy method, with a gate that is open on some prompts and shut on others."""
    adapter = toy_adapter()
    wanted = torch.tensor([1.0] * len(opened) + [-1.0] * len(shut))
    states = query_states([*opened, *shut])
    shift = torch.linalg.lstsq(states.double(), wanted.double()[:, None]).solution[:, 0].float()
    return SteeringAdapter(adapter.config, {**adapter.tensors, "shift": shift})


def test_the_prompts_are_toy_data_of_different_lengths():
    fitted_on = {row["prompt"] for row in toy_preferences()}
    general = {row["prompt"] for row in toy_general_prompts()}
    *first, last = make_bench(fit_on_toy(CAAConfig(layer=1, strength=4.0))[2]).prompts
    assert {toy_tokenizer().decode(ids) for ids in first} <= fitted_on
    assert toy_tokenizer().decode(last) in general
    assert len({len(ids) for ids in (*first, last)}) == 4


def test_the_gate_passes_three_toy_prompts_and_blocks_one():
    bench = make_bench(fit_on_toy(ToyConfig(layer=1))[2])
    assert bench.gates() == [1.0, 1.0, 1.0, 0.0]
    assert [a != b for a, b in zip(bench.expected, bench.unsteered, strict=True)] == [True, True, True, False]


def test_a_gate_open_on_its_own_data_passes_even_if_shut_on_random_tokens():
    adapter = gated(TOY, RANDOM)
    for feature in ("left_padding", "mixed_rows", "output_steering"):
        assert check_feature(feature, adapter).outcome == "passed"
    with pytest.raises(AssertionError, match=r"gate is shut on all of these prompts: give prompts=\.\.\."):
        check_feature("left_padding", adapter, prompts=RANDOM)


def test_prompts_may_be_given():
    adapter = gated(RANDOM, TOY)
    for prompts in (RANDOM, [torch.tensor(ids) for ids in RANDOM]):
        assert check_feature("left_padding", adapter, prompts=prompts).outcome == "passed"
    config = ToyConfig(layer=1)
    prompts = make_bench(fit_on_toy(config)[2]).prompts[::-1]
    results = check_steering_method(config, features=["left_padding"], prompts=prompts)
    assert [result.outcome for result in results] == ["passed"]


def test_a_shut_gate_is_reported_before_any_feature():
    # The threshold is the largest score of the fitted prompts.
    config = ToyConfig(layer=1, share=1e-9)
    with pytest.raises(AssertionError, match=r"^TOY cannot be checked: the gate is shut on all of these prompts"):
        check_steering_method(config, features=["unload"])


def test_one_open_gate_of_four_is_too_few_and_reported():
    adapter = gated(RANDOM[:1], RANDOM[1:])
    with pytest.raises(AssertionError, match=r"fewer than two of 4 prompts \(the gate is open on 1 of them\)"):
        check_feature("left_padding", adapter, prompts=RANDOM)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (RANDOM[:3], "at least 4 prompts"),
        ([[7, 8, 9]] * 4, "not all of one length"),
        ([[], *RANDOM], r"`\[tokens\]` each"),
        ([*RANDOM, [7, 54]], r"prompts \[4\] have ids outside"),
    ],
)
def test_prompts_without_an_effect_are_refused(prompts, match):
    with pytest.raises(ValueError, match=match):
        check_feature("left_padding", toy_adapter(), prompts=prompts)
