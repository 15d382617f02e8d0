"""InferAligner against the paper's formulas in numpy and in plain hooks, and its sibling's vectors."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from planted import PlantedData

from finesteer_hf import ConstantVector, QueryStates, SteeredModelForCausalLM
from finesteer_hf.errors import AdapterMismatchError, DatasetError
from finesteer_hf.methods.caa import CAAConfig
from finesteer_hf.methods.inferaligner import InferAligner, InferAlignerConfig, safety_gate
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


@functools.cache
def fitted(**settings):
    return fit_on_toy(InferAlignerConfig(layers=[1, 2], strength=2.0, **settings))[2]


def test_vectors_are_differences_of_means_and_the_boundary_lies_halfway():
    rng = np.random.default_rng(0)
    harmful, harmless = rng.normal(size=(9, 6)) + 1, rng.normal(size=(7, 6))
    srv, bias = safety_gate(harmful, harmless)
    np.testing.assert_allclose(srv, harmful.mean(0) - harmless.mean(0))
    states = rng.normal(size=(50, 6))
    nearer = np.linalg.norm(states - harmful.mean(0), axis=1) < np.linalg.norm(states - harmless.mean(0), axis=1)
    np.testing.assert_array_equal(states @ srv + bias > 0, nearer)


@pytest.mark.parametrize("vector", ["answers", "queries"])
def test_the_fit_is_the_paper_s(vector):
    data, config = PlantedData(), InferAlignerConfig(layers=[1, 2], vector=vector, strength=3.0)
    result = InferAligner.fit(data, config)
    both = ("fit", "calibration")
    for row, site in enumerate(InferAligner(result.config, result.tensors).writes):
        harmful, harmless = (
            np.concatenate([side(site, part) for part in both]) for side in (data.query, data.general)
        )
        srv = harmful.mean(0, dtype=np.float64) - harmless.mean(0, dtype=np.float64)
        np.testing.assert_allclose(result.tensors["srv"][row], srv, atol=1e-5)
        ssv = srv if vector == "queries" else data.shifts(site, *both).mean(0)
        np.testing.assert_allclose(result.tensors["ssv"][row], ssv, atol=1e-5)
    assert result.config.strength == 3.0
    for gate in result.report["gates"]:
        assert gate["opened"] > 0.85 and gate["false_alarms"] < 0.15


def gates_of(found, model, ids):
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states
    gates = []
    for layer, srv, bias in zip(found.config.gate_layers, found.tensors["srv"], found.tensors["bias"], strict=True):
        state = states[layer + 1][0, -1] if layer + 1 < len(states) - 1 else None
        if state is None:
            # The last entry is after the final norm, so the block's own output is hooked.
            seen = {}
            handle = model.model.layers[layer].register_forward_hook(lambda m, a, out, s=seen: s.update(out=out))
            with torch.no_grad():
                model(ids[None])
            handle.remove()
            state = seen["out"][0, -1]
        gates.append(float(state @ srv + bias > 0))
    return gates


@pytest.mark.parametrize("guard", [None, 1])
def test_all_tokens_of_opened_layers_are_shifted_as_by_plain_hooks(guard):
    found = fitted(guard_layer=guard)
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=found)
    patterns = set()
    for ids in torch.randint(6, 54, (24, 6), generator=torch.Generator().manual_seed(1)):
        plain = toy_model()
        gates = gates_of(found, plain, ids)
        gates = gates * 2 if guard is not None else gates
        for layer, gate, vector in zip((1, 2), gates, found.tensors["ssv"], strict=True):
            plain.model.layers[layer].register_forward_hook(lambda m, a, out, v=vector, g=gate: out + 2 * g * v)
        with torch.no_grad():
            torch.testing.assert_close(model(ids[None]).logits, plain(ids[None]).logits, atol=1e-4, rtol=1e-4)
        patterns.add(tuple(gates))
    assert len(patterns) >= (2 if guard is not None else 3), "layers must have decided otherwise in these prompts"


def test_closed_rows_and_closed_layers_are_bit_identical():
    found = fitted()
    processor = found.build()
    states = {site: torch.zeros(3, 32) for site in processor.reads}
    own = [srv * 100 for srv in found.tensors["srv"]]
    for row, opened in enumerate([(1, 1), (1, 0), (0, 0)]):
        for site, direction, is_open in zip(processor.reads, own, opened, strict=True):
            states[site][row] = direction if is_open else -direction
    decision = processor.decide(QueryStates(states, 3, torch.device("cpu")))
    assert decision.gate.tolist() == [1.0, 1.0, 0.0]
    assert decision.record["open_layers"].tolist() == [1.0, 0.5, 0.0]
    closed = decision.vectors[processor.writes[1]][1]
    assert torch.equal(closed, torch.zeros(32)) and torch.signbit(closed).all()


def test_wanted_answers_become_likelier_and_general_prompts_stay():
    data = PlantedData()
    result = InferAligner.fit(data, InferAlignerConfig(layers=[2]))
    (vector,) = result.tensors["ssv"]
    base, gated = data.dose_response(
        lambda strength: InferAligner(dataclasses.replace(result.config, strength=strength), result.tensors),
        (0.0, result.config.strength),
    )
    (ungated,) = data.dose_response(
        lambda strength: ConstantVector("resid_post[2]", vector, strength=strength), [result.config.strength]
    )
    assert gated.bottleneck > base.bottleneck
    assert gated.kl < 0.01 < ungated.kl / 10


def test_the_sibling_s_vectors_are_added(tmp_path):
    sibling = fit_on_toy(InferAlignerConfig(strength=1.0, layers=[0, 1, 2]), seed=1)[2]
    sibling.save_pretrained(tmp_path / "aligned")
    config = InferAlignerConfig(vector="sibling", sibling=str(tmp_path / "aligned"), layers=[1, 2], strength=2.0)
    found = fit_on_toy(config)[2]
    assert torch.equal(found.tensors["ssv"], sibling.tensors["srv"][1:])
    torch.testing.assert_close(found.tensors["srv"], fitted().tensors["srv"])


def test_a_sibling_that_does_not_fit_is_named_before_the_model_runs(tmp_path):
    fit_on_toy(InferAlignerConfig(strength=1.0, layers=[1]))[2].save_pretrained(tmp_path / "one_layer")
    fit_on_toy(CAAConfig(strength=1.0, layer=1))[2].save_pretrained(tmp_path / "caa")
    config = functools.partial(InferAlignerConfig, vector="sibling", layers=[1, 2], strength=1.0)
    with pytest.raises(AdapterMismatchError, match=r"at \[1\]; this model .* steered at \[1, 2\]"):
        fit_on_toy(config(sibling=str(tmp_path / "one_layer")))
    with pytest.raises(AdapterMismatchError, match="is a CAA adapter"):
        fit_on_toy(config(sibling=str(tmp_path / "caa")))


def test_without_general_prompts_there_is_no_gate():
    with pytest.raises(DatasetError, match="general_dataset"):
        InferAligner.fit(PlantedData(general=0), InferAlignerConfig(layers=[1], strength=1.0))


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("sibling", {"vector": "sibling"}),
        ("sibling", {"sibling": "org/aligned"}),
        ("guard_layer", {"guard_layer": "auto"}),
        ("vector", {"vector": "mean"}),
    ],
)
def test_invalid_settings_are_refused(field, settings):
    with pytest.raises(ValueError, match=field):
        InferAlignerConfig(**settings)
