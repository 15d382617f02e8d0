"""REPS: the loss against numpy, nulling, the published code's lengths, and what is learned."""

import numpy as np
import pytest
import torch
from toy_rows import WIDTH, ToyData, margins, scores

from finesteer_hf import Site
from finesteer_hf.methods._shared import preference_vector
from finesteer_hf.methods._shared.preference_training import PairScores, PreferenceRows
from finesteer_hf.methods.reps import PAPER_FACTORS, REPS, NulledDirection, REPSConfig, positive_half, reps_loss
from finesteer_hf.processors import TokenView
from finesteer_hf.testing import toy_preferences
from finesteer_hf.testing.conformance import fit_on_toy


SITE = Site("resid_post", 1)


def by_hand(positive, negative, plain, chosen_lengths, rejected_lengths):
    """The paper's objective, a row at a time."""
    losses = []
    for i in range(len(plain.chosen)):
        c, r = (side[i].item() for side in (plain.chosen, plain.rejected))
        long_c, long_r = chosen_lengths[i].item(), rejected_lengths[i].item()
        plus = max(r - c, 1) / long_c * positive.chosen[i].item() - positive.rejected[i].item() / long_r
        minus = max(c - r, 1) / long_r * negative.rejected[i].item() - negative.chosen[i].item() / long_c
        losses.append(np.log1p(np.exp(-plus)) + np.log1p(np.exp(-minus)))
    return losses


def test_the_loss_is_the_paper_s():
    positive, negative, plain = scores(0, 8), scores(1, 8), scores(2, 8)
    lengths = plain.chosen_tokens, plain.rejected_tokens
    # Both sides of the weights are met: rows whose chosen answer is likelier, and less likely, by more than a nat.
    assert plain.margins.max() > 1
    assert plain.margins.min() < -1
    np.testing.assert_allclose(
        reps_loss(positive, negative, plain, *lengths), by_hand(positive, negative, plain, *lengths), rtol=1e-5
    )


def test_the_negative_half_is_the_positive_one_with_the_answers_exchanged():
    def exchanged(s):
        return PairScores(s.rejected, s.chosen, s.rejected_tokens, s.chosen_tokens)

    positive, negative, plain = scores(3), scores(4), scores(5)
    lengths = plain.chosen_tokens, plain.rejected_tokens
    expected = positive_half(positive, plain, *lengths) + positive_half(
        exchanged(negative), exchanged(plain), *lengths[::-1]
    )
    torch.testing.assert_close(reps_loss(positive, negative, plain, *lengths), expected)


def test_weights_have_no_gradient():
    plain = PairScores(*(torch.tensor([-9.0, -2.0], requires_grad=True) for _ in range(2)), *[torch.ones(2)] * 2)
    positive = PairScores(*(torch.tensor([-3.0, -4.0], requires_grad=True) for _ in range(2)), *[torch.ones(2)] * 2)
    positive_half(positive, plain, 1.0, 1.0).sum().backward()
    assert plain.chosen.grad is None
    assert positive.chosen.grad is not None


def test_nulling_takes_the_direction_out_of_states_that_show_it():
    generator = torch.Generator().manual_seed(0)
    hidden, vector = torch.randn(2, 5, 8, generator=generator), torch.randn(8, generator=generator)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    view = TokenView(mask, None, True, torch.ones(2, 1, 1), {})
    got = NulledDirection(SITE, 3 * vector, "all").transform(SITE, hidden, view).numpy()
    h, v = hidden.numpy(), vector.numpy()
    expected = h - np.maximum(h @ v, 0)[..., None] / (v @ v) * v
    expected[0, :2] = h[0, :2]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    shown = (got @ v)[mask.numpy()]
    assert shown.max() < 1e-4
    assert shown.min() < -0.1


def losses(rows, vector, config, rng=None):
    return REPS.losses(rows, range(len(rows)), SITE, vector, config, rng)


def hooked_losses(data, vector, negative, lengths):
    """Written out with plain hooks, at factor 1."""
    unit = vector / vector.norm()
    taken = {"null": lambda h: h - torch.relu(h @ unit)[..., None] * unit, "subtract": lambda h: h - vector}

    def scored(change):
        handle = data.model.model.layers[1].register_forward_hook(lambda module, args, output: change(output))
        try:
            return PreferenceRows.draw(data, "fit").plain
        finally:
            handle.remove()

    plain = PreferenceRows.draw(data, "fit").plain
    return by_hand(scored(lambda h: h + vector), scored(taken[negative]), plain, *lengths)


