"""BIPO: the loss against numpy, both directions, the published settings, and what is learned."""

import numpy as np
import pytest
import torch
from planted import PlantedData
from toy_rows import margins, scores

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.methods._shared.preference_training import PairScores
from finesteer_hf.methods.bipo import BIPO, BIPOConfig, bipo_loss
from finesteer_hf.testing import toy_model, toy_preferences
from finesteer_hf.testing.conformance import fit_on_toy


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_loss_is_the_paper_s(direction):
    steered, plain = scores(0), scores(1)
    ratio = lambda side: getattr(steered, side).numpy() - getattr(plain, side).numpy()  # noqa: E731
    inside = direction * 0.1 * ratio("chosen") - direction * 0.1 * ratio("rejected")
    np.testing.assert_allclose(
        bipo_loss(steered, plain, direction, 0.1), -np.log(1 / (1 + np.exp(-inside))), rtol=1e-5
    )


def test_subtracting_is_adding_with_the_answers_exchanged():
    steered, plain = scores(2), scores(3)
    exchanged = [PairScores(s.rejected, s.chosen, s.rejected_tokens, s.chosen_tokens) for s in (steered, plain)]
    torch.testing.assert_close(bipo_loss(steered, plain, -1.0, 0.3), bipo_loss(*exchanged, 1.0, 0.3))


def test_the_vector_works_on_unseen_rows_in_both_directions():
    _, _, adapter = fit_on_toy(BIPOConfig(layer=1, strength=1.0))
    training = adapter.config.fit["report"]["training"]
    assert training["path"][0]["held_out"] == pytest.approx(np.log(2), abs=1e-5)
    assert training["path"][training["kept_epoch"]]["held_out"] < 0.6
    rows, vector = toy_preferences(24, seed=5), adapter.tensors["vector"]
    unsteered, added, subtracted = (margins(vector, 1, factor, rows) for factor in (0.0, 1.0, -1.0))
    assert added > unsteered + 2
    assert subtracted < unsteered - 2


def test_generating_is_what_a_plain_hook_gives():
    _, _, adapter = fit_on_toy(BIPOConfig(layer=1, strength=2.0, epochs=1))
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    plain = toy_model()
    vector = 2.0 * adapter.tensors["vector"]
    plain.model.layers[1].register_forward_hook(lambda module, args, output: output + vector)
    ids = torch.randint(6, 54, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, **settings).tolist() == plain.generate(ids, **settings).tolist()


def test_auto_trains_at_the_layers_of_the_steepest_loss():
    _, _, adapter = fit_on_toy(BIPOConfig(strength=0.5, epochs=1))
    tried = [row["layer"] for row in adapter.config.fit["report"]["layers_tried"]]
    assert len(tried) == 2
    assert adapter.config.layer in tried


def test_the_paper_s_settings():
    config = BIPOConfig.paper(layer=15)
    assert (config.learning_rate, config.weight_decay, config.beta) == (5e-4, 0.05, 0.1)
    assert (config.epochs, config.batch_size, config.schedule, config.warmup_steps) == (20, 4, "cosine", 100)
    assert (config.positions, config.num_rows, config.layer) == ("all", None, 15)


def test_norms_stay_within_the_cap():
    _, _, adapter = fit_on_toy(BIPOConfig(layer=1, strength=1.0, norm_cap=0.1))
    norms = adapter.config.fit["report"]["vector"]
    assert norms["vector_norm"] == pytest.approx(0.1 * norms["state_norm"], rel=1e-3)


def test_a_fit_leaves_the_model_as_it_was():
    model, _, _ = fit_on_toy(BIPOConfig(layer=1, strength=1.0, epochs=1))
    assert type(model) is type(toy_model())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_too_few_rows_are_refused():
    with pytest.raises(DatasetError, match="BIPO needs at least 2 rows"):
        BIPO.fit(PlantedData(rows=2), BIPOConfig(layer=1))


def test_training_that_does_not_help_held_out_rows_is_refused(monkeypatch):
    def flat(cls, rows, which, site, vector, config, rng):
        return (0 * vector.sum()).expand(len(which))

    monkeypatch.setattr(BIPO, "losses", classmethod(flat))
    with pytest.raises(DatasetError, match="BIPO's loss on held-out rows"):
        fit_on_toy(BIPOConfig(layer=1, strength=1.0, epochs=1))


def test_an_adapter_needs_its_layer_and_its_vector():
    with pytest.raises(AdapterFileError, match="lacks the tensor 'vector'"):
        BIPO(BIPOConfig(layer=1, strength=1.0, hidden_size=32), {})
    with pytest.raises(AdapterFileError, match="no layer"):
        BIPO(BIPOConfig(strength=1.0, hidden_size=32), {"vector": torch.ones(32)})


@pytest.mark.parametrize(
    "field",
    [
        {"beta": 0.0},
        {"layer": -1},
        {"epochs": 0},
        {"batch_size": 0},
        {"num_rows": 1},
        {"learning_rate": -1.0},
        {"learning_rate": "fast"},
        {"weight_decay": -0.1},
        {"schedule": "steps"},
        {"warmup_steps": -1},
        {"clip": 0.0},
        {"norm_cap": 0.0},
        {"keep": "first"},
    ],
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        BIPOConfig(**field)
