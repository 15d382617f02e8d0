"""CAST against the formulas of paper and code, written out, and a batch against its rows."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.decomposition import PCA

from finesteer_hf import QueryStates, SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods.cast import CAST, CASTConfig, best_threshold, first_direction, similarity
from finesteer_hf.methods.cast.method import explained_share
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy
from finesteer_hf.testing.toy import toy_general_prompts, toy_preferences


def test_similarity_is_the_paper_s():
    generator = torch.Generator().manual_seed(0)
    h, c = torch.randn(5, 8, generator=generator), 3 * torch.randn(8, generator=generator)
    projector = torch.outer(c, c) / (c @ c)
    for row, got in zip(h, similarity(h, c), strict=True):
        other = torch.tanh(projector @ row)
        torch.testing.assert_close(got, row @ other / row.norm() / other.norm())


def test_the_direction_is_the_first_component_of_centred_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(20, 6)) + np.arange(6), rng.normal(size=(20, 6))
    middle = (a + b) / 2
    centred = np.concatenate([a - middle, b - middle])
    expected = np.linalg.svd(centred)[2][0]
    expected *= np.sign((a - b).mean(0) @ expected)
    np.testing.assert_allclose(first_direction(a, b), expected, atol=1e-9)


def test_thresholds_are_those_of_the_best_f1_on_either_side():
    scores, labels = np.array([0.1, 0.2, 0.3, 0.7, 0.8]), np.array([0, 0, 1, 1, 1])
    assert best_threshold(scores, labels) == (pytest.approx(0.25), "above", 1.0)
    assert best_threshold(scores, 1 - labels) == (pytest.approx(0.25), "below", 1.0)
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=40), rng.integers(0, 2, 40)
    threshold, comparator, f1 = best_threshold(scores, labels)

    def f1_of(met):
        return 2 * (met & (labels == 1)).sum() / (met.sum() + labels.sum())

    grid = np.arange(-3, 3, 0.01)
    brute = max(f1_of(scores >= t) for t in grid), max(f1_of(scores <= t) for t in grid)
    assert f1 == pytest.approx(max(brute))
    assert f1_of(scores >= threshold if comparator == "above" else scores <= threshold) == pytest.approx(f1)


def two_conditions(rule):
    config = CASTConfig(
        layers=[1],
        condition_layers=[0, 1],
        thresholds=[0.3, 0.3],
        comparators=["above", "below"],
        rule=rule,
        strength=2.0,
        hidden_size=2,
        num_hidden_layers=2,
    )
    tensors = {"behaviors": torch.ones(1, 2), "conditions": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    return CAST(config, tensors)


@pytest.mark.parametrize(("rule", "gate"), [("or", [1, 1, 0, 1]), ("and", [1, 0, 0, 0])])
def test_rows_are_tested_each_by_itself_and_conditions_joined(rule, gate):
    processor = two_conditions(rule)
    along, across = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # Meets: both, the first, none, the second.
    first, second = torch.stack([along, along, across, across]), torch.stack([across, along, along, across])
    decision = processor.decide(QueryStates(dict(zip(processor.reads, (first, second), strict=True)), 4, first.device))
    assert decision.gate.tolist() == gate


def test_larger_means_what_it_says():
    """`above` fires where the similarity is above; the published code's `larger` fires where it is below."""
    processor = two_conditions("and")
    assert processor._signs == [1.0, -1.0]
    state = torch.tensor([[1.0, 0.0]])
    decision = processor.decide(QueryStates(dict.fromkeys(processor.reads, state), 1, state.device))
    assert similarity(state, torch.tensor([1.0, 0.0])).item() > 0.3
    assert decision.gate.item() == 0.0


