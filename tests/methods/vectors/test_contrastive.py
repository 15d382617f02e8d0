"""CONTRASTIVE against two plain forwards a step."""

import pytest
import torch

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.methods.contrastive import ContrastiveConfig
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


@pytest.fixture(scope="module")
def adapter():
    return fit_on_toy(ContrastiveConfig(layer=1, vector_strength=2.0, strength=1.5))[2]


def by_two_forwards(adapter, ids, steps, alpha):
    """Greedy tokens of base + alpha (steered - base), every step two forwards over the whole text, without a cache."""
    base, hooked = toy_model(), toy_model()
    start = ids.shape[1] - 1

    def add(module, args, out):
        out = out.clone()
        out[:, start:] += 2.0 * adapter.tensors["vector"]
        return out

    hooked.model.layers[1].register_forward_hook(add)
    with torch.no_grad():
        for _ in range(steps):
            a, b = base(ids, use_cache=False).logits[:, -1], hooked(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, (a + alpha * (b - a)).argmax(-1, keepdim=True)], dim=1)
    return ids


def prompts(seed=0):
    return torch.randint(6, 54, (3, 6), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_generate_is_two_plain_forwards_a_step(adapter, scale):
    ids = prompts()
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    got = model.generate(ids, max_new_tokens=8, do_sample=False, steering_scale=scale)
    assert torch.equal(got, by_two_forwards(adapter, ids, 8, 1.5 * scale))


def test_the_unsteered_stream_has_a_cache_of_its_own(adapter):
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    model.generate(prompts(), max_new_tokens=5, do_sample=False)
    # Prompt, then one token at a time, twice each: steered and unsteered.
    assert widths == [6, 6] + [1, 1] * 4


def test_strength_one_is_the_vector_alone(adapter):
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    ids = prompts()
    got = model.generate(ids, max_new_tokens=8, do_sample=False, steering_scale=1 / 1.5)
    assert torch.equal(got, by_two_forwards(adapter, ids, 8, 1.0))


def test_a_plain_forward_is_contrasted_too(adapter):
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    ids = by_two_forwards(adapter, prompts(), 5, 1.5)
    with torch.no_grad():
        logits = model(ids, prompt_lengths=torch.tensor([6] * 3)).logits
        assert torch.equal(logits[:, 5:-1].argmax(-1), ids[:, 6:])
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="cache"):
            model(ids[:, -1:], past_key_values=cache)


def test_auto_fits_vector_and_contrast():
    _, _, adapter = fit_on_toy(ContrastiveConfig(layer=1))
    assert isinstance(adapter.config.vector_strength, float)
    assert adapter.config.fit["report"]["dose_response"]


@pytest.mark.parametrize("field", [{"positions": "prompt"}, {"pool": "all"}, {"strength": "norm:1"}, {"layer": -1}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        ContrastiveConfig(**field)
