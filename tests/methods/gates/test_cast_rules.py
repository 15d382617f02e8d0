"""CAST's rules against brute force: several conditions and behaviours, each row of a batch by itself."""

import itertools

import numpy as np
import pytest
import torch

from finesteer_hf import QueryStates, SteeredModelForCausalLM, SteeringAdapter
from finesteer_hf.adapters.config import SteeringConfig
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.methods.cast import CAST, CASTConfig, Rule
from finesteer_hf.methods.cast.conditions import sides_of
from finesteer_hf.sites import Site
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


RULES = ["if C1 then B1", "if C2 and not C1 then B2", "if C3 or C1 and C2 then B2", "IF not C3 THEN B1"]
# In Python, `and` binds closer than `or`, as in the rules.
SPELLED = ["c1", "c2 and not c1", "c3 or c1 and c2", "not c3"]


@pytest.mark.parametrize(("text", "spelled"), zip(RULES, SPELLED, strict=True))
def test_a_rule_agrees_with_python(text, spelled):
    rule = Rule.parse(text)
    met = torch.tensor(list(itertools.product([False, True], repeat=3)))
    expected = [eval(spelled, dict(zip(("c1", "c2", "c3"), row, strict=True))) for row in met.tolist()]
    assert rule.holds(met).tolist() == expected
    margins = torch.where(met, 0.5, -0.5)
    assert (rule.margin(margins) >= 0).tolist() == expected
    assert rule.behavior == int(text[-1]) - 1


@pytest.mark.parametrize(
    "text",
    [
        "C1 then B1",
        "if C1",
        "if C0 then B1",
        "if then B1",
        "if C1 C2 then B1",
        "if C1 xor C2 then B1",
        "if (C1) then B1",
    ],
)
def test_invalid_rules_are_refused_with_an_example(text):
    with pytest.raises(ValueError, match="if C1 and not C2 then B1"):
        Rule.parse(text)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rules": ["if C2 then B1"]}, "only C1 to C1"),
        ({"rules": ["if C1 then B3"]}, "only B1 to B1"),
        ({"conditions": ["sun", "sea"]}, r"No rule names \['C2'\]"),
        ({"behaviors": ["sun", "sea"]}, r"No rule names \['B2'\]"),
        ({"rules": []}, "No rule names"),
        ({"conditions": ["sun", "sun"], "rules": ["if C1 or C2 then B1"]}, "different"),
        ({"behaviors": []}, "at least one"),
        ({"behavior_strengths": [1.0, 2.0]}, "2 numbers for 1"),
        ({"condition_layers": [[0], [1]]}, "lists for 2 conditions"),
    ],
)
def test_rules_and_names_must_fit(fields, says):
    with pytest.raises(ValueError, match=says):
        CASTConfig(**fields)


def by_hand(rule="or", seed=0):
    """Three conditions, of which the second is tested at two layers, and two behaviours at two layers."""
    generator = torch.Generator().manual_seed(seed)
    config = CASTConfig(
        conditions=["a", "b", "c"],
        behaviors=["a", "b"],
        rules=RULES[:3],
        behavior_strengths=[1.0, -0.5],
        layers=[1, 2],
        condition_layers=[[0], [0, 1], [1]],
        thresholds=[0.1, 0.12, 0.15, 0.1],
        comparators=["above", "below", "above", "below"],
        rule=rule,
        strength=3.0,
        hidden_size=32,
        num_hidden_layers=3,
    )
    tensors = {name: torch.randn(4, 32, generator=generator) for name in ("behaviors", "conditions")}
    return config, tensors


def brute_force(config, tensors, states):
    """What is added at each layer to one row, `{layer: [32]}`, and which conditions its states meet."""
    met, at = {}, 0
    for number, layers in enumerate(config.condition_layers):
        tests = []
        for layer in layers:
            h, c = states[layer], tensors["conditions"][at]
            projected = torch.tanh(torch.outer(c, c) @ h / (c @ c))
            similarity = float(h @ projected / h.norm() / projected.norm())
            above = config.comparators[at] == "above"
            tests.append(similarity >= config.thresholds[at] if above else similarity <= config.thresholds[at])
            at += 1
        met[f"c{number + 1}"] = any(tests) if config.rule == "or" else all(tests)
    called = {int(text[-1]) - 1 for text, said in zip(RULES[:3], SPELLED[:3], strict=True) if eval(said, dict(met))}
    added = {}
    for place, layer in enumerate(config.layers):
        vectors = [config.behavior_strengths[b] * tensors["behaviors"][2 * b + place] for b in sorted(called)]
        added[layer] = config.strength * torch.stack(vectors).sum(0) if vectors else torch.zeros(32)
    return added, tuple(met.values()), called


