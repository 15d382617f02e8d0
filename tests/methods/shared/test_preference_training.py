"""Training on preference rows: scores and slopes against plain hooks, the processor, and the loop against torch."""

import numpy as np
import pytest
import torch
from toy_rows import WIDTH, ToyData, toy_data

from finesteer_hf import Site
from finesteer_hf.errors import DatasetError
from finesteer_hf.methods._shared.preference_training import (
    PairScores,
    PreferenceRows,
    TrainedShift,
    Training,
    cap_norm,
    first_order,
    train,
)
from finesteer_hf.testing import toy_model


PLACES = (Site("resid_post", 0), Site("resid_post", 1))


def hooked_margin(row, vectors, generated=True, factor=1.0):
    """Written out with plain hooks: log p(chosen) - log p(rejected) in nats, with vectors added at blocks."""
    model, ids = toy_model(), toy_data().ids
    model.requires_grad_(False)
    start = len(ids(row["prompt"]))

    def add(vector):
        def hook(module, args, output):
            named = torch.arange(output.shape[1]) >= (start - 1 if generated else 0)
            return output + factor * named[None, :, None] * vector

        return hook

    for site, vector in vectors.items():
        model.model.layers[site.layer].register_forward_hook(add(vector))
    total = {}
    for side in ("chosen", "rejected"):
        text = ids(row["prompt"] + row[side])
        log_probs = model(torch.tensor([text])).logits[0].log_softmax(-1)
        total[side] = sum(log_probs[i - 1, text[i]] for i in range(start, len(text)))
    return total["chosen"] - total["rejected"]


def test_scores_are_sums_over_the_answers_tokens():
    data = toy_data()
    rows = PreferenceRows.draw(data, "fit")
    for i, row in enumerate(data.texts):
        assert float(rows.plain.margins[i]) == pytest.approx(float(hooked_margin(row, {})), abs=1e-4)
        assert rows.plain.chosen_tokens[i] == len(data.ids(row["chosen"]))
        assert rows.plain.rejected_tokens[i] == len(data.ids(row["rejected"]))
        assert rows.prompt_tokens[i] == len(data.ids(row["prompt"]))
    drawn = PreferenceRows.draw(data, "fit", most=3)
    assert len(set(drawn.rows)) == 3
    np.testing.assert_allclose(drawn.plain.chosen, rows.plain[list(drawn.rows)].chosen)


@pytest.mark.parametrize("positions", ["generated", "all"])
def test_vectors_at_several_blocks_and_their_gradients_are_those_of_plain_hooks(positions):
    data = toy_data()
    rows = PreferenceRows.draw(data, "fit", most=2)
    generator = torch.Generator().manual_seed(0)
    vectors = {site: torch.randn(WIDTH, generator=generator).requires_grad_(True) for site in PLACES}
    scores = rows.steered([0, 1], TrainedShift(vectors, positions=positions, factor=-0.5))
    gradients = torch.autograd.grad(scores.margins.sum(), list(vectors.values()))
    expected = [hooked_margin(data.texts[i], vectors, positions == "generated", -0.5) for i in rows.rows]
    by_hand = torch.autograd.grad(sum(expected), list(vectors.values()))
    torch.testing.assert_close(scores.margins, torch.stack(expected), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradients, by_hand, atol=1e-3, rtol=1e-3)


def test_a_shift_may_be_a_map_of_the_unsteered_query():
    data = toy_data()
    rows = PreferenceRows.draw(data, "fit", most=3)
    factors = torch.randn(2, WIDTH, 2, generator=torch.Generator().manual_seed(1)).requires_grad_(True)

    def of_query(query):
        return query @ factors[0] @ factors[1].T / WIDTH

    steering = TrainedShift(
        {site: lambda queries, at=site: of_query(queries[at]) for site in PLACES}, factor=0.1, reads=PLACES
    )
    scores = rows.steered([0, 1, 2], steering)
    expected = []
    for row in (data.texts[i] for i in rows.rows):
        with torch.no_grad():
            prompt = torch.tensor([data.ids(row["prompt"])])
            states = toy_model().model(prompt, output_hidden_states=True).hidden_states
        # The state after block 1 is read unsteered, though block 0 is steered, too.
        vectors = {site: of_query(states[site.layer + 1][0, -1]) for site in PLACES}
        expected.append(hooked_margin(row, vectors, factor=0.1))
    torch.testing.assert_close(scores.margins, torch.stack(expected), atol=1e-3, rtol=1e-4)
    got = torch.autograd.grad(scores.margins.sum(), factors)
    torch.testing.assert_close(got, torch.autograd.grad(sum(expected), factors), atol=1e-3, rtol=1e-3)