def answer_lengths(data, prompt=False):
    """Tokens of the answers, or of the prompts with them, `[rows]` for each side."""
    texts = [[(row["prompt"] if prompt else "") + row[side] for row in data.texts] for side in ("chosen", "rejected")]
    return [torch.tensor([float(len(data.ids(text))) for text in side]) for side in texts]


@pytest.mark.parametrize("negative", ["null", "subtract"])
def test_a_row_s_loss_is_that_of_plain_hooks(negative):
    data = ToyData(rows=2)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    config = REPSConfig(layer=1, factors=[0.5, 1.5], negative=negative)
    got = losses(PreferenceRows.draw(data, "fit"), vector, config)
    np.testing.assert_allclose(got, hooked_losses(data, vector, negative, answer_lengths(data)), rtol=1e-3)


def test_the_published_code_divides_by_prompt_and_answer():
    data = ToyData(rows=2)
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    config = REPSConfig(layer=1, factors=[1.0], compat="official")
    got = losses(PreferenceRows.draw(data, "fit"), vector, config)
    expected = hooked_losses(data, vector, "null", answer_lengths(data, prompt=True))
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def test_a_step_draws_one_of_the_factors():
    data = ToyData(rows=1)
    rows = PreferenceRows.draw(data, "fit")
    vector = torch.ones(WIDTH) / 10
    known = {float(losses(rows, vector, REPSConfig(factors=[factor]))) for factor in (1.0, 3.0)}
    rng = np.random.default_rng(0)
    drawn = {float(losses(rows, vector, REPSConfig(factors=[1.0, 3.0]), rng)) for _ in range(12)}
    assert drawn == known


@pytest.mark.parametrize("negative", ["null", "subtract"])
def test_the_vector_makes_unseen_rows_prefer_the_chosen_answer(negative):
    _, _, adapter = fit_on_toy(REPSConfig(layer=1, strength=1.0, negative=negative))
    training = adapter.config.fit["report"]["training"]
    assert training["path"][training["kept_epoch"]]["held_out"] < training["path"][0]["held_out"]
    rows, vector = toy_preferences(24, seed=5), adapter.tensors["vector"]
    unsteered, added, subtracted = (margins(vector, 1, factor, rows) for factor in (0.0, 1.0, -1.0))
    assert added > unsteered + 2
    assert subtracted < unsteered


def test_auto_trains_at_the_layers_where_the_gradient_as_a_vector_does_most():
    _, _, adapter = fit_on_toy(REPSConfig(strength=0.5, epochs=1))
    report = adapter.config.fit["report"]
    looked_at = sorted(report["layers_screened"], key=lambda row: row[row["criterion"]], reverse=True)
    assert len(looked_at) > 2
    assert not any(row["broken"] for row in looked_at)
    tried = [row["layer"] for row in report["layers_tried"]]
    assert sorted(tried) == sorted(row["layer"] for row in looked_at[:2])
    assert adapter.config.layer in tried


def test_the_first_look_tries_the_gradient_of_the_loss_as_a_vector(monkeypatch):
    looks = []

    def noted(data, rule, trials, what, doses=None):
        looks.append((rule, {layer: trial.build(1.0).tensors["vector"] for layer, trial in trials.items()}))
        return trials, []

    monkeypatch.setattr(preference_vector, "shortlist", noted)
    fit_on_toy(REPSConfig(strength=0.5, epochs=1))
    ((rule, vectors),) = looks
    # A given strength is the trained vector's.
    assert rule == "auto"
    assert len(vectors) > 2
    steered, plain = (margins(vectors[2], 2, factor, toy_preferences(24, seed=5)) for factor in (1.0, 0.0))
    assert steered > plain


def test_the_stored_vector_is_the_trained_one_at_the_mean_factor():
    one, ten = (
        fit_on_toy(REPSConfig(layer=1, strength=1.0, epochs=2, factors=factors))[2].tensors["vector"]
        for factors in ([1.0], [10.0])
    )
    torch.testing.assert_close(one, ten, atol=2e-2, rtol=2e-2)


def test_the_paper_s_settings():
    config = REPSConfig.paper(layer=10)
    assert (config.learning_rate, config.weight_decay, config.clip) == (0.04, 0.0, 1.0)
    assert (config.epochs, config.batch_size, config.schedule, config.warmup_steps) == (18, 6, "linear", 0)
    assert config.factors == list(PAPER_FACTORS) == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert (config.positions, config.num_rows, config.negative, config.compat) == ("all", None, "null", None)


@pytest.mark.parametrize(
    "field", [{"factors": []}, {"factors": [0.0]}, {"negative": "flip"}, {"compat": "code"}, {"layer": -1}]
)
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        REPSConfig(**field)
