"""SADI against the paper's formula in plain hooks, and the published code's replacement."""

import functools
import warnings

import numpy as np
import pytest
import torch
from planted import PlantedData
from transformers import LlamaConfig, LlamaForCausalLM

from finesteer_hf import Site, SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError, AdapterMismatchError, SiteError
from finesteer_hf.fitting import fit_steering
from finesteer_hf.fitting.data.lint import DatasetWarning
from finesteer_hf.methods.sadi import COUNTS, SADI, STRENGTHS, SADIConfig, largest
from finesteer_hf.testing import toy_general_prompts, toy_model, toy_preferences, toy_tokenizer
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.tiny_models import tiny_model


@functools.cache
def fitted(**settings):
    return fit_on_toy(SADIConfig(**{"num_elements": 3, "strength": 4.0, **settings}))[2]


ELEMENTS = ["head", "neurons", "hidden"]


def dense_masks(found, model):
    """For each block with chosen elements its mask over the whole width."""
    heads = found.config.elements == "head"
    width = model.config.hidden_size // model.config.num_attention_heads if heads else 1
    return {
        layer: row.repeat_interleave(width).float()
        for layer, row in zip(found.config.element_layers, found.tensors["mask"], strict=True)
    }


def hook_each(model, found, change):
    """Put `change(layer, states)` on the steered sites of a plain model."""
    for layer in dense_masks(found, model):
        block = model.model.layers[layer]
        inner = {"head": block.self_attn.o_proj, "neurons": block.mlp.down_proj}.get(found.config.elements)
        if inner is not None:
            inner.register_forward_pre_hook(lambda m, args, at=layer: (change(at, args[0]),))
        else:
            block.register_forward_hook(lambda m, args, out, at=layer: change(at, out))


@pytest.mark.parametrize("elements", ELEMENTS)
def test_newest_tokens_are_amplified_as_in_the_paper(elements):
    found, plain = fitted(elements=elements), toy_model()
    masks = dense_masks(found, plain)

    def newest(layer, states):
        states = states.clone()
        states[:, -1] = states[:, -1] + found.config.strength * (states[:, -1] * masks[layer])
        return states

    hook_each(plain, found, newest)
    steered = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": found})
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(6, 54, (n,), generator=generator) for n in (5, 8, 3)]
    expected = [
        plain.generate(p[None], attention_mask=torch.ones(1, len(p)), max_new_tokens=10, do_sample=False)[0, len(p) :]
        for p in prompts
    ]
    bench = Bench(steered, prompts, 1.0, [], [])
    assert bench.generate([0, 1, 2], max_new_tokens=10) == [row.tolist() for row in expected]
    assert bench.generate([0, 1, 2], max_new_tokens=10, steering=None) != [row.tolist() for row in expected]


@pytest.mark.parametrize("elements", ELEMENTS)
def test_the_published_code_replaces_the_query_s_elements_by_unsteered_ones(elements):
    found, plain = fitted(elements=elements, compat="official"), toy_model()
    assert len(found.config.element_layers) > 1 and "compat:official" in found.config.requires
    masks, query, first = dense_masks(found, plain), 4, {}
    text = torch.randint(6, 54, (1, 8), generator=torch.Generator().manual_seed(2))

    def remember(layer, states):
        first[layer] = states
        return states

    def replace(layer, states):
        states = states.clone()
        states[:, query] = torch.where(
            masks[layer] > 0, found.config.strength * first[layer][:, query], states[:, query]
        )
        return states

    with torch.no_grad():
        unsteered = toy_model()
        hook_each(unsteered, found, remember)
        unsteered(text)
        hook_each(plain, found, replace)
        expected = plain(text).logits
        model = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": found})
        got = model(text, prompt_lengths=torch.tensor([query + 1])).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        with model.steering("a", scale=0.5):
            half = model(text, prompt_lengths=torch.tensor([query + 1])).logits
    assert not torch.allclose(half, expected, atol=1e-3)
    paper = SteeredModelForCausalLM.from_model(toy_model(), steering={"a": fitted(elements=elements)})
    assert not torch.allclose(paper(text, prompt_lengths=torch.tensor([query + 1])).logits, expected, atol=1e-3)