def test_first_order_is_the_gradient_at_zero_of_all_blocks_in_one_pass():
    data = toy_data()
    rows = PreferenceRows.draw(data, "fit")
    slopes = first_order(
        lambda few, steering: -rows.steered(few, steering).margins,
        len(rows),
        dict.fromkeys(PLACES, WIDTH),
        "generated",
    )
    zeros = {site: torch.zeros(WIDTH, requires_grad=True) for site in PLACES}
    mean = sum(-hooked_margin(row, zeros) for row in data.texts) / len(data.texts)
    expected = torch.autograd.grad(mean, list(zeros.values()))
    for site, gradient in zip(PLACES, expected, strict=True):
        torch.testing.assert_close(slopes[site], gradient, atol=1e-3, rtol=1e-3)


def test_first_order_reports_losses_that_do_not_depend_on_a_vector():
    with pytest.raises(DatasetError, match="do not depend on vectors at"):
        first_order(
            lambda few, steering: torch.zeros(len(few)) * steering.shifts[PLACES[0]].sum(), 3, {PLACES[0]: 4}, "all"
        )


# -- the loop ---------------------------------------------------------------------------------------------------------


def quadratic(parameter, targets):
    return lambda few, rng: (parameter - targets[few]).square().sum(1)


@pytest.mark.parametrize("batch_size", [4, 12])
def test_the_loop_is_adamw_with_its_schedule(batch_size):
    targets = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    got, expected = (torch.zeros(3, requires_grad=True) for _ in range(2))
    training = Training(
        epochs=3, batch_size=batch_size, learning_rate=0.1, weight_decay=0.2, schedule="linear", clip=0.5
    )
    train([got], quadratic(got, targets), 12, training, seed=7)
    optimiser = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.2)
    rng, steps, done = np.random.default_rng(7), training.steps(12), 0
    for _ in range(3):
        order = rng.permutation(12)
        for start in range(0, 12, batch_size):
            optimiser.param_groups[0]["lr"] = 0.1 * (1 - done / steps)
            optimiser.zero_grad()
            (expected - targets[order[start : start + batch_size]]).square().sum(1).mean().backward()
            expected.grad *= min(1.0, 0.5 / (float(expected.grad.norm()) + 1e-6))
            optimiser.step()
            done += 1
    torch.testing.assert_close(got, expected)


def test_the_best_epoch_is_kept_and_without_a_judge_the_last():
    targets = torch.ones(8, 2)

    def run(judge):
        parameter, seen = torch.zeros(2, requires_grad=True), []

        def told():
            seen.append(float(parameter[0].detach()))
            return None if judge is None else judge(seen[-1])

        training = Training(epochs=4, learning_rate=0.2, schedule="constant")
        history = train([parameter], quadratic(parameter, targets), 8, training, seed=0, judge=told)
        return float(parameter[0].detach()), seen, history

    value, seen, history = run(lambda value: abs(value - 0.4))
    assert history.kept == 2
    assert value == seen[2]
    assert [point["epoch"] for point in history.report()["path"]] == [0, 1, 2, 3, 4]
    value, seen, history = run(None)
    assert history.kept == 4
    assert value == seen[4]
    assert run(lambda value: value)[2].kept == 0


def test_groups_have_their_own_rates_and_norms_can_be_capped_after_each_step():
    fast, slow = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    norms = []

    def cap():
        cap_norm(fast, 0.5)
        norms.append(float(fast.detach().norm()))

    train(
        [{"params": [fast], "lr": 0.3}, {"params": [slow], "lr": 0.001}],
        lambda few, rng: (fast + slow - 5.0).square().sum().expand(len(few)),
        4,
        Training(epochs=10, learning_rate=0.1, batch_size=2),
        seed=0,
        after_step=cap,
    )
    assert max(norms) == pytest.approx(0.5)
    assert 0 < float(slow.detach().norm()) < 0.03


def test_errors_say_what_to_do():
    parameter = torch.zeros(2, requires_grad=True)
    with pytest.raises(DatasetError, match="no rows to train on"):
        train([parameter], quadratic(parameter, torch.ones(1, 2)), 0, Training(epochs=1, learning_rate=0.1), seed=0)
    with pytest.raises(DatasetError, match="smaller learning_rate"):
        train(
            [parameter],
            lambda few, rng: parameter.sum().expand(len(few)) * float("nan"),
            2,
            Training(epochs=1, learning_rate=0.1),
            seed=0,
        )


def test_scores_of_no_rows_are_empty():
    data = ToyData(rows=0)
    rows = PreferenceRows.draw(data, "calibration")
    assert len(rows) == 0
    assert isinstance(rows.plain, PairScores)
    assert rows.plain.margins.shape == (0,)
