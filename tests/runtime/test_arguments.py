"""Invalid arguments raise before any work; numbers may be Python's, numpy's or torch's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from finesteer_hf import ConstantVector, SteeringAdapter
from finesteer_hf.methods.constant import ConstantConfig


SITE = "resid_post[1]"
NOT_NUMBERS = ["2", None, [], {}, [[1.0]], True, 1j, ...]
NOT_FINITE = [math.nan, math.inf, -math.inf, 10**400, np.float32("nan"), torch.tensor(math.inf)]


@pytest.fixture
def steered(model):
    config = ConstantConfig(strength=1.0, hidden_size=32, num_hidden_layers=3, layers=[1], positions="generated")
    model.load_steering(SteeringAdapter(config, {"vectors.1": torch.linspace(-2, 2, 32)}), "a")
    model.forwards = []
    model.model.register_forward_pre_hook(lambda *args: model.forwards.append(1))
    return model


@pytest.fixture
def inputs():
    ids = torch.randint(6, 54, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def said(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 4, "do_sample": False, **kwargs}).tolist()


@pytest.mark.parametrize("value", [*NOT_NUMBERS, ["1", "2"], [1.0, None], (1.0, True)], ids=repr)
def test_a_scale_of_another_type_is_refused(steered, inputs, value):
    with pytest.raises((TypeError, ValueError), match="steering_scale"):
        said(steered, inputs, steering_scale=value)
    assert not steered.forwards


@pytest.mark.parametrize("value", NOT_FINITE, ids=repr)
def test_a_scale_that_is_not_finite_is_refused_everywhere(steered, inputs, value):
    for refused in (
        lambda: said(steered, inputs, steering_scale=value),
        lambda: said(steered, inputs, steering_scale=[1.0, value]),
        lambda: said(steered, inputs, steering={"a": value}),
        lambda: said(steered, inputs, steering=["a", {"a": value}]),
        lambda: steered.set_steering({"a": value}),
        lambda: steered.steering("a", scale=value).__enter__(),
        lambda: steered.steering({"a": value}).__enter__(),
    ):
        with pytest.raises(ValueError, match="finite"):
            refused()
    assert not steered.forwards
    assert steered.active_steering == {"a": 1.0}


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_the_scale_of_an_adapter_is_a_number(steered, inputs, value):
    for refused in (
        lambda: steered.set_steering({"a": value}),
        lambda: steered.steering("a", scale=value).__enter__(),
    ):
        with pytest.raises(TypeError, match="must be a number"):
            refused()
    assert steered.active_steering == {"a": 1.0}


def test_numbers_of_numpy_and_torch_are_numbers(steered, inputs):
    want = said(steered, inputs, steering_scale=2.0)
    assert want != said(steered, inputs)
    for two in (2, np.float32(2), np.float64(2), np.int64(2), torch.tensor(2.0), torch.tensor(2), np.array(2.0)):
        assert said(steered, inputs, steering_scale=two) == want
        assert said(steered, inputs, steering={"a": two}) == want
        with steered.steering("a", scale=two):
            assert steered.active_steering == {"a": 2.0}
    for rows in ([2, 2.0], (np.float32(2), torch.tensor(2)), np.array([2.0, 2.0]), torch.tensor([2.0, 2.0])):
        assert said(steered, inputs, steering_scale=rows) == want


@pytest.mark.parametrize("value", [5, 1.0, ..., {1: 2.0}, {None: 1.0}], ids=repr)
def test_steering_of_another_type_is_refused(steered, inputs, value):
    with pytest.raises(TypeError, match="Give the active adapters as"):
        said(steered, inputs, steering=value)
    assert not steered.forwards


@pytest.mark.parametrize(
    "arguments",
    [
        {"steering": []},
        {"steering": [None]},
        {"steering": [None, None, None]},
        {"steering": ["a", "a", "a"]},
        {"steering_scale": [0.0, 0.0, 0.0]},
        {"steering_scale": [1.0]},
        {"steering": None, "steering_scale": [1.0]},
        {"steering_processor": [ConstantVector(SITE, torch.zeros(32))], "steering": None, "steering_scale": [0.0]},
    ],
    ids=", ".join,
)
def test_a_list_of_wrong_length_is_refused_even_if_it_steers_nothing(steered, inputs, arguments):
    with pytest.raises(ValueError, match=r"entr|rows"):
        said(steered, inputs, **arguments)
    assert not steered.forwards


@pytest.mark.parametrize(
    "value",
    [[3], [3, 3, 3], [], torch.tensor([3]), 3, torch.tensor(3), [3.0, 4.0], [True, True], [[3, 4]], "34", [None, 3]],
    ids=repr,
)
@pytest.mark.parametrize("call", ["model", "forward"])
def test_prompt_lengths_that_do_not_match_are_refused(steered, inputs, value, call):
    function = steered if call == "model" else steered.forward
    with pytest.raises((TypeError, ValueError), match="prompt_lengths"):
        function(**inputs, prompt_lengths=value)


def test_prompt_lengths_of_any_integer_type(steered, inputs):
    want = steered(**inputs, prompt_lengths=torch.tensor([3, 4])).logits
    for value in ([3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4], dtype=torch.int32)):
        assert torch.equal(steered(**inputs, prompt_lengths=value).logits, want)
        assert torch.equal(steered.forward(**inputs, prompt_lengths=value).logits, want)


HALVES = {torch.float16: 1e5, torch.bfloat16: 1e39, torch.float32: 1e39}


@pytest.mark.parametrize(("dtype", "strength"), HALVES.items(), ids=str)
def test_a_strength_that_the_dtype_cannot_hold_is_refused(model, inputs, dtype, strength):
    model.to(dtype)
    vector = torch.linspace(-2, 2, 32)
    many = [ConstantVector(f"resid_post[{layer}]", vector, strength=1.0) for layer in range(3)]
    many[1].strength = strength
    for processors in ([many[1]], many):
        with pytest.raises(ValueError, match=rf"resid_post\[1\] is not finite in {dtype}.*strength.*steering_scale"):
            said(model, inputs, steering_processor=processors)
        with pytest.raises(ValueError, match="not finite"), model.steering_with(processors):
            model(**inputs)
    assert torch.isfinite(model(**inputs).logits).all()
    with pytest.raises(ValueError, match="not finite"):
        said(model, inputs, steering_processor=[ConstantVector(SITE, vector)], steering_scale=[0.0, strength])
    with pytest.raises(ValueError, match="not finite"):
        said(model, inputs, steering_processor=[ConstantVector(SITE, vector * math.nan)], do_sample=True)
    assert said(model, inputs, steering_processor=many, steering_scale=0.0) == said(model, inputs)


def test_a_forward_that_was_refused_leaves_no_decision_with_its_cache(model, inputs):
    cache = DynamicCache(config=model.config)
    with model.steering_with([ConstantVector(SITE, torch.full((32,), math.nan))]):
        with pytest.raises(ValueError, match="not finite"):
            model(**inputs, past_key_values=cache)
    assert cache not in model._steering.plain_forwards.sessions