@pytest.mark.parametrize("elements", ELEMENTS)
def test_the_mask_marks_the_largest_mean_differences_of_all_layers(elements):
    data, config = PlantedData(), SADIConfig(elements=elements, num_elements=5, strength=1.0)
    result = SADI.fit(data, config)
    differences = []
    for layer in range(data.info.num_layers):
        found = data.shifts(config.site(layer), "fit", "calibration").mean(0)
        differences.append(found.reshape(data.info.num_heads, -1).mean(1) if elements == "head" else found)
    chosen = np.zeros_like(np.stack(differences))
    chosen[result.config.element_layers] = result.tensors["mask"]
    assert chosen.sum() == 5
    # Layers of this world share their shifts, so there are ties: compare values, not places.
    best = np.sort(np.stack(differences), axis=None)[:-6:-1]
    np.testing.assert_allclose(np.sort(np.stack(differences)[chosen == 1])[::-1], best, atol=1e-5)
    np.testing.assert_allclose([row["difference"] for row in result.report["elements"]], best, atol=1e-5)


def test_planted_elements_are_found():
    class Shifted(PlantedData):
        def chosen(self, site, part, pool="answer_mean"):
            states = self.rejected(site, part, pool).copy()
            if site == Site("resid_post", 2):
                states[:, [3, 11]] += 1.5
            return states

    result = SADI.fit(Shifted(), SADIConfig(elements="hidden", num_elements=2, strength=1.0))
    assert result.config.element_layers == [2]
    assert result.tensors["mask"].nonzero()[:, 1].tolist() == [3, 11]
    assert all(row["held_out_difference"] == pytest.approx(1.5, abs=1e-5) for row in result.report["elements"])


def test_ties_go_to_the_earlier_and_the_count_is_capped():
    assert largest(np.ones((2, 2)), 3).tolist() == [[True, True], [True, False]]
    assert largest(np.array([[-1.0, -3.0], [2.0, -9.0]]), 2).tolist() == [[True, False], [True, False]]
    assert largest(np.ones((2, 2)), 9).all()


@pytest.mark.parametrize("elements", ["hidden", pytest.param("neurons", marks=pytest.mark.slow)])
def test_auto_takes_the_count_that_brings_held_out_answers_nearest(elements):
    _, _, found = fit_on_toy(SADIConfig(elements=elements, layers=[1, 2]))
    report = found.config.fit["report"]
    table = report["counts_tried"]
    assert [row["count"] for row in report["counts_screened"]] == [c for c in COUNTS[elements] if c <= 128]
    assert {row["count"] for row in table} < {row["count"] for row in report["counts_screened"]}
    best = max(table, key=lambda row: (not row["broken"], row["preference"]))
    assert found.config.num_elements == best["count"] == int(found.tensors["mask"].sum())


@pytest.mark.parametrize("elements", ELEMENTS)
def test_the_published_code_s_strengths_are_what_is_searched_in_its_own_form(elements):
    config = SADIConfig(elements=elements, layers=[1, 2], compat="official")
    report = fit_on_toy(config)[2].config.fit["report"]
    low, _, middle = STRENGTHS[elements][:3]
    assert {row["strength"] for row in report["counts_screened"]} <= {float(low), float(middle)}
    assert len(report["counts_tried"]) == 4


def activations(elements_of, text):
    """The output of block 1's activation function, and what its last projection takes, `[tokens, neurons]`."""
    model, seen = toy_model(), []
    mlp = model.model.layers[1].mlp
    mlp.act_fn.register_forward_hook(elements_of)
    mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        model(text)
    return seen


