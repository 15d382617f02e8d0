"""ITI against a plain pre-hook on the output projections, and the choice of heads, FASB's too, against scikit-learn."""

import functools

import numpy as np
import pytest
import torch
from planted import PlantedData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from finesteer_hf import Site, SteeredModelForCausalLM
from finesteer_hf.method_api import ModelInfo
from finesteer_hf.methods._shared import heads
from finesteer_hf.methods.fasb import FASB, FASBConfig
from finesteer_hf.methods.iti import ITI, ITIConfig
from finesteer_hf.testing import FEATURES, check_feature
from finesteer_hf.testing.bench import Bench
from finesteer_hf.testing.conformance import check_files, fit_on_toy
from finesteer_hf.testing.toy import toy_model


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


@pytest.mark.parametrize(("method", "config_cls"), [(ITI, ITIConfig), (FASB, FASBConfig)])
def test_the_choice_is_the_published_one(method, config_cls):
    """By validation accuracy of a linear probe a head, directions and spreads from all rows that are not tested on."""
    data, states, accuracy = PlantedData(rows=60, noise=3.0), {}, {}
    found = method.fit(data, config_cls(num_heads=5, strength=1.0))
    for layer in range(data.info.num_layers):
        site = Site("head_out", layer)
        parts = [
            np.concatenate([side(site, part, "answer_last").reshape(-1, 4, 6) for part in ("fit", "calibration")])
            for side in (data.chosen, data.rejected)
        ]
        train = len(data.prompts("fit"))
        for head in range(4):
            true, false = (part[:, head] for part in parts)
            probe = LogisticRegression(max_iter=1000).fit(
                np.concatenate([true[:train], false[:train]]), np.repeat([1, 0], train)
            )
            held_out, labels = np.concatenate([true[train:], false[train:]]), np.repeat([1, 0], len(true) - train)
            accuracy[layer, head], states[layer, head] = accuracy_score(labels, probe.predict(held_out)), (true, false)
    chosen = [tuple(pair) for pair in found.config.heads]
    rest = set(accuracy) - set(chosen)
    assert len(chosen) == 5 and len(set(accuracy.values())) > 3
    assert min(accuracy[head] for head in chosen) >= max(accuracy[head] for head in rest)
    assert found.report["accuracy"] == pytest.approx([accuracy[head] for head in chosen])
    for row, head in enumerate(chosen):
        true, false = states[head]
        direction = true.mean(0) - false.mean(0)
        direction /= np.linalg.norm(direction)
        sigma = (np.concatenate([true, false]) @ direction).std()
        np.testing.assert_allclose(found.tensors["directions"][row], direction, atol=1e-5)
        assert float(found.tensors["sigma"][row]) == pytest.approx(sigma, rel=1e-4)


@pytest.mark.parametrize(
    ("config", "layers", "size", "counts"),
    [
        (ITIConfig(), 32, 32, [48, 24, 96, 192]),
        (FASBConfig(), 32, 32, [24, 12, 48, 96]),
        (ITIConfig(), 30, 9, [13, 6, 25, 51, 48]),
        (ITIConfig(), 3, 4, [1, 2, 12]),
        (FASBConfig(), 6, 4, [1, 2, 24]),
        (ITIConfig(num_heads=48), 3, 4, [12]),
        (ITIConfig.paper(), 32, 32, [48]),
        (FASBConfig.paper(), 32, 32, [24]),
    ],
)
def test_counts_are_the_published_share_of_the_models_heads_and_the_published_number(config, layers, size, counts):
    info = ModelInfo(num_layers=layers, hidden_size=64, num_heads=size, head_size=4, vocab_size=50)
    assert heads.head_counts(config, info, layers * size) == counts


def test_the_number_of_heads_is_chosen_by_steering_and_probes_are_fitted_once(monkeypatch):
    probed, fit = [], heads.fit_head_probes
    monkeypatch.setattr(heads, "fit_head_probes", lambda *args: probed.append(1) or fit(*args))
    found = fit_on_toy(ITIConfig())[2]
    assert len(probed) == 3
    report, all_heads = found.config.fit["report"], fitted(num_heads=12).config.heads
    assert [row["count"] for row in report["counts_tried"]] == [1, 2, 12]
    best = max(report["counts_tried"], key=lambda row: (not row["broken"], row["preference"]))
    assert found.config.num_heads == best["count"] == len(found.config.heads)
    assert found.config.heads == all_heads[: best["count"]]


def test_the_dose_counts_the_chosen_heads_alone():
    data = PlantedData()
    outputs = data.chosen(Site("head_out", 2), "fit").reshape(-1, 4, 6)
    ranked = heads.rank_heads(data, ITIConfig(layers=[2]))
    for count in (1, 3):
        best = ranked.best(count)
        taken = outputs[:, [head for _, head in best.heads]].reshape(len(outputs), -1)
        assert best.state_norm == pytest.approx(np.median(np.linalg.norm(taken, axis=1)), rel=1e-5)


def test_more_heads_than_the_model_has_are_all_of_them():
    assert len(fitted(num_heads=48).config.heads) == 12
    found = fit_on_toy(ITIConfig(num_heads=48, strength=1.0, layers=[1]))[2]
    assert {layer for layer, _ in found.config.heads} == {1}


@pytest.mark.parametrize("count", [0, "many", 1.5])
def test_a_count_is_a_number_or_auto(count):
    with pytest.raises(ValueError, match="num_heads"):
        ITIConfig(num_heads=count)


def test_a_missing_block_is_named():
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