def test_met_prompts_are_steered_as_by_a_plain_hook_and_others_not_at_all():
    _, _, adapter = fit_on_toy(CASTConfig(layers=[1, 2], condition_layers=[0, 1], strength=3.0, positions="all"))
    assert adapter.config.fit["report"]["held_out_f1"] > 0.7
    gates = []
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    for ids in torch.randint(6, 54, (12, 6), generator=torch.Generator().manual_seed(1)):
        plain = toy_model()
        with torch.no_grad():
            states = plain(ids[None], output_hidden_states=True).hidden_states
            queries = {site: states[site.layer + 1][:, -1] for site in adapter.build().reads}
            met = float(adapter.build().decide(QueryStates(queries, 1, ids.device)).gate)
            for layer, b in zip((1, 2), adapter.tensors["behaviors"], strict=True):
                plain.model.layers[layer].register_forward_hook(lambda m, args, out, b=b, met=met: out + 3 * met * b)
            torch.testing.assert_close(model(ids[None]).logits, plain(ids[None]).logits, atol=1e-4, rtol=1e-4)
        gates.append(met)
    assert set(gates) == {0.0, 1.0}


def test_the_default_is_the_published_steering():
    """By the published code's own formulas: one row, tested in the first forward, all tokens of each forward steered."""
    _, _, adapter = fit_on_toy(CASTConfig(layers=[1, 2], condition_layers=[0], strength=3.0))
    config, (c,) = adapter.config, adapter.tensors["conditions"].numpy()
    np.testing.assert_allclose(adapter.tensors["behaviors"].norm(dim=1), 1.0, atol=1e-6)
    steered, met = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter), []
    for ids in torch.randint(6, 54, (12, 1, 6), generator=torch.Generator().manual_seed(1)):
        plain = toy_model()
        with torch.no_grad():
            h = plain(ids, output_hidden_states=True).hidden_states[1][0, -1].numpy()
        projected = np.tanh(np.outer(c, c) / (c @ c) @ h)
        similarity_ = h @ projected / (np.linalg.norm(h) * np.linalg.norm(projected))
        # What the published code calls `smaller`: the threshold is smaller than the similarity.
        smaller = config.comparators[0] == "above"
        met.append(bool(similarity_ > config.thresholds[0]) == smaller)
        for layer, b in zip((1, 2), adapter.tensors["behaviors"], strict=True) if met[-1] else ():
            plain.model.layers[layer].register_forward_hook(lambda m, args, out, b=b: out + 3.0 * b)
        said = plain.generate(ids, max_new_tokens=8, do_sample=False)
        assert steered.generate(ids, max_new_tokens=8, do_sample=False).tolist() == said.tolist()
    assert set(met) == {True, False}


def test_a_condition_of_means_is_tested_as_the_code_s_default_mode_does():
    """`condition_threshold_comparison_mode="mean"`; the direction comes from means over all tokens as well."""
    config = CASTConfig.paper(layers=[1, 2], condition_layers=[1], strength=3.0)
    _, tokenizer, adapter = fit_on_toy(config)
    assert adapter.config.requires == ["prompt_mean"]
    (c,), met = adapter.tensors["conditions"].numpy(), []
    steered = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    prompts = [row["prompt"] for row in (*toy_preferences()[:6], *toy_general_prompts()[:6])]
    for prompt in prompts:
        ids, plain = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids, toy_model()
        with torch.no_grad():
            h = plain(ids, output_hidden_states=True).hidden_states[2][0].mean(dim=0).numpy()
        projected = np.tanh(np.outer(c, c) / (c @ c) @ h)
        above = h @ projected / (np.linalg.norm(h) * np.linalg.norm(projected)) > adapter.config.thresholds[0]
        met.append(bool(above) == (adapter.config.comparators[0] == "above"))
        for layer, b in zip((1, 2), adapter.tensors["behaviors"], strict=True) if met[-1] else ():
            plain.model.layers[layer].register_forward_hook(lambda m, args, out, b=b: out + 3.0 * b)
        said = plain.generate(ids, max_new_tokens=8, do_sample=False)
        assert steered.generate(ids, max_new_tokens=8, do_sample=False).tolist() == said.tolist()
    # The rows' prompts meet the condition, the general ones do not, but for a few.
    assert sum(met[:6]) >= 5 and sum(met[6:]) <= 1


@pytest.mark.parametrize("vector", ["pca", "mean"])
def test_lengths_of_a_behaviour(vector):
    fits = {
        length: fit_on_toy(CASTConfig(layers=[1], condition_layers=[0], strength=1.0, vector=vector, length=length))[2]
        for length in ("unit", "mean", "variance")
    }
    unit, mean, variance = (fit.tensors["behaviors"][0] for fit in fits.values())
    assert float(unit.norm()) == pytest.approx(1.0, abs=1e-6)
    assert 0 < float(variance.norm()) < 1
    for other in (mean, variance):
        assert float(torch.cosine_similarity(unit, other, dim=0)) == pytest.approx(1.0, abs=1e-5)
    assert float(mean.norm()) > 1