def test_amplifying_what_the_activation_function_gives_amplifies_what_the_last_projection_takes():
    """The published code writes at the activation function, before the product with the up projection."""
    text = torch.randint(6, 54, (1, 8), generator=torch.Generator().manual_seed(2))
    scale = torch.ones(64).index_fill(0, torch.tensor([3, 20]), 5.0)
    _, plain = activations(lambda module, args, output: output, text)
    inner, taken = activations(lambda module, args, output: output * scale, text)
    torch.testing.assert_close(taken, plain * scale)
    assert not torch.allclose(inner, taken, atol=1e-3)


def test_a_neuron_that_speaks_for_wanted_answers_is_found():
    model = model_with_a_truth_dimension(5)
    with torch.no_grad():
        # It takes the dimension in, and no other neuron differs so much between the answers.
        for projection in (model.model.layers[2].mlp.gate_proj, model.model.layers[2].mlp.up_proj):
            projection.weight[9] = 0.0
            projection.weight[9, 5] = 30.0
    config = SADIConfig(elements="neurons", num_elements=1, strength=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        found = fit_steering(model, toy_tokenizer(), toy_preferences(), config, general_dataset=None, progress=False)
    assert found.config.element_layers == [2] and found.config.requires == ["elements:neurons"]
    assert found.tensors["mask"].shape == (1, 64) and found.tensors["mask"].nonzero().tolist() == [[0, 9]]


def test_neurons_of_another_width_are_refused():
    found = fitted(elements="neurons")
    config = LlamaConfig(**{**toy_model().config.to_dict(), "intermediate_size": 48})
    with pytest.raises(AdapterMismatchError, match=r"neurons are together \[64\] wide at mlp_act.*are 48"):
        SteeredModelForCausalLM.from_model(LlamaForCausalLM(config), steering={"a": found})


def test_blocks_of_experts_have_no_neurons():
    model = tiny_model("MixtralForCausalLM")
    config = SADIConfig(elements="neurons", num_elements=1, strength=1.0)
    with pytest.raises(SiteError, match=r"no mlp_act\[0\].*MixtralDecoderLayer.*no feed-forward that all tokens pass"):
        fit_steering(model, toy_tokenizer(), toy_preferences(), config, general_dataset=None, progress=False)


def model_with_a_truth_dimension(dimension):
    """A toy model in which one dimension of the stream speaks for `oak`, and is larger after it than after `fox`."""
    model, tokenizer = toy_model(), toy_tokenizer()
    with torch.no_grad():
        for word, token in tokenizer.get_vocab().items():
            model.model.embed_tokens.weight[token, dimension] = 16.0 if word.startswith("oak") else 1.0
            model.lm_head.weight[token, dimension] = (word.startswith("oak") - word.startswith("fox")) / 2
        for block in model.model.layers:
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight[dimension] = 0.0
    return model


def test_wanted_answers_become_likelier_where_a_dimension_speaks_for_them():
    model = model_with_a_truth_dimension(5)
    config = SADIConfig(elements="hidden", num_elements=1, layers=[2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DatasetWarning)
        found = fit_steering(
            model, toy_tokenizer(), toy_preferences(), config, general_dataset=toy_general_prompts(), progress=False
        )
    assert found.tensors["mask"].nonzero().tolist() == [[0, 5]]
    at = {point["strength"]: point for point in found.config.fit["report"]["dose_response"]}
    chosen, base = at[found.config.strength], at[0.0]
    assert chosen["bottleneck"] > base["bottleneck"]


@pytest.mark.parametrize(
    "field",
    [{"elements": "neurones"}, {"num_elements": 0}, {"compat": "paper"}, {"positions": "all"}, {"layers": [2, 1]}],
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        SADIConfig(**field)


def test_a_mask_of_anything_but_zeros_and_ones_is_refused():
    found = fitted()
    with pytest.raises(AdapterFileError, match="zeros and ones"):
        SADI(found.config, {"mask": found.tensors["mask"] * 2})
