"""Steering on a GPU: every feature of the suite, no added waits for the device, and fits that agree with the CPU's."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

from finesteer_hf import CAAConfig, FineSteerConfig, SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.registry import get_steering_method
from finesteer_hf.fitting import fit_steering
from finesteer_hf.methods.alphasteer import AlphaSteerConfig
from finesteer_hf.methods.angular import AngularConfig
from finesteer_hf.methods.cast import CASTConfig
from finesteer_hf.methods.fasb import FASBConfig
from finesteer_hf.methods.was import WASConfig
from finesteer_hf.testing import (
    FEATURES,
    check_feature,
    toy_general_prompts,
    toy_model,
    toy_preferences,
    toy_tokenizer,
)
from finesteer_hf.testing.conformance import fit_on_toy


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = {
    "finesteer": FineSteerConfig(
        layer=1, gate_score="state", experts="mixture", num_experts=2, residual_rank=2, strength=4.0, positions="all"
    ),
    "finesteer-refined": FineSteerConfig(
        layer=0,
        write_site=["resid_post[0]", "resid_post[2]"],
        target="gradient",
        gate_score="state",
        experts="reduced_rank",
        residual_rank=2,
        refine=1,
        strength=12.0,
        positions="generated",
    ),
    "caa": CAAConfig(layer=1, strength=4.0),
    "cast": CASTConfig(layers=[0, 1], condition_layers=[0, 1], strength=4.0, positions="all"),
    "alphasteer": AlphaSteerConfig(layers=[1, 2], strength=4.0),
    "adaptive": AngularConfig(mode="adaptive", layers=[0, 1], strength=1.0),
    "fasb": FASBConfig(num_heads=4, threshold=0.3, backtrack=3, strength=8.0),
    "was": WASConfig(strength=8.0),
}


@functools.cache
def fitted(name: str) -> SteeringAdapter:
    return fit_on_toy(CONFIGS[name])[2]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("feature", sorted(FEATURES))
def test_every_feature_of_the_suite(name, feature):
    check_feature(feature, fitted(name), toy_model().cuda())


def waits(model, tokens: int, **kwargs) -> int:
    """How often a call of `generate` waits for the device."""
    ids = torch.randint(6, 54, (3, 7), generator=torch.Generator().manual_seed(0)).cuda()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", ["finesteer", "caa", "cast", "alphasteer", "adaptive", "was"])
def test_a_decode_step_waits_no_more_than_an_unsteered_one(name):
    model = SteeredModelForCausalLM.from_model(toy_model().cuda(), steering={"a": fitted(name)})
    waits(model, 2)

    def a_step(**kwargs) -> int:
        return waits(model, 9, **kwargs) - waits(model, 8, **kwargs)

    assert a_step() == a_step(steering=None)


@pytest.mark.parametrize("name", ["finesteer", "finesteer-refined", "caa", "alphasteer"])
def test_a_fit_agrees_with_the_processor_s(name):
    config, found = CONFIGS[name], fitted(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = fit_steering(
            toy_model().cuda(), toy_tokenizer(), toy_preferences(), config,
            general_dataset=toy_general_prompts(), progress=False, seed=0,
        )  # fmt: skip
    assert adapter.tensors.keys() == found.tensors.keys()
    for key, tensor in found.tensors.items():
        assert adapter.tensors[key].device.type == "cpu"
        torch.testing.assert_close(adapter.tensors[key].float(), tensor.float(), rtol=2e-3, atol=2e-3, msg=key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_a_plain_hook(dtype):
    adapter = fitted("caa")
    model = toy_model().cuda().to(dtype)
    ids = torch.randint(6, 54, (2, 7), generator=torch.Generator().manual_seed(1)).cuda()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    vector = float(adapter.config.strength) * adapter.tensors["vector"].cuda()

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        # From the prompt's last token on.
        hidden[:, -1] += vector.to(dtype)
        return output

    handle = model.model.layers[adapter.config.layer].register_forward_hook(add)
    expected = model.generate(ids, **settings)
    handle.remove()
    plain = model.generate(ids, **settings)
    steered = SteeredModelForCausalLM.from_model(model, steering={"a": adapter})
    assert torch.equal(steered.generate(ids, **settings), expected)
    assert not torch.equal(plain, expected)


def test_parameters_are_copied_to_the_device_once():
    adapter = fitted("finesteer")
    processor = get_steering_method("FINESTEER").method_cls(adapter.config, adapter.tensors)
    first = processor.parameters_on(torch.device("cuda", 0))
    assert all(tensor.is_cuda for tensor in first.values())
    assert processor.parameters_on(torch.device("cuda", 0)) is first
