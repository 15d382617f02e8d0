"""TAD: the gate written out, the head against scikit-learn, and single tokens against plain hooks."""

import dataclasses

import numpy as np
import pytest
import torch
from planted import PlantedData
from sklearn.metrics import roc_auc_score

from finesteer_hf import Site, SteeredModelForCausalLM, playground
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.fitting import fit_steering
from finesteer_hf.method_api import AnswerRun
from finesteer_hf.methods.tad import TAD, TADConfig
from finesteer_hf.methods.tad.heads import AnswerTokens, _tokens_of, fit_head
from finesteer_hf.methods.tad.method import _mean_difference
from finesteer_hf.testing import toy_model
from finesteer_hf.testing.conformance import fit_on_toy


D, SITE = 32, Site("resid_post", 1)


def some_adapter(gate="hard", strength=3.0, bias=0.0):
    generator = torch.Generator().manual_seed(0)
    config = TADConfig(layer=1, gate=gate, strength=strength, hidden_size=D, num_hidden_layers=3)
    tensors = {name: torch.randn(D, generator=generator) for name in ("vector", "gate.weight")}
    return TAD(config, {**tensors, "gate.bias": torch.tensor([bias])})


def by_hand(hidden, adapter, gate):
    """Ten lines of numpy: what is added to each token."""
    h, own = hidden.double().numpy(), {name: t.double().numpy() for name, t in adapter.tensors.items()}
    u = h @ own["gate.weight"] + own["gate.bias"]
    g = (u > 0).astype(float) if gate == "hard" else 1 / (1 + np.exp(-u))
    return torch.from_numpy(adapter.strength * g[..., None] * own["vector"]).float(), g


@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_each_token_is_gated_by_its_own_state(gate):
    adapter, plain = some_adapter(gate), toy_model()
    ids = torch.randint(6, 54, (3, 10), generator=torch.Generator().manual_seed(1))
    named = (torch.arange(10) >= 4)[None, :, None]
    gates = []

    def push(module, args, out):
        added, g = by_hand(out, adapter, gate)
        gates.append(g)
        return out + named * added

    plain.model.layers[1].register_forward_hook(push)
    model = SteeredModelForCausalLM.from_model(toy_model())
    with torch.no_grad(), model.steering_with([adapter]):
        got = model(ids, prompt_lengths=torch.full((3,), 5)).logits
    with torch.no_grad():
        torch.testing.assert_close(got, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(np.unique(gates[0])) == 2 if gate == "hard" else len(np.unique(gates[0])) > 2


def test_a_closed_gate_leaves_tokens_bit_identical():
    ids = torch.randint(6, 54, (2, 8), generator=torch.Generator().manual_seed(2))
    model = SteeredModelForCausalLM.from_model(toy_model())
    with torch.no_grad(), model.steering_with([some_adapter(bias=-1e6)]):
        got = model(ids, prompt_lengths=torch.tensor([3, 3])).logits
    with torch.no_grad():
        assert torch.equal(got, toy_model()(ids).logits)


def test_entropies_are_the_model_s():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    run = AnswerRun(torch.arange(6), logits, {SITE: torch.arange(6.0)[:, None].expand(6, D)})
    states, entropy = _tokens_of(run, most=3)
    # The query's state is left out, the others are taken evenly.
    assert states[SITE][:, 0].tolist() == [1.0, 3.0, 5.0]
    p = torch.softmax(logits[[1, 3, 5]].double(), -1).numpy()
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(1), rtol=1e-5)


def tokens(seed, count=300):
    rng = np.random.default_rng(seed)
    direction = np.ones(D) / np.sqrt(D)
    states, entropy = {}, {}
    for side, shift in (("chosen", -1.0), ("rejected", 1.0)):
        rows = 10 + rng.normal(size=(count, D)) + shift * direction
        states[side] = {SITE: rows.astype(np.float32)}
        entropy[side] = 2 + rows[:, 3] - 10 + 0.1 * rng.normal(size=count)
    return AnswerTokens(count, states, entropy)


@pytest.mark.parametrize("name", ["answers", "entropy"])
def test_the_threshold_is_a_quantile_of_trusted_tokens(name):
    held_out = tokens(1)
    head = fit_head(tokens(0), held_out, 1, TADConfig(uncertainty=name, quantile=0.8))
    weight, bias = head.tensors["gate.weight"].numpy(), head.tensors["gate.bias"].numpy()
    excess = held_out.states["chosen"][SITE] @ weight + bias
    assert (excess > 0).mean() == pytest.approx(0.2, abs=0.01)
    assert excess.std() == pytest.approx(1.0, rel=1e-3)


def test_the_head_predicts_its_target():
    fit, held_out = tokens(0), tokens(1)
    answers = fit_head(fit, held_out, 1, TADConfig(uncertainty="answers"))
    # Two Gaussians two apart: no score does better than Phi(2 / sqrt 2) = 0.921.
    assert 0.87 < answers.quality < 0.95
    entropy = fit_head(fit, held_out, 1, TADConfig(uncertainty="entropy"))
    assert entropy.quality > 0.98
    assert int(entropy.tensors["gate.weight"].abs().argmax()) == 3
    told = held_out.both(SITE) @ answers.tensors["gate.weight"].numpy()
    assert answers.quality == pytest.approx(roc_auc_score(held_out.target("answers"), told))


@pytest.mark.parametrize(("name", "least"), [("answers", 0.8), ("entropy", 0.4)])
def test_the_states_of_a_trained_model_predict_its_uncertainty(name, least):
    """Random weights have nothing that a head could predict."""
    model, tokenizer = playground.load()
    rows = playground.preference_rows("truthful", "fit")[:60]
    config = TADConfig(layer=5, strength=1.0, uncertainty=name, quantile=0.75)
    report = fit_steering(model, tokenizer, rows, config, general_dataset=None, progress=False).config.fit["report"]
    assert report["layers"][0]["quality"] > least
    assert report["open"]["chosen"] == pytest.approx(0.25, abs=0.02)
    assert report["open"]["general"] is None


def test_auto_tries_the_layers_at_which_the_head_does_best():
    _, _, adapter = fit_on_toy(TADConfig(strength=1.0))
    report = adapter.config.fit["report"]
    assert {row["layer"] for row in report["layers_tried"]} == {0, 1, 2}
    assert adapter.config.layer == report["layer"]


def test_the_vector_is_the_mean_difference():
    data = PlantedData()
    shifts = data.shifts(SITE, "fit", "calibration")
    np.testing.assert_allclose(_mean_difference(data, TADConfig(), 1).numpy(), shifts.mean(0), atol=1e-4)


def test_too_few_rows_are_refused():
    data = PlantedData(rows=4)
    data.answers = lambda *args, **kwargs: iter(())
    with pytest.raises(DatasetError, match="at least 4 rows"):
        TAD.fit(data, TADConfig(layer=1))


def test_soft_gates_must_be_understood():
    _, _, adapter = fit_on_toy(TADConfig(layer=1, strength=1.0, gate="soft"))
    assert adapter.config.requires == ["gate:soft"]


def test_missing_tensors_are_named():
    whole = some_adapter()
    with pytest.raises(AdapterFileError, match="vector"):
        TAD(whole.config, {name: t for name, t in whole.tensors.items() if name != "vector"})
    with pytest.raises(AdapterFileError, match="not fitted"):
        TAD(dataclasses.replace(whole.config, layer="auto"), whole.tensors)


@pytest.mark.parametrize("field", [{"uncertainty": "doubt"}, {"gate": "open"}, {"quantile": 1.0}, {"pool": "all"}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TADConfig(**field)