def test_the_variance_that_is_explained_is_that_of_centred_pairs():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(30, 5)) + np.arange(5), rng.normal(size=(30, 5))
    centred = np.concatenate([(a - b) / 2, (b - a) / 2])
    published = PCA(n_components=1).fit(centred)
    direction = first_direction(a, b)
    np.testing.assert_allclose(np.abs(published.components_[0] @ direction), 1.0, atol=1e-9)
    assert explained_share(a - b, direction) == pytest.approx(published.explained_variance_ratio_[0])


def old_files(folder):
    """An adapter as it was written when there was one condition and one behaviour."""
    config = {
        "format_version": 1,
        "steering_type": "CAST",
        "base_model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "positions": "generated",
        "strength": 2.0,
        "layers": [1, 2],
        "vector": "pca",
        "pool": "answer_mean",
        "condition_layers": [0, 1],
        "num_conditions": 2,
        "rule": "and",
        "thresholds": [0.1, 0.2],
        "comparators": ["above", "below"],
        "requires": [],
    }
    generator = torch.Generator().manual_seed(5)
    tensors = {name: 4 * torch.randn(2, 32, generator=generator) for name in ("behaviors", "conditions")}
    (folder / "steering_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "steering_model.safetensors")
    return config, tensors


def test_files_of_one_condition_and_one_behaviour_load_and_steer_as_before(tmp_path):
    config, tensors = old_files(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = SteeringAdapter.from_pretrained(tmp_path)
    assert {name: getattr(adapter.config, name) for name in config if name[:7] not in ("format_", "steerin")} == {
        name: value for name, value in config.items() if name[:7] not in ("format_", "steerin")
    }
    processor = adapter.build()
    states = {
        site: torch.randn(200, 32, generator=torch.Generator().manual_seed(site.layer)) for site in processor.reads
    }
    decision = processor.decide(QueryStates(states, 200, torch.device("cpu")))
    sims = [similarity(states[site], c) for site, c in zip(processor.reads, tensors["conditions"], strict=True)]
    margins = torch.stack([sims[0] - 0.1, 0.2 - sims[1]])
    torch.testing.assert_close(decision.record["score"], margins.amin(dim=0), rtol=0, atol=0)
    assert set(decision.record) == {"score"}
    met = (margins >= 0).all(dim=0)
    assert decision.gate.tolist() == met.float().tolist()
    assert 0 < met.sum() < 200
    for site, b in zip(processor.writes, tensors["behaviors"], strict=True):
        torch.testing.assert_close(decision.vectors[site][met], b.expand(int(met.sum()), -1), rtol=0, atol=0)
    assert processor.positions == "generated"


def test_what_paper_and_code_fix():
    config = CASTConfig.paper(layers=[15, 16], strength=1.5)
    assert (config.positions, config.vector, config.length, config.pool) == ("all", "pca", "unit", "answer_mean")
    assert config.condition_pool == "mean"
    assert (config.layers, config.strength, config.rule) == ([15, 16], 1.5, "or")
    assert CASTConfig.paper(positions="generated").positions == "generated"


def test_auto_keeps_the_best_layers():
    _, _, adapter = fit_on_toy(CASTConfig(layers=[2], num_conditions=2, rule="and", strength=1.0, vector="mean"))
    table = adapter.config.fit["report"]["conditions"]
    assert [row["layer"] for row in table] == adapter.config.condition_layers
    assert len(table) == 2


def test_thresholds_must_match_conditions():
    config = CASTConfig(layers=[0], condition_layers=[0], strength=1.0, hidden_size=2, num_hidden_layers=2)
    with pytest.raises(AdapterFileError, match="thresholds"):
        CAST(config, {"behaviors": torch.ones(1, 2), "conditions": torch.ones(1, 2)})


@pytest.mark.parametrize("field", [{"rule": "xor"}, {"comparators": ["larger"]}, {"num_conditions": 0}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        CASTConfig(**field)