@pytest.mark.parametrize("rule", ["or", "and"])
def test_rows_of_a_mixed_batch_get_what_brute_force_gives_each(rule):
    config, tensors = by_hand(rule)
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=SteeringAdapter(config, tensors))
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(6, 54, (3 + row % 4,), generator=generator) for row in range(16)]
    ids, mask = torch.zeros(16, 6, dtype=torch.long), torch.zeros(16, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        output_steering=True,
        return_dict_in_generate=True,
    )
    seen, combinations = out.steering["default"], set()
    for row, prompt in enumerate(prompts):
        plain = toy_model()
        with torch.no_grad():
            hidden = plain(prompt[None], output_hidden_states=True).hidden_states
        added, met, called = brute_force(config, tensors, {layer: hidden[layer + 1][0, -1] for layer in (0, 1)})
        for layer, vector in added.items():
            plain.model.layers[layer].register_forward_hook(lambda m, args, output, v=vector: output + v)
        said = plain.generate(prompt[None], max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        assert out.sequences[row, 6:].tolist() == said.tolist()
        assert (seen["conditions"][row] >= 0).tolist() == list(met)
        assert seen["behaviors"][row].tolist() == [float(b in called) for b in (0, 1)]
        assert seen["gate"][row] == float(bool(called)) == float(seen["score"][row] >= 0)
        combinations.add(frozenset(called))
    assert len(combinations) >= 3


def test_a_row_without_a_rule_is_bit_identical_to_the_base():
    config, tensors = by_hand()
    processor = CAST(config, tensors)
    states = dict.fromkeys(processor.reads, torch.randn(64, 32, generator=torch.Generator().manual_seed(4)))
    decision = processor.decide(QueryStates(states, 64, torch.device("cpu")))
    shut = decision.gate == 0
    assert 0 < shut.sum() < 64
    assert all((vector[shut] == 0).all() for vector in decision.vectors.values())


def test_categories_are_separated_and_each_has_its_own_behaviour(tmp_path):
    config = CASTConfig(
        conditions=["sun", "sea"],
        behaviors=["sun", "*"],
        rules=["if C1 then B1", "if C2 and not C1 then B2"],
        layers=[1, 2],
        strength=2.0,
    )
    _, _, adapter = fit_on_toy(config)
    report = adapter.config.fit["report"]
    assert [row["name"] for row in report["conditions"]] == ["sun", "sea"]
    assert list(report["held_out_f1"]) == ["sun", "sea"]
    assert adapter.tensors["behaviors"].shape == (4, 32)
    assert adapter.config.condition_layers == [[row["layer"]] for row in report["conditions"]]
    torch.testing.assert_close(adapter.tensors["behaviors"].norm(dim=1), torch.ones(4))
    adapter.save_pretrained(tmp_path)
    again = SteeringAdapter.from_pretrained(tmp_path)
    assert again.config == adapter.config
    # A reader that knows one condition alone would steer otherwise: it is told to refuse.
    assert SteeringConfig.from_pretrained(tmp_path).requires == ["conditions_and_behaviors"]
    # What was chosen can be fitted anew.
    CASTConfig(**again.config.settings())


class Prompts:
    """Eight rows of two categories and three general prompts, whose states say which they are."""

    def query(self, site, part, pool):
        return np.arange(8.0)[:, None]

    def general(self, site, part, pool):
        return np.array([[100.0], [101.0], [102.0]])

    def prompts(self, part):
        return np.arange(8)

    def kinds(self, part):
        return np.array(["sun", "sea"] * 4)


def test_a_condition_is_a_category_against_everything_else():
    site = Site("resid_post", 0)
    wanted, others = sides_of(Prompts(), site, "fit", "sea")
    assert wanted[:, 0].tolist() == [1, 3, 5, 7]
    assert others[:, 0].tolist() == [0, 2, 4, 6, 100, 101, 102]
    wanted, others = sides_of(Prompts(), site, "fit", "*")
    assert wanted[:, 0].tolist() == list(range(8))
    assert others[:, 0].tolist() == [100, 101, 102]


def test_an_unknown_category_is_refused_with_the_known_ones():
    config = CASTConfig(conditions=["moon"], layers=[1], strength=1.0)
    with pytest.raises(DatasetError, match=r"'moon'.*\['sea', 'sun'\]"):
        fit_on_toy(config)


def test_a_file_whose_tests_do_not_fit_its_conditions_is_refused():
    config, tensors = by_hand()
    config.thresholds = config.thresholds[:3]
    with pytest.raises(AdapterFileError, match="tests 4 layers, but has 3 thresholds"):
        CAST(config, tensors)
