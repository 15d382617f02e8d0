"""ITI against a plain pre-hook on the output projections."""

import functools

import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.methods.iti import ITIConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import check_files, fit_on_toy
from finesteer_hf.testing.toy import toy_model


torch.set_num_threads(1)


@functools.cache
def fitted(**settings):
    return fit_on_toy(ITIConfig(**{"num_heads": 5, "strength": 6.0, **settings}))[2]


def plain_loop(model, found, prompt, count):
    """The paper's: at each step the last position's heads are shifted; what was cached stays as it was."""

    def hook(layer, module, args):
        states = args[0].clone()
        for row, (at, head) in enumerate(found.config.heads):
            if at == layer:
                shift = found.config.strength * found.tensors["sigma"][row] * found.tensors["directions"][row]
                states[:, -1].view(-1, 4, states.shape[-1] // 4)[:, head] += shift
        return (states,)

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(functools.partial(hook, layer))
        for layer, block in enumerate(model.model.layers)
    ]
    out = model.generate(
        prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=count, do_sample=False
    )
    for handle in handles:
        handle.remove()
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("direction", ["centre", "probe"])
def test_tokens_are_those_of_a_plain_hook(direction):
    found = fitted(direction=direction)
    model = toy_model()
    SteeredModelForCausalLM.from_model(model, steering={"a": found})
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 54, (n,), generator=generator) for n in (5, 8, 3)]
    bench = Bench(model, prompts, 1.0, [], [])
    expected = [plain_loop(toy_model(), found, prompt, 10) for prompt in prompts]
    assert bench.generate([0, 1, 2], max_new_tokens=10) == expected
    assert bench.generate([0, 1, 2], max_new_tokens=10, steering=None) != expected


def test_heads_are_chosen_where_the_answers_differ():
    found = fitted()
    assert len(found.config.heads) == 5 == found.tensors["sigma"].shape[0]
    assert found.config.attention_heads == 4
    assert set(found.tensors) == {"directions", "sigma"}
    assert ITIConfig.paper().strength == 15.0 and ITIConfig.paper().num_heads == 48


def test_more_heads_than_the_model_has_are_all_of_them():
    assert len(fitted(num_heads=48).config.heads) == 12
    found = fit_on_toy(ITIConfig(num_heads=48, strength=1.0, layers=[1]))[2]
    assert {layer for layer, _ in found.config.heads} == {1}


def test_a_block_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="block 9: the model has layers 0 to 2"):
        fit_on_toy(ITIConfig(layers=[9]))


def test_files():
    check_files(fitted())


QUICK = {"left_padding", "prompt_lengths", "beams", "compiled_static_cache"}


@pytest.mark.parametrize(
    "feature", [pytest.param(f, marks=[] if f in QUICK else pytest.mark.slow) for f in sorted(FEATURES)]
)
def test_feature(feature):
    check_feature(feature, fitted())
