"""TASKDRIVEN: the descent against scikit-learn and brute force, the loss against plain hooks, and what is learned."""

import numpy as np
import pytest
import torch
from planted import PlantedData
from scipy.optimize import minimize
from sklearn.linear_model import Lasso

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.errors import AdapterFileError, DatasetError
from finesteer_hf.estimators.sparse_group import proximal_descent, sparse_group_prox
from finesteer_hf.methods.task_driven import TaskDriven, TaskDrivenConfig, penalties
from finesteer_hf.testing import toy_model, toy_preferences
from finesteer_hf.testing.conformance import fit_on_toy


def test_the_proximal_step_is_the_minimiser():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    l1, group = 0.3, 0.35

    def objective(flat):
        x = flat.reshape(3, 4)
        return ((x - values.numpy()) ** 2).sum() / 2 + l1 * abs(x).sum() + group * 2 * np.linalg.norm(x, axis=1).sum()

    got = sparse_group_prox(values, l1, group).numpy()
    brute = minimize(objective, got.ravel() + 0.1, method="Powell", options={"xtol": 1e-10, "ftol": 1e-14}).x
    assert objective(got.ravel()) <= objective(brute) + 1e-9
    np.testing.assert_allclose(got.ravel(), brute, atol=1e-3)
    assert 0 < (got == 0).sum() < 12


def descend(x, y, l1, group, shape):
    x, y = torch.tensor(x), torch.tensor(y)

    def smooth(w):
        residual = x @ w.flatten() - y
        return float(residual.square().mean()) / 2, (x.T @ residual / len(y)).reshape(shape)

    start = torch.zeros(shape, dtype=torch.float64)
    return list(proximal_descent(smooth, start, l1, group, 1.0, 2000, tolerance=1e-10))[-1][0]


def test_the_descent_finds_scikit_learn_s_lasso():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 12)), rng.normal(size=60)
    got = descend(x, y, 0.1, 0.0, (3, 4))
    expected = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12).fit(x, y).coef_
    np.testing.assert_allclose(got.flatten(), expected, atol=1e-6)


def test_groups_leave_zero_together_and_meet_the_optimality_condition():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(80, 12))
    y = x[:, :4] @ np.array([1.0, -1.0, 0.5, 2.0]) + 0.1 * rng.normal(size=80)
    got = descend(x, y, 0.0, 0.2, (3, 4)).numpy()
    assert (got[0] != 0).all()
    assert (got[1:] == 0).all()
    gradient = (x.T @ (x @ got.ravel() - y) / 80).reshape(3, 4)
    np.testing.assert_allclose(gradient[0], -0.2 * 2 * got[0] / np.linalg.norm(got[0]), atol=1e-6)
    assert (np.linalg.norm(gradient[1:], axis=1) <= 0.2 * 2).all()


def test_penalties_are_shares_of_those_that_leave_nothing():
    slope = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    l1, group = penalties(slope, 1.0, 1.0)
    assert not sparse_group_prox(-slope, l1 * 1.001, 0.0).any()
    assert not sparse_group_prox(-slope, 0.0, group * 1.001).any()
    assert (sparse_group_prox(-slope, l1 * 0.999, 0.0) != 0).sum() == 1
    assert (sparse_group_prox(-slope, 0.0, group * 0.999).norm(dim=1) != 0).sum() == 1


def answer_nll(model, tokenizer, row):
    """Written out: mean negative log-likelihood of the chosen answer's tokens."""
    prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
    text = tokenizer(row["prompt"] + row["chosen"], add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([text])).logits[0]
    log_probs = logits.log_softmax(-1)
    return -float(np.mean([log_probs[i - 1, text[i]] for i in range(len(prompt), len(text))])), len(prompt)


def test_learned_shifts_make_unseen_answers_likelier_and_a_plain_hook_says_so_too():
    _, tokenizer, adapter = fit_on_toy(TaskDrivenConfig(layer=1, strength=1.0))
    report = adapter.config.fit["report"]
    path = [point["fit"] for point in report["loss"]["path"]]
    assert report["loss"]["held_out"] < report["loss"]["unsteered_held_out"] - 0.5
    assert path[-1] < path[0]
    shift = adapter.tensors["shifts"].flatten()
    before, after = [], []
    for row in toy_preferences(24, seed=5):
        plain = toy_model()
        unsteered, start = answer_nll(plain, tokenizer, row)

        def add(module, args, start=start):
            named = torch.arange(args[0].shape[1]) >= start - 1
            return (args[0] + named[None, :, None] * shift,)

        plain.model.layers[1].self_attn.o_proj.register_forward_pre_hook(add)
        before.append(unsteered)
        after.append(answer_nll(plain, tokenizer, row)[0])
    assert np.mean(after) < np.mean(before) - 0.5


def test_generating_is_what_a_plain_hook_gives():
    _, _, adapter = fit_on_toy(TaskDrivenConfig(layer=1, strength=2.0, positions="all", iterations=3))
    model = SteeredModelForCausalLM.from_model(toy_model(), steering=adapter)
    plain = toy_model()
    shift = 2.0 * adapter.tensors["shifts"].flatten()
    plain.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, args: (args[0] + shift,))
    ids = torch.randint(6, 54, (3, 7), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, **settings).tolist() == plain.generate(ids, **settings).tolist()


def test_a_larger_penalty_steers_fewer_coordinates():
    counts = []
    for l1 in (0.0, 0.3, 0.8):
        _, _, adapter = fit_on_toy(TaskDrivenConfig(layer=1, strength=1.0, l1=l1, iterations=6))
        counts.append(adapter.config.fit["report"]["coordinates"])
        assert counts[-1] == int((adapter.tensors["shifts"] != 0).sum())
    assert counts[0] > counts[1] > counts[2] > 0


def test_auto_tries_the_layers_of_the_steepest_loss():
    _, _, adapter = fit_on_toy(TaskDrivenConfig(strength=0.5, iterations=3))
    tried = adapter.config.fit["report"]["layers_tried"]
    assert sorted(row["layer"] for row in tried) == [0, 1, 2]
    assert adapter.config.layer in (0, 1, 2)


def test_a_fit_leaves_the_model_as_it_was():
    model, _, _ = fit_on_toy(TaskDrivenConfig(layer=1, strength=1.0, iterations=2))
    reference = toy_model()
    assert type(model) is type(reference)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for (name, got), (_, expected) in zip(model.state_dict().items(), reference.state_dict().items(), strict=True):
        assert torch.equal(got, expected), name


def test_too_few_rows_are_refused():
    with pytest.raises(DatasetError, match="TASKDRIVEN needs at least 2 rows"):
        TaskDriven.fit(PlantedData(rows=2), TaskDrivenConfig(layer=1))


def test_shifts_must_have_one_row_per_head():
    config = TaskDrivenConfig(layer=1, strength=1.0, attention_heads=4, hidden_size=32, num_hidden_layers=3)
    with pytest.raises(AdapterFileError, match="one row per head"):
        TaskDriven(config, {"shifts": torch.ones(3, 8)})
    with pytest.raises(AdapterFileError, match="attention_heads"):
        TaskDriven(TaskDrivenConfig(layer=1, strength=1.0, hidden_size=32), {"shifts": torch.ones(4, 8)})


@pytest.mark.parametrize("field", [{"l1": 1.0}, {"group": -0.1}, {"num_rows": 1}, {"iterations": 0}, {"layer": -1}])
def test_invalid_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TaskDrivenConfig(**field)
