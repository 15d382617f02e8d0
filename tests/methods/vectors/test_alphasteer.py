"""ALPHASTEER against the paper's matrices, written out."""

import numpy as np
import pytest
import torch

from finesteer_hf import QueryStates, SteeredModelForCausalLM
from finesteer_hf.errors import DatasetError
from finesteer_hf.fitting import fit_steering
from finesteer_hf.methods.alphasteer import AlphaSteerConfig, null_space_probe
from finesteer_hf.testing import toy_model, toy_preferences, toy_tokenizer
from finesteer_hf.testing.conformance import fit_on_toy


def test_two_vectors_are_the_paper_s_matrix():
    rng = np.random.default_rng(0)
    d, ridge, share = 12, 10.0, 0.4
    benign = rng.normal(size=(60, d)) * np.geomspace(5, 0.1, d)
    malicious = rng.normal(size=(20, d)) + 1
    r = rng.normal(size=d)

    _, vectors = np.linalg.eigh(benign.T @ benign)
    null = vectors[:, : round(share * d)]
    p = null @ null.T
    h, targets = malicious.T, np.tile(r[:, None], (1, len(malicious)))
    d_tilde = targets @ h.T @ p @ np.linalg.pinv(p @ h @ h.T @ p + ridge * p)
    expected = d_tilde @ p

    w = null_space_probe(benign, malicious, share, ridge)
    np.testing.assert_allclose(np.outer(r, w), expected, atol=1e-9)


def test_few_benign_queries_leave_their_whole_null_space():
    rng = np.random.default_rng(1)
    benign, malicious = rng.normal(size=(5, 40)), rng.normal(size=(30, 40))
    w = null_space_probe(benign, malicious, 0.1, 1e-8)
    np.testing.assert_allclose(benign @ w, 0, atol=1e-9)
    np.testing.assert_allclose(malicious @ w, 1, atol=1e-5)


def test_benign_queries_get_almost_nothing():
    rng = np.random.default_rng(2)
    subspace = rng.normal(size=(10, 64))
    benign = rng.normal(size=(500, 10)) @ subspace + 0.01 * rng.normal(size=(500, 64))
    malicious = rng.normal(size=(100, 10)) @ subspace + rng.normal(size=64)
    w = null_space_probe(benign[:400], malicious[:80], 0.5, 10.0)
    assert np.abs(benign[400:] @ w).max() < 0.01
    assert (malicious[80:] @ w).mean() > 0.9


def test_the_model_is_steered_as_by_hooks_on_the_unsteered_states():
    _, _, adapter = fit_on_toy(AlphaSteerConfig(layers=[1, 2], strength=3.0))
    ids = torch.arange(6, 14)[None]
    plain = toy_model()
    with torch.no_grad():
        states = plain(ids, output_hidden_states=True).hidden_states

    def hook(index, layer):
        h, r, w = states[layer][:, -1], adapter.tensors["refusal"][index], adapter.tensors["probe"][index]
        return lambda module, args: (args[0] + 3.0 * (h @ w)[:, None, None] * r, *args[1:])

    for index, layer in enumerate((1, 2)):
        plain.model.layers[layer].register_forward_pre_hook(hook(index, layer))
    steered = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    with torch.no_grad():
        torch.testing.assert_close(steered(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


def test_only_the_prompt_is_steered():
    _, _, adapter = fit_on_toy(AlphaSteerConfig(layers=[1], strength=3.0))
    processor = adapter.build()
    assert processor.positions == "prompt"
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    decision = processor.decide(QueryStates({processor.reads[0]: rows}, 3, rows.device))
    torch.testing.assert_close(decision.record["score"], rows @ adapter.tensors["probe"][0])


def test_it_says_that_it_needs_general_prompts():
    with pytest.raises(DatasetError, match="general_dataset"):
        fit_steering(
            toy_model(),
            toy_tokenizer(),
            toy_preferences(),
            AlphaSteerConfig(layers=[1], strength=1.0),
            general_dataset=None,
            progress=False,
        )


@pytest.mark.parametrize("field", [{"layers": [0]}, {"null_space": 1.0}, {"ridge": 0}, {"pool": "all"}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        AlphaSteerConfig(**field)
