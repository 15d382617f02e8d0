"""CAST against the paper's formulas, written out, and a batch against its rows."""

import numpy as np
import pytest
import torch

from finesteer_hf import QueryStates, SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.methods.cast import CAST, CASTConfig, best_threshold, first_direction, similarity
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


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
def test_nonsense_is_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        CASTConfig(**field)
