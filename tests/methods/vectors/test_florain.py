"""FLORAIN at run time against plain hooks, and its fit."""

import functools

import numpy as np
import pytest
import torch
from planted import PlantedData

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators.head_maps import HeadMap
from finesteer_hf.methods import florain
from finesteer_hf.methods.florain import Florain, FlorainConfig
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import fit_on_toy


@functools.cache
def fitted(**settings):
    return fit_on_toy(FlorainConfig(layer=1, strength=1.0, epochs=40, **settings))[2]


def test_a_fit_moves_held_out_answers_towards_the_wanted_ones():
    result = Florain.fit(PlantedData(), FlorainConfig(layer=2, rank=4, epochs=60, strength=1.0))
    loss = result.report["validation_loss"]
    assert loss["steered"] < 0.7 * loss["unsteered"]
    assert result.tensors["weight"].shape == (4, 6, 4) and result.tensors["shift"].shape == (4, 6)
    assert result.config.attention_heads == 4


def test_answers_that_rows_repeat_count_once():
    class Twice(PlantedData):
        def chosen(self, site, part, pool="answer_mean"):
            return np.repeat(super().chosen(site, part, pool), 2, axis=0)

        def rejected(self, site, part, pool="answer_mean"):
            return np.repeat(super().rejected(site, part, pool), 2, axis=0)

        def prompts(self, part):
            return np.repeat(super().prompts(part), 2)

    config = FlorainConfig(layer=1, rank=2, epochs=3, strength=1.0)
    once, twice = Florain.fit(PlantedData(rows=60), config), Florain.fit(Twice(rows=60), config)
    assert all(torch.equal(once.tensors[name], twice.tensors[name]) for name in once.tensors)


def test_of_the_layers_with_the_best_probes_the_one_that_steers_best_is_taken():
    found = fit_on_toy(FlorainConfig(epochs=20))[2]
    report = found.config.fit["report"]
    probed = sorted(report["layers"], key=lambda row: -row["probe_accuracy"])
    assert probed[0]["layer"] == report["layers_tried"][0]["layer"]
    best = max(report["layers_tried"], key=lambda row: (row["kl"] <= 0.1, row["bottleneck"]))
    assert found.config.layer == report["layer"] == best["layer"]


def plain_tokens(found, prompts, keep=1.0):
    """Greedy tokens with a hook that maps the newest position's heads; `keep` is the factor of the "a +"."""
    model, maps = toy_model(), HeadMap(**found.tensors)

    def hook(module, args):
        states = args[0].clone()
        heads = states[:, -1].unflatten(-1, (4, -1))
        states[:, -1] = (keep * heads + maps.displacement(heads)).flatten(-2)
        return (states,)

    model.model.layers[found.config.layer].self_attn.o_proj.register_forward_pre_hook(hook)
    settings = {"max_new_tokens": 10, "do_sample": False}
    return [
        model.generate(p[None], attention_mask=torch.ones(1, len(p)), **settings)[0, len(p) :].tolist()
        for p in prompts
    ]


def test_tokens_are_those_of_a_plain_hook_that_keeps_the_state():
    found = fitted()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 54, (n,), generator=generator) for n in (5, 8, 3)]
    model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": found})
    got = Bench(model, prompts, 1.0, [], []).generate([0, 1, 2], max_new_tokens=10)
    assert got == plain_tokens(found, prompts)
    assert got != plain_tokens(found, prompts, keep=0.0), (
        "the published code drops the state that the map was trained with"
    )


def test_half_strength_and_long_prompts_in_chunks(monkeypatch):
    found = fitted(positions="all")
    model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": found})
    text = torch.randint(6, 54, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(text).logits
        monkeypatch.setattr(florain, "VALUES", 1)
        torch.testing.assert_close(model(text).logits, whole, atol=1e-4, rtol=1e-4)
        plain, maps = toy_model(), HeadMap(**found.tensors)

        def half(module, args):
            heads = args[0].unflatten(-1, (4, -1))
            return ((heads + 0.5 * maps.displacement(heads)).flatten(-2),)

        plain.model.layers[1].self_attn.o_proj.register_forward_pre_hook(half)
        with model.steering("a", scale=0.5):
            torch.testing.assert_close(model(text).logits, plain(text).logits, atol=1e-4, rtol=1e-4)


def test_the_paper_s_sizes():
    config = FlorainConfig.paper(layer=12)
    assert (config.rank, config.epochs, config.learning_rate, config.strength) == (32, 1000, 2e-4, 1.0)


def test_answers_that_do_not_vary_are_refused():
    class Same(PlantedData):
        def chosen(self, site, part, pool="answer_mean"):
            return np.ones_like(super().chosen(site, part, pool))

    with pytest.raises(DatasetError, match="all the same"):
        Florain.fit(Same(), FlorainConfig(layer=1, strength=1.0))


def test_tensors_that_disagree_are_refused():
    found = fitted()
    with pytest.raises(AdapterFileError, match="must agree"):
        Florain(found.config, {**found.tensors, "shift": torch.zeros(4, 7)})


@pytest.mark.parametrize(
    "field", [{"rank": 0}, {"alpha": 1.5}, {"delta": -1.0}, {"shrink": 0.0}, {"strength": "norm:0.1"}]
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        FlorainConfig(**field)
